#!/usr/bin/env bash
# Train on the machines of a hostfile: launchers/multinode.sh [OPTIONS] HOSTFILE RECIPE [--restarts N] [OVERRIDES...]
#   bash launchers/multinode.sh hosts recipes/demo.yaml optim.lr=1e-3
#   bash launchers/multinode.sh hosts doctor [RECIPE]     checks all of them instead (slm doctor)
# HOSTFILE has a line `HOST slots=N` for each machine, N its number of ranks. Each is reached by ssh without a password, and has
# the same folder at the same path, with the same interpreter. Stop it with Ctrl-C or SIGTERM: it saves first. The exit
# code is the run's own, see README.md. --restarts starts it again, at most N times, when it was killed, crashed or hung.
# Options: --port N and --address A of rank 0 (both are found otherwise), --export NAME,NAME of more variables for the ranks;
# SLM_SSH="ssh -F FILE" is the ssh to use. docs/distributed.md says what goes to the machines, and what each failure looks like.
set -euo pipefail

options=()
while [[ ${1:-} =~ ^--(port|address|export)(=.*)?$ ]]; do
    options+=("$1")
    if [[ $1 != *=* ]]; then
        options+=("${2:?}")
        shift
    fi
    shift
done
if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0
    exit 2
fi
hostfile=$1
shift
for argument in "$@"; do
    if [[ $argument =~ ^--(port|address|export)(=|$) ]]; then
        echo "Error: ${argument%%=*} stands after HOSTFILE, where the options of slm go, and it is the launcher's" >&2
        echo "  Fix: bash launchers/multinode.sh ${argument%%=*} … HOSTFILE RECIPE" >&2
        exit 2
    fi
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then
    for python in "${VIRTUAL_ENV:-/none}/bin/python" "$root/.venv/bin/python" python3; do
        command -v "$python" >/dev/null && break
    done
fi
# exec: signals sent to this script must reach the program that forwards them.
launch=("$root/launchers/hosts.py" "${options[@]}" --module "$hostfile" slm.cli)
if [[ $1 == doctor ]]; then
    exec "$python" "${launch[@]}" "$@"
fi
for argument in "$@"; do
    if [[ $argument == --restarts || $argument == --restarts=* ]]; then
        export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
        # Quoted as slm reads it: printf %q writes $'…' for é where the locale is C.
        quote='import os, shlex, sys; sys.stdout.buffer.write(os.fsencode(shlex.join(sys.argv[1:])))'
        exec "$python" -m slm train "$@" --launcher "$("$python" -c "$quote" "$python" "${launch[@]}")"
    fi
done
exec "$python" "${launch[@]}" train "$@"
