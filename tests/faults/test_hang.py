"""Row 14 of the fault matrix: a rank that hangs is found, every stack is there, the run ends with code 79."""

import json
import time

import pytest

from slm import checkpoint
from tests.faults.runs import digest, events, run

LIMIT_SECONDS = 4
LIMIT = f"watchdog.step_seconds={LIMIT_SECONDS}"
HANGS = {  # what, and the function and file that the guilty rank's stack must show
    "sleep-data": "in sleep_for_ever",
    "stop-forward": "in stop",
    "miss-collective": "slm/",
    "hold-backward": "in hold_the_interpreter",
}


@pytest.mark.parametrize(
    "what", ["sleep-data", *(pytest.param(w, marks=pytest.mark.slow) for w in list(HANGS) if w != "sleep-data")]
)
def test_a_hang_of_one_rank_ends_the_run_with_both_stacks(recipe, what):
    """A loader that sleeps for ever, SIGSTOP, a collective call that one rank leaves out, the interpreter's lock held in C:
    code 79 within the limit and some seconds, where each rank was, and nothing left running."""
    call = 20 if what == "miss-collective" else 7  # of all collective calls, some steps in
    code, printed = run(recipe, f"{what}@1:{call}", 2, LIMIT)
    ended = time.time()
    assert code == 79
    hung = (recipe.with_name("counts") / f"{what}@1:{call}").stat().st_mtime
    assert ended - hung < LIMIT_SECONDS + 20, "the launcher gives the other rank 15 seconds"
    run_dir = recipe.with_name("run")
    record = json.loads((run_dir / "exit.json").read_text())
    assert record["code"] == 79
    (event,) = events(run_dir, "hang")
    # Who left out a call waits in the next one, as the other does: then nobody can say whose fault it is.
    hung = [] if what == "miss-collective" else [1]
    assert event["hung"] == record["hung"] == hung
    assert record["reason"].startswith(f"rank 1 hangs: {event['where']['1']}. " if hung else "a rank hangs. ")
    assert LIMIT_SECONDS <= event["seconds"] < LIMIT_SECONDS + 3
    assert event["doing"] == "step"
    assert set(event["where"]) == {"0", "1"}
    stacks = [(run_dir / "logs" / f"rank-{rank}.stacks").read_text() for rank in (0, 1)]
    assert HANGS[what] in stacks[1]
    assert "slm/loop.py" in stacks[0]
    assert "slm/loop.py" in stacks[1]
    assert "Where they are:" in printed


def test_a_rank_that_does_not_leave_after_the_run_is_ended(recipe):
    """The run is done and says so; the process is ended with its stack, and whoever waits for it goes on."""
    assert run(recipe, "stay-start@0:1", 1)[0] == 1
    run_dir = recipe.with_name("run")
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0
    assert "in sleep_for_ever" in (run_dir / "logs" / "rank-0.stacks").read_text()


@pytest.mark.slow
def test_slow_work_is_no_hang(recipe, straight):
    """A start, a first step, a save that rank 0 alone waits for, a batch of an evaluation, each twice as long as a step may
    take: the run goes through, to the same weights."""
    slow = "rest-start@1:1,rest-forward@0:1,rest-write@0:1,rest-eval@1:2"
    code, printed = run(recipe, slow, 2, LIMIT, "checkpoint.every_steps=2", FAULT_SECONDS="9")
    assert code == 0, printed
    assert len(list(recipe.with_name("counts").iterdir())) == 4
    assert not events(recipe.with_name("run"), "hang")
    assert digest(recipe.with_name("run")) == straight(2)


@pytest.mark.slow
def test_a_hung_run_is_started_again_and_comes_to_the_same(recipe, straight):
    """--restarts counts a hang among what can pass."""
    from tests.faults.test_kill import supervised

    assert supervised(recipe, "sleep-data@1:7", 2, LIMIT) == 0
    (event,) = events(recipe.with_name("run"), "restart")
    assert event["code"] == 79
    assert event["why"].startswith("rank 1 hangs: sleep_for_ever (")
    assert digest(recipe.with_name("run")) == straight(2)
    checkpoint.verify(recipe.with_name("run") / "latest")
