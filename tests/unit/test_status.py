"""slm/status.py without a queue, and the job script's rule for requeueing: what is told from files alone."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from slm.errors import UserError
from slm.recipe import load_recipe
from slm.status import in_words, newest_position, standings, status

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """A function that writes a run's folder: three phases of 10 steps, the second with a gate; checkpoints by (phase, step)."""
    phase = {"tokens": 640, "batch_tokens": 64, "seq_len": 64}
    gated = {**phase, "name": "two", "gate": {"position_rise": 1.0, "position_early": 16}}
    tree = {
        "name": "t",
        "output": str(tmp_path / "run"),
        "model": "cpu-tiny",
        "data": {"sources": {"a": "a"}, "validation": {"a": "b"}},
        "phases": [{**phase, "name": "one"}, gated, {**phase, "name": "three"}],
    }

    def write(checkpoints, gate=None, **files):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
        for order, (name, step) in enumerate(checkpoints):
            saved = folder / "checkpoints" / f"{name}-{step:08d}"
            saved.mkdir(parents=True)
            (saved / "manifest.json").write_text(json.dumps({"global_step": order}))
            (saved / "state.json").write_text(json.dumps({"position": {"phase": name, "step": step}}))
        if gate is not None:
            (folder / "events.jsonl").write_text(json.dumps({"kind": "gate", "phase": "two", "passed": gate}) + "\n")
        for name, text in files.items():
            (folder / name).write_text(text)
        return folder

    return write


def launcher(name, monkeypatch):
    """A file of launchers/slurm, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "launchers" / "slurm" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def over(folder):
    return {
        name: (where.step, where.is_over)
        for name, where in standings(folder, load_recipe(folder / "recipe.yaml")).items()
    }


def test_a_phase_is_over_with_its_last_step_and_its_gate(run):
    """Nothing saved; in the middle of the first; at the end of one with a gate that was not looked at."""
    assert over(run([])) == {"one": (0, False), "two": (0, False), "three": (0, False)}
    assert over(run([("one", 4)])) == {"one": (4, False), "two": (0, False), "three": (0, False)}
    assert over(run([("one", 10), ("two", 10)])) == {"one": (10, True), "two": (10, False), "three": (0, False)}


@pytest.mark.parametrize("held", [True, False])
def test_the_last_word_of_the_gate_counts(run, held):
    """Of the events, the newest."""
    folder = run([("one", 10), ("two", 10)], gate=not held)
    with open(folder / "events.jsonl", "a") as events:
        events.write(json.dumps({"kind": "gate", "phase": "two", "passed": held}) + "\n{cut")
    assert over(folder)["two"] == (10, held)


def test_damaged_and_half_removed_checkpoints_do_not_count(run):
    """A folder that was set aside, one without a state, one that is being written."""
    folder = run([("one", 4), ("one", 8), ("one", 10), ("two", 2)])
    root = folder / "checkpoints"
    (root / "two-00000002").rename(root / "two-00000002.damaged")
    (root / "one-00000010").rename(root / ".staging-one-00000010")
    (root / "one-00000008" / "state.json").unlink()
    assert newest_position(folder) == ("one", 4)


def test_what_it_says_of_a_run_and_of_a_folder_that_is_none(run, tmp_path):
    """The loss is of the phase that is going on; how it ended is there; no torch is imported for it by the command."""
    row = {"step": 14, "phase": "two", "loss": 2.5, "tokens_per_second": 100.0, "time": 1.0}
    ended = {"code": 75, "reason": "stopped", "time": 2.0}
    folder = run([("one", 10)], **{"metrics.jsonl": json.dumps(row) + "\n", "exit.json": json.dumps(ended)})
    found = status(folder)
    assert [(p["phase"], p["saved_step"], p.get("loss")) for p in found["phases"]] == [
        ("one", 10, None), ("two", 0, 2.5), ("three", 0, None),
    ]  # fmt: skip
    assert found["exit"]["code"] == 75
    with pytest.raises(UserError, match="is no run"):
        status(tmp_path)


def test_a_job_in_words():
    """One job with where or why; an array by its members' states."""
    assert in_words([("RUNNING", "node[1-2]")]) == "running on node[1-2]"
    assert in_words([("PENDING", "(Priority)")]) == "pending (Priority)"
    assert in_words([("COMPLETED", "node1")]) == "completed on node1"
    assert in_words([("FAILED", "(NonZeroExitCode)")]) == "failed (NonZeroExitCode)"
    assert in_words([("RUNNING", "n1"), ("RUNNING", "n2"), ("PENDING", "(None)")]) == "2 running, 1 pending"


def test_a_job_that_gains_nothing_is_requeued_twice_and_not_three_times(tmp_path, monkeypatch, capsys):
    """Its last two requeues were after the step at which it stands now; SLURM is not asked. scontrol is a recording stand-in
    here: the real one is in tests/slurm."""
    job = launcher("job", monkeypatch)
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    (tmp_path / "events.jsonl").write_text(json.dumps({"kind": "requeue", "job": "5", "step": 7}) + "\n")
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$1" = show ] && echo JobState=RUNNING && exit 0\nexit 1\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    handlers = {number: job.signal.getsignal(number) for number in (job.signal.SIGTERM, job.signal.SIGUSR1)}
    assert job.requeue(75, tmp_path) == 75
    assert "requeue 5" in (tmp_path / "asked").read_text()
    with open(tmp_path / "events.jsonl", "a") as events:
        events.write(json.dumps({"kind": "requeue", "job": "5", "step": 7}) + "\n")
    (tmp_path / "asked").unlink()
    assert job.requeue(75, tmp_path) == 75
    assert "requeue" not in (tmp_path / "asked").read_text()
    assert "no further than step 7" in capsys.readouterr().err
    for number, handler in handlers.items():
        job.signal.signal(number, handler)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("partition", "low; touch pwned"),
        ("account", "$(id)"),
        ("qos", "a\nb"),
        ("time", "`id`"),
        ("time", 1440),
        ("memory", "1G --wrap=id"),
        ("environment", ["A=canary"]),
        ("exclude", ["--wrap"]),
        ("container", {"image": "x y"}),
        ("node", 3),
        ("phases", {"a b": {}}),
        ("train", {"array": 3}),
    ],
)
def test_a_cluster_file_cannot_say_more_than_values(tmp_path, monkeypatch, field, value):
    """Options of sbatch are words of an argument list, but what looks like a command is refused all the same, and by name."""
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({field: value}))
    with pytest.raises(UserError, match=field):
        launcher("cluster", monkeypatch).load_cluster(path)


def test_the_cluster_file_that_is_copied_says_the_defaults(monkeypatch):
    """launchers/slurm/cluster.yaml has every field, but for those that only some need, which stand in its comments."""
    module, path = launcher("cluster", monkeypatch), ROOT / "launchers" / "slurm" / "cluster.yaml"
    cluster, text = module.load_cluster(path), path.read_text()
    assert not [name for name in module.Cluster.model_fields if f"{name}:" not in text]
    assert cluster.of_phase("any").ranks == 8
    assert cluster.of_phase("any").options() == [
        "--partition=gpu", "--time=24:00:00", "--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12",
    ]  # fmt: skip
