"""What an evaluation found, put where people and programs see it: JSON, metrics.jsonl, tables, a picture.

report(metrics, run_dir, "main", 400, 400, findings)    # also RUN/eval/main-00000400.json and .png
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
from slm.errors import EnvironmentProblem, UserError
from slm.evaluate import ALL, Bucket, Findings, Result
from slm.metrics import MetricsLogger
from slm.recall.score import Found
from slm.runtime import atomic_write

log = logging.getLogger("slm")


# --- numbers -------------------------------------------------------------------------------------------------


def as_dict(findings: Findings, bytes_per_token: Mapping[str, float] | None = None) -> dict[str, Any]:
    """For programs: loss by seq_len and source, by position, and the cells of recall.

    bytes_per_token: by source; with it bits_per_byte is given (None where it is not known).
    """

    def of(name: str, r: Result) -> dict[str, Any]:
        row: dict[str, Any] = {"targets": r.num_targets, "loss": r.loss, "perplexity": r.perplexity}
        if bytes_per_token is not None:
            known = bytes_per_token.get(name)
            row["bits_per_byte"] = r.loss / math.log(2) / known if known else None
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
                "answer_loss": f.loss,
            }
            for f in findings.recall
        ],
    }


def _buckets(buckets: Iterable[Bucket]) -> list[dict[str, Any]]:
    return [{"up_to": b.up_to, "targets": b.num_targets, "loss": b.loss} for b in buckets]


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
        rows[f"{at}/answer_loss"] = sum(f.loss_sum for f in found) / max(1, sum(f.num_tokens for f in found))
    return rows


def grids(recall: Iterable[Found]) -> list[list[Found]]:
    """The cells of each (number of keys, length), by depth."""
    by_place: dict[tuple[int, int], list[Found]] = {}
    for f in recall:
        by_place.setdefault((f.cell.keys, f.cell.length), []).append(f)
    return [sorted(by_place[place], key=lambda f: f.cell.depth) for place in sorted(by_place)]


def mean_accuracy(found: list[Found]) -> float:
    return sum(f.num_exact for f in found) / max(1, sum(f.num_samples for f in found))


def report(metrics: MetricsLogger, run_dir: Path, phase: str, step: int, global_step: int, findings: Findings) -> None:
    """Into metrics.jsonl, the log, and RUN/eval/PHASE-STEP.json; with a picture beside it if there is matplotlib and
    recall to show. `step` is the phase's. Before its first step metrics are named start/… instead of eval/…: the
    phase before ends at the same global step. On the first rank; a full disk never ends a run.
    """
    rows = metrics_rows(findings)
    metrics.log(global_step, rows if step else {f"start{name.removeprefix('eval')}": x for name, x in rows.items()})
    if parallel.rank():
        return
    for line in sentences(findings):
        log.info("step %d %s", global_step, line)
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
            f"{g[0].cell.length} tokens {mean_accuracy(g):.0%} (worst depth {min(f.accuracy for f in g):.0%})"
            for g in found
        ]
        lines.append(f"{_title(found[0][0].cell.keys)}: {', '.join(parts)}")
    return lines


def _title(keys: int) -> str:
    return "pass key" if keys == 1 else f"recall, 1 of {keys} keys"


def draw(findings: Findings, *, by_position: bool) -> None:
    """On the terminal: loss by position, a column for each source; recall, a coloured grid for each number of keys."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if by_position:
        named = shown(findings.main)
        table = Table("tokens seen", title="loss by position (nats)", title_justify="left")
        for name, _ in named:
            table.add_column(Text(name), justify="right")
            table.add_column("of full pieces", justify="right")
        for up_to in sorted({b.up_to for _, r in named for b in r.by_position}):
            cells = []
            for _, r in named:
                for buckets in (r.by_position, r.by_position_full):
                    loss = next((b.loss for b in buckets if b.up_to == up_to), None)
                    cells.append("-" if loss is None else f"{loss:.4f}")
            table.add_row(_span(up_to), *cells)
        console.print(table)
    for keys in sorted({f.cell.keys for f in findings.recall}):
        columns = [grid for grid in grids(findings.recall) if grid[0].cell.keys == keys]
        title = f"{_title(keys)}: exact answers of {columns[0][0].num_samples} in a cell"
        table = Table("needle at", title=title, title_justify="left")
        for grid in columns:
            table.add_column(f"{grid[0].cell.length:,} tokens", justify="right")
        for i, first in enumerate(columns[0]):
            shares = [Text(f" {g[i].accuracy:.0%} ", style=f"black on {_colour(g[i].accuracy)}") for g in columns]
            table.add_row(_depth(first), *shares, end_section=i == len(columns[0]) - 1)
        table.add_row("all", *[f"{mean_accuracy(g):.0%} " for g in columns])
        losses = [sum(f.loss_sum for f in g) / max(1, sum(f.num_tokens for f in g)) for g in columns]
        table.add_row("nats an answer's token", *[f"{loss:.3f} " for loss in losses])
        console.print(table)


def _span(up_to: int) -> str:
    return f"{up_to:,}" if up_to < 3 else f"{up_to // 2 + 1:,} - {up_to:,}"


def _depth(f: Found) -> str:
    return f"{f.cell.percent} - {round(100 * (f.cell.depth + 1) / f.cell.depths)} %"


def _colour(share: float) -> str:
    """From red over yellow to green, light enough for black letters."""
    red, green = min(1.0, 2 - 2 * share), min(1.0, 2 * share)
    return f"#{int(110 + 130 * red):02x}{int(110 + 130 * green):02x}6e"


# --- the picture ---------------------------------------------------------------------------------------------


def plot(findings: Findings, path: Path) -> None:
    """Loss by position, a line for each source, and a heat map of recall for each number of keys: PNG, SVG or PDF.

    Raises EnvironmentProblem without matplotlib, UserError for a path that cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise EnvironmentProblem("the picture needs matplotlib", fix='pip install -e ".[plots]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    key_counts = sorted({f.cell.keys for f in findings.recall})
    widths = [6.5, *(2.6 + 0.8 * sum(g[0].cell.keys == k for g in grids(findings.recall)) for k in key_counts)]
    figure, panels = pyplot.subplots(
        1, len(widths), figsize=(sum(widths), 4.6), width_ratios=widths, layout="constrained", squeeze=False
    )
    _plot_positions(panels[0, 0], findings)
    for axes, keys in zip(panels[0, 1:], key_counts, strict=True):
        image = _plot_recall(axes, [g for g in grids(findings.recall) if g[0].cell.keys == keys])
    if key_counts:
        figure.colorbar(image, ax=panels[0, 1:], label="share of exact answers", fraction=0.05)
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise UserError(f"--plot {path}: {error}", fix="give a .png, .svg or .pdf in a folder that is there") from None
    finally:
        pyplot.close(figure)


def _plot_positions(axes: Any, findings: Findings) -> None:
    for name, r in shown(findings.main):
        if not r.by_position:
            continue
        (line,) = axes.plot(
            [b.up_to for b in r.by_position],
            [b.loss for b in r.by_position],
            linestyle=":",
            label=f"{name}, all documents",
        )
        full = r.by_position_full
        label = f"{name}, those of {findings.seq_len:,} tokens and more"
        if full:
            axes.plot(
                [b.up_to for b in full], [b.loss for b in full], color=line.get_color(), marker="o", ms=4, label=label
            )
    ticks = sorted({b.up_to for _, r in shown(findings.main) for b in r.by_position})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{t:,}" if t < 1024 else f"{t // 1024}Ki" for t in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel="tokens seen (up to)", ylabel="loss (nats)", title="Held-out loss by position")
    axes.grid(alpha=0.3)
    if ticks:
        axes.legend(fontsize=8)


def _plot_recall(axes: Any, columns: list[list[Found]]) -> Any:
    shares = [[g[i].accuracy for g in columns] for i in range(len(columns[0]))]
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            axes.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), [f"{g[0].cell.length:,}" for g in columns], fontsize=8)
    axes.set_yticks(range(len(shares)), [_depth(f) for f in columns[0]], fontsize=8)
    title = _title(columns[0][0].cell.keys)
    axes.set(xlabel="length (tokens)", ylabel="needle at", title=title[0].upper() + title[1:])
    return image
