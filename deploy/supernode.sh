#!/usr/bin/env bash
# Starts a SuperNode: TLS and its own key, or nothing but loopback.
set -euo pipefail
home="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
# shellcheck source=deploy/common.sh
source "$home/common.sh"

usage() {
    cat <<'END'
usage: supernode.sh [--insecure-loopback]
Settings (environment, see env/supernode.env):
  PRUNUS_SUPERLINK     HOST:PORT of the SuperLink (required)
  PRUNUS_PARTITION     number of this device in the federation, 0 to num-clients - 1 (required)
  PRUNUS_STATE         folder of this node: what it remembers between rounds (required)
  PRUNUS_CA            ca.crt of the SuperLink's authority (required)
  PRUNUS_KEY           this device's private key, made by node-key.sh (required)
  PRUNUS_DATA          folder of the data sets on this device, or an .npz file: all of it is this device's share
  PRUNUS_MEMORY_BYTES  refuse sub-models that need more memory to train; unset: no limit
  PRUNUS_POLL_S        seconds between two looks for work (0.5); Flower's own 3 s would be most of a short round
  PRUNUS_PRELOAD       yes: import torch once and fork the client of each message, 140 MiB that stay in memory; or no
  PRUNUS_NODE_PORT     port of the node's own loopback service (9094); one for each SuperNode of a machine
--insecure-loopback    no TLS and no key, for trials on one machine: any other address is refused
END
}

is_insecure=no
case "${1:-}" in
    "") ;;
    --insecure-loopback) is_insecure=yes ;;
    -h | --help) usage; exit ;;
    *) usage >&2; fail "unknown argument '$1'" ;;
esac
[[ -n "${PRUNUS_SUPERLINK:-}" ]] || fail "PRUNUS_SUPERLINK is not set: HOST:PORT of the SuperLink"
[[ "${PRUNUS_PARTITION:-}" =~ ^[0-9]+$ ]] || fail "PRUNUS_PARTITION: got '${PRUNUS_PARTITION:-}', expected a number from 0"
[[ -n "${PRUNUS_STATE:-}" ]] || fail "PRUNUS_STATE is not set: the folder where this node keeps what it remembers"
[[ "${PRUNUS_MEMORY_BYTES:-0}" =~ ^[0-9]+$ ]] || fail "PRUNUS_MEMORY_BYTES: got '$PRUNUS_MEMORY_BYTES', expected bytes"
[[ "${PRUNUS_PRELOAD:=yes}" == yes || "$PRUNUS_PRELOAD" == no ]] || fail "PRUNUS_PRELOAD: got '$PRUNUS_PRELOAD', expected yes or no"
umask 077  # messages and what is remembered of them are the owner's
mkdir -p "$PRUNUS_STATE/memory"
state="$(realpath -- "$PRUNUS_STATE")"
[[ "$state$PWD${PRUNUS_DATA:-}" != *\"* ]] || fail "a path with a quotation mark cannot be handed to Flower"
config="partition-id=$PRUNUS_PARTITION state-dir=\"$state/memory\""
if [[ -n "${PRUNUS_DATA:-}" ]]; then
    need_file PRUNUS_DATA "$PRUNUS_DATA" "the data of this device"
    config+=" data=\"$(realpath -- "$PRUNUS_DATA")\""
fi
if [[ -n "${PRUNUS_MEMORY_BYTES:-}" ]]; then config+=" memory-bytes=$PRUNUS_MEMORY_BYTES"; fi
arguments=(--superlink "$PRUNUS_SUPERLINK" --host 127.0.0.1 --port "${PRUNUS_NODE_PORT:-9094}" --node-config "$config")
if [[ $is_insecure == yes ]]; then
    is_loopback "${PRUNUS_SUPERLINK%:*}" ||
        fail "--insecure-loopback: $PRUNUS_SUPERLINK is not this machine; set PRUNUS_CA and PRUNUS_KEY and leave the flag out"
    arguments+=(--insecure)
else
    need_file PRUNUS_CA "${PRUNUS_CA:-}" "the ca.crt that certificates.sh made"
    need_file PRUNUS_KEY "${PRUNUS_KEY:-}" "this device's private key (node-key.sh make)"
    need_private "$PRUNUS_KEY"
    arguments+=(--root-certificates "$(realpath -- "$PRUNUS_CA")" --auth-supernode-private-key "$(realpath -- "$PRUNUS_KEY")")
fi
quiet_flower "$state"
if [[ $PRUNUS_PRELOAD == yes ]]; then export PATH="$home/bin:$PATH"; fi
exec python3 -P "$home/supernode.py" "${arguments[@]}"
