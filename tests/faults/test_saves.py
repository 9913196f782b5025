"""Saves under faults, with real runs: killed in the middle, stopped again and again, on a full disk. docs/reliability.md has
the table of these rows."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.faults.digest import digest, state, steps
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    },
    **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
}
BIG = {
    "preset": "cpu-tiny",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
}  # 4 million parameters


def write_recipe(folder, num_steps, *, model="cpu-tiny", every_steps=1, **changes):
    """A recipe for RUN = folder/run: num_steps steps of 128 tokens."""
    if not (folder / "tokens").exists():
        make_dataset(folder / "tokens")
    tree = {
        "name": "t",
        "output": str(folder / "run"),
        "model": model,
        "data": {"sources": {"a": str(folder / "tokens")}},
        "optim": {"lr": 1e-3},
        "phases": [{"name": "main", "tokens": num_steps * 128, "seq_len": 64, "batch_tokens": 128,
                    "schedule": {"warmup_steps": 2}}],
        "checkpoint": {"every_steps": every_steps},
        **changes,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def python(arguments, timeout_seconds, check=True):
    """Runs it in a session of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert not check or process.returncode == 0, err[-4000:]
    return process.returncode, out, err


def torment(mode, recipe, times, timeout_seconds):
    _, out, _ = python(["-m", "tests.faults.torment", mode, recipe, times], timeout_seconds)
    found = json.loads(out.splitlines()[-1])
    print(found)
    return found


def test_control_the_same_run_twice_is_equal_and_another_is_not(tmp_path):
    """What the other tests stand on: digests of two runs agree in every bit, and differ where one seed does."""
    path = write_recipe(tmp_path, 6, every_steps=3)
    code = "import sys; from slm import parallel; from slm.recipe import load_recipe; from slm.train import train\n"
    code += (
        "from slm.runtime import discover_ranks; parallel.start(parallel.local_device(discover_ranks().local_rank))\n"
    )
    code += "for name in ('one', 'two', 'other'):\n"
    code += "    seed = ['seed=9'] if name == 'other' else []\n"
    code += "    if train(load_recipe(sys.argv[1], [f'output={sys.argv[2]}/{name}', *seed])): sys.exit(1)\n"
    code += "parallel.stop()"
    python(["-c", code, path, tmp_path], 120)
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    assert digest(one) == digest(two)
    assert len(steps(one)) == 6
    assert not set(steps(one).values()) & set(steps(other).values())
    assert sum(a != b for a, b in zip(state(one).values(), state(other).values(), strict=True)) > 10


def test_three_kills_in_saves(tmp_path):
    """Row 2, quick: 2 ranks killed three times within a save go on from a verified checkpoint and end bit for bit as never
    killed; nothing half-written is left. A rank that is left alone within a save does not wait for the other for long."""
    found = torment("kill", write_recipe(tmp_path, 10, model=BIG), 3, 200)
    assert found["equal"]
    assert found["alone_seconds"] < 30


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_kills_in_saves(tmp_path):
    """Row 2: the same a hundred times, a rank stopped or killed before the other in half of them; most tear a save."""
    found = torment("kill", write_recipe(tmp_path, 110, model=BIG), 100, 2900)
    assert found["equal"]
    assert found["resumed_beyond_0"] >= 95
    assert sum(count for how, count in found["how"].items() if how.endswith("torn")) >= 50


def test_stopped_and_started_three_times(tmp_path):
    """Row 26, quick: SIGTERM in every second step, on 2 ranks; exit code 75 each time and the same run in the end."""
    found = torment("stop", write_recipe(tmp_path, 8, every_steps=1000), 3, 120)
    assert (found["equal"], found["last_start"]) == (True, 6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_and_started_twenty_times(tmp_path):
    """Row 26: resumed at every second of 42 steps."""
    found = torment("stop", write_recipe(tmp_path, 42, every_steps=1000), 20, 850)
    assert (found["equal"], found["last_start"]) == (True, 40)
