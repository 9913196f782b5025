"""The progress of a training phase and of a teacher: a bar on a terminal, a line now and then elsewhere.

progress = StepProgress("quickstart/main", total=400, done=0, enabled=rank == 0)
progress.update(10, loss=5.1, tokens_per_second=20000)
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from slm.runtime import terminal

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger("slm")

_SECONDS_BETWEEN_LINES = 10.0


class _Progress:
    """A bar on a terminal; else none, and lines are the subclass's."""

    def __init__(self, title: str, total: int, done: int, enabled: bool) -> None:
        self._title, self._total, self._enabled = title, total, enabled
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=terminal())
            self._task = self._bar.add_task(title, total=total, completed=done, note="")
            self._bar.start()

    def _draw(self, **fields: Any) -> None:
        assert self._bar is not None
        try:
            self._bar.update(self._task, **fields)
        except OSError:  # the terminal was closed, and the run goes on under nohup
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
            self._bar = None


class StepProgress(_Progress):
    def __init__(self, title: str, total: int, done: int, *, enabled: bool) -> None:
        super().__init__(title, total, done, enabled)
        self._first = done
        self._started = self._last_line = time.monotonic()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """`step` steps of the phase are done."""
        note = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._draw(completed=step, note=note)
        elif self._enabled and (time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES or step == self._total):
            self._last_line = time.monotonic()
            left = (self._last_line - self._started) / max(1, step - self._first) * (self._total - step)
            log.info("%s step %d/%d  %s  %s left", self._title, step, self._total, note, timedelta(seconds=round(left)))

    def evaluating(self, num_batches: int) -> None:
        """An evaluation within the phase has done so many batches."""
        if self._bar is not None:
            self._draw(note=f"evaluating: {num_batches} batches done")
        elif self._enabled and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            log.info("%s evaluating: %d batches done", self._title, num_batches)


class TokenProgress(_Progress):
    """Tokens, or other units, done by this process and by others that share the work; the rate is of all since the start."""

    def __init__(self, title: str, total: int, *, enabled: bool, unit: str = "tokens") -> None:
        super().__init__(title, total, 0, enabled)
        self._unit = unit
        self.done = 0
        self._began: tuple[float, int] | None = None  # after what was there already
        self._last_line = 0.0

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began = (now, done)
        ended, self.done = done == self._total != self.done, done
        began, first = self._began
        rate = (done - first) / max(1e-9, now - began)
        note = f"{rate:,.{0 if rate >= 10 else 1}f} {self._unit}/s"
        if self._bar is not None:
            self._draw(completed=done, note=note)
        elif self._enabled and (now - self._last_line > _SECONDS_BETWEEN_LINES or ended):
            self._last_line = now
            left = f"  {timedelta(seconds=round((self._total - done) / rate))} left" if rate > 0 else ""
            told = f"{done:,} of {self._total:,} {self._unit}"
            log.info("%s: %s  %s%s", self._title, told, note, left)
