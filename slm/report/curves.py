"""The sections of the page that are curves over a run: losses, optimisation, speed and memory, the teacher's part.

Owns which columns of metrics.jsonl are shown and how. Of one run several columns stand in a chart; of several runs a chart
has one column and a line for each of them.

    losses(View.of([record], x="steps"))    # HTML
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm.errors import UserError
from slm.report.charts import Band, Line, Mark, line_chart, number, smooth
from slm.report.record import Column, Record

GIB = float(1 << 30)
_MOST_MARKS = 200


@dataclass(frozen=True)
class View:
    """The runs of a page, what to call them, and what the x axis counts: steps or tokens."""

    records: Sequence[Record]
    labels: Sequence[str]
    x: str

    @classmethod
    def of(cls, records: Sequence[Record], x: str) -> View:
        """Raises UserError if a run is given twice."""
        folders = [record.folder.resolve() for record in records]
        if len(set(folders)) < len(folders):
            twice = next(r.folder for r, f in zip(records, folders, strict=True) if folders.count(f) > 1)
            raise UserError(f"{twice} is given twice", fix="name each run once")
        names = [record.name for record in records]
        labels = [
            f"{name} ({r.folder})" if names.count(name) > 1 else name for name, r in zip(names, records, strict=True)
        ]
        return cls(records, labels, x)

    @property
    def is_one(self) -> bool:
        return len(self.records) == 1

    @property
    def x_label(self) -> str:
        return "step" if self.x == "steps" else "tokens"

    def places(self, record: Record, steps: np.ndarray) -> np.ndarray:
        return np.asarray(steps, dtype=float) if self.x == "steps" else record.tokens_at(steps)

    def bands(self) -> list[Band]:
        """Phases, where all runs have the same; a single phase needs no name."""
        found = [self._bands_of(record) for record in self.records]
        return found[0] if all(bands == found[0] for bands in found) and len(found[0]) > 1 else []

    def _bands_of(self, record: Record) -> list[Band]:
        edges = [self.places(record, np.array([span.first, span.last])).tolist() for span in record.spans]
        return [Band(span.name, *edge) for span, edge in zip(record.spans, edges, strict=True) if edge[1] > edge[0]]

    def marks(self) -> list[Mark]:
        """Of one run: steps that were skipped, gone back from, and started again at."""
        if not self.is_one:
            return []
        record = self.records[0]
        found: list[tuple[int, str, str]] = []
        for event in record.events:
            kind, step = event["kind"], event.get("from_step" if event["kind"] == "rollback" else "step")
            if not isinstance(step, int) or step > record.last_step:
                continue
            if kind == "skip":
                found.append((step, f"step {step} skipped: {event.get('reason')}", "bad"))
            elif kind == "rollback":
                found.append((step, f"gone back from step {step} to {event.get('to_step')}", "bad"))
            elif kind == "start" and step > 0:
                found.append((step, f"started again from step {step}", "note"))
        found = found[-_MOST_MARKS:]
        places = self.places(record, np.array([step for step, _, _ in found])).tolist()
        return [Mark(x, label, kind) for x, (_, label, kind) in zip(places, found, strict=True)]

    # --- lines -------------------------------------------------------------------------------------------
    def curve(
        self, record: Record, column: Column | None, label: str, colour: int, *, noisy: bool = False, scale: float = 1.0
    ) -> list[Line]:
        """[] without the column. noisy: a smoothed line over what was measured, each phase by itself."""
        if column is None:
            return []
        x, y = self.places(record, column.steps), column.values * scale
        if not noisy or len(y) < 60:
            return [Line(label, x, y, colour, dots=len(y) == 1)]
        edges = np.searchsorted(column.steps, [span.last for span in record.spans[:-1]], side="right")
        parts = [smooth(part, max(3, len(y) // 60)) for part in np.split(y, edges)]
        return [Line(label, x, np.concatenate(parts), colour, raw=y)]

    def of_all(self, name: str, label: str, *, noisy: bool = False, scale: float = 1.0) -> list[Line]:
        """This column of each run; of one run named `label`, of several as they are."""
        return [
            line
            for i, (record, run) in enumerate(zip(self.records, self.labels, strict=True))
            for line in self.curve(
                record, record.columns.get(name), label if self.is_one else run, i, noisy=noisy, scale=scale
            )
        ]

    def evaluated(self, record: Record, name: str, label: str, colour: int, *, gaps: bool = False) -> list[Line]:
        """eval/NAME, with start/NAME before the first step of a phase. gaps: between phases, which measure other things."""
        segments: dict[int, list[tuple[int, float]]] = {}
        firsts = [span.first for span in record.spans] or [0]
        for kind, side in (("start", "right"), ("eval", "left")):
            if (column := record.columns.get(f"{kind}{name}")) is not None:
                phases = np.searchsorted(firsts, column.steps, side=side) - 1  # type: ignore[call-overload]
                for phase, step, value in zip(
                    phases.tolist(), column.steps.tolist(), column.values.tolist(), strict=True
                ):
                    segments.setdefault(phase, []).append((step, value))
        points: list[tuple[float, float]] = []
        for phase in sorted(segments):
            points += [(math.nan, math.nan)] * (gaps and bool(points)) + sorted(segments[phase])
        if not points:
            return []
        steps, values = np.array(points).T
        steps = np.where(
            np.isnan(steps), np.concatenate([[0], steps[:-1]]), steps
        )  # a gap stands where the phase ended
        return [Line(label, self.places(record, steps), values, colour, dots=True)]

    def chart(self, title: str, lines: list[Line], *, legend: bool = False, **options: Any) -> str:
        return line_chart(
            title, lines, x_label=self.x_label, bands=self.bands(), legend=legend or not self.is_one, **options
        )


def grid(charts: Sequence[str], otherwise: str) -> str:
    """Small charts side by side where there is room; a sentence if there is none."""
    shown = [chart for chart in charts if chart]
    return f'<div class="grid2">{"".join(shown)}</div>' if shown else f'<p class="soft">{otherwise}</p>'


# ---------------------------------------------------------------------------------------------- the sections
def losses(view: View) -> str:
    """Training and held-out loss; held out by source; at other lengths."""
    first = view.records[0]
    if view.is_one:
        lines = view.of_all("loss", "training", noisy=True)
        lines += view.curve(first, first.columns.get("loss/ce"), "training, cross-entropy alone", 2, noisy=True)
        lines += view.evaluated(first, f"/{_sum_of(first)}/loss", "held out", 1, gaps=True)
    else:
        lines = view.of_all("loss", "training", noisy=True)
    faint = any(line.raw is not None for line in lines)
    marks = view.marks()
    note = (
        "Faint: as logged. The line, and what the mouse shows, is its mean over a thirtieth of the curve. "
        if faint
        else ""
    )
    note += (
        "At the foot: steps that were skipped or gone back from (red), and where it was started again." if marks else ""
    )
    title = "Loss" if view.is_one else "Training loss"
    charts = [view.chart(title, lines, unit="nats a token", log_y=True, tall=True, marks=marks, note=note)]
    if not any(charts):
        charts = ['<p class="soft">No step has been logged yet.</p>']
    return "".join(charts) + _held_out(view)


def _held_out(view: View) -> str:
    """Of one run all sources in one chart; of several, one chart for each source."""
    charts = []
    if view.is_one:
        record = view.records[0]
        sources = _sources(record)
        lines = [line for i, s in enumerate(sources) for line in view.evaluated(record, f"/{s}/loss", s, i, gaps=True)]
        if len(sources) > 1:  # a single one is in the chart above
            charts.append(view.chart("Held-out loss by source", lines, unit="nats a token", log_y=True))
        other = sorted(
            {m[1] for name in record.columns if (m := re.fullmatch(r"eval(@\d+)/.+/loss", name))}, key=_length
        )
        lines = [
            line
            for i, at in enumerate(other)
            for line in view.evaluated(record, f"{at}/{_sum_of(record)}/loss", f"{_length(at):,} tokens", i)
        ]
        charts.append(view.chart("Held-out loss at other lengths", lines, unit="nats a token", log_y=True, legend=True))
    else:
        for source in dict.fromkeys(s for record in view.records for s in _sources(record)):
            lines = [
                line
                for i, (record, label) in enumerate(zip(view.records, view.labels, strict=True))
                for line in view.evaluated(record, f"/{source}/loss", label, i, gaps=True)
            ]
            charts.append(view.chart(f"Held-out loss: {source}", lines, unit="nats a token", log_y=True))
    if view.is_one and _sources(view.records[0]) and not any(charts):
        return ""
    return grid(
        charts, "Nothing was evaluated yet; the recipe's data.validation and eval.every_steps say what and when."
    )


def _length(at: str) -> int:
    return int(at[1:])


def _sources(record: Record) -> list[str]:
    """Of held-out text; the sum of all only where there are several."""
    found = dict.fromkeys(m[1] for name in record.columns if (m := re.fullmatch(r"(?:eval|start)/(.+)/loss", name)))
    return [name for name in found if name != "all" or len(found) > 2]


def _sum_of(record: Record) -> str:
    sources = _sources(record)
    return sources[0] if len(sources) == 1 else "all"


def optimisation(view: View) -> str:
    charts = [
        view.chart("Learning rate", view.of_all("lr", "learning rate")),
        view.chart(
            "Gradient norm", view.of_all("grad_norm", "before clipping", noisy=True), unit="before clipping", log_y=True
        ),
    ]
    return grid(charts, "No step has been logged yet.")


def speed(view: View) -> str:
    """Throughput, utilisation, what a step's time goes to, memory."""
    per = "a second"
    charts = [
        view.chart(
            "Throughput", view.of_all("tokens_per_second", "tokens", noisy=True), unit=f"tokens {per}", zero=True
        )
    ]
    known = any("mfu/causal" in record.columns for record in view.records)
    kind, unit, scale = ("mfu", "of the peak", 1.0) if known else ("flops_per_second", *_flops_unit(view))
    title = "Model FLOPs utilisation" if known else "Model FLOPs"
    if view.is_one:
        record = view.records[0]
        shown = [("causal", "attended pairs"), ("full", "whole squares")]
        lines = []
        for i, (convention, label) in enumerate(shown):
            lines += view.curve(record, record.columns.get(f"{kind}/{convention}"), label, i, noisy=True, scale=scale)
        charts.append(view.chart(title, lines, unit=unit, zero=True))
        charts.append(_parts(view, record))
        memory = [("cuda_peak_allocated_bytes", "GPU, peak allocated"), ("cuda_peak_reserved_bytes", "GPU, peak reserved"),
                  ("peak_rss_bytes", "process, peak"), ("rss_bytes", "process")]  # fmt: skip
        memory = [(name, label) for name, label in memory if name in record.columns]
        lines = [line for i, (name, label) in enumerate(memory)
                 for line in view.curve(record, record.columns.get(name), label, i, scale=1 / GIB)]  # fmt: skip
        charts.append(view.chart("Memory of the first rank", lines, unit="GiB", zero=True))
    else:
        charts.append(
            view.chart(title, view.of_all(f"{kind}/causal", "", noisy=True, scale=scale), unit=unit, zero=True)
        )
        charts.append(
            view.chart("Time of a step", view.of_all("seconds/step", "", noisy=True), unit="seconds", zero=True)
        )
        on_gpu = any("cuda_peak_allocated_bytes" in record.columns for record in view.records)
        name = "cuda_peak_allocated_bytes" if on_gpu else "peak_rss_bytes"
        unit = "GiB, GPU, peak allocated" if on_gpu else "GiB, process, peak"
        charts.append(
            view.chart("Memory of the first rank", view.of_all(name, "", scale=1 / GIB), unit=unit, zero=True)
        )
    return grid(charts, "No step has been logged yet.")


def _flops_unit(view: View) -> tuple[str, float]:
    """(name, factor) that most values are a few hundreds of at the most."""
    largest = max((record.last("flops_per_second/causal") or 0.0 for record in view.records), default=0.0)
    name, size = next(((n, s) for n, s in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if largest >= s), ("M", 1e6))
    return f"{name}FLOP/s a device", 1 / size


def _parts(view: View, record: Record) -> str:
    parts = ["forward", "backward", "optimizer", "data", "teacher"]
    found = {part: record.columns.get(f"seconds/{part}") for part in parts}
    # What takes no time worth seeing would only be a line on the axis.
    longest = max((np.nanmax(c.values) for c in found.values() if c and np.isfinite(c.values).any()), default=0.0)
    told = {
        part: c
        for part, c in found.items()
        if c and np.isfinite(c.values).any() and np.nanmax(c.values) > longest / 100
    }
    lines = [line for i, (part, c) in enumerate(told.items())
             for line in view.curve(record, c, part, i, noisy=True, scale=1000)]  # fmt: skip
    return view.chart("Time of a step by part", lines, unit="milliseconds", zero=True)


def distillation(view: View) -> str:
    """What the log has of teachers: their loss beside the student's, the two terms, alpha and temperature. "" without any."""
    charts = []
    if view.is_one:
        record = view.records[0]
        teachers = [m[1] for name in record.columns if (m := re.fullmatch(r"teacher/(.+)/loss", name))]
        lines = view.curve(record, record.columns.get("loss/ce"), "student", 0, noisy=True)
        for i, name in enumerate(teachers, 1):
            label = f"teacher {name}" if len(teachers) > 1 else "teacher"
            lines += view.curve(record, record.columns.get(f"teacher/{name}/loss"), label, i, noisy=True)
        if record.columns.keys() & {"loss/ce", "loss/distill"}:
            charts.append(view.chart("Cross-entropy on the same tokens", lines, unit="nats a token", log_y=True))
        lines = view.curve(record, record.columns.get("loss/distill"), "distillation", 0, noisy=True)
        charts.append(view.chart("Distillation term", lines, unit="T² times the divergence; of samples −Σ t log q"))
        lines = view.curve(record, record.columns.get("loss/alpha"), "alpha", 0)
        lines += view.curve(record, record.columns.get("loss/temperature"), "temperature", 1)
        if any(_varies(line) for line in lines):
            charts.append(view.chart("Alpha and temperature", lines, zero=True))
        known = view.curve(record, record.columns.get("teacher/known"), "known", 0, noisy=True)
        charts.append(view.chart("Share of targets that the caches hold", known, zero=True))
    else:
        charts.append(
            view.chart(
                "Student's cross-entropy", view.of_all("loss/ce", "", noisy=True), unit="nats a token", log_y=True
            )
        )
        charts.append(view.chart("Distillation term", view.of_all("loss/distill", "", noisy=True)))
    return grid(charts, "") if any(charts) else ""


def _varies(line: Line) -> bool:
    known = line.y[np.isfinite(line.y)]
    return bool(len(known)) and float(known.max()) > float(known.min())


def recall_over_time(view: View) -> list[str]:
    """Share of exact answers by length over training; of several runs a chart for each length."""
    pattern = re.compile(r"eval/(.+)/(\d+)/mean")
    names = [[m for name in record.columns if (m := pattern.fullmatch(name))] for record in view.records]
    if view.is_one:
        record = view.records[0]
        found = sorted(names[0], key=lambda m: (m[1], int(m[2])))
        several = len({m[1] for m in found}) > 1
        lines = [
            line
            for i, m in enumerate(found)
            for line in view.evaluated(
                record, f"/{m[1]}/{m[2]}/mean", f"{m[1]} {int(m[2]):,}" if several else f"{int(m[2]):,} tokens", i
            )
        ]
        return [view.chart("Exact answers over training", lines, unit="share, all depths", zero=True)]
    charts = []
    for place in sorted({(m[1], int(m[2])) for found in names for m in found}):
        lines = [
            line
            for i, (record, label) in enumerate(zip(view.records, view.labels, strict=True))
            for line in view.evaluated(record, f"/{place[0]}/{place[1]}/mean", label, i)
        ]
        charts.append(
            view.chart(f"Exact answers: {place[0]}, {place[1]:,} tokens", lines, unit="share, all depths", zero=True)
        )
    return charts


LastValue = Callable[[Record], str]
FIGURES: list[tuple[str, LastValue]] = [
    ("steps", lambda r: f"{r.last_step:,}"),
    ("tokens", lambda r: _shown(r.last("tokens"))),
    ("training loss, last", lambda r: _shown(r.last("loss"))),
    ("held-out loss, last", lambda r: _shown(r.last(f"eval/{_sum_of(r)}/loss"))),
    ("held-out loss, best", lambda r: _shown(_best(r))),
    ("tokens a second, last", lambda r: _shown(r.last("tokens_per_second"))),
    ("goodput", lambda r: f"{r.seconds['goodput']:.1%}" if r.seconds.get("wall") else "-"),
]


def _best(record: Record) -> float | None:
    """In the last phase that was evaluated: phases of other lengths measure other things."""
    column = record.columns.get(f"eval/{_sum_of(record)}/loss")
    if column is None or not np.isfinite(column.values).any():
        return None
    firsts = [span.first for span in record.spans if span.first < column.steps[-1]] or [0]
    part = column.values[column.steps > firsts[-1]]
    return float(np.nanmin(part)) if np.isfinite(part).any() else None


def _shown(value: float | None) -> str:
    return "-" if value is None else number(value)
