"""Rows 4 and 6: signals, wherever they arrive, end a run of two ranks in order: one step, one whole checkpoint, code 75."""

import json

import pytest

from slm import checkpoint
from tests.faults.runs import digest, run

pytestmark = pytest.mark.slow


def stopped_in_order(recipe, printed):
    """The step that all ranks agreed on: the last one logged, whose checkpoint is whole and `latest`."""
    run_dir = recipe.with_name("run")
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 75
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    step = max(line["step"] for line in lines if "loss" in line)
    newest = run_dir / "checkpoints" / f"main-{step:08d}"
    checkpoint.verify(newest)
    assert {p.name for p in newest.glob("rank-*")} == {"rank-00000.safetensors", "rank-00001.safetensors"}
    assert (run_dir / "latest").resolve() == newest
    assert not list((run_dir / "checkpoints").glob(".staging*"))
    assert "Traceback" not in printed
    return step


@pytest.mark.parametrize(
    "fault",
    [
        "termlauncher-forward@0:3",
        "term-forward@1:3",
        "termlauncher2-forward@0:3",
        "term2-backward@1:3",
        "term-forward@1:3,term-write@0:1",  # the second one in the middle of the save
        "term-eval@1:2",
    ],
)
def test_sigterm_stops_all_ranks_at_one_step(recipe, straight, fault):
    """To the launcher, to one rank, twice, during the save that the first one asked for, and during an evaluation: code 75,
    and the same command ends as the uninterrupted run."""
    options = ("eval.every_steps=3",) if "eval" in fault else ()
    code, printed = run(recipe, fault, 2, *options)
    assert code == 75
    assert stopped_in_order(recipe, printed) in (3, 4)
    assert run(recipe)[0] == 0
    assert digest(recipe.with_name("run")) == straight(2)


def test_sigterm_during_a_save_of_the_loop(recipe, straight):
    """The save of step 4 is under way on rank 0, slowly, when the signal comes: both checkpoints are whole."""
    code, printed = run(recipe, "term-write@0:1,rest-write@0:1", 2, "checkpoint.keep_last=9", FAULT_SECONDS="3")
    assert code == 75
    step = stopped_in_order(recipe, printed)
    checkpoint.verify(recipe.with_name("run") / "checkpoints" / "main-00000004")
    assert step > 4
    assert run(recipe)[0] == 0
    assert digest(recipe.with_name("run")) == straight(2)


def test_sigterm_during_the_first_compile(recipe, tmp_path):
    """The signal's handler runs while torch.compile is at work within the first forward pass, as its stack shows; the compile
    goes on to its end, no rank waits for ever, and all stop after the step that it was for."""
    where = tmp_path / "where"
    fresh = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "FAULT_WHERE": str(where),
    }  # nothing compiled is there
    code, printed = run(recipe, "termwhere-compile@1:1", 2, "compile=true", **fresh)
    assert code == 75
    stack = where.read_text()
    assert stack.index("in train_step") < stack.index("_dynamo/convert_frame.py") < stack.index("in ask_and_say_where")
    assert list((tmp_path / "inductor").rglob("*.so"))
    assert stopped_in_order(recipe, printed) in (
        1,
        2,
    )  # the ranks had agreed on what follows step 1 before the signal came
