#!/usr/bin/env bash
# Tells the flwr command of this machine where the SuperLink is.
set -euo pipefail
# shellcheck source=deploy/common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

usage() {
    cat <<'END'
usage: connect.sh HOST:PORT CA_FILE [--wait]    connection PRUNUS_CONNECTION (prunus) in FLWR_HOME/config.toml
       connect.sh HOST:PORT --insecure-loopback [--wait]
--wait: return when the SuperLink listens, which takes it some seconds from its start; give up after a minute.
The folder is FLWR_HOME, ~/.flwr by default. An existing connection of that name is replaced.
END
}

[[ $# -eq 2 || ($# -eq 3 && "$3" == --wait) ]] || { usage >&2; exit 2; }
name="${PRUNUS_CONNECTION:-prunus}"
[[ "$name" =~ ^[A-Za-z0-9_-]+$ ]] || fail "PRUNUS_CONNECTION: '$name' is no plain name"
[[ "$1" =~ ^[][A-Za-z0-9.:_-]+:[0-9]+$ ]] || fail "'$1' is not HOST:PORT"
home="${FLWR_HOME:-$HOME/.flwr}"
if [[ "$2" == --insecure-loopback ]]; then
    is_loopback "${1%:*}" || fail "--insecure-loopback: $1 is not this machine"
    line="insecure = true"
else
    need_file CA_FILE "$2" "the ca.crt that certificates.sh made"
    line="root-certificates = \"$(realpath -- "$2")\""
fi
mkdir -p "$home"
config="$home/config.toml"
touch "$config"
# everything but this connection's table
awk -v name="[superlink.$name]" '/^\[/ { skip = ($0 == name) } !skip' "$config" >"$config.new"
grep -q '^\[superlink\]' "$config.new" || printf '[superlink]\ndefault = "%s"\n\n' "$name" >>"$config.new"
printf '[superlink.%s]\naddress = "%s"\n%s\n' "$name" "$1" "$line" >>"$config.new"
mv "$config.new" "$config"
echo "connection $name: $1 ($config)"
if [[ $# -eq 3 ]]; then
    host="${1%:*}"
    host="${host#[}"
    deadline=$((SECONDS + ${PRUNUS_WAIT_S:-60}))
    until timeout 5 bash -c '>"/dev/tcp/$0/$1"' "${host%]}" "${1##*:}" 2>/dev/null; do
        ((SECONDS < deadline)) || fail "nothing listens at $1"
        sleep 0.2
    done
fi
