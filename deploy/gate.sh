#!/usr/bin/env bash
# Starts the gate: nginx with nginx.conf, in the foreground. Devices connect to it, never to the SuperLink itself.
set -euo pipefail
home="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
# shellcheck source=deploy/common.sh
source "$home/common.sh"

usage() {
    cat <<'END'
usage: gate.sh
Settings (environment): PRUNUS_CERTIFICATES and PRUNUS_STATE as of superlink.sh, PRUNUS_GATE ADDRESS:PORT to listen on
(0.0.0.0:9443), PRUNUS_HOST and PRUNUS_PORT of the SuperLink (127.0.0.1, 8000).
END
}

[[ $# -eq 0 ]] || { usage; [[ "$1" == -h || "$1" == --help ]] && exit 0 || exit 2; }
command -v nginx >/dev/null || fail "nginx is not installed (apt-get install nginx-light)"
[[ -n "${PRUNUS_STATE:-}" ]] || fail "PRUNUS_STATE is not set"
certificates="$(realpath -- "${PRUNUS_CERTIFICATES:-/nonexistent}" 2>/dev/null || true)"
need_file PRUNUS_CERTIFICATES "$certificates/server.key" "the folder that certificates.sh makes"
mkdir -p "$PRUNUS_STATE/gate"
state="$(realpath -- "$PRUNUS_STATE/gate")"
for path in "$state" "$certificates"; do
    [[ "$path" != *[\;\{\}\|\ ]* ]] || fail "nginx cannot use a path with blanks or ; { } |: $path"
done
sed -e "s|@STATE@|$state|g" -e "s|@CERTIFICATES@|$certificates|g" -e "s|@LISTEN@|${PRUNUS_GATE:-0.0.0.0:9443}|g" \
    -e "s|@SUPERLINK@|${PRUNUS_HOST:-127.0.0.1}:${PRUNUS_PORT:-8000}|g" "$home/nginx.conf" >"$state/nginx.conf"
exec nginx -e "$state/nginx-error.log" -p "$state" -c "$state/nginx.conf" -g "daemon off;"
