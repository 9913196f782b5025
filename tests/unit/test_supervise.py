"""supervise.py: which ends are tried again, when it gives up, what it passes on. The commands are small programs."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slm.supervise import last_step, supervise

ROOT = Path(__file__).parents[2]

# A run: each attempt logs one step more than the one before began with, if told so, and ends as told.
RUN = """
import json, os, pathlib, signal, sys, time
run_dir, ends, progress = pathlib.Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
attempts = run_dir / "attempts"
number = int(attempts.read_text()) if attempts.exists() else 0
attempts.write_text(str(number + 1))
with open(run_dir / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": 3 + number * progress}) + "\\n")
end = int(ends[min(number, len(ends) - 1)])
if end < 0:
    os.kill(os.getpid(), -end)
sys.exit(end)
"""


@pytest.fixture
def signals():
    """What supervise takes over for the life of its process, given back."""
    names = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in names}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def attempt(tmp_path, ends, restarts=5, progress=1):
    """(code, number of attempts)"""
    code = supervise([sys.executable, "-c", RUN, str(tmp_path), ends, str(progress)], tmp_path, restarts)
    return code, int((tmp_path / "attempts").read_text())


@pytest.mark.parametrize("code", [0, 2, 3, 4, 75, 76, 77, 78])
def test_what_the_same_command_would_not_mend_is_not_tried_again(tmp_path, signals, code):
    """Done, a mistake, a lack, a broken file, stopped, diverged, out of memory, a gate."""
    assert attempt(tmp_path, str(code)) == (code, 1)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_run_that_had_saved_does_not_begin_anew_when_its_folder_is_gone(tmp_path, signals):
    """The next attempt is told --must-resume; before a checkpoint it is not."""
    told = tmp_path / "told"
    program = """
import pathlib, shutil, sys
run, told = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
told.write_text((told.read_text() if told.exists() else "") + " ".join(sys.argv[3:]) + ";")
count = told.read_text().count(";")
if count == 2:
    (run / "checkpoints" / "main-00000004").mkdir(parents=True)
    (run / "checkpoints" / "main-00000004" / "manifest.json").write_text("{}")
sys.exit(0 if count == 3 else 5)
"""
    assert supervise([sys.executable, "-c", program, str(tmp_path / "run"), str(told)], tmp_path / "run", 5) == 0
    assert told.read_text() == ";;--must-resume;"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_told_to_stop_in_its_first_seconds_is_not_started_again(tmp_path, signals, number):
    """By somebody else than us, as SLURM tells its tasks: there is nothing to save yet, so it ends by the signal."""
    assert attempt(tmp_path, str(-number)) == (128 + number, 1)


def test_what_can_pass_is_tried_again(tmp_path, signals):
    """A crash, SIGKILL; then done. Each restart is an event with why and how long, and in the log."""
    assert attempt(tmp_path, "5,-9,0") == (0, 3)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["code"], e["step"]) for e in events] == [("restart", 5, 3), ("restart", 137, 4)]
    assert "crashed" in events[0]["why"]
    assert "SIGKILL" in events[1]["why"]
    assert events[0]["seconds_down"] < events[1]["seconds_down"] < 3
    assert "Restart 2 of 5 in 2 s" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_it_gives_up_at_the_third_end_at_one_step(tmp_path, signals, capsys):
    """Of five restarts two are used: what fails at the same step three times is no accident."""
    assert attempt(tmp_path, "79", progress=0) == (79, 3)
    assert "given up: 3 attempts in a row ended after step 3" in capsys.readouterr().err


def test_it_gives_up_after_so_many_restarts(tmp_path, signals, capsys):
    """Also where each attempt comes further."""
    assert attempt(tmp_path, "5", restarts=1) == (5, 2)
    assert "given up after 1 restarts" in capsys.readouterr().err


# Ranks that say by their exit record how they ended, and leave with a code that says it as well.
RANKS = """
import os, pathlib, sys
from slm.runtime import RunLock, write_exit
run_dir, record, code = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if os.environ.get("RANK", "0") == "0":
    RunLock(run_dir)
    with open(run_dir / "attempts", "a") as file:
        file.write("x")
if sys.argv[4] == "elsewhere":  # as on another machine
    del os.environ["SLM_EXIT_FILE"]
write_exit(run_dir, record, "as told")
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("record", "code", "attempts"), [(75, 1, 1), (2, 1, 1), (5, 0, 2), (0, 1, 1), (79, 1, 2)], ids=str
)
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_what_the_run_has_written_counts_and_not_what_its_launcher_says(
    tmp_path, signals, monkeypatch, record, code, attempts, where
):
    """Whether it is tried again, and the code in the end. A record of an earlier run in the folder is none."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "exit.json").write_text(json.dumps({"code": 5, "reason": "earlier"}))
    command = [sys.executable, "-c", RANKS, str(tmp_path), str(record), str(code), where]
    assert supervise(command, tmp_path, 1) == record
    assert len((tmp_path / "attempts").read_text()) == attempts
    if attempts == 2:
        assert "as told" in json.loads((tmp_path / "events.jsonl").read_text())["why"]


def test_a_record_of_an_earlier_attempt_is_none_of_this_one(tmp_path, signals):
    """Which was killed before it could remove it."""
    (tmp_path / "exit.json").write_text(json.dumps({"code": 75, "reason": "earlier"}))
    assert attempt(tmp_path, "-9,0") == (0, 2)


def test_a_run_that_stopped_under_torchrun_is_not_started_again(tmp_path, signals, monkeypatch):
    """Two ranks stop in order and torchrun says 1. A launcher around the supervisor learns it, too."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SLM_EXIT_FILE", str(tmp_path / "outer.json"))
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert supervise([*torchrun, str(tmp_path / "ranks.py"), str(tmp_path), "75", "75", "here"], tmp_path, 2) == 75
    assert (tmp_path / "attempts").read_text() == "x"
    assert json.loads((tmp_path / "outer.json").read_text())["code"] == 75


SUPERVISE = (
    "import sys, pathlib; from slm.supervise import supervise;"
    "sys.exit(supervise(sys.argv[2:], pathlib.Path(sys.argv[1]), 3))"
)


def supervised(tmp_path, code):
    """A supervisor in a process of its own, over a program whose first line is its process id in tmp_path/pid."""
    program = (
        "import os, pathlib, signal, sys, time\n"
        f"file = pathlib.Path({str(tmp_path)!r}) / 'pid'\n"
        f"{code}\n"
        "file.with_suffix('.tmp').write_text(str(os.getpid())); file.with_suffix('.tmp').rename(file)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", SUPERVISE, str(tmp_path), sys.executable, "-c", program]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "pid").exists())
    return process, psutil.Process(int((tmp_path / "pid").read_text()))


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_passed_on_and_is_the_end(tmp_path, name):
    """The command ends as it likes, here by a crash, and is not started again."""
    process, child = supervised(tmp_path, f"signal.signal(signal.{name}, lambda *_: os._exit(5))")
    process.send_signal(getattr(signal, name))
    assert process.wait(20) == 5
    assert not child.is_running()


def test_a_signal_between_two_attempts_ends_the_waiting(tmp_path):
    """128 + its number, at once."""
    process, child = supervised(tmp_path, "")
    child.kill()
    wait_for(lambda: (tmp_path / "logs" / "rank-0.log").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert "not started again" in process.stderr.read()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_command_does_not_outlive_its_supervisor(tmp_path):
    """Killed itself, it leaves a command that is asked to save and stop."""
    process, child = supervised(tmp_path, "")
    process.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_the_last_step_of_a_run(tmp_path):
    """Of a log that a kill cut short; 0 where there is none."""
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5, "lo')
    assert last_step(tmp_path) == 4


def test_restarts_are_refused_in_each_rank_and_a_launcher_without_them():
    """A user's mistake, with the way that works."""
    base = [sys.executable, "-m", "slm", "train", "recipes/demo.yaml"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for more, variables, words in (
        (["--restarts", "2"], {"RANK": "0", "WORLD_SIZE": "2"}, "give --restarts N to launchers/local.sh"),
        (["--launcher", "mpirun -n 2 slm"], {}, "no effect without --restarts"),
        (["--restarts", "2", "--launcher", "torchrunn -m slm"], {}, "torchrunn is no program on the PATH"),
    ):
        done = subprocess.run([*base, *more], env={**env, **variables}, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_local_sh_in_a_folder_of_any_name(tmp_path):
    """Its launcher's command arrives word by word, also where the locale knows no é."""
    root = tmp_path / "é 'x' $y"
    (root / "launchers").mkdir(parents=True)
    script = shutil.copy(ROOT / "launchers" / "local.sh", root / "launchers")
    python = root / "python"  # says what `python -m slm` is given
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n'
        f"exec {sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"\n"
    )
    python.chmod(0o755)
    said = subprocess.run(
        ["bash", script, "r.yaml", "2", "--restarts", "1"], env={**os.environ, "LC_ALL": "C", "PYTHON": str(python)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    *words, launcher = json.loads(said)
    assert words == ["-m", "slm", "train", "r.yaml", "--restarts", "1", "--launcher"]
    launch = [str(python), str(root / "launchers" / "launch.py"), "--ranks", "2", "--module", "slm.cli"]
    assert shlex.split(launcher) == launch
