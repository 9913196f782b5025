"""Starts real ranks for tests: torchrun in a session of its own, killed as a whole on a timeout."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(script, arguments, world_size, timeout_seconds=240, check=True, **env):
    """Runs `python script arguments…` on world_size gloo ranks; returns the CompletedProcess (output joined)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    command += [str(script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **env}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        output = "(timed out)"
        raise
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    result = subprocess.CompletedProcess(command, process.returncode, output)
    if check:
        assert result.returncode == 0, output[-6000:]
    return result


def train_many(jobs, world_size, **options):
    """Trains each (recipe path, overrides, the phase to leave after if not the last, the exit code if not 0) in turn in one
    set of ranks."""
    listed = json.dumps([[str(recipe), *rest, *["", 0][len(rest) - 1 :]] for recipe, *rest in jobs])
    return run_ranks(Path(__file__).with_name("train_many.py"), [listed], world_size, **options)
