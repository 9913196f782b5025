"""`slm quantize MODEL OUTPUT`: a model's weights in 4 or 8 bits, as a folder that is loaded without the original.

Owns the search for codes, the writing, one tensor at a time, and the report of what it cost. The format and its reader are
model/quantized_files.py's, the arithmetic on codes model/quantized.py's.

    report = quantize("runs/demo", Path("small"), Quantization(4, 64, embeddings=True))
    draw(report)

`N` rows of a matrix, `K` columns, `g` columns that share a scale, `G` = K/g groups of a row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

from slm import __version__
from slm.errors import CorruptArtefact, SLMError, UserError
from slm.findings import shown
from slm.loading import evaluate_model, fresh_folder, open_checkpoint, phase_of, write_beside
from slm.model.config import ModelConfig
from slm.model.hf import expected_shapes, read_config, weight_reader
from slm.model.quantized_files import Quantization, check_groups, config_fields, pairs_of
from slm.redact import redacted
from slm.runtime import atomic_write

# Parts of the full range of a group that are tried for its scale: the fewer steps outside it cost, the finer those inside.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_CHUNK_WEIGHTS = 1 << 18  # looked at together: stays in the cache


@dataclass(frozen=True)
class Measured:
    """One text or source of shards, before and after."""

    name: str
    num_tokens: int
    loss_before: float
    loss_after: float

    @property
    def change(self) -> float:
        """Of the perplexity, as a part of it."""
        return math.expm1(min(700.0, self.loss_after - self.loss_before))


@dataclass(frozen=True)
class Report:
    """Bytes of weights (before: as they were stored), and the relative error of those that are codes now:
    sqrt(sum of squared errors / sum of squares)."""

    num_parameters: int
    bytes_before: int
    bytes_after: int
    relative_error: float
    measured: list[Measured]
    not_measured: str = ""

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {
                **asdict(m),
                "perplexity_before": math.exp(min(700.0, m.loss_before)),
                "perplexity_after": math.exp(min(700.0, m.loss_after)),
                "perplexity_change": m.change,
            }
            for m in self.measured
        ]
        return asdict(self) | {"measured": rows}


def default_group(config: ModelConfig, bits: int) -> int:
    """Rows with 8 bits; with 4 bits the largest of 64, 32 and 16 that divides the columns of every matrix (else 64)."""
    columns = {shape[1] for shape in expected_shapes(config).values() if len(shape) == 2}
    fitting = (size for size in (64, 32, 16) if not any(width % size for width in columns))
    return 0 if bits == 8 else next(fitting, 64)


# --- codes --------------------------------------------------------------------------------------------------------


def quantize_matrix(
    weight_NK: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float, float]:
    """(codes [N, K], scales [N, G], zeros [N, G] or None with 8 bits, sum of squared errors, sum of squares).

    weight = code * scale, codes -127 to 127 in int8; with 4 bits (code - 8) * scale + zero, codes 0 to 15 in uint8. Scales
    and zeros are bfloat16, as the kernels want them; codes are chosen for the rounded ones.
    """
    N, K = weight_NK.shape
    search = _eight_bits if bits == 8 else _four_bits
    parts = []
    for rows_nK in weight_NK.split(max(1, _CHUNK_WEIGHTS // K)):
        w_nGg = rows_nK.float().view(-1, K // group, group)
        codes, scales, zeros, error = search(w_nGg)
        parts.append((codes.view(-1, K), scales, zeros, error, float(w_nGg.square().sum(dtype=torch.float64))))
    codes_, scales_, zeros_, errors, squares = zip(*parts, strict=True)
    all_zeros = torch.cat(zeros_) if bits == 4 else None
    return torch.cat(codes_), torch.cat(scales_), all_zeros, sum(errors), sum(squares)


_Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]


def _eight_bits(w_nGg: torch.Tensor) -> _Found:
    scale = _usable((w_nGg.abs().amax(-1, keepdim=True) / 127).bfloat16())
    codes = (w_nGg / scale).round_().clamp_(-127, 127)
    error = float((codes * scale - w_nGg).square_().sum(dtype=torch.float64))
    return codes.to(torch.int8), scale[..., 0], scale[..., 0], error


def _four_bits(w_nGg: torch.Tensor) -> _Found:
    """For each group the scale and zero of least squared error: of several parts of its range, then by least squares."""
    low, high = w_nGg.amin(-1, keepdim=True), w_nGg.amax(-1, keepdim=True)
    middle, width = (low + high) / 2, high - low
    best: tuple[torch.Tensor, ...] | None = None

    def attempt(scale: torch.Tensor, zero: torch.Tensor) -> None:
        nonlocal best
        scale, zero = _usable(scale.bfloat16()), zero.bfloat16()
        codes = w_nGg.sub(zero).div_(scale).add_(8).round_().clamp_(0, 15)
        error = codes.sub(8).mul_(scale).add_(zero).sub_(w_nGg).square_().sum(-1, keepdim=True)
        new = (error, codes.to(torch.uint8), scale, zero)
        best = (
            new if best is None else tuple(torch.where(error < best[0], n, b) for n, b in zip(new, best, strict=True))
        )

    for part in _SHRINKS:
        scale = width * part / 15
        attempt(scale, middle + scale / 2)  # codes 0 to 15 lie around 7.5
    assert best is not None
    # The line through (code, weight) of least squares, which moves scale and zero a little.
    codes = best[1].float() - 8
    codes_mean, w_mean = codes.mean(-1, keepdim=True), w_nGg.mean(-1, keepdim=True)
    centred = codes - codes_mean
    scale = (centred * (w_nGg - w_mean)).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp_(min=1e-9)
    attempt(scale, w_mean - scale * codes_mean)
    error, codes, scale, zero = best
    return codes, scale[..., 0], zero[..., 0], float(error.sum(dtype=torch.float64))


def _usable(scale: torch.Tensor) -> torch.Tensor:
    """1 where it is 0: there all weights of the group are the same."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


# --- the folder ---------------------------------------------------------------------------------------------------


def quantize(
    path: str,
    output: Path,
    q: Quantization,
    *,
    data: Sequence[str] = (),
    text: bool = False,
    measure: bool = True,
    max_sequences: int = 64,
    tokenizer: str = "",
) -> Report:
    """Writes `output`, whole or not at all.

    q: its group_size None takes `default_group`.

    data: folders of shards, or with `text` text files, that perplexity is measured on before and after; if there are none, the
    held-out shards of the model's recipe, where they are there. Raises UserError, CorruptArtefact, EnvironmentProblem.
    """
    weight, config, state = _source(path)
    if q.group_size is None:
        q = replace(q, group_size=default_group(config, q.bits))
    check_groups(config, q, "--group-size")
    losses: Callable[[str], dict[str, tuple[float, int]]] | None = None
    not_measured = "" if measure else "as --no-measure says"
    before: dict[str, tuple[float, int]] = {}
    with fresh_folder(output) as partial:
        if measure:
            held_out = list(state.get("recipe", {}).get("data", {}).get("validation", {}).values())
            losses = _measure(list(data) or held_out, text, max_sequences, tokenizer, state)
            try:
                before = losses(path)
            except SLMError as error:
                if data:
                    raise
                not_measured = error.problem
        report = _write(partial, path, weight, config, state, q, tokenizer)
        after = losses(str(partial)) if before and losses is not None else {}
        measured = [Measured(name, count, loss, after[name][0]) for name, (loss, count) in before.items()]
        report = Report(**{**vars(report), "measured": measured, "not_measured": not_measured})
        atomic_write(partial / "README.md", redacted(_card(path, config, state, q, report)))
    return report


def _source(path: str) -> tuple[Callable[[str, tuple[int, ...]], torch.Tensor], ModelConfig, dict[str, Any]]:
    """(a function that reads a weight, the config, the checkpoint's state or {}), for what load_model takes."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return weight_reader(folder), read_config(folder), {}
    reader = open_checkpoint(folder)
    return reader.weight, ModelConfig(**reader.state["model"]), reader.state


def _write(
    partial: Path,
    path: str,
    weight: Callable[[str, tuple[int, ...]], torch.Tensor],
    config: ModelConfig,
    state: dict[str, Any],
    q: Quantization,
    tokenizer: str,
) -> Report:
    shapes = expected_shapes(config)
    tensors: dict[str, torch.Tensor] = {}
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    bytes_before, squared_error, squares = 0, 0.0, 0.0
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("quantising", total=num_parameters)
        for name, shape in shapes.items():
            value = weight(name, shape)
            bytes_before += value.nbytes
            if not bool(torch.isfinite(value).all()):
                raise CorruptArtefact(f"{path}: {name} holds numbers that are not finite", fix="copy the model again")
            if q.covers(name, shape):
                stem = name.removesuffix(".weight")
                codes, scales, zeros, error, square = quantize_matrix(value, q.bits, q.group(shape[1]))
                tensors[f"{stem}.codes"] = codes if zeros is None else pairs_of(codes)
                tensors[f"{stem}.scales"] = scales
                if zeros is not None:
                    tensors[f"{stem}.zeros"] = zeros
                squared_error, squares = squared_error + error, squares + square
            else:  # norms are small and stay as they are
                tensors[name] = value.bfloat16() if value.ndim == 2 and value.dtype == torch.float32 else value
            progress.update(task, advance=math.prod(shape))
    file = partial / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    os.chmod(file, 0o644)  # safetensors makes it readable by the owner alone
    write_beside(partial, path, config_fields(config, q), state, tokenizer)
    error = math.sqrt(squared_error / squares) if squares else 0.0
    return Report(num_parameters, bytes_before, file.stat().st_size, error, [])


# --- what it cost -------------------------------------------------------------------------------------------------


def _measure(
    data: list[str], text: bool, max_sequences: int, tokenizer: str, state: dict[str, Any]
) -> Callable[[str], dict[str, tuple[float, int]]]:
    """A function from a model's path to {source: (mean loss in nats, number of tokens)}."""

    def losses(path: str) -> dict[str, tuple[float, int]]:
        if text:
            from slm.text_loss import evaluate_text

            rows = evaluate_text(path, data, tokenizer=tokenizer)
            assert rows is not None  # one process
            return {row.name: (row.loss, row.num_tokens) for row in rows}
        if not data:
            raise UserError(f"{path}: its recipe names no held-out data, and none is given")
        measured = evaluate_model(path, data, phase_of(state)["seq_len"] if state else 0, 4, max_sequences)
        assert measured is not None  # one process
        found, _ = measured
        return {name: (result.loss, result.num_targets) for name, result in shown(found.main)}

    return losses


def _card(path: str, config: ModelConfig, state: dict[str, Any], q: Quantization, report: Report) -> str:
    name = (state.get("recipe") or {}).get("name") or Path(path).resolve().name
    group = f"groups of {q.group_size}" if q.group_size else "whole rows"
    where = "everywhere but in norms" if q.embeddings else "but for embeddings and head (16 bits) and norms"
    rows = "\n".join(f"| {' | '.join(row)} |" for row in _rows(report))
    return f"""---
tags: [slm, llama]
# license: to be said by who publishes these weights
---

# {name}, {q.bits} bits

{config.num_parameters():,} parameters, made by slm quantize ({__version__}): {q.bits} bits in {group}, {where}. slm reads it
(`slm generate FOLDER`, `slm eval FOLDER`, `SLMForCausalLM.from_pretrained(FOLDER)`), and other tools do not.

| | before | after | |
|---|---|---|---|
{rows}

{_remark(report)}
"""


def _rows(report: Report) -> list[tuple[str, str, str, str]]:
    before, after = report.bytes_before, report.bytes_after
    bits_before, bits_after = (8 * size / report.num_parameters for size in (before, after))
    rows = [
        ("bytes of weights", f"{before:,}", f"{after:,}", f"1/{before / after:.2f}"),
        ("bits a parameter", f"{bits_before:.2f}", f"{bits_after:.2f}", ""),
    ]
    for m in report.measured:
        was, is_now = (f"{math.exp(min(700.0, loss)):.4f}" for loss in (m.loss_before, m.loss_after))
        rows.append((f"perplexity of {m.name}", was, is_now, f"{100 * m.change:+.3f} %"))
    return rows


def _remark(report: Report) -> str:
    tokens = ", ".join(f"{m.num_tokens:,}" for m in report.measured)
    told = f"over {tokens} tokens" if tokens else f"not measured: {report.not_measured}"
    return f"Relative error of the weights: {100 * report.relative_error:.2f} %. Perplexity {told}."


def draw(report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("", overflow="fold")
    for name in ("before", "after", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for name, *told in _rows(report):
        table.add_row(Text(name), *told)
    console = Console()
    console.print(table)
    console.print(_remark(report), highlight=False)
