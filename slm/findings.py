"""What an evaluation found, put where people and programs see it: JSON, metrics.jsonl, tables, a picture.

report(metrics, run_dir, "main", 400, 400, findings, best=True)    # also RUN/eval/main-00000400.json and .png
draw(findings); plot(findings, Path("grid.png"))
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slm import parallel
from slm.errors import EnvironmentProblem
from slm.evaluate import ALL, Bucket, Findings, Result
from slm.metrics import MetricsLogger
from slm.pictures import check_picture, save_picture
from slm.recall.score import Found
from slm.runtime import atomic_write

log = logging.getLogger("slm")


# --- numbers -------------------------------------------------------------------------------------------------


def as_dict(findings: Findings, bytes_per_token: Mapping[str, float] | None = None) -> dict[str, Any]:
    """For programs: loss by seq_len and source, by position, and the cells of recall.

    bytes_per_token: by source; with it bits_per_byte is given (None where it is not known).
    """

    def of(name: str, r: Result) -> dict[str, Any]:
        row: dict[str, Any] = {"targets": r.num_targets, "loss": _number(r.loss), "perplexity": _number(r.perplexity)}
        if bytes_per_token is not None:
            known = bytes_per_token.get(name)
            row["bits_per_byte"] = _number(r.loss / math.log(2) / known) if known else None
        return row | {"by_position": _buckets(r.by_position), "by_position_full": _buckets(r.by_position_full)}

    return {
        "seq_len": findings.seq_len,
        "loss": {str(n): {name: of(name, r) for name, r in shown(rows)} for n, rows in findings.losses.items()},
        "recall": [
            {
                "task": f.cell.task,
                "keys": f.cell.keys,
                "length": f.cell.length,
                "depth_percent": f.cell.percent,
                "samples": f.num_samples,
                "exact": f.num_exact,
                "accuracy": f.accuracy,
                "answer_loss": _number(f.loss),
            }
            for f in findings.recall
        ],
    }


def _buckets(buckets: Iterable[Bucket]) -> list[dict[str, Any]]:
    return [{"up_to": b.up_to, "targets": b.num_targets, "loss": _number(b.loss)} for b in buckets]


def _number(value: float) -> float | None:
    """JSON has no number that is not finite."""
    return value if math.isfinite(value) else None


def shown(results: Mapping[str, Result]) -> list[tuple[str, Result]]:
    """The sources, and their sum if they are several."""
    return [(name, r) for name, r in results.items() if name != ALL or len(results) > 2]


def metrics_rows(findings: Findings) -> dict[str, float]:
    """Names of metrics.jsonl: eval/SOURCE/loss, eval/SOURCE/position/UP_TO, eval@SEQ_LEN/SOURCE/loss for other lengths;
    eval/passkey/LENGTH/DEPTH (accuracy, by the percent at which its part begins), and /mean, /worst, /answer_loss."""
    rows: dict[str, float] = {}
    for seq_len, results in findings.losses.items():
        at = "eval" if seq_len == findings.seq_len else f"eval@{seq_len}"
        rows |= {
            f"{at}/{name}/loss": r.loss for name, r in results.items() if r.num_targets or seq_len != findings.seq_len
        }
    for name, r in shown(findings.main):
        rows |= {f"eval/{name}/position/{b.up_to}": b.loss for b in r.by_position}
        rows |= {f"eval/{name}/position_full/{b.up_to}": b.loss for b in r.by_position_full}
    for found in grids(findings.recall):
        at = f"eval/{found[0].cell.task}/{found[0].cell.length}"
        rows |= {f"{at}/{f.cell.percent}": f.accuracy for f in found}
        rows |= {f"{at}/mean": mean_accuracy(found), f"{at}/worst": min(f.accuracy for f in found)}
        rows[f"{at}/answer_loss"] = answer_loss(found)
    return rows


def grids(recall: Iterable[Found]) -> list[list[Found]]:
    """The cells of each (number of keys, length), by depth."""
    by_place: dict[tuple[int, int], list[Found]] = {}
    for f in recall:
        by_place.setdefault((f.cell.keys, f.cell.length), []).append(f)
    return [sorted(by_place[place], key=lambda f: f.cell.depth) for place in sorted(by_place)]


def mean_accuracy(found: list[Found]) -> float:
    return sum(f.num_exact for f in found) / max(1, sum(f.num_samples for f in found))


def answer_loss(found: list[Found]) -> float:
    """Nats per token of the answers."""
    return sum(f.loss_sum for f in found) / max(1, sum(f.num_tokens for f in found))


def report(
    metrics: MetricsLogger, run_dir: Path, phase: str, step: int, global_step: int, findings: Findings, best: bool
) -> None:
    """Into metrics.jsonl, the log, and RUN/eval/PHASE-STEP.json; with a picture beside it if there is matplotlib and
    recall to show. `step` is the phase's. Before its first step metrics are named start/… instead of eval/…: the
    phase before ends at the same global step. On the first rank; a full disk never ends a run.
    """
    rows = metrics_rows(findings)
    metrics.log(global_step, rows if step else {f"start{name.removeprefix('eval')}": x for name, x in rows.items()})
    if parallel.rank():
        return
    for i, line in enumerate(sentences(findings)):
        log.info("step %d %s%s", global_step, line, "; the best so far" if best and i == 0 else "")
    path = run_dir / "eval" / f"{phase}-{step:08d}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, json.dumps(as_dict(findings), indent=1) + "\n")
        if findings.recall:
            plot(findings, path.with_suffix(".png"))
    except EnvironmentProblem:  # no matplotlib, which is optional
        pass
    except Exception as error:
        log.warning("%s could not be written, training goes on without: %s", path, error)


# --- the terminal --------------------------------------------------------------------------------------------


def sentences(findings: Findings) -> list[str]:
    """For the log of a run: held-out loss, and recall by length."""
    lines = []
    for seq_len, results in findings.losses.items():
        at = "" if seq_len == findings.seq_len else f" at {seq_len} tokens"
        losses = ", ".join(
            f"{n} {r.loss:.4f} (perplexity {r.perplexity:.2f})" for n, r in shown(results) if r.num_targets
        )
        lines += [f"held-out loss{at}: {losses}"] if losses else []
    for task in dict.fromkeys(f.cell.task for f in findings.recall):
        found = [grid for grid in grids(findings.recall) if grid[0].cell.task == task]
        parts = [
            f"{g[0].cell.length} tokens {percent(mean_accuracy(g))} (worst depth {percent(min(f.accuracy for f in g))})"
            for g in found
        ]
        lines.append(f"{_title(found[0][0].cell.keys)}: {', '.join(parts)}")
    return lines


def _title(keys: int) -> str:
    return "pass key" if keys == 1 else f"recall, 1 of {keys} keys"


def draw(findings: Findings, bytes_per_token: Mapping[str, float], *, by_position: bool) -> None:
    """On the terminal: loss, a row for each source, and by position; recall, a coloured grid for each number of keys."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    named = shown(findings.main)
    table = Table("source", "targets", "loss (nats)", "perplexity", "bits per byte")
    for name, r in named:
        bits = f"{r.loss / math.log(2) / known:.4f}" if (known := bytes_per_token.get(name)) else "-"
        table.add_row(Text(name), f"{r.num_targets:,}", f"{r.loss:.4f}", f"{r.perplexity:.2f}", bits)
    console.print(table)
    if by_position:
        title = f"loss (nats) by tokens seen; full: documents of {findings.seq_len:,} tokens and more"
        console.print(title, highlight=False)  # as a table's title it would be cut to the table's width
        table = Table()
        table.add_column("up to", justify="right", no_wrap=True)
        for name, _ in named:
            table.add_column(Text(name), justify="right")
            table.add_column("full", justify="right")
        for up_to in sorted({b.up_to for _, r in named for b in r.by_position}):
            cells = []
            for _, r in named:
                for buckets in (r.by_position, r.by_position_full):
                    loss = next((b.loss for b in buckets if b.up_to == up_to), None)
                    cells.append("-" if loss is None else f"{loss:.3f}")
            table.add_row(f"{up_to:,}", *cells)
        console.print(table)
    for keys in sorted({f.cell.keys for f in findings.recall}):
        columns = [grid for grid in grids(findings.recall) if grid[0].cell.keys == keys]
        title = f"{_title(keys)}: exact answers of {columns[0][0].num_samples} in a cell, by length in tokens"
        console.print(title, highlight=False)
        table = Table()
        table.add_column("needle at", no_wrap=True)
        for grid in columns:
            table.add_column(f"{grid[0].cell.length:,}", justify="right")
        for i, first in enumerate(columns[0]):
            shares = [Text(f" {percent(g[i].accuracy)} ", style=f"black on {_colour(g[i].accuracy)}") for g in columns]
            table.add_row(_depth(first), *shares, end_section=i == len(columns[0]) - 1)
        table.add_row("all", *[f"{percent(mean_accuracy(g))} " for g in columns])
        table.add_row("nats a token", *[f"{answer_loss(g):.3f} " for g in columns])
        console.print(table)


def percent(share: float) -> str:
    """Without decimals, but where they would hide that it is not quite all or nothing."""
    return f"{share:.1%}" if 0 < share < 0.01 or 0.99 < share < 1 else f"{share:.0%}"


def _depth(f: Found) -> str:
    return f"{f.cell.percent} - {round(100 * (f.cell.depth + 1) / f.cell.depths)} %"


def _colour(share: float) -> str:
    """From red over yellow to green, light enough for black letters."""
    red, green = min(1.0, 2 - 2 * share), min(1.0, 2 * share)
    return f"#{int(110 + 130 * red):02x}{int(110 + 130 * green):02x}6e"


# --- the picture ---------------------------------------------------------------------------------------------


def plot(findings: Findings, path: Path) -> None:
    """Loss by position, a line for each source, and a heat map of recall for each number of keys: PNG, SVG or PDF.

    Raises what check_picture does.
    """
    check_picture(path)
    from matplotlib import pyplot

    key_counts = sorted({f.cell.keys for f in findings.recall})
    widths = [7.5, *(1.8 + 0.7 * sum(g[0].cell.keys == k for g in grids(findings.recall)) for k in key_counts)]
    figure, panels = pyplot.subplots(
        1, len(widths), figsize=(sum(widths), 4.6), width_ratios=widths, layout="constrained", squeeze=False
    )
    _plot_positions(panels[0, 0], findings)
    for axes, keys in zip(panels[0, 1:], key_counts, strict=True):
        image = _plot_recall(axes, [g for g in grids(findings.recall) if g[0].cell.keys == keys])
    if key_counts:
        figure.colorbar(image, ax=panels[0, 1:], label="share of exact answers", fraction=0.05)
    save_picture(figure, path)


def _plot_positions(axes: Any, findings: Findings) -> None:
    """From 16 tokens on, if there are longer documents: what comes before would flatten the rest."""
    named = shown(findings.main)
    longest = max((b.up_to for _, r in named for b in r.by_position), default=1)

    def line(name: str, buckets: tuple[Bucket, ...], **style: Any) -> Any:
        later = [b for b in buckets if b.up_to >= min(16, longest)]
        return axes.plot([b.up_to for b in later], [b.loss for b in later], label=name, **style)[0]

    for name, r in named:
        first = line(f"{name}, all documents", r.by_position, linestyle=":")
        if r.by_position_full:
            label = f"{name}, those of {findings.seq_len:,} tokens and more"
            line(label, r.by_position_full, color=first.get_color(), marker="o", markersize=4)
    ticks = [t for t in (2**b for b in range(32)) if min(16, longest) <= t <= longest]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{t}" if t < 1024 else f"{t // 1024}Ki" for t in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel="tokens seen (up to)", ylabel="loss (nats)", title="Held-out loss by position")
    axes.grid(alpha=0.3)
    if named:
        axes.legend(fontsize=8)


def _plot_recall(axes: Any, columns: list[list[Found]]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    shares = [[g[i].accuracy for g in columns] for i in range(len(columns[0]))]
    colours = LinearSegmentedColormap.from_list("recall", [_colour(i / 20) for i in range(21)])
    image = axes.imshow(shares, vmin=0, vmax=1, cmap=colours, aspect="auto")
    axes.set_xticks([j + 0.5 for j in range(len(columns) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(shares) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            axes.text(j, i, percent(share), ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), [f"{g[0].cell.length:,}" for g in columns], fontsize=8)
    axes.set_yticks(range(len(shares)), [_depth(f) for f in columns[0]], fontsize=8)
    title = _title(columns[0][0].cell.keys)
    axes.set(xlabel="length (tokens)", title=f"{title[0].upper()}{title[1:]} ({columns[0][0].num_samples} in a cell)")
    axes.set_ylabel("needle at (of the text)")
    return image
