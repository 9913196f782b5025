"""The page: head, sections, style and script in one file that loads nothing.

write_page([Path("runs/demo")], Path("runs/demo/report.html"))

What is in it was written by a training run, a user, or a library: it is escaped (charts.text), secrets are taken out, and the
page's own policy lets no script run but ours and nothing load, should a way around the escaping be found.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from slm import __version__
from slm.errors import EnvironmentProblem, SLMError
from slm.report import curves, sections
from slm.report.benchmarks import benchmarks
from slm.report.charts import Html, number, swatch, table, text
from slm.report.curves import FIGURES, View
from slm.report.record import Record, read_record
from slm.runtime import atomic_write

UNREADABLE = "This cannot be shown: a file of the run is not as a run writes it."
SECTIONS = [
    ("loss", "Loss", curves.losses),
    ("optimisation", "Optimisation", curves.optimisation),
    ("speed", "Speed and memory", curves.speed),
    ("time", "Where time went", sections.time_spent),
    ("position", "Loss by position", sections.positions),
    ("recall", "Pass keys", sections.recall),
    ("benchmarks", "Benchmarks", benchmarks),
    ("teacher", "Teacher", sections.teachers),
    ("data", "Data", sections.data),
    ("events", "Events", sections.events),
    ("recipe", "Recipe", sections.recipe),
    ("environment", "Environment", sections.environment),
]


def write_page(folders: Sequence[Path], output: Path, x: Literal["steps", "tokens"] | None = None) -> None:
    """x: what curves are drawn over; tokens if there are several runs, whose steps may be of different sizes.

    Raises UserError for a folder that is no run, EnvironmentProblem where the page cannot be written.
    """
    page = build_page([read_record(folder) for folder in folders], x)
    try:
        atomic_write(output, page)
    except OSError as error:
        raise EnvironmentProblem(
            f"{output} cannot be written: {error.strerror or error}",
            fix="give --output FILE.html in a folder that can be written, or --no-page",
        ) from None


def build_page(records: Sequence[Record], x: Literal["steps", "tokens"] | None = None) -> str:
    view = View.of(records, x or ("steps" if len(records) == 1 else "tokens"))
    style, script = (Path(__file__).with_name(name).read_text() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    title = text(" · ".join(view.labels))
    parts = [(anchor, name, _shown(show, view)) for anchor, name, show in SECTIONS]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in parts)
    body = "".join(f'<section id="{anchor}"><h2>{name}</h2>{shown}</section>' for anchor, name, shown in parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<title>{title}</title><link rel="icon" href="data:,"><style>\n{style}</style></head>\n<body><main>'
        f"<header><h1>{title}</h1>{_summary(view)}</header><nav>{links}</nav>{body}"
        f"<footer>{_made_from(view)}</footer></main>\n<script>{script}</script></body></html>\n"
    )


def _shown(show: Callable[[View], str], view: View) -> str:
    """A section; where a file that it reads is JSON or YAML but not what a run writes, the rest of the page stays."""
    try:
        return show(view)
    except (ArithmeticError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        return f'<p class="soft">{UNREADABLE} ({text(f"{type(error).__name__}: {error}")})</p>'


def _summary(view: View) -> str:
    """Of one run how it ended and its figures as tiles; of several a table."""
    if not view.is_one:
        rows = [
            [swatch(i, label), Html(_ended(record)), *(show(record) for _, show in FIGURES), _heard(record)]
            for i, (record, label) in enumerate(zip(view.records, view.labels, strict=True))
        ]
        columns = ["run", "", *(name for name, _ in FIGURES), "last heard of (UTC)"]
        return f'<div class="card">{table(columns, rows, numeric=range(2, len(columns)), style="summary")}</div>'
    record = view.records[0]
    figures = [("parameters", _parameters(record)), *((name, show(record)) for name, show in FIGURES)]
    tiles = "".join(f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>" for name, value in figures)
    reason = str(record.exit.get("reason") or "").partition("\n")[0]
    why = text(reason) if reason != record.exit.get("meaning") else ""
    heard = f'<span class="soft">last heard of {_heard(record)} UTC</span>'
    return f'<p>{_ended(record)} {why} {heard}</p><dl class="tiles">{tiles}</dl>'


def _ended(record: Record) -> str:
    """How the last attempt ended."""
    if not record.exit:
        return '<span class="pill note">going on, or killed</span>'
    code = record.exit.get("code")
    style = "good" if code == 0 else "note" if code == 75 else "bad"
    return f'<span class="pill {style}">{text(record.exit.get("meaning") or f"code {code}")}</span>'


def _heard(record: Record) -> str:
    return sections.moment(record.events[-1]["time"]) if record.events else "-"


def _parameters(record: Record) -> str:
    """ "-" where the recipe is one that this version does not know."""
    from slm.recipe import load_recipe

    try:
        return number(load_recipe(record.folder / "recipe.yaml").model.num_parameters())
    except (SLMError, OSError):
        return "-"


def _made_from(view: View) -> str:
    damaged = sum(record.damaged_lines for record in view.records)
    told = f" {damaged} damaged line{'s' * (damaged != 1)} of metrics.jsonl passed over." if damaged else ""
    folders = ", ".join(str(record.folder) for record in view.records)
    return f"slm {__version__}, {sections.moment(time.time())} UTC, from {text(folders)}.{told}"
