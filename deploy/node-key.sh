#!/usr/bin/env bash
# Keys of SuperNodes: a device is who holds its private key.
set -euo pipefail

usage() {
    cat <<'END'
usage: node-key.sh make FILE               on the device: FILE (private, stays here) and FILE.pub, of the folder's owner
       node-key.sh register FILE.pub       on the operator's machine: admit this device; prints its node id
       node-key.sh list                    devices and whether they are online
       node-key.sh revoke NODE_ID          refuse this device from now on; its id never comes back
       node-key.sh rotate FILE             on the device: a new key beside the old one, with what is to be done next
register, list and revoke ask the SuperLink of the flwr connection PRUNUS_CONNECTION (default: prunus), which
connect.sh writes.
END
}

fail() {
    printf 'node-key.sh: %s\n' "$*" >&2
    exit 2
}

# make_key FILE LIKE: a key that belongs to whom LIKE belongs to: root makes it, a service of its own user reads it.
make_key() {
    local owner
    [[ ! -e "$1" ]] || fail "$1 is there already; a key is never overwritten"
    (umask 077 && mkdir -p "$(dirname -- "$1")" && ssh-keygen -q -t ecdsa -b 384 -N "" -C "" -f "$1")
    if [[ "$(id -u)" -eq 0 ]]; then
        owner="$(stat -c %u -- "$2" 2>/dev/null || stat -f %u -- "$2")"
        chown "$owner" "$1" "$1.pub"
    fi
    echo "private key: $1 (never leaves this device)"
    echo "public key:  $1.pub (register it before the SuperNode starts)"
}

connection="${PRUNUS_CONNECTION:-prunus}"
command="${1:-help}"
case "$command" in
    help | -h | --help) usage ;;
    make)
        [[ $# -eq 2 ]] || { usage >&2; exit 2; }
        make_key "$2" "$(dirname -- "$2")"
        ;;
    rotate)
        [[ $# -eq 2 ]] || { usage >&2; exit 2; }
        [[ -f "$2" ]] || fail "there is no key $2"
        new="$2.$(date -u +%Y%m%d-%H%M%S)"
        make_key "$new" "$2"
        cat <<END
next: 1. register $new.pub (operator)
      2. set PRUNUS_KEY=$new on this device and restart its SuperNode
      3. revoke the device's old node id (operator; see: node-key.sh list), then delete $2
END
        ;;
    register)
        [[ $# -eq 2 ]] || { usage >&2; exit 2; }
        [[ "$2" == *.pub ]] || fail "'$2' is no public key (FILE.pub); a private key must not leave its device"
        exec flwr supernode register "$2" "$connection" --format json
        ;;
    list) exec flwr supernode list "$connection" --format json ;;
    revoke)
        [[ $# -eq 2 && "$2" =~ ^[0-9]+$ ]] || { usage >&2; exit 2; }
        exec flwr supernode unregister "$2" "$connection" --format json
        ;;
    *) usage >&2; fail "there is no command '$command'" ;;
esac
