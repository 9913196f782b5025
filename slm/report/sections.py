"""The sections of the page that are tables, bars and heat maps: time, positions, recall, teachers, data, events, recipe,
environment. Owns what of a run's files stands in them.

    time_spent(view)    # HTML
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from slm.errors import SLMError
from slm.ledger import counted, duration
from slm.report.charts import Html, Line, heat_map, line_chart, number, stacked_bar, swatch, table, text
from slm.report.curves import View, distillation, grid, recall_over_time
from slm.report.record import Evaluation, Record

CATEGORIES = {
    "step": "training steps that count",
    "data": "waiting for data",
    "init": "start-up: opening data, building engines",
    "compile": "the first step of a phase whose blocks are compiled",
    "save": "saving, as far as training waited",
    "eval": "evaluating",
    "check": "comparing replicas",
    "finish": "after the last step",
    "lost": "steps that were computed again",
    "hang": "a rank hung",
    "restart": "from an attempt's end to the next one's first step",
    "idle": "done, until it was given more to do",
}
_MOST_ENVIRONMENTS = 6  # columns
_MOST_ROWS = 400  # of the table of events
_MOST_CACHES = 4  # whose statistics are read again: each is up to a GB with its checksums


def moment(seconds: Any) -> str:
    try:
        return datetime.fromtimestamp(float(seconds), timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError, OSError):
        return "-"


def each(view: View, show: Callable[[Record], str]) -> str:
    """A section of one run after the other, each under its name if they are several."""
    if view.is_one:
        return show(view.records[0])
    return "".join(f"<h3>{text(label)}</h3>{show(r)}" for r, label in zip(view.records, view.labels, strict=True))


# ------------------------------------------------------------------------------------------ where time went
def time_spent(view: View) -> str:
    """A bar for each run, and its seconds by category."""
    known = [(label, r.seconds) for r, label in zip(view.records, view.labels, strict=True) if r.seconds.get("wall")]
    if not known:
        return '<p class="soft">No attempt has told its time.</p>'
    parts = []
    for label, found in known:
        attempts, wall = counted(found["attempts"], "attempt"), found["wall"] - found["seconds"].get("idle", 0.0)
        told = (
            f"of {duration(wall)} over {attempts}, {found['goodput']:.1%} was steps that count; "
            f"{counted(found['steps_lost'], 'step')} computed again, {found['skipped']} skipped, "
            f"{counted(found['rollbacks'], 'rollback')}."
        )
        counting = [name for name in CATEGORIES if name != "idle"]
        shares = (
            [(name, found["seconds"].get(name, 0.0) / wall, _colour(name)) for name in counting] if wall > 0 else []
        )
        parts.append(f"<p>{told.capitalize() if view.is_one else text(f'{label}: {told}')}</p>")
        parts.append(stacked_bar([part for part in shares if part[1]], "where time went"))
    rows = [
        [swatch(_colour(name), name), *(_spent(found, name) for _, found in known), what]
        for name, what in CATEGORIES.items()
        if any(found["seconds"].get(name) for _, found in known)
    ]
    columns = ["", *(label if not view.is_one else "time" for label, _ in known), "what"]
    return f'<div class="card">{"".join(parts)}{table(columns, rows, numeric=range(1, len(known) + 1))}</div>'


def _spent(found: dict[str, Any], category: str) -> str:
    """Shares are of the time without what was idle, as goodput is."""
    seconds = found["seconds"].get(category, 0.0)
    if not seconds or category == "idle":
        return duration(seconds) if seconds else "-"
    return f"{duration(seconds)} ({seconds / (found['wall'] - found['seconds'].get('idle', 0.0)):.1%})"


def _colour(category: str) -> int:
    """Of a few, by what it says: green counts, red is lost, the rest is apart from each other."""
    return {"step": 2, "data": 5, "init": 0, "compile": 6, "save": 4, "eval": 1, "check": 7, "finish": 7, "lost": 3,
            "hang": 3, "restart": 6, "idle": 0}[category]  # fmt: skip


# ------------------------------------------------------------------------------------ evaluations in detail
def _newest(record: Record, wanted: Callable[[Evaluation], bool]) -> list[Evaluation]:
    """The last evaluation of each phase that has what is wanted, in the order of the phases."""
    return list({e.phase: e for e in record.evaluations if wanted(e)}.values())


def _results(evaluation: Evaluation) -> dict[str, Any]:
    """By source, at the phase's own length; the sum only of several."""
    found = evaluation.found["loss"].get(str(evaluation.found.get("seq_len"))) or {}
    return {name: row for name, row in found.items() if isinstance(row, dict)}


def _buckets(row: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens seen, up to; loss), of buckets that are whole."""
    known = [b for b in row.get(name) or [] if isinstance(b, dict) and b.get("up_to") and b.get("loss") is not None]
    return np.array([float(b["up_to"]) for b in known]), np.array([float(b["loss"]) for b in known])


def positions(view: View) -> str:
    """Of one run a chart for each source, a line for each phase; of several, a line for each run's last evaluation."""
    lines_of: dict[str, list[Line]] = {}
    for index, (record, label) in enumerate(zip(view.records, view.labels, strict=True)):
        newest = _newest(record, lambda e: any(r.get("by_position") for r in _results(e).values()))
        for i, evaluation in enumerate(newest if view.is_one else newest[-1:]):
            for source, row in _results(evaluation).items():
                full = _buckets(row, "by_position_full")
                seen, loss = full if len(full[0]) else _buckets(row, "by_position")
                what = evaluation.phase if view.is_one else label
                what += (
                    f", step {evaluation.step:,}" if view.is_one else f" ({evaluation.phase}, step {evaluation.step:,})"
                )
                line = Line(what, seen, loss, i if view.is_one else index, dots=True)
                lines_of.setdefault(source, []).append(line)
    note = (
        "By how many tokens of its document the model has seen; only documents that fill the phase's length, where there are "
        "any. A line that rises to the right says that the model does not use its context there."
    )
    charts = [
        line_chart(
            f"Loss by position: {source}",
            lines,
            x_label="tokens seen, up to",
            unit="nats a token",
            log_x=True,
            legend=True,
            tall=len(lines_of) == 1,
        )
        for source, lines in lines_of.items()
    ]
    shown = grid(charts, "No evaluation has told the loss by position.")
    return shown + (f'<p class="note">{note}</p>' if any(charts) else "")


def recall(view: View) -> str:
    """The newest grid of each run, those of earlier phases folded up, and the means over training."""
    found = [_newest(record, lambda e: bool(e.found.get("recall"))) for record in view.records]
    if not any(found):
        return '<p class="soft">No pass keys were hidden: see eval.recall in the recipe, or slm eval --recall.</p>'
    latest = [_grids(evaluations[-1]) if evaluations else [] for evaluations in found]
    earlier = [
        "".join(f"<details><summary>{_named(e)}</summary>{''.join(_grids(e))}</details>" for e in evaluations[-2::-1])
        for evaluations in found
    ]
    if view.is_one:
        return grid([*latest[0], *recall_over_time(view)], "") + earlier[0]
    parts = [grid(recall_over_time(view), "")]
    for label, grids, folded in zip(view.labels, latest, earlier, strict=True):
        parts.append(f"<h3>{text(label)}</h3>{grid(grids, 'No pass keys were hidden.')}{folded}")
    return "".join(parts)


def _named(evaluation: Evaluation) -> str:
    return text(f"{evaluation.phase}, step {evaluation.step:,}")


def _grids(evaluation: Evaluation) -> list[str]:
    """A heat map for each number of keys."""
    cells = [c for c in evaluation.found["recall"] if isinstance(c, dict) and isinstance(c.get("keys"), int)]
    maps = []
    for keys in sorted({cell["keys"] for cell in cells}):
        of_keys = [cell for cell in cells if cell["keys"] == keys]
        lengths = sorted({cell["length"] for cell in of_keys})
        depths = sorted({cell["depth_percent"] for cell in of_keys})
        share = {(cell["length"], cell["depth_percent"]): cell["accuracy"] for cell in of_keys}
        rows = [(f"from {depth} %", [share.get((length, depth)) for length in lengths]) for depth in depths]
        means = [_mean([share[place] for place in share if place[0] == length]) for length in lengths]
        what = "Pass key" if keys == 1 else f"Recall, 1 of {keys} keys"
        title = f"{what}: exact answers, by length in tokens"
        unit = f"of {of_keys[0].get('samples')} samples; {evaluation.phase}, step {evaluation.step:,}"
        maps.append(heat_map(title, unit, "needle at", [f"{length:,}" for length in lengths], [*rows, ("all", means)]))
    return maps


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# ----------------------------------------------------------------------------------------- teachers and data
def teachers(view: View) -> str:
    charts = distillation(view)
    tables = [
        (f"<h3>{text(label)}</h3>" if not view.is_one else "") + shown
        for record, label in zip(view.records, view.labels, strict=True)
        if (shown := _caches(record))
    ]
    return charts + "".join(tables) or '<p class="soft">No teacher: the loss is cross-entropy on the text alone.</p>'


def _caches(record: Record) -> str:
    """What `slm teacher stats` finds, of the first caches; "" for a run without a cache."""
    teacher = record.recipe.get("teacher")
    if not isinstance(teacher, dict) or not any(isinstance(t, dict) and t.get("cache") for t in teacher.values()):
        return ""
    try:
        from slm.distill.examine import stats
        from slm.recipe import load_recipe

        found = stats(load_recipe(record.folder / "recipe.yaml"), most=_MOST_CACHES)
    except (SLMError, OSError) as error:
        return f'<p class="soft">The caches cannot be looked at from here: {text(str(error).partition(chr(10))[0])}</p>'
    rows, lines = [], []
    for i, r in enumerate(found):
        path, missing = "/".join(Path(r["path"]).parts[-2:]), r["missing_tokens"] / max(1, r["tokens"])
        held = ", ".join(f"{list(masses.values())[-1]:.1%} at T={t}" for t, masses in r["head_mass"].items())
        rows.append([
            swatch(i, path), r["teacher"], r["kind"], str(r["k"]), held, f"{r['piece_length']:,}", number(r["tokens"]),
            f"{missing:.1%}", str(r["bytes_per_token"]), f"{r['teacher_loss']:.4f}", f"{r['entropy']:.4f}",
        ])  # fmt: skip
        for j, (temperature, masses) in enumerate(r["head_mass"].items()):
            label = f"{r['teacher']}, {path}, T={temperature}"
            x, y = np.array(list(masses), dtype=float), np.array(list(masses.values()))
            lines += [Line(label, x, y, i, dots=True, dashed=j > 0)] if len(x) > 1 else []
    columns = ["cache", "teacher", "kind", "k", "mass of exact entries", "pieces up to", "tokens", "missing", "bytes a token",
               "teacher's loss", "entropy"]  # fmt: skip
    chart = line_chart("Mass of the teacher's likeliest k", lines, x_label="k", log_x=True, zero=True, legend=True)
    more = f'<p class="note">The first {_MOST_CACHES} caches.</p>' if len(found) == _MOST_CACHES else ""
    return f'<div class="card">{table(columns, rows, numeric=[3, *range(5, 11)])}{more}</div>{chart}'


def data(view: View) -> str:
    """Of each phase what share of its sequences is of which source, and how often that goes through it."""

    def show(record: Record) -> str:
        told: dict[str, dict[str, Any]] = {}
        for event in record.events:
            if event["kind"] == "data" and isinstance(event.get("phases"), dict):
                told |= event["phases"]
        phases = [(phase, told.get(str(phase.get("name"))) or {}) for phase in record.phases]
        names = dict.fromkeys(source for phase, has in phases for source in [*has, *(phase.get("mixture") or {})])
        colours = {name: i for i, name in enumerate(names)}
        parts = [_phase_data(phase, has, colours) for phase, has in phases]
        sources = record.recipe.get("data")
        folders = sources if isinstance(sources, dict) else {}
        rows = [
            [use, name, path]
            for use, key in (("trained on", "sources"), ("held out", "validation"))
            for name, path in (folders.get(key) or {}).items()
        ]
        return "".join(parts) + (
            f'<div class="card">{table(["", "source", "folder"], rows, style="facts")}</div>' if rows else ""
        )

    return each(view, show) or '<p class="soft">The recipe of this run cannot be read.</p>'


def _phase_data(phase: dict[str, Any], told: dict[str, Any], colours: dict[str, int]) -> str:
    """told: of each source what the event "data" says (PhaseData.report); runs from before there was one have the mixture."""
    name, filters = phase.get("name"), phase.get("filters") or {}
    mixture = {s: w for s, w in (phase.get("mixture") or {}).items() if isinstance(w, int | float) and w > 0}
    share = {s: row["share"] for s, row in told.items()} or {s: w / sum(mixture.values()) for s, w in mixture.items()}
    tokens, seq_len, batch = (float(phase.get(key) or math.nan) for key in ("tokens", "seq_len", "batch_tokens"))
    about = f"{number(tokens)} tokens in sequences of {number(seq_len)}, {number(batch)} a step"
    head = f'<h3>{text(name)}</h3><p class="soft">{about}</p>'
    if not share:
        return f'<div class="card">{head}<p class="soft">all sources, by their size</p></div>'
    rows = []
    for source, part in share.items():
        row: list[Any] = [swatch(colours[source], source), f"{part:.1%}"]
        if source in told:
            has = told[source]
            epochs = part * tokens / seq_len / max(1, has["sequences"])
            row += [number(epochs * has["tokens"]), f"{epochs:.2f}", f"{has['documents']:,}", number(has["tokens"])]
        else:
            row += ["-"] * 4
        rows.append([*row, _filter(filters.get(source))])
    bar = stacked_bar([(s, part, colours[s]) for s, part in share.items()], f"data of phase {name}")
    columns = ["source", "share", "tokens drawn", "times through", "documents", "tokens there", "filter"]
    return f'<div class="card">{head}{bar}{table(columns, rows, numeric=range(1, 6))}</div>'


def _filter(found: Any) -> str:
    """Only what differs from letting everything through."""
    if not isinstance(found, dict):
        return ""
    low, high = found.get("min_doc_tokens"), found.get("max_doc_tokens")
    if isinstance(low, int) and low == high:
        parts = [f"of {low:,} tokens"]
    else:
        parts = [f"≥ {low:,} tokens"] if isinstance(low, int) and low else []
        parts += [f"≤ {high:,} tokens"] if isinstance(high, int) else []
    parts += [f"a share of {found['share']}"] if found.get("share") not in (None, 1, 1.0) else []
    parts += [f"not seen in {', '.join(map(str, found['exclude_seen']))}"] if found.get("exclude_seen") else []
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------- the events
_ROUTINE = ("saved", "straggler", "save skipped", "save waited")
_SILENT = ("seconds", "save begun", "data")
_BAD = ("skip", "rollback", "hang", "save failed", "restart", "requeue")


def events(view: View) -> str:
    def show(record: Record) -> str:
        rows = _event_rows(record.events)
        left_out = len(rows) - _MOST_ROWS
        if left_out > 0:
            gap = [["", "", Html(f'<span class="soft">{left_out} more</span>'), "see events.jsonl"]]
            rows = rows[:50] + gap + rows[50 + left_out :]
        return f'<div class="card">{table(["time (UTC)", "step", "what", ""], rows, numeric=[1], style="events")}</div>'

    return each(view, show)


def _event_rows(events: list[dict[str, Any]]) -> list[list[Any]]:
    """What is routine is one row for each kind between two events that are not."""
    rows: list[list[Any]] = []
    routine: dict[str, list[dict[str, Any]]] = {}

    def close() -> None:
        for group in sorted(routine.values(), key=lambda group: group[-1]["time"]):
            first, last = group[0], group[-1]
            if len(group) == 1:
                rows.append(_event_row(first, _details(first)))
            else:
                row = _event_row(last, f"{len(group)} times, first at step {first.get('step')}")
                rows.append(row)
        routine.clear()

    for event in events:
        if event["kind"] in _ROUTINE:
            routine.setdefault(event["kind"], []).append(event)
        elif event["kind"] not in _SILENT:
            close()
            rows.append(_event_row(event, _details(event)))
    close()
    return rows


def _event_row(event: dict[str, Any], details: str) -> list[Any]:
    kind = event["kind"]
    is_bad = kind in _BAD or (kind == "gate" and not event.get("passed"))
    style = "bad" if is_bad else "good" if kind in ("done", "gate") else "plain"
    step = event.get("step", event.get("from_step", ""))
    what = Html(f'<span class="dot {style}"></span>{text(kind)}')
    return [moment(event.get("time")), f"{step:,}" if isinstance(step, int) else step, what, details]


def _details(event: dict[str, Any]) -> str:
    left = {
        k: v
        for k, v in event.items()
        if k not in ("time", "kind", "step", "age", "environment") and v not in ([], "", None)
    }
    return "; ".join(f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in left.items())[:1000]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return number(value) if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------ recipe and environment
def recipe(view: View) -> str:
    """What differs between the runs, then each recipe."""
    parts = []
    if not view.is_one:
        flat = [dict(_leaves(record.recipe)) for record in view.records]
        names = dict.fromkeys(name for leaves in flat for name in leaves)
        rows = [
            [name, *(leaves.get(name, "-") for leaves in flat)]
            for name in names
            if len({str(leaves.get(name, "-")) for leaves in flat}) > 1 and name not in ("name", "output")
        ]
        differences = (
            table(["field", *view.labels], rows, style="facts")
            if rows
            else '<p class="soft">The recipes are the same.</p>'
        )
        parts.append(f'<div class="card"><h3>What differs</h3>{differences}</div>')
    for record, label in zip(view.records, view.labels, strict=True):
        shown = record.recipe_text or "recipe.yaml cannot be read"
        opened = " open" if view.is_one and shown.count("\n") < 60 else ""
        parts.append(
            f'<details class="card"{opened}><summary>{text(label)}: recipe.yaml</summary><pre>{text(shown)}</pre></details>'
        )
    return "".join(parts)


def _leaves(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted name, value); of a list of phases by their names."""
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name))
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        for i, item in enumerate(tree):
            yield from _leaves(item, f"{path}.{item.get('name', i)}")
    else:
        yield (
            path,
            yaml.safe_dump(tree, default_flow_style=True).removesuffix("\n...\n").strip()
            if isinstance(tree, list)
            else tree,
        )


def environment(view: View) -> str:
    """What each attempt ran on: a column for those that follow each other on the same."""

    def show(record: Record) -> str:
        groups: list[tuple[list[Any], dict[str, str]]] = []  # times of the attempts, and what they ran on
        for event in record.events:
            if event["kind"] == "start":
                here = _ran_on(event)
                if not groups or groups[-1][1] != here:
                    groups.append(([], here))
                groups[-1][0].append(event["time"])
        left_out, groups = len(groups) - _MOST_ENVIRONMENTS, groups[-_MOST_ENVIRONMENTS:]
        names = dict.fromkeys(name for _, here in groups for name in here)
        rows = [[name, *(here.get(name, "-") for _, here in groups)] for name in names]
        heads = [f"{counted(len(times), 'attempt')} from {moment(times[0])}" for times, _ in groups]
        shown = f'<div class="card">{table(["", *heads], rows, style="facts")}</div>' if rows else ""
        return shown + (f'<p class="note">{counted(left_out, "earlier one")} left out</p>' if left_out > 0 else "")

    return each(view, show) or '<p class="soft">No attempt has begun.</p>'


def _ran_on(event: dict[str, Any]) -> dict[str, str]:
    """Of an event "start"; those from before there was `environment` tell ranks and precision only."""
    told = {
        "ranks": event.get("world_size", "-"),
        "precision": event.get("precision", "-"),
        **(event.get("environment") or {}),
    }
    if isinstance(hosts := told.get("hosts"), dict):
        told["hosts"] = ", ".join(f"{host} ({counted(ranks, 'rank')})" for host, ranks in hosts.items())
    return {str(name): str(value) for name, value in told.items()}
