#!/usr/bin/env bash
# Starts the gate: nginx with nginx.conf, in the foreground. Devices connect to it, never to the SuperLink itself.
set -euo pipefail
home="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
# shellcheck source=deploy/common.sh
source "$home/common.sh"

usage() {
    cat <<'END'
usage: gate.sh
Settings (environment, see env/superlink.env):
  PRUNUS_STATE         folder of the gate: its configuration and messages on their way (required)
  PRUNUS_CERTIFICATES  folder with ca.crt, server.pem, server.key, as of superlink.sh (required)
  PRUNUS_GATE          ADDRESS:PORT to listen on (0.0.0.0:9443)
  PRUNUS_GATE_DEVICES  devices that may come from one address, such as all behind one router (64); four requests a second
                       and four at a time for each, what is beyond is told to come again
  PRUNUS_HOST, PRUNUS_PORT  of the SuperLink (127.0.0.1, 8000)
  PRUNUS_NAME          by which the SuperLink's certificate knows it (localhost)
Runs as the user of server.key, not as root: nginx would hand the work to a user who cannot enter the folder.
END
}

[[ $# -eq 0 ]] || { usage; [[ "$1" == -h || "$1" == --help ]] && exit 0 || exit 2; }
[[ -n "${PRUNUS_STATE:-}" ]] || fail "PRUNUS_STATE is not set"
certificates="$(realpath -- "${PRUNUS_CERTIFICATES:-}" 2>/dev/null || printf '%s' "${PRUNUS_CERTIFICATES:-}")"
need_file PRUNUS_CERTIFICATES "${certificates:+$certificates/server.key}" "the folder that certificates.sh makes"
devices="${PRUNUS_GATE_DEVICES:-64}"
[[ "$devices" =~ ^[1-9][0-9]{0,5}$ ]] || fail "PRUNUS_GATE_DEVICES: got '$devices', expected a number from 1"
for setting in "${PRUNUS_GATE:-}" "${PRUNUS_HOST:-}" "${PRUNUS_PORT:-}" "${PRUNUS_NAME:-}"; do
    [[ "$setting" =~ ^[][A-Za-z0-9.:_-]*$ ]] || fail "'$setting' is neither a name, an address nor a port"
done
[[ "$(id -u)" -ne 0 ]] || fail "not as root: use systemd/prunus-gate.service, or runuser -u prunus -- $home/gate.sh"
export PATH="$PATH:/usr/local/sbin:/usr/sbin"  # where nginx is, and what is no user's path
command -v nginx >/dev/null || fail "nginx is not installed (apt-get install nginx-light)"
umask 077
mkdir -p "$PRUNUS_STATE/gate"
state="$(realpath -- "$PRUNUS_STATE/gate")"
for path in "$state" "$certificates"; do
    [[ "$path" != *[\;\{\}\|\ ]* ]] || fail "nginx cannot use a path with blanks or ; { } |: $path"
done
sed -e "s|@STATE@|$state|g" -e "s|@CERTIFICATES@|$certificates|g" -e "s|@LISTEN@|${PRUNUS_GATE:-0.0.0.0:9443}|g" \
    -e "s|@SUPERLINK@|${PRUNUS_HOST:-127.0.0.1}:${PRUNUS_PORT:-8000}|g" -e "s|@NAME@|${PRUNUS_NAME:-localhost}|g" \
    -e "s|@RATE@|$((4 * devices))|g" -e "s|@BURST@|$((40 * devices))|g" -e "s|@CONNECTIONS@|$((4 * devices))|g" \
    "$home/nginx.conf" >"$state/nginx.conf"
exec nginx -e stderr -p "$state" -c "$state/nginx.conf" -g "daemon off;"
