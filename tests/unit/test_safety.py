"""What counts as a spike, which rank is slow, and where the seconds of several attempts went: the arithmetic alone."""

import math
import random
import re
import statistics
import time

import pytest

from slm.ledger import Ledger, describe, goodput, how_it_ended, process_age_seconds
from slm.safety import Safety, Spikes, stragglers


def test_a_spike_is_told_from_noise_and_from_learning():
    """The limit is mean + 6 standard deviations of the window, as statistics says; a noisy falling loss never reaches it, a
    loss 50 times as high always does; nothing is a spike before 32 losses or where it is turned off."""
    rng = random.Random(0)
    spikes, off = Spikes(Safety()), Spikes(Safety(spike_sigmas=0))
    for step in range(2000):
        loss = 2 + 8 * math.exp(-step / 50) + rng.gauss(0, 0.05)
        assert loss <= spikes.limit, step
        assert (50 * loss > spikes.limit) == (step >= 32)
        spikes.accept(loss)
        off.accept(loss)
    window = list(spikes.losses)
    assert len(window) == 128
    wide = [2 + rng.gauss(0, 0.5) for _ in range(128)]
    expected = statistics.fmean(wide) + 6 * statistics.pstdev(wide)
    assert Spikes(Safety(), wide).limit == pytest.approx(expected, rel=1e-12)
    assert off.limit == math.inf
    assert Spikes(Safety(), window).limit == spikes.limit  # as a resume has them


def test_a_loss_that_hardly_differs_is_no_spike():
    spikes = Spikes(Safety(), [1.0] * 128)
    assert spikes.limit == 1.2


def test_a_slow_rank_is_one_that_costs_the_step_something():
    assert stragglers({0: 0.10, 1: 0.11, 2: 0.10, 3: 0.31}, 1.0) == {3: pytest.approx(0.21)}
    assert stragglers({0: 0.01, 1: 0.21}, 0.5) == {1: pytest.approx(0.2)}
    assert stragglers({0: 0.001, 1: 0.003}, 1.0) == {}  # three times as slow, and it does not matter
    assert stragglers({0: 0.5}, 1.0) == {}


def test_a_ledger_is_always_in_one_category():
    began = time.monotonic()
    ledger = Ledger(2.0)
    time.sleep(0.02)
    ledger.enter("step")
    with ledger.within("data"):
        time.sleep(0.03)
    time.sleep(0.01)
    seconds = ledger.seconds()
    assert sum(seconds.values()) == pytest.approx(2.0 + time.monotonic() - began, abs=2e-3)
    assert seconds["init"] >= 2.02 - 1e-3
    assert seconds["data"] >= 0.03 - 1e-3
    assert 0 < process_age_seconds() < 24 * 3600


def event(kind, at, **fields):
    return {"time": 1000.0 + at, "kind": kind, **fields}


def test_goodput_of_a_run_that_was_killed_twice():
    """Three attempts on one clock. The first is killed at 130 s after its last word at 120 s (step 40), and the checkpoint is
    of step 30; the second hangs for 60 s; the third ends. Each second is somewhere, once."""
    events = [
        event("start", 10, age=10.0, step=0),
        event("seconds", 90, step=30, seconds={"init": 20.0, "step": 65.0, "data": 5.0}),
        event("seconds", 120, step=40, seconds={"init": 20.0, "step": 94.0, "data": 6.0}),
        event("start", 150, age=5.0, step=30),  # process from 145: 25 s after the last word
        event("seconds", 200, step=45, seconds={"init": 8.0, "step": 45.0, "data": 2.0}),
        event("hang", 270, seconds=60.0),
        event("start", 290, age=5.0, step=45),  # process from 285: 85 s after the last word, 60 of them hung
        event("seconds", 400, step=80, seconds={"init": 7.0, "step": 100.0, "eval": 5.0, "save": 3.0}),
        event("done", 401, step=80),
    ]
    found = goodput(events)
    assert found["wall"] == pytest.approx(401)
    assert sum(found["seconds"].values()) == pytest.approx(401)
    assert found["steps_lost"] == 10
    assert found["seconds"]["lost"] == pytest.approx(30)
    assert found["seconds"]["hang"] == pytest.approx(60)
    assert found["seconds"]["restart"] == pytest.approx(25 + 8 + 25 + 7)
    assert found["seconds"]["step"] == pytest.approx(65 + 45 + 100)
    assert found["goodput"] == pytest.approx(210 / 401)
    assert found["attempts"] == 3


def test_the_queue_between_the_jobs_of_two_phases_is_no_idleness():
    """The first phase is done at 100 s and the job of the second starts an hour later: that lowers goodput, and is `restart`.
    After the last phase a day is idle."""
    events = [
        event("start", 10, age=10.0, step=0),
        told(100, 90, 10.0, 90.0),
        event("done", 100, step=90, phases_left=["second"]),
        event("start", 3710, age=10.0, step=90),
        told(3800, 180, 10.0, 90.0),
        event("done", 3800, step=180, phases_left=[]),
        event("start", 3810 + 86400, age=10.0, step=180),
        told(3900 + 86400, 270, 10.0, 90.0),
    ]
    found = goodput(events)
    assert found["seconds"]["restart"] == pytest.approx(3600 + 10 + 10)
    assert found["seconds"]["idle"] == pytest.approx(86400)
    assert found["goodput"] == pytest.approx(270 / 3900)


def test_days_after_a_run_was_done_are_idle_and_others_are_said(tmp_path):
    """Done at 100 s, made longer three days later; then killed, and gone on with after an hour: the days lower no goodput, the
    hour does; both add up to the wall, and the words have no "1 attempts"."""
    days, hour = 3 * 86400.0, 3600.0
    events = [
        event("start", 10, age=10.0, step=0),
        told(100, 90, 10.0, 90.0),
        event("done", 100, step=90),
        event("start", 110 + days, age=10.0, step=90),
        told(200 + days, 180, 10.0, 90.0),
        event("start", 210 + days + hour, age=10.0, step=180),
        told(300 + days + hour, 270, 10.0, 90.0),
    ]
    found = goodput(events)
    assert found["seconds"]["idle"] == pytest.approx(days)
    assert found["seconds"]["restart"] == pytest.approx(hour + 20)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"]) == pytest.approx(300 + days + hour)
    assert found["goodput"] == pytest.approx(270 / (300 + hour))
    assert found["longest_gap"] == {"seconds": pytest.approx(days), "step": 90}
    shown = describe(found)
    shares = dict(re.findall(r"^  (\w+) .* ([\d.]+)%  #*$", shown, re.MULTILINE))
    assert f"goodput {float(shares['step']):.1f}%: of 1:05:00 over" in shown  # header and table are of one whole
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.02)
    assert "idle     3 days 0:00:00  not counted" in shown
    assert "longest time between two attempts: 3 days 0:00:00, before the one from step 90" in describe(found)
    once = goodput(events[:2])
    assert once["longest_gap"] is None
    assert "in 1 attempt, " in describe(once)
    assert "0 steps computed again, 0 skipped, 0 rollbacks" in describe(once)
    assert "still running, or was killed" in how_it_ended(tmp_path)


def test_goodput_counts_what_a_rollback_computed_again():
    """From step 12 back to 8, then killed at 20 with a checkpoint of 16: 4 steps are lost twice."""
    events = [
        event("start", 1, age=1.0, step=0),
        event("seconds", 9, step=8, seconds={"init": 1.0, "step": 8.0}),
        event("seconds", 13, step=12, seconds={"init": 1.0, "step": 12.0}),
        event("rollback", 13, from_step=12, to_step=8),
        event("seconds", 22, step=16, seconds={"init": 2.0, "step": 20.0}),
        event("seconds", 26, step=20, seconds={"init": 2.0, "step": 24.0}),
        event("start", 30, age=2.0, step=16),
        event("seconds", 40, step=24, seconds={"init": 3.0, "step": 9.0}),
    ]
    found = goodput(events)
    assert found["steps_lost"] == 8
    assert found["seconds"]["lost"] == pytest.approx(8)
    assert found["seconds"]["step"] == pytest.approx(8 + 8 + 9)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"]) == pytest.approx(40)


def test_a_hang_that_each_machine_tells_of_is_one():
    events = [
        event("start", 1, age=1.0, step=0),
        event("seconds", 10, step=9, seconds={"init": 1.0, "step": 9.0}),
        event("hang", 70, seconds=60.0),
        event("hang", 71, seconds=58.0),
        event("start", 205, age=5.0, step=9),
    ]
    found = goodput(events)
    assert found["seconds"]["hang"] == pytest.approx(60)
    assert found["seconds"]["restart"] == pytest.approx(130)


def told(at, step, init, steps, data=0.0):
    return event("seconds", at, step=step, seconds={"init": init, "step": steps, "data": data})


def test_goodput_of_a_return_to_before_the_attempt_began():
    """Steps 1 to 100 at 1 s, to 150 at 2 s in the second attempt; the third falls back to 50, and the fourth to 70."""
    events = [
        event("start", 10, age=10.0, step=0),
        told(60, 50, 10.0, 40.0, 10.0),
        told(110, 100, 10.0, 80.0, 20.0),
        event("start", 120, age=10.0, step=100),
        told(220, 150, 10.0, 100.0),
        event("start", 230, age=10.0, step=50),
        told(260, 80, 10.0, 30.0),
        event("start", 270, age=10.0, step=70),
        told(350, 150, 10.0, 80.0),
    ]
    found = goodput(events)
    assert found["steps_lost"] == 50 + 50 + 10
    assert found["seconds"]["lost"] == pytest.approx(50 + 100 + 10)
    assert found["seconds"]["step"] == pytest.approx(40 + 20 + 80)
    assert found["seconds"]["data"] == pytest.approx(10)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"]) == pytest.approx(350)


def test_goodput_of_a_rollback_to_before_the_attempt_began():
    """From 25 in an attempt of 20 on back to 10, the middle of a stretch; again from 15; and to 0 by a kill."""
    events = [
        event("start", 1, age=1.0, step=0),
        told(21, 20, 1.0, 20.0),
        event("start", 22, age=1.0, step=20),
        told(32, 25, 1.0, 10.0),
        event("rollback", 32, from_step=25, to_step=10),
        told(42, 15, 1.0, 20.0),
        event("rollback", 42, from_step=15, to_step=10),
    ]
    found = goodput(events)
    assert found["steps_lost"] == 10 + 5 + 5
    assert found["seconds"]["lost"] == pytest.approx(10 + 10 + 10)
    events += [event("start", 43, age=1.0, step=0), told(63, 20, 1.0, 20.0)]
    found = goodput(events)
    assert found["steps_lost"] == 20 + 10
    assert found["seconds"]["lost"] == pytest.approx(40)
    assert found["seconds"]["step"] == pytest.approx(20)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"]) == pytest.approx(63)


def test_a_hang_that_was_told_of_as_a_step_is_a_hang():
    """The rank that was stopped is woken for its stack, and both tell of the step that lasted 20 s before they are ended."""
    events = [
        event("start", 2, age=2.0, step=0),
        event("seconds", 12, step=10, seconds={"init": 2.0, "step": 10.0}),
        event("seconds", 33, step=11, seconds={"init": 2.0, "step": 31.0}),
        event("hang", 34, seconds=20.0),
        event("start", 40, age=3.0, step=10),
        event("seconds", 50, step=20, seconds={"init": 3.0, "step": 10.0}),
    ]
    found = goodput(events)
    assert found["seconds"]["hang"] == pytest.approx(20)
    assert found["seconds"]["step"] == pytest.approx(20)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"]) == pytest.approx(50)
