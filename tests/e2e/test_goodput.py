"""Every second of a run that is killed and started again is accounted for, against a clock outside of it."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.e2e.test_train import ROOT, environment
from tests.shards import make_dataset


def start(recipe):
    return subprocess.Popen([sys.executable, "-m", "slm", "train", str(recipe)], cwd=ROOT, env=environment())


def test_the_seconds_of_a_killed_run_sum_to_the_wall(tmp_path):
    """Killed by SIGKILL after a step that no checkpoint has, then finished by the same command. `slm report` gives a wall
    within 0.5 % of that of a clock outside, categories that sum to it, and the steps that were computed twice."""
    make_dataset(tmp_path / "tokens")
    tree = {
        "name": "t",
        "output": str(tmp_path / "run"),
        "model": "cpu-tiny",
        "data": {"sources": {"a": str(tmp_path / "tokens")}, "validation": {"a": str(tmp_path / "tokens")}},
        "phases": [{"name": "main", "tokens": 400 * 256, "seq_len": 64, "batch_tokens": 256, "micro_batch": 4}],
        "checkpoint": {"every_steps": 150},
        "eval": {"every_steps": 150},
        "log": {"every_steps": 10},
    }
    recipe, metrics = tmp_path / "recipe.yaml", tmp_path / "run" / "metrics.jsonl"
    recipe.write_text(yaml.safe_dump(tree))
    began = time.time()
    run = start(recipe)
    while not metrics.exists() or '"step": 200' not in metrics.read_text():
        assert run.poll() is None
        assert time.time() - began < 120
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(1.0)
    assert start(recipe).wait(timeout=120) == 0
    wall = json.loads((tmp_path / "run" / "exit.json").read_text())["time"] - began

    command = [sys.executable, "-m", "slm", "report", str(tmp_path / "run")]
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True, cwd=ROOT).stdout)
    assert found["wall"] == pytest.approx(wall, rel=0.005)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"], rel=1e-6)
    assert found["attempts"] == 2
    assert 50 <= found["steps_lost"] < 250  # told every 10 steps, of 150 … the step of the kill
    assert found["seconds"]["restart"] > 1.0
    assert set(found["seconds"]) == {"init", "step", "data", "save", "eval", "check", "lost", "restart", "finish"}
    shown = subprocess.run(command, capture_output=True, check=True, text=True, cwd=ROOT).stdout
    assert "goodput" in shown
    assert "restart" in shown
    assert "over 2 attempts" in shown
    assert "longest time between two attempts" in shown
    assert shown.splitlines()[-1].startswith("the last attempt ended at ")
    assert shown.splitlines()[-1].endswith(" with code 0: done")
    nothing = subprocess.run([*command[:-1], str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert nothing.returncode == 2
    assert "no run that has begun" in nothing.stderr
    assert f"give one of {tmp_path}/run" in nothing.stderr
    for path, said in ((recipe, "is a file, and a run is a folder"), (tmp_path / "runn", "does not exist")):
        wrong = subprocess.run([*command[:-1], str(path)], capture_output=True, text=True, cwd=ROOT)
        assert (wrong.returncode, said in wrong.stderr) == (2, True)
