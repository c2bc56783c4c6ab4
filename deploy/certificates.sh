#!/usr/bin/env bash
# Keys and certificates of a SuperLink: a certificate authority of your own, and the server's certificate signed by it.
set -euo pipefail

usage() {
    cat <<'END'
usage: certificates.sh FOLDER HOST [HOST ...]    make, or renew, the server's certificate for these names and addresses
       certificates.sh --new-ca FOLDER           start to rotate: a new authority; both are trusted from now on
       certificates.sh --drop-old-ca FOLDER      end the rotation: only the newest authority is trusted

FOLDER gets
  ca.crt       what SuperNodes and the flwr command trust: copy it to every device
  ca.pem/.key  the authority that signs now; ca.key is all it takes to impersonate your server: keep it off the server
  server.pem/.key  of the SuperLink; valid PRUNUS_CERTIFICATE_DAYS days (397)
Everybody may enter FOLDER, only the owner reads a .key. Give server.key to the user that the SuperLink runs as, once:
a key that is renewed belongs to whom the one before belonged to.
To rotate the authority: --new-ca, copy ca.crt to every device and restart its SuperNode, renew the server's
certificate, restart the SuperLink, then --drop-old-ca and copy ca.crt once more.
END
}

fail() {
    printf 'certificates.sh: %s\n' "$*" >&2
    exit 2
}

# replace NEW OLD: NEW takes the place of OLD, and its owner: a service that could read its key still can.
replace() {
    local owner
    if [[ -e "$2" ]]; then
        owner="$(stat -c %u -- "$2" 2>/dev/null || stat -f %u -- "$2")"
        [[ "$owner" == "$(id -u)" ]] || chown "$owner" "$1" 2>/dev/null ||
            fail "$2 belongs to user number $owner, who could not read a new one of yours: run this as root or as that user"
    fi
    mv "$1" "$2"
}

new_ca() {
    openssl ecparam -name prime256v1 -genkey -noout -out "$folder/ca.key.new"
    openssl req -new -x509 -key "$folder/ca.key.new" -sha256 -days 3650 -out "$folder/ca.pem.new" \
        -subj "/O=Prunus/CN=Prunus authority $(date -u +%Y%m%d-%H%M%S)" \
        -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign"
    replace "$folder/ca.key.new" "$folder/ca.key"
    mv "$folder/ca.pem.new" "$folder/ca.pem"
}

sign_server() {
    local host names="" work
    for host in "$@"; do
        [[ "$host" =~ ^[A-Za-z0-9.:_-]+$ ]] || fail "'$host' is neither a name nor an address"
        if [[ "$host" =~ ^[0-9.]+$ || "$host" == *:* ]]; then names+=",IP:$host"; else names+=",DNS:$host"; fi
    done
    work="$(mktemp -d "$folder/.sign-XXXXXX")"
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf $(printf %q "$work")" EXIT
    printf 'subjectAltName=%s\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\nextendedKeyUsage=serverAuth\nauthorityKeyIdentifier=keyid\n' \
        "${names#,}" >"$work/extensions"
    openssl ecparam -name prime256v1 -genkey -noout -out "$work/server.key"
    openssl req -new -key "$work/server.key" -subj "/O=Prunus/CN=${1:0:64}" -out "$work/server.csr"
    openssl x509 -req -in "$work/server.csr" -CA "$folder/ca.pem" -CAkey "$folder/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
        -days "${PRUNUS_CERTIFICATE_DAYS:-397}" -sha256 -extfile "$work/extensions" -out "$work/server.pem" 2>/dev/null
    replace "$work/server.key" "$folder/server.key"
    mv "$work/server.pem" "$folder/server.pem"
}

action=server
case "${1:-}" in
    --new-ca | --drop-old-ca)
        action="${1#--}"
        shift
        [[ $# -eq 1 ]] || { usage >&2; exit 2; }
        ;;
    -h | --help | "")
        usage
        exit
        ;;
    -*) fail "unknown option $1" ;;
    *) [[ $# -ge 2 ]] || fail "no HOST: give every name and address by which SuperNodes reach the SuperLink" ;;
esac
folder="$1"
shift
# what lies in it is public but for the keys, which are made with the umask that follows
(umask 022 && mkdir -p "$folder")
umask 077
case "$action" in
    server)
        if [[ ! -f "$folder/ca.key" ]]; then
            [[ ! -f "$folder/ca.pem" ]] || fail "$folder/ca.key is not here (kept elsewhere?): it is needed to sign"
            new_ca
            cp "$folder/ca.pem" "$folder/ca.crt"
        fi
        sign_server "$@"
        ;;
    new-ca)
        [[ -f "$folder/ca.pem" ]] || fail "$folder holds no authority to be replaced"
        new_ca
        cat "$folder/ca.pem" "$folder/ca.crt" >"$folder/ca.crt.new"
        mv "$folder/ca.crt.new" "$folder/ca.crt"
        ;;
    drop-old-ca)
        [[ -f "$folder/ca.pem" ]] || fail "$folder holds no authority"
        openssl verify -CAfile "$folder/ca.pem" "$folder/server.pem" >/dev/null 2>&1 ||
            fail "$folder/server.pem is still signed by an old authority: renew it first"
        cp "$folder/ca.pem" "$folder/ca.crt"
        ;;
esac
chmod 644 "$folder/ca.crt" "$folder/ca.pem"
if [[ -f "$folder/server.pem" ]]; then
    chmod 644 "$folder/server.pem"
    openssl x509 -in "$folder/server.pem" -noout -enddate -ext subjectAltName
fi
