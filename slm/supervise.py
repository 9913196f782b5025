"""`slm train --restarts N`: runs a training command again when it ends in a way that can pass.

Owns the decision and the waiting; the run itself goes on from its newest checkpoint by the same command. It knows the run
by what it writes (metrics.jsonl, its exit record), so one process, our launcher, torchrun and mpirun are all the same to it.

    code = supervise([sys.executable, "-m", "slm", "train", "recipes/demo.yaml"], Path("runs/demo"), restarts=3)
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from slm.metrics import append_event
from slm.runtime import EXIT_CODES, EXIT_FILE_VARIABLE, setup_logging
from slm.status import has_saved, json_object, newest_suspect

log = logging.getLogger("slm")

# What the same command again would not mend: done, a mistake, a lack, a broken file, or for somebody to look at.
_FINAL_CODES = frozenset({0, 2, 3, 4, 75, 76, 77, 78})
LEAVE_SUSPECTS = "SLM_LEAVE_SUSPECTS"  # in the environment: who started us leaves a node out that a run blames (job.py)
_TIMES_AT_ONE_STEP = 3  # then it is no accident
_LONGEST_WAIT_SECONDS = 60.0
_TAIL_BYTES = 1 << 16
_LOOK_SECONDS = 10.0  # between two looks for a checkpoint


def supervise(command: list[str], run_dir: Path, restarts: int) -> int:
    """Runs the command, at most `restarts` times again; returns the code of the last attempt: what the run has written,
    since torchrun says 1 for everything, else what the command said.

    Signals go to the command, after which there is no other attempt. It dies with us (where there is prctl): by SIGTERM,
    so that it saves.
    """
    with tempfile.TemporaryDirectory(prefix="slm-restarts-") as folder:
        child = _Child(Path(folder))
        code = _supervise(child, command, run_dir, restarts)
        if EXIT_FILE_VARIABLE in os.environ and child.exit_file.exists():  # a launcher waits for us, too
            shutil.copy(child.exit_file, os.environ[EXIT_FILE_VARIABLE])
    return code


def _supervise(child: _Child, command: list[str], run_dir: Path, restarts: int) -> int:
    setup_logging(0, None)
    failed_step, times_at_step = -1, 0
    for attempt in range(restarts + 1):
        earlier = json_object(run_dir / "exit.json")
        code = child.run(command, run_dir)
        # The run's folder is for ranks that cannot write our file, as on another machine. An attempt may end before it
        # removes the record of the one before.
        record = json_object(child.exit_file) or json_object(run_dir / "exit.json")
        record = {} if record == earlier else record
        code = record.get("code", code)
        # A rank that is told to stop saves and says so (75), but in its first seconds, when it just ends.
        told_to_stop = not record and code in (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
        if code in _FINAL_CODES or child.arrived or told_to_stop:
            return code
        if LEAVE_SUSPECTS in os.environ and newest_suspect(run_dir):  # on the same nodes it would only happen again
            return code
        reason = _why(code, record)
        step = last_step(run_dir)
        times_at_step = times_at_step + 1 if step == failed_step else 1
        failed_step = step
        if times_at_step == _TIMES_AT_ONE_STEP:
            log.error(
                "given up: %d attempts in a row ended after step %d (%s). That is no accident: see %s/logs",
                times_at_step, step, reason, run_dir,
            )  # fmt: skip
            return code
        if attempt == restarts:
            log.error("given up after %d restarts; the last attempt ended after step %d: %s", restarts, step, reason)
            return code
        if child.has_saved and "--must-resume" not in command:  # were its folder gone, it would begin anew
            command = [*command, "--must-resume"]
        seconds = min(_LONGEST_WAIT_SECONDS, 2.0**attempt)
        if run_dir.is_dir():
            setup_logging(0, run_dir)  # from now on also in the run's own log
        log.warning(
            "attempt %d ended after step %d: %s. Restart %d of %d in %g s",
            attempt + 1, step, reason, attempt + 1, restarts, seconds,
        )  # fmt: skip
        began = time.monotonic()
        if child.sleep(seconds):
            log.info("%s: not started again", signal.Signals(child.arrived[-1]).name)
            return 128 + child.arrived[-1]
        down = time.monotonic() - began
        try:
            append_event(run_dir, "restart", why=reason, code=code, step=step, seconds_down=round(down, 2))
        except OSError as error:
            log.warning("events.jsonl could not be written: %s", error)
    raise AssertionError


class _Child:
    """The command's process, and the signals that came for it. folder: for exit_file, of each attempt another."""

    def __init__(self, folder: Path) -> None:
        self.exit_file, self._folder = folder / "none", folder
        self.arrived: list[int] = []
        self.has_saved = False
        self._process: subprocess.Popen[bytes] | None = None
        wanted = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup: let it be so
            wanted.append(signal.SIGHUP)
        for number in wanted:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.arrived.append(number)
        if self._process is not None and self._process.returncode is None:
            os.kill(self._process.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    def run(self, command: list[str], run_dir: Path) -> int:
        """The command's code. Looks now and then whether the run has a checkpoint: afterwards its folder may be gone."""
        self.exit_file = self._folder / f"exit-{time.monotonic_ns()}.json"
        # A session of its own: Ctrl-C in a terminal then arrives once, through us.
        env = {**os.environ, EXIT_FILE_VARIABLE: str(self.exit_file)}
        self._process = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_end_with_parent)
        for number in self.arrived:  # between two attempts
            self._process.send_signal(number)
        while (code := self._poll(run_dir)) is None:
            pass
        return code if code >= 0 else 128 - code  # as a shell says it

    def _poll(self, run_dir: Path) -> int | None:
        assert self._process is not None
        try:
            return self._process.wait(_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.has_saved = self.has_saved or has_saved(run_dir)

    def sleep(self, seconds: float) -> bool:
        """True if a signal came."""
        deadline = time.monotonic() + seconds
        while not self.arrived and time.monotonic() < deadline:
            time.sleep(0.05)
        return bool(self.arrived)


def _end_with_parent() -> None:
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, prctl(2)
    except (OSError, AttributeError):  # not Linux
        pass


def last_step(run_dir: Path) -> int:
    """The last step that the run has logged, 0 if none."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut short by a kill
            continue
    return 0


def _why(code: int, record: dict[str, Any]) -> str:
    if record:
        return f"{str(record['reason']).partition(chr(10))[0]} (code {code})"
    if 128 < code <= 128 + signal.SIGRTMAX:
        return f"ended by {signal.Signals(code - 128).name}" + " (out of memory?)" * (code == 128 + signal.SIGKILL)
    return f"code {code}" + (f", {EXIT_CODES[code]}" if code in EXIT_CODES else ", without a word of why")
