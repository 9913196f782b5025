#!/usr/bin/env bash
# Installs what the tests need (a virtual environment, Debian packages where root may) and runs them.
#   bash tests/run.sh            ruff, mypy and the quick suite
#   bash tests/run.sh --all      the slow tests too
#   bash tests/run.sh ARGS…      passed on to pytest instead of the whole suite
set -euo pipefail
cd "$(dirname "$0")/.."
source launchers/environment.sh
ensure_system_packages g++
# For the tests of clusters, which skip where these cannot be had.
ensure_system_packages slurmctld:slurm-wlm munged:munge sshd:openssh-server ssh:openssh-client ip:iproute2 pdsh || true
ensure_system_packages chromium || true # for the test that looks at the page of slm report in a browser
ensure_environment dev

python -m ruff check .
python -m mypy
# DeepSpeed's CPU Adam, which the offload tests use, is compiled here once and not inside a test's time limit.
python -c 'import logging; logging.basicConfig(); from slm.engine import build_cpu_adam; build_cpu_adam()'

slow="not slow" gpu="not gpu"
if [ "${1:-}" = "--all" ]; then slow="(slow or not slow)"; shift; fi
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then gpu="(gpu or not gpu)"; fi
if [ $# -gt 0 ]; then exec python -m pytest -m "$slow and $gpu" "$@"; fi
export OMP_NUM_THREADS=1
# Three files at a time on two cores: many tests wait for each other's processes, a scheduler, a time limit.
exec python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "$slow and $gpu" --durations 10
