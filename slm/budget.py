"""What a recipe comes to on named GPUs: what fits, how fast, for how long, at what cost; as tables and as JSON. No torch.

Owns what `slm plan RECIPE --gpus N --gpu NAME` shows; the figures are from choose.py, memory.py and forecast.py.

    found = budget(recipe, find_gpu("h200"), GPUs(64), Assumptions(price_per_gpu_hour=2.5))
    draw(found); check_fits(found)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from slm.choose import Candidate, candidates, choose, gib, reasons
from slm.errors import UserError
from slm.forecast import (
    MTBF_HOURS_PER_GPU,
    GPUs,
    lost_fraction,
    mtbf_seconds,
    save_interval_seconds,
    save_stall_seconds,
)
from slm.hardware import GPU, HOST_MEMORY_BANDWIDTH, PAGEABLE, PINNED
from slm.layout import check_ranks
from slm.memory import STATE_BYTES
from slm.plan import flops_per_token
from slm.recipe import Phase, Recipe

_WIDTH = 132
_WIDTH_ALL = 178
_LAUNCH_SECONDS = 1e-3  # about what Python needs to start the kernels of one block, both passes


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know, and a user may."""

    price_per_gpu_hour: float | None = None
    mtbf_hours_per_gpu: float = MTBF_HOURS_PER_GPU
    save_stall_seconds: float | None = None  # None: the time of the copy to host memory


@dataclass(frozen=True)
class PhaseBudget:
    phase: Phase
    rows: tuple[Candidate, ...]
    own: Candidate
    best: Candidate | None
    flops_full: float  # a token
    flops_causal: float
    save_seconds: float  # between two saves


@dataclass(frozen=True)
class Budget:
    recipe: Recipe
    gpu: GPU
    gpus: GPUs
    assumed: Assumptions
    stall_seconds: float
    mtbf_seconds: float
    phases: tuple[PhaseBudget, ...]


def budget(recipe: Recipe, gpu: GPU, gpus: GPUs, assumed: Assumptions, phases: Sequence[Phase] | None = None) -> Budget:
    """Of these of its phases, or of all. Raises UserError if so many GPUs cannot share their work as it is."""
    planned = recipe.phases if phases is None else phases
    check_ranks(planned, gpus.count)
    stall = assumed.save_stall_seconds
    if stall is None:
        stall = save_stall_seconds(recipe.model, gpu, gpus.count)
    between_failures = mtbf_seconds(gpus.count, assumed.mtbf_hours_per_gpu)
    parts = []
    for phase in planned:
        found = candidates(recipe, phase, gpu, gpus)
        parts.append(
            PhaseBudget(
                phase,
                found.rows,
                found.own,
                choose(found.rows),
                flops_per_token(recipe.model, phase.seq_len, causal=False),
                flops_per_token(recipe.model, phase.seq_len, causal=True),
                save_interval_seconds(stall, between_failures),
            )
        )
    return Budget(recipe, gpu, gpus, assumed, stall, between_failures, tuple(parts))


def check_fits(found: Budget) -> None:
    """Raises UserError if the recipe, as it stands, does not fit, with the nearest settings that do."""
    usable = found.gpu.usable_bytes
    told, fixes = [], []
    for part in found.phases:
        if part.own.fits:
            continue
        held = part.own.memory.peak
        largest = max(held.parts().items(), key=lambda item: item[1])
        told.append(
            f"phases.{part.phase.name} needs {gib(held.total_bytes)} GiB on each GPU ({held.moment}; most of it {largest[0]}, "
            f"{gib(largest[1])} GiB), and tensors may fill {gib(usable)} GiB of {found.gpu.name}: "
            f"{gib(held.total_bytes - usable)} GiB too much" + "".join(f"; and {what}" for what in part.own.not_counted)
        )
        if part.best is None:
            least = min(part.rows, key=lambda row: row.memory.peak.total_bytes)
            fixes.append(
                f"phases.{part.phase.name} fits with none of the settings looked at (the least needs "
                f"{gib(least.memory.peak.total_bytes)} GiB): take more or larger GPUs, or a shorter seq_len"
            )
        else:
            fixes.append(" ".join(f"phases.{part.phase.name}.{k}={v}" for k, v in changed(part).items()))
    if told:
        raise UserError(";\n".join(told), fix="\n       ".join(fixes))


def changed(part: PhaseBudget) -> dict[str, Any]:
    """The fields in which the choice differs from the recipe."""
    if part.best is None:
        return {}
    own = part.own.overrides
    found = {name: value for name, value in part.best.overrides.items() if own.get(name) != value}
    if part.own.offload_activations and not part.best.offload_activations:
        found["offload_activations"] = "false"
    return found


# --- figures of one row ------------------------------------------------------------------------------------------


def _as_dict(found: Budget, part: PhaseBudget, row: Candidate) -> dict[str, Any]:
    phase, count = part.phase, found.gpus.count
    seconds = phase.num_steps * row.time.seconds
    rate = row.tokens_per_second / count
    hours = seconds / 3600 * count
    price = found.assumed.price_per_gpu_hour
    peak = found.gpu.peak_flops if row.memory.value_bytes == 2 else found.gpu.float32_flops
    return {
        "deepspeed": row.deepspeed,
        "zero_stage": row.zero.stage,
        "sequence_parallel": row.sequence_parallel,
        "activation_checkpointing": row.policy,
        "micro_batch": row.micro_batch,
        "gradient_accumulation": row.gradient_accumulation,
        "mlp_tile_tokens": row.mlp_tile_tokens,
        "offload_activations": row.offload_activations,
        "fits": row.fits,
        "memory_bytes": {"total": row.memory.peak.total_bytes, **row.memory.peak.parts()},
        "fullest_at": row.memory.peak.moment,
        "memory_bytes_at": {held.moment: held.total_bytes for held in row.memory.moments},
        "not_counted": list(row.not_counted),
        "host_bytes": row.memory.host_bytes,
        "host_bytes_per_node": _host_bytes_of_node(found, row),
        "save_copy_bytes": row.memory.save_bytes,
        "communication_bytes_per_step": {
            "gradients_and_weights": row.time.state_bytes,
            "sequences": row.time.exchange_bytes,
        },
        "offload_bytes_per_step": {"host_link": row.time.host_link_bytes, "host_memory": row.time.host_memory_bytes},
        "step_seconds": row.time.seconds,
        "exposed_communication_seconds": row.time.exposed_seconds,
        "offload_seconds": row.time.offload_seconds,
        "teacher_seconds": row.time.teacher_seconds,
        "tokens_per_second": row.tokens_per_second,
        "tokens_per_second_per_gpu": rate,
        "mfu_full": rate * part.flops_full / peak,
        "mfu_causal": rate * part.flops_causal / peak,
        "days": seconds / 86400,
        "gpu_hours": hours,
        "cost": None if price is None else price * hours,
        "save_every_steps": max(1, round(part.save_seconds / row.time.seconds)),
    }


def as_dict(found: Budget) -> dict[str, Any]:
    """Everything, for programs; bytes, seconds, and rates as their names say."""
    parameters = found.recipe.model.num_parameters()
    return {
        "gpu": {**vars(found.gpu), "usable_bytes": found.gpu.usable_bytes},
        "gpus": found.gpus.count,
        "gpus_per_node": found.gpus.per_node,
        "assumed": {
            **vars(found.assumed),
            "save_stall_seconds": found.stall_seconds,
            "host_memory_bandwidth_per_node": HOST_MEMORY_BANDWIDTH,
            "host_link_efficiency": {"pinned": PINNED, "pageable": PAGEABLE},
            "mtbf_hours": found.mtbf_seconds / 3600,
        },
        "checkpoint_bytes": STATE_BYTES * parameters,
        "phases": [
            {
                "name": part.phase.name,
                "flops_per_token_full": part.flops_full,
                "flops_per_token_causal": part.flops_causal,
                "own": _as_dict(found, part, part.own),
                "chosen": None if part.best is None else _as_dict(found, part, part.best),
                "changes": changed(part),
                "why": [] if part.best is None else reasons(part.best, part.rows, found.gpu),
                "save_interval_seconds": part.save_seconds,
                "candidates": [_as_dict(found, part, row) for row in part.rows if not row.is_own],
            }
            for part in found.phases
        ],
    }


# --- in words ------------------------------------------------------------------------------------------------------


def draw(found: Budget, *, all_rows: bool = False) -> None:
    """A table and a few lines a phase."""
    console = Console(width=_WIDTH_ALL if all_rows else _WIDTH, highlight=False)
    gpu, assumed = found.gpu, found.assumed
    console.print(
        f"\non {found.gpus.count} x {gpu.name} ({found.gpus.nodes} node{'s' * (found.gpus.nodes > 1)}): "
        f"{gpu.memory_gib:g} GiB each, of which "
        f"tensors may fill {gib(gpu.usable_bytes)}. Speeds are forecasts, from what published runs reached\n"
        "(matrix products at "
        f"{gpu.matmul_efficiency:.0%} and attention at {gpu.attention_efficiency:.0%} of peak; "
        "benchmarks/published_speeds.py), not measurements."
    )
    for part in found.phases:
        console.print(_table(found, part, all_rows))
        for line in _lines(found, part):
            console.print(f"  {line}", soft_wrap=True)
    console.print(f"checkpoints: {STATE_BYTES * found.recipe.model.num_parameters() / 1e9:.2f} GB each; {_kept(found)}")
    failures = f"one failure in {found.mtbf_seconds / 3600:,.0f} h ({assumed.mtbf_hours_per_gpu:,.0f} h a GPU)"
    console.print(f"failures: {failures}; a save blocks for {found.stall_seconds:.2g} s")


def _kept(found: Budget) -> str:
    recipe = found.recipe
    most = recipe.most_checkpoints()
    size = STATE_BYTES * recipe.model.num_parameters() * most / 1e9
    alone = 2 * recipe.model.num_parameters() / 1e9
    return f"at most {most} at once, {size:.0f} GB; the model alone in 16 bits {alone:.2f} GB"


def _table(found: Budget, part: PhaseBudget, all_rows: bool) -> Table:
    missing = "; * not all is counted, see below" if any(row.not_counted for row in part.rows) else ""
    table = Table(
        title=f"phase {part.phase.name}: {part.phase.seq_len:,} tokens, {part.phase.batch_tokens:,} a step{missing}",
        title_justify="left",
    )
    names = ["", "ZeRO", "GPUs a sequence", "recompute", "micro-batch", "GiB", "fits", "tokens/s/GPU"]
    parts = [name for name in part.own.memory.peak.parts() if any(row.memory.peak.parts()[name] for row in part.rows)]
    for name in names + (parts if all_rows else []):
        table.add_column(name, no_wrap=True, justify="left" if name in ("", "ZeRO", "recompute", "fits") else "right")
    for row in _shown(part, all_rows):
        same = part.best is not None and row.is_own and part.best.overrides == row.overrides
        mark = "recipe, chosen" if same else "recipe" if row.is_own else "chosen" if row is part.best else ""
        policy = row.policy + " +tiles" * (row.mlp_tile_tokens is not None) + " +host" * row.offload_activations
        held = row.memory.peak
        star = "*" * bool(row.not_counted)
        cells = [
            mark,
            row.deepspeed,
            str(row.sequence_parallel),
            policy,
            str(row.micro_batch),
            gib(held.total_bytes) + star,
        ]
        rate = f"{row.tokens_per_second / found.gpus.count:,.0f}{star}" if row.fits else "-"
        cells += [("yes" if row.fits else "no") + star, rate]
        cells += [gib(held.parts()[name]) for name in parts] if all_rows else []
        table.add_row(*cells, style="bold" if mark else None)
    return table


def _shown(part: PhaseBudget, all_rows: bool) -> list[Candidate]:
    """The recipe's own, and unless all: one row for each strategy and policy, at the degree chosen and the recipe's; offloading
    only where it is needed."""
    others = [row for row in part.rows if not row.is_own]
    if all_rows:
        return [part.own, *others]
    shown_degrees = {
        part.own.sequence_parallel,
        part.best.sequence_parallel if part.best else part.own.sequence_parallel,
    }
    needed = part.best is None or part.best.zero.offload_optimizer
    others = [
        row
        for row in others
        if row.sequence_parallel in shown_degrees
        and (needed or row.deepspeed == part.own.deepspeed or not row.zero.offload_optimizer)
    ]
    return [part.own, *others]


def _lines(found: Budget, part: PhaseBudget) -> list[str]:
    row, phase = part.own, part.phase
    lines = [_memory_line("recipe", row, found)]
    if part.best is not None and part.best.overrides != row.overrides:
        lines.append(_memory_line("chosen", part.best, found))
    lines += _warnings(found, part)
    if part.best is None:
        lines.append("chosen: none of these fits")
    else:
        said = " ".join(f"phases.{phase.name}.{k}={v}" for k, v in changed(part).items())
        only = " (what is not counted must find room beside it)" if part.best.not_counted else ""
        lines.append(f"chosen: {said or 'as the recipe has it'}{only}")
        lines += [f"  {reason}" for reason in reasons(part.best, part.rows, found.gpu)]
    shown = row if row.fits else part.best
    if shown is None:
        return lines
    figures = _as_dict(found, part, shown)
    price = found.assumed.price_per_gpu_hour
    cost = f", {figures['cost']:,.0f} at {price:g} a GPU hour" if price is not None else ""
    sent = figures["communication_bytes_per_step"]
    exchanged = f" and {sent['sequences'] / 1e9:.2f} GB of sequences" if sent["sequences"] else ""
    taught = f", the teacher {figures['teacher_seconds']:.2g} s (not in MFU)" if figures["teacher_seconds"] else ""
    interval = part.save_seconds
    every = found.recipe.checkpoint.every_steps
    own_loss = lost_fraction(every * shown.time.seconds, found.stall_seconds, found.mtbf_seconds)
    best_loss = lost_fraction(interval, found.stall_seconds, found.mtbf_seconds)
    return [
        *lines,
        f"{'as the recipe has it: ' if shown is row else 'as chosen: '}{figures['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {figures['mfu_causal']:.0%} causal, {figures['mfu_full']:.0%} full; a step {figures['step_seconds']:.3g} s, "
        f"of which communication {figures['exposed_communication_seconds']:.2g} s{taught}{_too_small(found, shown)}"
        f"{'; WITHOUT what is not counted (above)' if shown.not_counted else ''}",
        *([_offload_line(found, shown)] if shown.zero.offloads else []),
        f"a GPU sends {sent['gradients_and_weights'] / 1e9:.2f} GB of gradients and weights{exchanged} a step",
        f"{phase.num_steps:,} steps in {figures['days']:.2g} days, {figures['gpu_hours']:,.0f} GPU hours{cost}",
        f"save every {interval:,.0f} s = {figures['save_every_steps']:,} steps "
        f"(Young: {best_loss:.2%} lost to saves and failures; checkpoint.every_steps {every:,}: "
        f"{f'{own_loss:.2%}' if own_loss < 1 else 'saves take longer than the steps'})",
    ]


def _too_small(found: Budget, row: Candidate) -> str:
    micro_batch_seconds = row.time.compute_seconds / row.gradient_accumulation
    if micro_batch_seconds > found.recipe.model.num_hidden_layers * _LAUNCH_SECONDS:
        return ""
    return " (too small a micro-batch for this rule: the GPU would wait for its kernels to be started)"


def _memory_line(name: str, row: Candidate, found: Budget) -> str:
    held = row.memory.peak
    parts = " + ".join(
        f"{part} {gib(value)}" for part, value in held.parts().items() if value >= 0.005 * held.total_bytes
    )
    on_host = f"; host memory {gib(_host_bytes_of_node(found, row))} GiB a node"
    return f"{name}: {gib(held.total_bytes)} GiB at its fullest ({held.moment}) = {parts}{on_host}"


def _host_bytes_of_node(found: Budget, row: Candidate) -> int:
    """What is offloaded, and the copy that a checkpoint is written from."""
    return (row.memory.host_bytes + row.memory.save_bytes) * min(found.gpus.count, found.gpus.per_node)


def _warnings(found: Budget, part: PhaseBudget) -> list[str]:
    """What the figures of the recipe's row and of the choice do not hold."""
    rows = {"recipe": part.own} | ({} if part.best is None else {"chosen": part.best})
    told = [f"NOT COUNTED: {what}" for what in dict.fromkeys(what for row in rows.values() for what in row.not_counted)]
    for name, row in rows.items():
        if row.memory.host_bytes:
            told.append(
                f"warning ({name}): each node needs {gib(_host_bytes_of_node(found, row))} GiB of host memory free for what is "
                "offloaded and for checkpoints; how much a node has is not known here"
            )
    return told


def _offload_line(found: Budget, row: Candidate) -> str:
    efficiency = PINNED if row.zero.pinned else PAGEABLE
    kind = "page-locked" if row.zero.pinned else "not page-locked (pin_memory false)"
    link, memory = row.time.host_link_bytes / 1e9, row.time.host_memory_bytes / 1e9
    return (
        f"offload: {row.time.offload_seconds:.3g} s a step, taken as not hidden: a GPU moves {link:.2f} GB to and from host "
        f"memory, at {efficiency:.0%} of {found.gpu.host_bandwidth / 1e9:g} GB/s for it is {kind}, and the CPUs {memory:.2f} GB "
        f"for it (Adam), at {HOST_MEMORY_BANDWIDTH / 1e9:g} GB/s a node: assumed, not measured"
    )
