"""What a run's folder tells of it: the columns of metrics.jsonl, evaluations, events, recipe, how it ended.

Owns the reading, which takes a folder as it is: of a run that goes on, that was killed in the middle of a line, that went
back, or of which a file is damaged or missing. It judges and draws nothing.

    record = read_record(Path("runs/demo"))
    record.columns["loss"].steps, record.columns["loss"].values
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml

from slm import strict_yaml
from slm.ledger import goodput, read_events

_LARGEST_STEP = 1 << 53  # beyond it a float64 does not hold a step


@dataclass(frozen=True)
class Column:
    """One name of metrics.jsonl. steps rise; values [same length] are nan where JSON had null: a number that was not finite."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Span:
    """The steps of a phase that were told of: after `first`, up to and with `last`."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Evaluation:
    """RUN/eval/PHASE-STEP.json (findings.as_dict); step is the phase's own."""

    phase: str
    step: int
    found: dict[str, Any]


@dataclass(frozen=True)
class Afterwards:
    """RUN/eval/KIND-PHASE-STEP.json (afterwards.py): what a suite or a text told of a checkpoint; step is the phase's own."""

    kind: str  # suite, text
    phase: str
    step: int
    results: dict[str, Any]


@dataclass
class Record:
    folder: Path
    columns: dict[str, Column] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    damaged_lines: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, Any] = field(default_factory=dict)  # ledger.goodput
    evaluations: list[Evaluation] = field(default_factory=list)
    afterwards: list[Afterwards] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    exit: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.resolve().name)

    @property
    def phases(self) -> list[dict[str, Any]]:
        phases = self.recipe.get("phases")
        return [p for p in phases if isinstance(p, dict)] if isinstance(phases, list) else []

    @property
    def last_step(self) -> int:
        return max((int(c.steps[-1]) for c in self.columns.values()), default=0)

    def last(self, name: str) -> float | None:
        """The newest value that is a number."""
        column = self.columns.get(name)
        if column is None or not np.isfinite(column.values).any():
            return None
        return float(column.values[np.isfinite(column.values)][-1])

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """How many tokens were trained on by then; between two lines of metrics.jsonl as if evenly."""
        column = self.columns.get("tokens")
        if column is None:
            return np.full(len(steps), math.nan)
        tokens = np.maximum.accumulate(np.nan_to_num(column.values))
        return np.interp(steps, [0, *column.steps], [0, *tokens])


def read_record(folder: Path) -> Record:
    """Raises UserError if the folder is no run that has begun."""
    events = read_events(folder)
    record = Record(folder, events=events, seconds=goodput(events), exit=_json(folder / "exit.json"))
    record.columns, record.spans, record.damaged_lines = read_metrics(folder / "metrics.jsonl")
    try:
        record.recipe_text = (folder / "recipe.yaml").read_text(errors="replace")[: strict_yaml.MAX_CHARACTERS]
        tree, _ = strict_yaml.load(record.recipe_text)
        record.recipe = tree if isinstance(tree, dict) else {}
    except (OSError, yaml.YAMLError):
        pass
    phases = [str(phase.get("name")) for phase in record.phases]
    record.evaluations, record.afterwards = _evaluations(folder, phases), _afterwards(folder, phases)
    return record


def read_metrics(path: Path) -> tuple[dict[str, Column], list[Span], int]:
    """(columns by name, spans of phases, lines that were none). Of steps that were computed again the newest value counts."""
    steps: dict[str, array[int]] = {}
    values: dict[str, array[float]] = {}
    changes: list[tuple[int, str]] = []  # the first step that a line of another phase than before was written for
    damaged, newest = 0, -1
    for row in _lines(path):
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _LARGEST_STEP:
            damaged += 1
            continue
        if step < newest:  # gone back: what was after it no longer counts
            for name, at in steps.items():
                keep = bisect_left(at, step)
                del at[keep:], values[name][keep:]
            changes = [change for change in changes if change[0] < step]
        newest = step
        phase = row.get("phase")
        if isinstance(phase, str) and (not changes or changes[-1][1] != phase):
            changes.append((step, phase))
        for name, value in row.items():
            if name in ("step", "time") or isinstance(value, str | bool | dict | list):
                continue
            at = steps.setdefault(name, array("q"))
            into = values.setdefault(name, array("d"))
            if at and at[-1] == step:
                del at[-1], into[-1]
            at.append(step)
            into.append(math.nan if value is None else float(value))
    columns = {name: Column(np.array(at), np.array(values[name])) for name, at in steps.items() if at}
    return columns, _spans(changes, steps.get("loss", array("q"))), damaged


def _spans(changes: list[tuple[int, str]], logged: array[int]) -> list[Span]:
    """A phase ends with its last line, which is always of its last step; the next one begins there."""
    spans: list[Span] = []
    for i, (_, name) in enumerate(changes):
        end = bisect_left(logged, changes[i + 1][0]) if i + 1 < len(changes) else len(logged)
        first = spans[-1].last if spans else 0
        spans.append(Span(name, first, logged[end - 1] if end else first))
    return spans


def _lines(path: Path) -> Iterator[Any]:
    """Each line's value; None for one that is no JSON."""
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    try:
                        yield orjson.loads(line)
                    except ValueError:  # cut short by a kill, or damaged
                        yield None
    except OSError:
        return


def _evaluations(folder: Path, phases: list[str]) -> list[Evaluation]:
    """By the order of the phases, and by step."""
    found = []
    for path in folder.glob("eval/*.json"):
        phase, _, step = path.stem.rpartition("-")
        tree = _json(path)
        if phase and step.isdigit() and isinstance(tree.get("loss"), dict):
            found.append(Evaluation(phase, int(step), tree))
    place = {name: i for i, name in enumerate(phases)}
    return sorted(found, key=lambda e: (place.get(e.phase, len(place)), e.phase, e.step))


def _afterwards(folder: Path, phases: list[str]) -> list[Afterwards]:
    """By kind, by the order of the phases, and by step."""
    found = []
    for path in folder.glob("eval/*.json"):
        kind, _, rest = path.stem.partition("-")
        phase, _, step = rest.rpartition("-")
        results = _json(path).get("results")
        if kind in ("suite", "text") and phase and step.isdigit() and isinstance(results, dict):
            found.append(Afterwards(kind, phase, int(step), results))
    place = {name: i for i, name in enumerate(phases)}
    return sorted(found, key=lambda a: (a.kind, place.get(a.phase, len(place)), a.phase, a.step))


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
