"""Pictures as HTML: curves, bars, heat maps, tables. Pure functions from numbers to text.

Why not matplotlib's SVG: it is an optional extra, its colours are fixed (this page is light or dark as the reader's system
is), and its letters shrink with the picture, to nothing on a phone. Here only the curves are SVG, which is stretched to the
width that there is; letters are HTML beside it and keep their size. page.css has the colours, page.js the values under a
finger or a mouse.

    line_chart("Training loss", [Line("loss", steps, values)], x_label="step", log_y=True)

Everything that comes from a run passes through `text`, which takes out secrets and markup.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm.redact import redacted

COLOURS = 8  # .c0 … .c7 of page.css
_MOST_BUCKETS = 600  # of a curve: two points each, more than a screen has columns for
_MOST_VALUES = 400  # of a curve, that page.js shows
_UNITS = 1000.0  # an SVG's width and height, before it is stretched


@dataclass(frozen=True)
class Line:
    """x rises; nan in y is a gap. raw: the same x, what y was smoothed from, drawn faintly. dots: at each point."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    raw: np.ndarray | None = None
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """A named stretch of the x axis: a phase."""

    name: str
    first: float
    last: float


@dataclass(frozen=True)
class Mark:
    """Something that happened at x. kind: "bad" or "note"."""

    x: float
    label: str
    kind: str


def text(value: Any) -> str:
    """Of a run, a user or another program, as HTML: no secrets, no markup, nothing that UTF-8 cannot hold."""
    known = redacted(str(value)).encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    return html.escape(known, quote=True)


# ------------------------------------------------------------------------------------------------ numbers
def number(value: float, digits: int = 4) -> str:
    """Short, for axes and tables: 1,234 · 12.5k · 3.2M · 0.0015 · 3e-06"""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1000 if letter == 'k' else unit):.{digits}g}{letter}"
    if size >= 1000 and value == round(value):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if size < 1000 or digits > 4 else f"{value:,.0f}"


def smooth(y: np.ndarray, half_width: int) -> np.ndarray:
    """The mean over so many points before and after each one, and of fewer towards the ends, so that it neither lags nor begins
    too low. Gaps stay."""
    n = len(y)
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(n)
    half = np.minimum(np.minimum(at, n - 1 - at), half_width)
    low, high = at - half, at + half + 1
    with np.errstate(invalid="ignore"):
        means = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return np.where(known, means, math.nan)


def thinned(x: np.ndarray, y: np.ndarray, buckets: int = _MOST_BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """Of each bucket of neighbours the least and the greatest value, in their order: no peak is lost. A bucket without any
    number is a gap."""
    if len(x) <= 2 * buckets:
        return x, y
    kept: list[int] = []
    edges = np.linspace(0, len(x), buckets + 1).astype(int)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = y[low:high]
        if np.isnan(part).all():
            kept.append(low)
        else:
            kept += sorted({low + int(np.nanargmin(part)), low + int(np.nanargmax(part))})
    return x[kept], y[kept]


# --------------------------------------------------------------------------------------------------- axes
@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    log: bool = False

    def places(self, values: np.ndarray) -> np.ndarray:
        """0 … 1 along the axis; nan for what it cannot show."""
        values = np.asarray(values, dtype=float)
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(values > 0, np.log(values), math.nan)
        return (logs - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    def ticks(self, most: int = 6) -> list[float]:
        if self.log and self.high / self.low >= 8:
            lowest, highest = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = max(1, math.ceil((highest - lowest) / most))
            powers = range(lowest, highest + 1, every)
            mantissas = (1, 2, 5) if every == 1 and (highest - lowest) * 3 <= 2 * most else (1,)
            found = [m * 10.0**p for p in powers for m in mantissas]
        else:
            step = _step((self.high - self.low) / most)
            first = math.ceil(self.low / step - 1e-9)
            found = [float(f"{i * step:.12g}") for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        slack = 1e-9 * (self.low if self.log else self.high - self.low)
        return [tick for tick in found if self.low - slack <= tick <= self.high + slack]

    def labels(self) -> list[tuple[float, str]]:
        """(tick, how it is written): with as many digits as tell them apart."""
        ticks = self.ticks()
        for digits in (4, 6, 8, 12):
            names = [number(tick, digits) for tick in ticks]
            if len(set(names)) == len(names):
                break
        return list(zip(ticks, names, strict=True))


def _step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is no less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))


def axis(values: Iterable[np.ndarray], *, log: bool = False, zero: bool = False, margin: float = 0.05) -> Axis | None:
    """That shows all finite values (the positive ones, if log), with a margin; None if there is none."""
    known = [v[np.isfinite(v) & ((v > 0) if log else True)] for v in map(np.asarray, values)]
    known = [v for v in known if len(v)]
    if not known:
        return None
    low, high = min(float(v.min()) for v in known), max(float(v.max()) for v in known)
    if log:
        spread = (high / low) ** margin if high > low else 1.1
        return Axis(low / spread, high * spread, log=True)
    low = min(low, 0.0) if zero else low
    if high == low:
        half = abs(high) * 0.1 or 1.0
        return Axis(low - half, high + half)
    return Axis(low if zero and low == 0 else low - margin * (high - low), high + margin * (high - low))


# ------------------------------------------------------------------------------------------------- curves
def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    unit: str = "",
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    bands: Sequence[Band] = (),
    marks: Sequence[Mark] = (),
    tall: bool = False,
    legend: bool = False,
    note: str = "",
) -> str:
    """A figure; "" if no line has a number to show. log_x: base 2. zero: the y axis begins there. legend: also of one line."""
    lines = [line for line in lines if len(_known(line))]
    # The margin keeps dots at the ends whole. Steps and tokens begin at 0, a single one too.
    ends = np.array([x for band in bands for x in (band.first, band.last)] + [0.0] * (not log_x))
    xs = axis([*(line.x for line in lines), ends], log=log_x, margin=0.015)
    # What is faint behind a curve may leave the picture at the top: a single spike must not press all else flat.
    shown = [line.y for line in lines] + [_without_outliers(line.raw) for line in lines if line.raw is not None]
    ys = axis(shown, log=log_y, zero=zero)
    if xs is None or ys is None:
        return ""
    x_ticks = _powers_of_two(xs) if log_x else xs.ticks(5)
    curves = []
    for line in lines:
        if line.raw is not None:
            curves.append(_path(*thinned(line.x, line.raw), xs, ys, f"curve raw c{line.colour % COLOURS}"))
    for line in lines:
        style = "curve dashed" if line.dashed else "curve"
        curves.append(_path(*thinned(line.x, line.y), xs, ys, f"{style} c{line.colour % COLOURS}"))
        if line.dots and len(line.x) <= 200:
            curves.append(_path(line.x, line.y, xs, ys, f"dots c{line.colour % COLOURS}", dots=True))
    y_labels = "".join(_y_label(tick, label, ys) for tick, label in ys.labels())
    drawn = [*_bands(bands, xs), *_grid(x_ticks, xs, ys), *curves, *_marks(marks, xs)]
    names = [
        f'<li class="c{line.colour % COLOURS}{" dashed" if line.dashed else ""}">{text(line.label)}</li>'
        for line in lines
    ]
    parts = [
        f'<figure class="chart{" tall" if tall else ""}">',
        f"<figcaption>{text(title)}{f' <small>{text(unit)}</small>' if unit else ''}</figcaption>",
        f'<ul class="legend">{"".join(names)}</ul>' if legend or len(lines) > 1 else "",
        f'<div class="plot{" phases" if bands else ""}"><div class="y">{y_labels}</div><div class="area">',
        f'<svg viewBox="0 0 {_UNITS:g} {_UNITS:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(_in_words(title, lines, x_label))}">{"".join(drawn)}</svg>',
        "".join(_band_label(band, xs) for band in bands),
        f'</div><div class="x">{"".join(_x_label(tick, xs) for tick in x_ticks)}<b>{text(x_label)}</b></div></div>',
        f'<p class="note">{text(note)}</p>' if note else "",
        _values(lines, bands, marks, xs, x_label),
        "</figure>",
    ]
    return "".join(parts)


def _known(line: Line) -> np.ndarray:
    """Indices of the points that can be shown."""
    return np.flatnonzero(np.isfinite(line.x) & np.isfinite(line.y))


def _without_outliers(y: np.ndarray) -> np.ndarray:
    """Up to four times the distance from the middle that nine of ten values keep."""
    known = y[np.isfinite(y)]
    if len(known) < 20:
        return known
    low, middle, high = np.quantile(known, [0.05, 0.5, 0.95])
    return known[(known <= middle + 4 * (high - middle)) & (known >= middle - 4 * (middle - low))]


def _path(x: np.ndarray, y: np.ndarray, xs: Axis, ys: Axis, style: str, *, dots: bool = False) -> str:
    points, parts, is_open = np.stack([xs.places(x), 1 - ys.places(y)], 1) * _UNITS, [], False
    for px, py in points.tolist():
        if not (math.isfinite(px) and math.isfinite(py)):
            is_open = False
            continue
        parts.append(f"{'L' if is_open else 'M'}{px:.1f} {py:.1f}" + ("h0" if dots else ""))
        is_open = not dots
    return f'<path class="{style}" d="{"".join(parts)}"/>'


def _grid(x_ticks: list[float], xs: Axis, ys: Axis) -> list[str]:
    across = [f"M0 {(1 - p) * _UNITS:.1f}H{_UNITS:g}" for p in ys.places(np.array(ys.ticks())).tolist()]
    up = [f"M{p * _UNITS:.1f} 0V{_UNITS:g}" for p in xs.places(np.array(x_ticks)).tolist()]
    return [f'<path class="grid" d="{"".join(across + up)}"/>']


def _bands(bands: Sequence[Band], xs: Axis) -> list[str]:
    found = []
    for i, band in enumerate(bands):
        low, high = (xs.places(np.array([band.first, band.last])) * _UNITS).tolist()
        if i % 2:
            found.append(f'<rect class="band" x="{low:.1f}" y="0" width="{high - low:.1f}" height="{_UNITS:g}"/>')
    return found


def _marks(marks: Sequence[Mark], xs: Axis) -> list[str]:
    places = zip(marks, xs.places(np.array([mark.x for mark in marks])).tolist(), strict=True)
    return [
        f'<path class="mark {mark.kind}" d="M{place * _UNITS:.1f} {_UNITS:g}v-60"><title>{text(mark.label)}</title></path>'
        for mark, place in places
        if 0 <= place <= 1
    ]


def _band_label(band: Band, xs: Axis) -> str:
    low, high = (xs.places(np.array([band.first, band.last])) * 100).tolist()
    name = text(band.name)
    return (
        f'<span class="phase" style="left:{low:.2f}%;width:{high - low:.2f}%" title="{name}"><span>{name}</span></span>'
    )


def _y_label(tick: float, label: str, ys: Axis) -> str:
    return f'<span style="top:{100 * (1 - float(ys.places(np.array(tick)))):.2f}%">{label}</span>'


def _x_label(tick: float, xs: Axis) -> str:
    label = f"{tick / 1024:g}Ki" if xs.log and tick >= 1024 else number(tick)
    return f'<span style="left:{100 * float(xs.places(np.array(tick))):.2f}%">{label}</span>'


def _powers_of_two(xs: Axis) -> list[float]:
    powers = range(math.ceil(math.log2(xs.low) - 1e-9), math.floor(math.log2(xs.high) + 1e-9) + 1)
    every = max(1, math.ceil(len(powers) / 7))
    return [2.0**p for p in powers[::-1][::every][::-1]]


def _in_words(title: str, lines: Sequence[Line], x_label: str) -> str:
    told = []
    for line in lines[:COLOURS]:
        known = _known(line)
        first, last = known[0], known[-1]
        told.append(
            f"{line.label} from {number(float(line.y[first]))} at {x_label} {number(float(line.x[first]))} "
            f"to {number(float(line.y[last]))} at {x_label} {number(float(line.x[last]))}"
        )
    return f"{title}: {'; '.join(told)}"


def _values(lines: Sequence[Line], bands: Sequence[Band], marks: Sequence[Mark], xs: Axis, x_label: str) -> str:
    """What page.js shows: of each curve, evenly chosen points of the line that is drawn."""
    series = []
    for line in lines:
        known = _known(line)
        if len(known) > _MOST_VALUES:
            known = known[np.linspace(0, len(known) - 1, _MOST_VALUES).astype(int)]
        points = [[float(line.x[i]), float(f"{line.y[i]:.5g}")] for i in known.tolist()]
        series.append({"label": redacted(line.label), "colour": line.colour % COLOURS, "points": points})
    told = {
        "x": [xs.low, xs.high],
        "log": xs.log,
        "label": x_label,
        "series": series,
        "bands": [[redacted(b.name), b.first, b.last] for b in bands],
        "marks": [[m.x, redacted(m.label)] for m in marks],
    }
    # "<" would end the script element, or begin a comment in it.
    values = json.dumps(told, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{values}</script>'


# ------------------------------------------------------------------------------- bars, heat maps and tables
def stacked_bar(parts: Sequence[tuple[str, float, int]], label: str) -> str:
    """One bar of full width: [(name, share of 1, colour)]."""
    pieces = [
        f'<span class="c{colour % COLOURS}" style="width:{100 * share:.3f}%" title="{text(name)} {share:.1%}">'
        f"{f'<i>{text(name)}</i>' if share > 0.12 else ''}</span>"
        for name, share, colour in parts
    ]
    told = ", ".join(f"{name} {share:.1%}" for name, share, _ in parts)
    return f'<div class="bar" role="img" aria-label="{text(label)}: {text(told)}">{"".join(pieces)}</div>'


def heat_map(
    title: str, unit: str, corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]
) -> str:
    """A table of shares (0 … 1), coloured from bad to good; None is an empty cell."""
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th>'
        + "".join(
            "<td></td>" if share is None else f'<td style="--share:{share:.3f}">{share:.0%}</td>' for share in shares
        )
        + "</tr>"
        for name, shares in rows
    )
    return (
        f'<figure class="heat"><figcaption>{text(title)} <small>{text(unit)}</small></figcaption><div class="scroll"><table>'
        f"<thead><tr><th>{text(corner)}</th>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numeric: Iterable[int] = (), style: str = ""
) -> str:
    """numeric: the columns that are aligned to the right. A cell that is `Html` is taken as it is; columns of which nothing is
    known ("-") are left out."""
    shown = [i for i in range(len(columns)) if not rows or any(row[i] not in ("-", "") for row in rows)]
    right = {new for new, old in enumerate(shown) if old in set(numeric)}
    columns, rows = [columns[i] for i in shown], [[row[i] for i in shown] for row in rows]

    def cell(i: int, value: Any) -> str:
        inner = value.markup if isinstance(value, Html) else text(value)
        return f"<td{' class=n' if i in right else ''}>{inner}</td>"

    head = "".join(f'<th scope="col"{" class=n" if i in right else ""}>{text(c)}</th>' for i, c in enumerate(columns))
    body = "".join(f"<tr>{''.join(cell(i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


@dataclass(frozen=True)
class Html:
    """A cell that is markup of our own."""

    markup: str


def swatch(colour: int, label: str) -> Html:
    return Html(f'<span class="named"><span class="swatch c{colour % COLOURS}"></span>{text(label)}</span>')
