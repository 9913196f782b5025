"""Rows 23 and 24: what happens around a run does not touch it."""

import json
import os
import pty
import select
import signal
import subprocess
import time

import pytest

from tests.distributed.test_launcher import processes_of
from tests.faults.runs import ROOT, command, digest, environment, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault", ["logfull-forward@0:5", "clock-forward@0:5", ""])
def test_a_full_log_a_clock_set_back_and_wandb_offline(recipe, straight, fault):
    """The same losses and weights, code 0; a log that cannot be written is said once."""
    options = () if fault else ("log.wandb.project=t", "log.wandb.mode=offline")
    code, printed = run(recipe, fault, 1, *options)
    assert code == 0
    assert digest(recipe.with_name("run")) == straight(1)
    assert "Traceback" not in printed
    if "logfull" in fault:
        assert printed.count("cannot be written, the run goes on without") == 1
    if not fault:
        assert list((recipe.with_name("run") / "wandb").glob("offline-run-*"))


def test_a_log_folder_that_cannot_be_made(recipe, straight):
    """A file stands where the folder of logs should be: said, and training goes on."""
    recipe.with_name("run").mkdir()
    (recipe.with_name("run") / "logs").write_text("")
    code, printed = run(recipe, "", 1)
    assert code == 0
    assert "rank-0.log cannot be written" in printed
    assert "Traceback" not in printed
    assert digest(recipe.with_name("run")) == straight(1)


@pytest.mark.parametrize("shell", ["{} 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}", "{} >&- 2>&-"])
def test_a_closed_pipe_and_closed_streams(recipe, straight, shell):
    """Nobody reads what is printed, or there is no stdout and stderr at all."""
    line = shell.format(" ".join(command(recipe, "", 1)))
    done = subprocess.run(["bash", "-c", line], env=environment(), cwd=ROOT, timeout=200)
    assert done.returncode == 0
    assert json.loads((recipe.with_name("run") / "exit.json").read_text())["code"] == 0
    assert digest(recipe.with_name("run")) == straight(1)


def test_a_terminal_that_is_closed_under_nohup(recipe, straight):
    """The progress bar's terminal goes away, and SIGHUP comes, which nohup ignores."""
    ours, theirs = pty.openpty()
    metrics = recipe.with_name("run") / "metrics.jsonl"

    def ignore_hangup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = subprocess.Popen(
        command(recipe, "rest-forward@0:5,hup-forward@0:5", 1), env=environment(FAULT_SECONDS="2"), cwd=ROOT,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=ignore_hangup,
    )  # fmt: skip
    os.close(theirs)
    deadline = time.monotonic() + 150
    shown = b""
    try:
        while b"/12" not in shown or not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline, shown
            if select.select([ours], [], [], 0.05)[0]:
                shown += os.read(ours, 1 << 16)
        os.close(ours)
        assert process.wait(150) == 0
    finally:
        for left in processes_of(recipe):
            left.kill()
    assert digest(recipe.with_name("run")) == straight(1)


def test_hangup_without_nohup_saves_and_stops(recipe, straight):
    """As SIGTERM: a user who closes the terminal loses nothing."""
    assert run(recipe, "hup-forward@0:5", 1)[0] == 75
    assert run(recipe, "", 1)[0] == 0
    assert digest(recipe.with_name("run")) == straight(1)


def test_a_second_job_in_the_same_folder_is_refused(recipe, straight):
    """With the host and process of the first, by code 2, also under --restarts; the first loses nothing."""
    word = recipe.with_name("word")
    first = subprocess.Popen(
        command(recipe, "wait-forward@0:6", 2, "watchdog.step_seconds=0"), env=environment(FAULT_GO=str(word)), cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 150
        while not (recipe.with_name("counts") / "wait-forward@0:6").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        options = ["train", str(recipe), "--restarts", "3"]
        second = subprocess.run(
            [*command(recipe, "", 1)[:3], *options],
            env=environment(),
            cwd=ROOT,
            timeout=200,
            capture_output=True,
            text=True,
        )
        assert second.returncode == 2
        assert "run directory in use by another job" in second.stderr
        assert "Restart" not in second.stderr
        word.touch()
        assert first.wait(120) == 0
    finally:
        for left in processes_of(recipe):
            left.kill()
    assert digest(recipe.with_name("run")) == straight(2)
