"""Rows 1 and 28: a rank that is killed ends the run at once; --restarts brings it to the uninterrupted run's weights."""

import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.distributed.test_launcher import processes_of, wait_until
from tests.faults.runs import ROOT, digest, environment, events, run, starter


def supervised(recipe, faults, ranks, *options, restarts=3):
    """The code of `slm train --restarts`; nothing of it may be left."""
    command = [sys.executable, "-m", "slm", "train", str(recipe), *options, "--restarts", str(restarts)]
    command += ["--launcher", shlex.join(starter(recipe, faults, ranks))]
    try:
        code = subprocess.run(command, env=environment(), cwd=ROOT, timeout=280).returncode
        assert not processes_of(recipe)
    finally:
        for process in processes_of(recipe):
            process.kill()
    return code


@pytest.mark.slow
@pytest.mark.parametrize("place", ["forward", "backward", "step"])
def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(recipe, straight, place):
    """SIGKILL of rank 1 in the forward, the backward and the optimiser step: the other rank and the launcher are gone within
    15 seconds, the code is not 0, nothing is left, and the same command ends as the uninterrupted run."""
    code, printed = run(recipe, f"kill-{place}@1:7")
    ended = time.time()
    killed = (recipe.with_name("counts") / f"kill-{place}@1:7").stat().st_mtime
    assert code not in (0, 75)
    assert ended - killed < 15
    assert "was ended by SIGKILL" in printed
    assert "rank 1 has gone" in printed
    assert run(recipe)[0] == 0
    assert digest(recipe.with_name("run")) == straight(2)


def test_killed_twice_from_outside_the_run_still_comes_to_the_same(recipe, straight):
    """One process under --restarts: SIGKILL in two attempts, two restarts, the uninterrupted run's weights and code 0."""
    rests = "rest-forward@0:12*2"  # in step 6, where it is killed; the third attempt goes through
    command = [sys.executable, "-m", "slm", "train", str(recipe), "--restarts", "3", "watchdog.step_seconds=0"]
    command += ["--launcher", shlex.join(starter(recipe, rests, 1))]
    count = recipe.with_name("counts") / rests.replace("*", "x")
    with subprocess.Popen(command, env=environment(FAULT_SECONDS="1000"), cwd=ROOT) as process:
        try:
            for number in ("1", "2"):
                wait_until(lambda number=number: count.exists() and count.read_text() == number, 150)
                (child,) = psutil.Process(process.pid).children()
                child.kill()
            assert process.wait(120) == 0
            assert not processes_of(recipe)
        finally:
            for left in processes_of(recipe):
                left.kill()
    restarts = events(recipe.with_name("run"), "restart")
    assert len(restarts) == 2
    for number, event in enumerate(restarts):
        assert event["code"] == 128 + signal.SIGKILL
        assert "SIGKILL" in event["why"]
        assert 2**number <= event["seconds_down"] < 2**number + 1
    log = (recipe.with_name("run") / "logs" / "rank-0.log").read_text()
    assert "Restart 2 of 3" in log
    assert digest(recipe.with_name("run")) == straight(1)


@pytest.mark.slow
def test_many_ranks_by_local_sh(recipe, straight):
    """launchers/local.sh RECIPE 2 --restarts N: rank 1 killed from outside, started again, the uninterrupted run's weights."""
    command = ["bash", str(ROOT / "launchers" / "local.sh"), str(recipe), "2", "--restarts", "2"]
    metrics = recipe.with_name("run") / "metrics.jsonl"
    with subprocess.Popen(command, env=environment(PYTHON=sys.executable), cwd=ROOT) as process:
        try:
            wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, 150)
            ranks = [p for p in processes_of(recipe) if p.environ().get("RANK") == "1"]
            os.kill(ranks[0].pid, signal.SIGKILL)
            assert process.wait(200) == 0
            assert not processes_of(recipe)
        finally:
            for left in processes_of(recipe):
                left.kill()
    assert len(events(recipe.with_name("run"), "restart")) == 1
    assert digest(recipe.with_name("run")) == straight(2)


@pytest.mark.slow
def test_a_crash_at_the_same_step_three_times_is_given_up(recipe, capfd):
    """Five restarts are allowed and two are used."""
    assert supervised(recipe, "crash-forward@0:5*9", 1, restarts=5) == 5
    assert len(events(recipe.with_name("run"), "restart")) == 2
    assert "given up: 3 attempts in a row ended after step" in capfd.readouterr().err
