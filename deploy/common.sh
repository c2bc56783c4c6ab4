# What the scripts of this folder share; sourced, not run.

fail() {
    printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
    exit 2
}

# is_loopback HOST: whether nothing but this machine is reached by it.
is_loopback() {
    [[ "$1" =~ ^127\.[0-9]+\.[0-9]+\.[0-9]+$ || "$1" == localhost || "$1" == "::1" || "$1" == "[::1]" ]]
}

# need_file NAME PATH WHAT: the file of a setting exists and is readable.
need_file() {
    [[ -n "$2" ]] || fail "$1 is not set: $3"
    [[ -r "$2" ]] || fail "$1: cannot read $2: $3 (tried as user $(id -un 2>/dev/null || id -u))"
}

# need_private FILE: nobody but the owner (and root) reads a private key.
need_private() {
    local mode
    mode="$(stat -c %a -- "$1" 2>/dev/null || stat -f %Lp -- "$1")"
    [[ "$mode" == *00 ]] || fail "$1 can be read by others (mode $mode): chmod 600 $1"
}

# What Flower's processes inherit: nothing is fetched, nothing is phoned home, everything lies in one folder.
quiet_flower() {
    export FLWR_HOME="$1"
    export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
    export FLWR_SUPEREXEC_TASK_POLL_INTERVAL="${PRUNUS_POLL_S:-0.5}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1
    # the app's code comes from the bundle that Flower delivers, never from a checkout that happens to lie here
    unset PYTHONPATH
    export PYTHONSAFEPATH=1
    mkdir -p "$1/cwd"
    cd "$1/cwd"
}
