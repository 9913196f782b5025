"""The README.md of an exported folder: what the model is, how to load it, and what it was made of and measured at.

Owns the text and its picture. What is not known (a copied checkpoint has no log; a Hugging Face folder no recipe) is left out.
The license is left to who publishes the weights.

    write_card(Path("export"), "runs/demo", run_of("runs/demo"), state, model.config, has_tokenizer=True)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from slm import __version__
from slm.afterwards import scores
from slm.data.tokens import TokenDataset
from slm.errors import EnvironmentProblem, SLMError
from slm.model.config import ModelConfig
from slm.pictures import check_picture, save_picture
from slm.redact import redacted, redacted_in
from slm.runtime import atomic_write
from slm.status import json_lines, json_object

_ROWS = 12  # of the table that stands for the picture


def write_card(
    folder: Path,
    path: str,
    run: Path | None,
    state: dict[str, Any],
    config: ModelConfig,
    has_tokenizer: bool,
) -> None:
    """run: the run's folder, if the model is of one. state: its checkpoint's; {} of a Hugging Face folder."""
    recipe = state.get("recipe") or {}
    name = recipe.get("name") or Path(path).resolve().name
    about = (
        f"A base language model, with no instruction tuning, trained with slm {__version__}."
        if state
        else f"Written by slm {__version__} from a folder of that name, whose own card says what it was trained on."
    )
    sections = [_head(name, about, config, has_tokenizer)]
    if state:
        sections += [_training(state, recipe), _data(state, recipe)]
        sections += [_evaluation(state, run), _curve(folder, run, state)]
    text = "\n\n".join(section for section in sections if section) + "\n"
    atomic_write(folder / "README.md", redacted(text))


def _head(name: str, about: str, c: ModelConfig, has_tokenizer: bool) -> str:
    rope = "plain" if c.rope_scaling is None else c.rope_scaling.rope_type
    with_text = (
        """
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""
        if has_tokenizer
        else ""
    )
    names = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [slm, llama]
# license: to be said by who publishes these weights
---

# {name}

{about}

| parameters | layers | width | MLP | heads | key/value heads | vocabulary | context | rotary scaling | head |
|---|---|---|---|---|---|---|---|---|---|
| {c.num_parameters():,} | {c.num_hidden_layers} | {c.hidden_size} | {c.intermediate_size} | {c.num_attention_heads} \
| {c.num_key_value_heads} | {c.vocab_size} | {c.max_position_embeddings} | {rope} \
| {"tied" if c.tie_word_embeddings else "own"} |

```python
from transformers import {names}

folder = "."  # this one
model = AutoModelForCausalLM.from_pretrained(folder){with_text}
```"""


def _training(state: dict[str, Any], recipe: dict[str, Any]) -> str:
    position = state.get("position") or {}
    layout = state.get("layout") or {}
    told = yaml.safe_dump(redacted_in(recipe), sort_keys=False, allow_unicode=True).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in _backticks(told)), default=0))
    return f"""## Training

Step {state["global_step"]:,} of the whole run (phase {position.get("phase")}, step {position.get("step")}), \
{layout.get("world_size", "?")} ranks at its end. The whole recipe:

{fence}yaml
{told}
{fence}"""


def _backticks(text: str) -> list[str]:
    return ["`" * len(run) for run in "".join(c if c == "`" else " " for c in text).split()]


def _data(state: dict[str, Any], recipe: dict[str, Any]) -> str:
    identity = state.get("identity") or {}
    lines = ["## Data", "", "| source | tokens | documents | fingerprint (SHA-256) |", "|---|---|---|---|"]
    data = recipe.get("data") or {}
    held_out = {f"{name} (held out)": place for name, place in (data.get("validation") or {}).items()}
    for name, place in {**(data.get("sources") or {}), **held_out}.items():
        folder = place.get("path") if isinstance(place, dict) else place
        try:
            dataset = TokenDataset(str(folder))
            lines.append(f"| {name} | {dataset.num_tokens:,} | {dataset.num_docs:,} | `{dataset.fingerprint}` |")
        except (SLMError, OSError):  # not on this machine, or no longer
            lines.append(f"| {name} | ? | ? | ? |")
    lines += [
        "",
        f"Tokenizer: `{identity.get('tokenizer', '?')}`. Of all that the phase read: `{identity.get('data', '?')}`.",
    ]
    return "\n".join(lines)


def _evaluation(state: dict[str, Any], run: Path | None) -> str:
    position = state.get("position") or {}
    name = f"{position.get('phase')}-{position.get('step', 0):08d}"
    found = state.get("findings") or (json_object(run / "eval" / f"{name}.json") if run is not None else {})
    lines: list[str] = []
    losses = found.get("loss") or {}
    if losses:
        lines += ["| tokens | held-out source | targets | loss (nats) | perplexity |", "|---|---|---|---|---|"]
        for seq_len, sources in losses.items():
            for source, row in sources.items():
                lines.append(
                    f"| {seq_len} | {source} | {row['targets']:,} | {_number(row['loss'])} | {_number(row['perplexity'])} |"
                )
    if recall := found.get("recall"):
        lines += ["", "| keys hidden | length | samples | exact answers |", "|---|---|---|---|"]
        for keys, length in sorted({(cell["keys"], cell["length"]) for cell in recall}):
            cells = [cell for cell in recall if (cell["keys"], cell["length"]) == (keys, length)]
            samples, exact = (sum(cell[field] for cell in cells) for field in ("samples", "exact"))
            lines.append(f"| {keys} | {length} | {samples} | {exact / max(1, samples):.1%} |")
    suite = json_object(run / "eval" / f"suite-{name}.json") if run is not None else {}
    if suite:
        lines += [
            "",
            f"lm-evaluation-harness {suite['harness']}:",
            "",
            "| benchmark | metric | score |",
            "|---|---|---|",
        ]
        for task, metric, kind, value, _ in scores(suite["results"]):
            lines.append(f"| {task} | {metric if kind == 'none' else f'{metric}, {kind}'} | {_number(value)} |")
    texts = json_object(run / "eval" / f"text-{name}.json") if run is not None else {}
    if texts:
        lines += ["", "| text | tokens | perplexity | bits per byte | bits per character |", "|---|---|---|---|---|"]
        for text, m in texts["results"].items():
            ratios = (m["perplexity"], m["bits_per_byte"], m["bits_per_character"])
            lines.append(f"| {Path(text).name} | {m['num_tokens']:,} | {' | '.join(map(_number, ratios))} |")
    return "\n".join(["## Evaluation", "", *lines]) if lines else ""


def _curve(folder: Path, run: Path | None, state: dict[str, Any]) -> str:
    rows = (
        [row for row in _rows(run / "metrics.jsonl") if row["step"] <= state["global_step"]] if run is not None else []
    )
    steps = [(row["step"], row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]
    if not steps:
        return ""
    held_out: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("eval/") and key.endswith("/loss") and key.count("/") == 2 and isinstance(value, float):
                held_out.setdefault(key.split("/")[1], []).append((row["step"], value))
    try:
        _draw(folder / "loss.png", steps, held_out)
        return "## Loss\n\n![training and held-out loss by step](loss.png)"
    except EnvironmentProblem:  # no matplotlib, which is optional
        every = max(1, -(-len(steps) // _ROWS))
        shown = steps[::every] + ([steps[-1]] if (len(steps) - 1) % every else [])
        return "\n".join(
            ["## Loss", "", "| step | loss |", "|---|---|", *(f"| {s:,} | {_number(x)} |" for s, x in shown)]
        )


def _draw(path: Path, steps: list[tuple[int, float]], held_out: dict[str, list[tuple[int, float]]]) -> None:
    check_picture(path)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    axes.plot(*zip(*steps, strict=True), color="0.6", linewidth=1, label="training")
    for name, points in held_out.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"held out: {name}")
    axes.set(xlabel="step", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_picture(figure, path)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def _rows(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, without those that a kill cut short."""
    return [row for row in json_lines(path) if isinstance(row.get("step"), int)]
