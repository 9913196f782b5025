#!/usr/bin/env bash
# Train on this machine: launchers/local.sh RECIPE [NUMBER_OF_RANKS] [--restarts N] [OVERRIDES...]
#   bash launchers/local.sh recipes/quickstart.yaml 2 optim.lr=1e-3
# Ranks: by default one for each visible GPU, or one on a machine without. Stop it with Ctrl-C or SIGTERM: it
# saves first. The exit code is the run's own: 0 done, 75 stopped after saving (start again to go on), others in
# README.md. --restarts starts it again, at most N times, when it was killed, crashed or hung.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit $(( $# < 1 ? 2 : 0 ))
fi
recipe=$1
shift
ranks=()
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    ranks=(--ranks "$1")
    shift
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then
    for python in "${VIRTUAL_ENV:-/none}/bin/python" "$root/.venv/bin/python" python3; do
        command -v "$python" >/dev/null && break
    done
fi
# exec: signals sent to this script must reach the program that forwards them.
launch=("$root/launchers/launch.py" "${ranks[@]}" --module slm.cli)
for argument in "$@"; do
    if [[ $argument == --restarts || $argument == --restarts=* ]]; then
        export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
        # Quoted as slm reads it: printf %q writes $'…' for é where the locale is C.
        quote='import os, shlex, sys; sys.stdout.buffer.write(os.fsencode(shlex.join(sys.argv[1:])))'
        exec "$python" -m slm train "$recipe" "$@" --launcher "$("$python" -c "$quote" "$python" "${launch[@]}")"
    fi
done
exec "$python" "${launch[@]}" train "$recipe" "$@"
