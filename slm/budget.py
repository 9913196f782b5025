"""What a recipe comes to on named GPUs: what fits, how fast, for how long, at what cost. No torch.

Owns the figures that `slm plan RECIPE --gpus N --gpu NAME` shows, one by one, in total and as JSON; budget_text.py prints them.
They are from choose.py, memory.py and forecast.py.

    found = budget(recipe, find_gpu("h200"), GPUs(64), Assumptions(price_per_gpu_hour=2.5))
    check_fits(found); as_dict(found)["total"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.choose import Candidate, candidates, choose, evaluate, gib, reasons
from slm.data.tokens import MANIFEST, TokenDataset
from slm.distill.beside import cache_bytes_per_token, teachers_of
from slm.errors import UserError
from slm.forecast import (
    MTBF_HOURS_PER_GPU,
    GPUs,
    mtbf_seconds,
    save_interval_seconds,
    save_stall_seconds,
)
from slm.gate import parts
from slm.hardware import GPU, HOST_MEMORY, HOST_MEMORY_BANDWIDTH, PAGEABLE, PINNED
from slm.layout import check_ranks, fitting_ranks
from slm.memory import STATE_BYTES
from slm.plan import flops_per_token
from slm.recipe import Phase, Recipe

MOST_CHOSEN = 64  # GPUs, where their number is not given


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know, and a user may."""

    price_per_gpu_hour: float | None = None
    mtbf_hours_per_gpu: float = MTBF_HOURS_PER_GPU
    save_stall_seconds: float | None = None  # None: the time of the copy to host memory

    def check(self) -> None:
        """Raises UserError for what cannot be meant."""
        for option, value, low, high, what in (
            ("price-per-gpu-hour", self.price_per_gpu_hour, 0.0, 1e6, "a price of an hour"),
            ("mtbf-hours", self.mtbf_hours_per_gpu, 1.0, 1e7, "hours between two failures of one GPU"),
            ("save-stall-seconds", self.save_stall_seconds, 0.001, 3600.0, "seconds for which a save blocks training"),
        ):
            if value is not None and not low <= value <= high:  # nan too
                raise UserError(
                    f"--{option} is {value:g}: {what} must lie between {low:g} and {high:,.0f}, or all that is made of it "
                    "means nothing",
                    fix="give a number between these, or leave it out",
                )


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
    count_from: str = ""  # why so many GPUs, where their number was not given


def fewest_gpus(recipe: Recipe, gpu: GPU, per_node: int) -> tuple[int, str]:
    """The fewest that share the work of all phases and hold each as it is; and that they were chosen, in words. If none up to
    MOST_CHOSEN does, the most of these: there most can be changed so that it fits. Raises UserError if no number shares it."""
    fitting = fitting_ranks(recipe.phases)
    if not fitting:
        raise UserError("no number of GPUs fits all phases, so --gpu has nothing to plan for", fix="give --gpus N")
    tried = [count for count in fitting if count <= MOST_CHOSEN] or fitting[:1]
    for count in tried:
        gpus = GPUs(count, per_node)
        if all(evaluate(recipe, phase, gpu, gpus, teachers_of(recipe, phase)).fits for phase in recipe.phases):
            return (
                count,
                f"--gpus was not given: {count} is the fewest that share the work and whose memory holds the recipe",
            )
    listed = ", ".join(map(str, tried))
    return tried[
        -1
    ], f"--gpus was not given: of the numbers that share the work ({listed}) none holds the recipe as it is"


def budget(
    recipe: Recipe,
    gpu: GPU,
    gpus: GPUs,
    assumed: Assumptions,
    phases: Sequence[Phase] | None = None,
    count_from: str = "",
) -> Budget:
    """Of these of its phases, or of all. Raises UserError if so many GPUs cannot share their work as it is, and for assumptions
    that mean nothing."""
    assumed.check()
    planned = recipe.phases if phases is None else phases
    check_ranks(planned, gpus.count)
    stall = assumed.save_stall_seconds
    if stall is None:
        stall = save_stall_seconds(recipe.model, gpu, gpus.count)
    between_failures = mtbf_seconds(gpus.count, assumed.mtbf_hours_per_gpu)
    planned_phases = []
    for phase in planned:
        found = candidates(recipe, phase, gpu, gpus)
        planned_phases.append(
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
    return Budget(recipe, gpu, gpus, assumed, stall, between_failures, tuple(planned_phases), count_from)


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
        elif part.best.too_much_for_a_host:
            fixes.append(
                f"phases.{part.phase.name} fits with none of the settings looked at that a server's memory allows: the nearest, "
                f"{settings(part)}, needs {host_memory(part.best)}; take more or larger GPUs, or a shorter seq_len"
            )
        else:
            fixes.append(settings(part))
    if told:
        raise UserError(";\n".join(told), fix="\n       ".join(fixes))


def settings(part: PhaseBudget) -> str:
    """The choice as overrides of the recipe; empty if it is the recipe's."""
    return " ".join(f"phases.{part.phase.name}.{name}={value}" for name, value in changed(part).items())


def host_memory(row: Candidate) -> str:
    size = f"{gib(row.host_bytes_per_node)} GiB of host memory a node"
    more = f", more than servers have (taken as {HOST_MEMORY / 1e12:g} TB; a DGX H100 has that)"
    return size + more * row.too_much_for_a_host


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


def _forecast(found: Budget, part: PhaseBudget, row: Candidate) -> dict[str, Any]:
    """Of a row that has one."""
    count = found.gpus.count
    seconds = part.phase.num_steps * row.time.seconds
    rate = row.tokens_per_second / count
    hours = seconds / 3600 * count
    price = found.assumed.price_per_gpu_hour
    peak = found.gpu.peak_flops if row.memory.value_bytes == 2 else found.gpu.float32_flops
    return {
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


def row_figures(found: Budget, part: PhaseBudget, row: Candidate) -> dict[str, Any]:
    forecast = _forecast(found, part, row)
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
        "host_bytes_per_node": row.host_bytes_per_node,
        "too_much_for_a_host": row.too_much_for_a_host,
        "save_copy_bytes": row.memory.save_bytes,
        "communication_bytes_per_step": {
            "gradients_and_weights": row.time.state_bytes,
            "sequences": row.time.exchange_bytes,
        },
        "offload_bytes_per_step": {"host_link": row.time.host_link_bytes, "host_memory": row.time.host_memory_bytes},
        "has_forecast": row.has_forecast,
        **(forecast if row.has_forecast else dict.fromkeys(forecast)),
    }


# --- all phases ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """Of all phases' steps."""

    days: float
    gpu_hours: float
    cost: float | None
    as_chosen: tuple[str, ...]  # phases that do not fit as they are: of these, what was chosen


def counted(part: PhaseBudget) -> Candidate | None:
    """The row whose time and cost count: the recipe's if it fits, else the choice."""
    return part.own if part.own.fits else part.best


def total(found: Budget) -> Total | None:
    """None if a phase fits in no way or has no forecast."""
    days = gpu_hours = 0.0
    for part in found.phases:
        row = counted(part)
        if row is None or not row.has_forecast:
            return None
        figures = _forecast(found, part, row)
        days, gpu_hours = days + figures["days"], gpu_hours + figures["gpu_hours"]
    price = found.assumed.price_per_gpu_hour
    as_chosen = tuple(part.phase.name for part in found.phases if not part.own.fits)
    return Total(days, gpu_hours, None if price is None else price * gpu_hours, as_chosen)


def left_out(found: Budget) -> list[str]:
    """What the total does not count, in words."""
    told = []
    for part in found.phases:
        repeated = sum(len(steps) for steps in parts(part.phase)[1:])
        row = counted(part)
        if repeated:
            size = f", {span(repeated * row.time.seconds)}" if row is not None and row.has_forecast else ""
            told.append(f"repetitions that the gate of {part.phase.name} may ask for (up to {repeated:,} steps{size})")
    told.append("evaluation and recall; saves and failures; starts and compilation")
    if size := _caches(found):
        told.append(f"slm teacher's own time on these or other GPUs, and room for its caches ({size})")
    told += dict.fromkeys(what for part in found.phases if (row := counted(part)) for what in row.not_counted)
    return told


def _caches(found: Budget) -> str:
    """The size of all teacher caches of the phases, in words; empty if there are none. They hold whole sources."""
    recipe, asked, guessed = found.recipe, {}, False
    for phase in (part.phase for part in found.phases if part.phase.loss.type == "distill"):
        names = tuple(phase.mixture or recipe.data.sources)
        folders = [recipe.data.sources[name] for name in names]
        here = all((Path(folder) / MANIFEST).exists() for folder in folders)
        sizes = {name: TokenDataset(folder).num_tokens for name, folder in zip(names, folders, strict=True) if here}
        for teacher in phase.loss.mixing(recipe.teacher):
            if (cache := recipe.teacher[teacher].cache) is None:
                continue
            each = cache_bytes_per_token(cache, recipe.model.vocab_size)
            for name, tokens in (sizes or {"".join(names): phase.num_steps * phase.batch_tokens}).items():
                asked[teacher, name, phase.seq_len] = each * tokens
            guessed |= not here
    if not asked:
        return ""
    return (
        f"{sum(asked.values()) / 1e9:,.3g} GB" + ", if the phase sees no token twice and all of its sources" * guessed
    )


def span(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds == 0:
        return "0 s"
    for unit, size, most in (
        ("µs", 1e-6, 1e-3),
        ("ms", 1e-3, 1.0),
        ("s", 1.0, 120.0),
        ("min", 60.0, 7200.0),
        ("h", 3600.0, 172800.0),
    ):
        if seconds < most:
            return f"{seconds / size:.3g} {unit}"
    days = seconds / 86400
    return f"{days:,.0f} days" if days >= 100 else f"{days:.3g} days"


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
            "host_memory_bytes": HOST_MEMORY,
            "host_memory_bandwidth_per_node": HOST_MEMORY_BANDWIDTH,
            "host_link_efficiency": {"pinned": PINNED, "pageable": PAGEABLE},
            "mtbf_hours": found.mtbf_seconds / 3600,
        },
        "checkpoint_bytes": STATE_BYTES * parameters,
        "gpus_from": found.count_from,
        "total": None if (whole := total(found)) is None else vars(whole),
        "total_leaves_out": left_out(found),
        "phases": [
            {
                "name": part.phase.name,
                "flops_per_token_full": part.flops_full,
                "flops_per_token_causal": part.flops_causal,
                "own": row_figures(found, part, part.own),
                "chosen": None if part.best is None else row_figures(found, part, part.best),
                "changes": changed(part),
                "why": [] if part.best is None else reasons(part.best, part.rows, found.gpu),
                "save_interval_seconds": part.save_seconds,
                "candidates": [row_figures(found, part, row) for row in part.rows if not row.is_own],
            }
            for part in found.phases
        ],
    }
