"""The section of the page with what `slm eval --suite` and `--text` found of a run's checkpoints.

benchmarks(view)    # HTML
"""

from __future__ import annotations

from typing import Any

from slm.afterwards import scores
from slm.report.charts import number, table
from slm.report.curves import View

_MOST_CHECKPOINTS = 4  # of one run


def benchmarks(view: View) -> str:
    """A row for each benchmark and metric, and for each text; of one run each checkpoint, of several runs the newest of each."""
    suites, texts = _columns(view, "suite"), _columns(view, "text")
    if not (suites or texts):
        return '<p class="soft">None were asked for: slm eval RUN --suite NAME, slm eval RUN --text FILE.</p>'
    return _scores(suites) + _texts(texts)


def _columns(view: View, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """(head, results by name)."""
    columns = []
    for record, label in zip(view.records, view.labels, strict=True):
        found = [a for a in record.afterwards if a.kind == kind]
        for a in found[-_MOST_CHECKPOINTS:] if view.is_one else found[-1:]:
            where = f"{a.phase}, step {a.step:,}"
            columns.append((where if view.is_one else f"{label} ({where})", a.results))
    return columns


def _scores(columns: list[tuple[str, dict[str, Any]]]) -> str:
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for i, (_, results) in enumerate(columns):
        for task, metric, kind, value, error in scores(results):
            name = metric if kind == "none" else f"{metric} ({kind})"
            about = [
                "-" if (x := results[task].get(field)) is None else str(x) for field in ("num_fewshot", "documents")
            ]
            if results[task].get("limit") is not None:
                about[1] += ", the first"
            shown = number(value) + (f" ± {error:.2g}" if error is not None else "")
            cells.setdefault((task, name, *about), {})[i] = shown
    if not cells:
        return ""
    rows = [
        [task, name, *(of.get(i, "-") for i in range(len(columns))), *about]
        for (task, name, *about), of in cells.items()
    ]
    heads = [
        "benchmark",
        "metric",
        *(head for head, _ in columns),
        "shots",
        "documents",
    ]  # on a phone the first are seen
    shown = table(heads, rows, numeric=range(2, len(heads)))
    return f'<div class="card"><h3>lm-evaluation-harness</h3>{shown}<p class="note">± is the standard error.</p></div>'


def _texts(columns: list[tuple[str, dict[str, Any]]]) -> str:
    rows = [
        [
            name, head, *(number(m[ratio]) for ratio in ("bits_per_byte", "bits_per_character", "perplexity", "word_perplexity")),
            f"{m['num_tokens']:,}", f"{m['seq_len']:,} by {m['stride']:,}",
        ]
        for name in dict.fromkeys(name for _, results in columns for name in results)
        for head, results in columns
        if (m := results.get(name)) is not None
    ]  # fmt: skip
    if not rows:
        return ""
    heads = ["text", "checkpoint", "bits a byte", "bits a character", "perplexity", "per word", "tokens", "windows"]
    return f'<div class="card"><h3>Texts</h3>{table(heads, rows, numeric=range(2, len(heads)))}</div>'
