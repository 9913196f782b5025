# Sourced by the job scripts: SLM_ROOT, the folder of this project (SLURM runs a copy of the script, elsewhere), and SLM_PYTHON.
set -euo pipefail
SLM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# What a cluster wants done before anything runs, such as `module load cuda`: a file of yours.
if [ -n "${SLM_SETUP:-}" ]; then
    set +eu # `module` and its like read variables that are not set
    # shellcheck disable=SC1090
    source "$SLM_SETUP"
    set -eu
fi
for SLM_PYTHON in "${SLM_PYTHON:-/none}" "${VIRTUAL_ENV:-/none}/bin/python" "$SLM_ROOT/.venv/bin/python" python3; do
    command -v "$SLM_PYTHON" >/dev/null && break
done
export SLM_ROOT SLM_PYTHON PYTHONPATH="$SLM_ROOT${PYTHONPATH:+:$PYTHONPATH}"
