"""Where the seconds of a run went: every second of an attempt is in one category, and attempts are joined by `goodput`.

Owns the arithmetic of time; who writes it down is train.py (events of the kind "seconds"), who prints it cli.py.

    ledger = Ledger(process_age_seconds())
    with ledger.within("eval"): ...         # and then it is again what it was before
    metrics.event("seconds", step=100, **ledger.seconds())
    goodput(read_events(run_dir))           # {"wall": 3600.0, "seconds": {"step": 3300.0, "restart": 40.0, …}, …}

Categories: init (start-up, opening data, building and filling engines), compile (the first step of a phase whose blocks are
compiled), data (waiting for it), step, save (what training waits for), eval, check (comparing replicas), finish; and between
attempts: lost (steps that a later attempt, or a rollback, computed again), hang (a rank hung until the watchdog ended the
run), restart (from the last sign of life of an attempt to the first step of the next; also where the one before had done its
phase, and the next phase's job waited in a queue), idle (between the end of the last phase and the start of the next attempt:
nobody wanted the run to go on, until it was given more to do).
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slm.errors import UserError
from slm.runtime import process_start_ticks

WORK = ("step", "data")  # what is lost when steps are computed again


def process_age_seconds() -> float:
    """How long this process has been running."""
    try:
        started = process_start_ticks("self") / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError):
        return time.process_time()


class Ledger:
    """The seconds of an attempt by category; always in exactly one of them. age: how long it has been going on already."""

    def __init__(self, age_seconds: float = 0.0) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._category, self._since = "init", time.monotonic() - age_seconds

    def enter(self, category: str) -> None:
        now = time.monotonic()
        self._seconds[self._category] += now - self._since
        self._category, self._since = category, now

    @contextmanager
    def within(self, category: str) -> Iterator[None]:
        before = self._category
        self.enter(category)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Up to now, by category. Their sum is the age of the attempt."""
        self.enter(self._category)
        return {name: round(seconds, 6) for name, seconds in self._seconds.items()}


# --- over all attempts of a run ----------------------------------------------------------------------------------


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl that are events: not one that a kill cut short. Raises UserError where there is no such file."""
    path, events = run_dir / "events.jsonl", []
    if not run_dir.is_dir():
        what = "is a file, and a run is a folder" if run_dir.exists() else "does not exist"
        raise UserError(f"{run_dir} {what}", fix="give runs/NAME, a run's `output`")
    if not path.is_file():
        runs = sorted(str(events.parent) for events in run_dir.glob("*/events.jsonl"))
        raise UserError(
            f"{run_dir} has no events.jsonl, so it is no run that has begun",
            fix=f"give one of {', '.join(runs[:9])}" if runs else "give runs/NAME, a run's `output`",
        )
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if _is_event(event):
            events.append(event)
    return events


def _is_event(event: Any) -> bool:
    """Whether a line holds what `goodput` reads of its kind; a file may be damaged, or another tool's."""
    if (
        not isinstance(event, dict)
        or not isinstance(kind := event.get("kind"), str)
        or not _is_number(event.get("time"))
    ):
        return False
    if kind == "start":
        return _is_number(event.get("step")) and _is_number(event.get("age", 0.0))
    if kind == "seconds":
        spent = event.get("seconds")
        return _is_number(event.get("step")) and isinstance(spent, dict) and all(map(_is_number, spent.values()))
    if kind == "rollback":
        return _is_number(event.get("to_step"))
    return kind != "hang" or _is_number(event.get("seconds", 0.0))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e15  # no NaN either


def goodput(events: list[dict[str, Any]]) -> dict[str, Any]:
    """{"wall", "seconds" by category, "goodput", "attempts", "longest_gap", "steps_lost", "skipped", "rollbacks"}. Times in
    seconds.

    wall: from the start of the first process to the last event. The categories sum to it. goodput: the share in steps that
    were not computed again, of the wall without what was idle. longest_gap: between an attempt's last word and the next one's
    start, and the step there; None with one attempt.
    """
    attempts: list[list[dict[str, Any]]] = []
    for event in events:
        if event["kind"] == "start" and "age" in event:
            attempts.append([])
        if attempts:
            attempts[-1].append(event)
    total: dict[str, float] = defaultdict(float)
    hung_in_steps, gaps = 0.0, []
    for i, attempt in enumerate(attempts):
        told = [event for event in attempt if event["kind"] == "seconds"]
        spent = defaultdict(float, told[-1]["seconds"] if told else {})
        following = attempts[i + 1][0] if i + 1 < len(attempts) else None
        if i > 0:  # what an interruption cost besides: until the first step again
            total["restart"] += spent.pop("init", 0.0)
        for category, seconds in spent.items():
            total[category] += seconds
        # From the last time that seconds were told to the end of the attempt, as far as it is known, and to the next one.
        last_told = told[-1]["time"] if told else attempt[0]["time"] - attempt[0]["age"]
        # Each machine tells of the same hang.
        hung = max((event.get("seconds", 0.0) for event in attempt if event["kind"] == "hang"), default=0.0)
        end = following["time"] - following["age"] if following else max(last_told, attempt[-1]["time"])
        gap = max(0.0, end - last_told)
        # A rank that was woken to show where it was may have gone on a little, and told of the time as of a step.
        as_step = min(max(0.0, hung - gap), spent["step"])
        total["step"] -= as_step
        total["hang"] += min(hung, gap) + as_step
        hung_in_steps += as_step
        done = any(event["kind"] == "done" and not event.get("phases_left") for event in attempt)
        between = "idle" if done else "restart"
        total[between if following else "finish"] += gap - min(hung, gap)
        if following:
            gaps.append({"seconds": gap - min(hung, gap), "step": following["step"]})
    lost, steps_lost = _lost([event for attempt in attempts for event in attempt])
    lost["step"] = max(0.0, lost["step"] - hung_in_steps)  # the last steps of an attempt, that is, those lost
    for category in WORK:
        total[category] -= lost[category]
        total["lost"] += lost[category]
    wall = sum(total.values())
    seconds = {name: value for name, value in total.items() if value > 0}
    return {
        "wall": wall,
        "seconds": dict(sorted(seconds.items(), key=lambda item: -item[1])),
        "goodput": total["step"] / (wall - total["idle"]) if wall > total["idle"] else 0.0,
        "attempts": len(attempts),
        "longest_gap": max(gaps, key=lambda gap: gap["seconds"], default=None),
        "steps_lost": steps_lost,
        "skipped": sum(event["kind"] == "skip" for event in events),
        "rollbacks": sum(event["kind"] == "rollback" for event in events),
    }


def describe(found: dict[str, Any]) -> str:
    """What goodput returns, as a table with bars."""
    wall = found["wall"]
    if wall <= found["seconds"].get("idle", 0.0):
        return "no attempt of this run has told its time"
    idle = found["seconds"].get("idle", 0.0)
    busy = wall - idle  # the whole that all shares are of
    lines = [
        f"goodput {found['goodput']:.1%}: of {duration(busy)} "
        f"{'in' if found['attempts'] == 1 else 'over'} {counted(found['attempts'], 'attempt')}, so much was steps that count",
        "",
    ]
    for name, seconds in found["seconds"].items():
        if name != "idle":
            bar = "#" * round(40 * seconds / busy)
            lines.append(f"  {name:8} {duration(seconds):>10} {seconds / busy:7.2%}  {bar}")
    if idle:
        lines.append(f"  {'idle':8} {duration(idle):>10}  not counted: it was done, until it was given more to do")
    lines.append("")
    if gap := found["longest_gap"]:
        lines.append(
            f"longest time between two attempts: {duration(gap['seconds'])}, before the one from step {gap['step']}"
        )
    again = counted(found["steps_lost"], "step")
    lines.append(f"{again} computed again, {found['skipped']} skipped, {counted(found['rollbacks'], 'rollback')}")
    return "\n".join(lines)


def how_it_ended(run_dir: Path) -> str:
    """The run's last attempt, in words, by exit.json, which one that is still going on does not have."""
    try:
        record = json.loads((run_dir / "exit.json").read_text())
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["time"]))
        reason = str(record["reason"]).partition("\n")[0]
        return f"the last attempt ended at {when} with code {record['code']}: {reason}"
    except OSError:
        return "it is still running, or was killed without a word (there is no exit.json)"
    except (ValueError, KeyError, TypeError, OverflowError):
        return f"how the last attempt ended is not known: {run_dir / 'exit.json'} is damaged"


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    days = f"{counted(hours // 24, 'day')} " if hours >= 48 else ""
    return f"{days}{hours % 24 if days else hours}:{rest // 60:02}:{rest % 60:02}"


def _lost(events: list[dict[str, Any]]) -> tuple[dict[str, float], int]:
    """(seconds by category of WORK, steps) of what was computed again, in whichever attempt it was computed first."""
    lost, steps_lost = dict.fromkeys(WORK, 0.0), 0
    counting: list[tuple[int, int, dict[str, float]]] = []  # stretches of steps that were not: from, to, seconds
    step, before = 0, dict[str, float]()
    for event in events:
        if event["kind"] == "seconds":
            spent = {name: event["seconds"].get(name, 0.0) - before.get(name, 0.0) for name in WORK}
            counting.append((min(step, event["step"]), event["step"], spent))
            step, before = event["step"], event["seconds"]
        elif event["kind"] in ("start", "rollback"):
            step = event["to_step" if event["kind"] == "rollback" else "step"]
            before = before if event["kind"] == "rollback" else {}
            earlier, counting = counting, []
            for first, last, spent in earlier:
                kept_steps = min(last, max(first, step)) - first
                share = kept_steps / (last - first) if last > first else float(last <= step)
                counting.append((first, first + kept_steps, {name: share * spent[name] for name in WORK}))
                steps_lost += last - first - kept_steps
                for name in WORK:
                    lost[name] += (1 - share) * spent[name]
    return lost, steps_lost
