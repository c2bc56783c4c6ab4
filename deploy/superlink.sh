#!/usr/bin/env bash
# Starts the SuperLink: TLS and SuperNode authentication, or nothing but loopback.
set -euo pipefail
# shellcheck source=deploy/common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

usage() {
    cat <<'END'
usage: superlink.sh [--insecure-loopback]
Settings (environment, see env/superlink.env):
  PRUNUS_STATE         folder of the SuperLink: its database, apps and logs (required)
  PRUNUS_HOST          address it listens on (127.0.0.1: behind the gate of nginx.conf)
  PRUNUS_PORT          port (8000)
  PRUNUS_CERTIFICATES  folder that certificates.sh made: ca.crt, server.pem, server.key (required)
--insecure-loopback    no TLS and no authentication, for trials on one machine: any other address is refused
END
}

is_insecure=no
case "${1:-}" in
    "") ;;
    --insecure-loopback) is_insecure=yes ;;
    -h | --help) usage; exit ;;
    *) usage >&2; fail "unknown argument '$1'" ;;
esac
host="${PRUNUS_HOST:-127.0.0.1}"
port="${PRUNUS_PORT:-8000}"
[[ -n "${PRUNUS_STATE:-}" ]] || fail "PRUNUS_STATE is not set: the folder that keeps the SuperLink's database"
# the database holds every device's updates until they are merged: nobody else's business
umask 077
mkdir -p "$PRUNUS_STATE"
for file in "$PRUNUS_STATE"/superlink.db*; do
    if [[ -f "$file" ]]; then chmod 600 "$file"; fi
done
arguments=(--host "$host" --port "$port" --database "$PRUNUS_STATE/superlink.db" --disable-runtime-dependency-installation)
if [[ $is_insecure == yes ]]; then
    is_loopback "$host" || fail "--insecure-loopback: $host is not this machine; use certificates.sh and leave the flag out"
    arguments+=(--insecure)
else
    # as it is given where it cannot be looked at: the message is to name it
    certificates="$(realpath -- "${PRUNUS_CERTIFICATES:-}" 2>/dev/null || printf '%s' "${PRUNUS_CERTIFICATES:-}")"
    for name in ca.crt server.pem server.key; do
        need_file PRUNUS_CERTIFICATES "${certificates:+$certificates/$name}" "the folder that certificates.sh makes"
    done
    need_private "$certificates/server.key"
    arguments+=(--ssl-ca-certfile "$certificates/ca.crt" --ssl-certfile "$certificates/server.pem")
    arguments+=(--ssl-keyfile "$certificates/server.key" --enable-supernode-auth)
fi
quiet_flower "$(realpath -- "$PRUNUS_STATE")"
exec flower-superlink "${arguments[@]}"
