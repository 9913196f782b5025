"""slm/status.py without a queue: what is told from files alone."""

import json
import os

import pytest
import yaml

from slm.errors import UserError
from slm.recipe import load_recipe
from slm.status import in_words, is_done, newest_position, newest_suspect, standings, status, suspects


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


def test_what_is_done_of_a_chain_is_told_from_the_disk(run, tmp_path):
    """Shards by their manifest, a check for a day, an evaluation if nothing was saved after it."""
    folder = run([("one", 10)])
    recipe = load_recipe(folder / "recipe.yaml")

    def done(stage, *words):
        return is_done(stage, list(words), folder, recipe)

    assert done("phase one")
    assert not done("phase two")
    assert not done("data a", "text", "--output", str(tmp_path / "tokens"))
    (tmp_path / "tokens" / "train").mkdir(parents=True)
    (tmp_path / "tokens" / "train" / "manifest.json").write_text("{}")
    assert done("data a", "text", "--output", str(tmp_path / "tokens"))
    assert not done("check")
    (folder / "checked").touch()
    assert done("check")
    os.utime(folder / "checked", (1, 1))
    assert not done("check")
    assert not done("evaluation")
    (folder / "eval").mkdir()
    (folder / "eval" / "final.json").write_text("{}")
    assert done("evaluation")
    os.utime(folder / "eval" / "final.json", (1, 1))
    assert not done("evaluation")


def test_the_node_that_the_last_attempt_blames(run):
    """Not that of an attempt before, and lines that a kill has cut do not hide it."""
    folder = run([])
    lines = ['{"kind": "start"}', '{"kind": "hang", "suspect_node": "n1"}', '{"kind": "st', '{"kind": "start"}', "17"]
    (folder / "events.jsonl").write_text("\n".join(lines))
    assert (newest_suspect(folder), suspects(folder)) == ("", ["n1"])
    with open(folder / "events.jsonl", "a") as events:
        events.write('\n{"kind": "replicas differ", "suspect_node": "n2"}\n')
    assert (newest_suspect(folder), suspects(folder)) == ("n2", ["n1", "n2"])
