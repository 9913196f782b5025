"""A bar of bytes on a terminal; elsewhere, such as in a job's log, a line every half minute.

with byte_progress("encoding", total=10_000_000) as advance:
    advance(4096)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from data_prep.corpus import human_bytes

_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def byte_progress(title: str, total: int, done: int = 0, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Gives the function to call with the number of bytes just finished. done: what an earlier run left.
    enabled: False shows nothing, for all ranks but one."""
    if not enabled:
        yield lambda size: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda size: bar.advance(task, size)
        return
    started = last = time.monotonic()
    now_done = done

    def advance(size: int) -> None:
        nonlocal last, now_done
        now_done += size
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES:
            last = now
            left = timedelta(seconds=round((now - started) / max(1, now_done - done) * (total - now_done)))
            print(f"{title}: {human_bytes(now_done)} of {human_bytes(total)}, {left} left", file=sys.stderr, flush=True)

    yield advance
