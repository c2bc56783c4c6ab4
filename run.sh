#!/usr/bin/env bash
# The two commands of the project: ./run.sh and ./run.sh test. Makes the environment where there is none.
set -euo pipefail

project="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
venv="$project/.venv"
cpu_index="https://download.pytorch.org/whl/cpu"

usage() {
    cat <<'END'
./run.sh [run] [key=value ...]       run the default job, or with other settings: ./run.sh strategy=heterofl num-rounds=20
./run.sh compare STRATEGY ... [key=value ...]   one run of each and a page that compares them
./run.sh report RUN_FOLDER           write the report of a run again, or of one that was stopped
./run.sh test [pytest arguments]     the test suite (fast part: ./run.sh test -m 'not slow')
./run.sh check                       lint, format, types
./run.sh bench NAME [arguments]      one benchmark of bench/
./run.sh help

Every key, its default and what it means: docs/settings.md.
Environment: PYTHON (the interpreter, 3.11 or newer), PRUNUS_TORCH_INDEX (a package index to take torch from, or `default`).
END
}

fail() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s' "$name"
            return
        fi
    done
    fail "Python 3.11 or newer with venv is needed; none of ${PYTHON:+$PYTHON, }python3.11 to python3.13, python3 is that. Set PYTHON=/path/to/python"
}

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check "$@"
}

# The version of torch that pip would install with these arguments, such as 2.13.0+cpu; nothing if it cannot say.
torch_version() {
    pip install --dry-run --ignore-installed --no-deps --quiet --report - -c "$project/constraints.txt" torch "$@" 2>/dev/null |
        "$venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>/dev/null || true
}

# Arguments that make pip take torch's CPU build where no GPU is to be seen: it is a tenth of the CUDA build in size.
torch_index() {
    if [[ -n "${PRUNUS_TORCH_INDEX:-}" ]]; then
        if [[ "$PRUNUS_TORCH_INDEX" != default ]]; then printf '%s' "--extra-index-url=$PRUNUS_TORCH_INDEX"; fi
    elif [[ "$(uname -s)" == Linux ]] && ! nvidia-smi >/dev/null 2>&1 && [[ "$(torch_version)" != *+cpu ]]; then
        if [[ "$(torch_version --extra-index-url="$cpu_index" --timeout=5 --retries=0)" == *+cpu ]]; then
            printf '%s' "--extra-index-url=$cpu_index"
        else
            echo "run.sh: no CPU build of torch is in reach; the default build is larger but works too" >&2
        fi
    fi
}

# requirements GROUP: the project's dependencies (base) or an extra's, one per line.
requirements() {
    "$venv/bin/python" - "$project/pyproject.toml" "$1" <<'END'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print(*(project["dependencies"] if sys.argv[2] == "base" else project["optional-dependencies"][sys.argv[2]]), sep="\n")
END
}

digest() {
    cat "$project/pyproject.toml" "$project/constraints.txt" | cksum
}

is_installed() {
    [[ -x "$venv/bin/python" && "$(cat "$venv/made-for" 2>/dev/null)" == "$venv" && -f "$venv/installed-$1" && "$(cat "$venv/installed-$1")" == "$(digest)" ]]
}

# install GROUP: nothing to do when the stamp fits; the stamp is written last, so an interrupted install is done again.
install() {
    if is_installed "$1"; then return; fi
    rm -f "$venv/installed-$1"
    # an environment that was copied or moved here with its folder still starts the other place's programs
    if [[ "$(cat "$venv/made-for" 2>/dev/null)" != "$venv" ]] || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        local python
        python="$(find_python)"
        echo "run.sh: making the environment $venv"
        "$python" -m venv --clear "$venv" || fail "the environment $venv could not be made"
        printf '%s' "$venv" >"$venv/made-for"
    fi
    requirements "$1" >"$venv/requirements-$1.txt"
    local index=""
    if [[ "$1" == base ]]; then
        index="$(torch_index)"
        # first, so that what depends on torch finds it and does not choose another build
        echo "run.sh: installing torch (once; minutes)"
        pip install -qq -c "$project/constraints.txt" ${index:+"$index"} torch
    fi
    echo "run.sh: installing the dependencies ($1)"
    pip install -qq -c "$project/constraints.txt" ${index:+"$index"} -r "$venv/requirements-$1.txt"
    digest >"$venv/installed-$1"
}

# set_up GROUP ...: one run.sh at a time; the others wait for it.
set_up() {
    local group is_complete=yes
    for group in "$@"; do is_installed "$group" || is_complete=no; done
    if [[ $is_complete == yes ]]; then return; fi
    (
        if command -v flock >/dev/null && ! flock -n 9; then
            echo "run.sh: waiting for another run.sh that sets up"
            flock 9
        fi
        for group in "$@"; do install "$group"; done
    ) 9>"$project/.setup.lock"
}

run_python() {
    # -P: a package of the folder that we are called from must not come before the project's
    export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"
    exec "$venv/bin/python" -P "$@"
}

command="${1:-run}"
case "$command" in
    help | -h | --help)
        usage
        ;;
    test)
        shift
        set_up base dev
        cd "$project"
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
        run_python -m pytest -n "${PRUNUS_TEST_WORKERS:-4}" --dist worksteal "$@"
        ;;
    check)
        set_up base dev
        cd "$project"
        "$venv/bin/ruff" check .
        "$venv/bin/ruff" format --check .
        run_python -m mypy
        ;;
    bench)
        [[ $# -ge 2 ]] || fail "bench: expected the name of a benchmark; there are: $(cd "$project/bench" && echo *.py)"
        name="$2"
        shift 2
        set_up base dev
        cd "$project"
        run_python -m "bench.${name#bench.}" "$@"
        ;;
    report)
        shift
        set_up base
        run_python -m reporting "$@"
        ;;
    run | compare | *=*)
        set_up base
        run_python -m server_app.launch "$@"
        ;;
    *)
        usage >&2
        fail "there is no command '$command'; settings are given as key=value"
        ;;
esac
