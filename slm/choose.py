"""Which settings of a phase fit the GPUs named, how fast each is, and which to take and why. Pure; no torch.

Owns the combinations that are looked at and the rule of choice; memory.py says what each needs, forecast.py how long it takes.

    found = candidates(recipe, phase, find_gpu("h200"), GPUs(64))
    best = choose(found.rows)                          # None: none fits
    print(reasons(best, found.rows, gpu))

The rule: no more host memory than servers have, if that can be; then optimiser and weights stay on the GPUs, if they can. Of all
that then fit and are within 2 % of the fastest, the least recomputation, then no offloading of activations, the smallest sequence
degree, the lowest ZeRO stage, the largest micro-batch. Stage 1 is not given several micro-batches in half precision: it would
add them up in half precision. Settings whose micro-batch is too small for the rule of speed are taken only where there are no
others, and then the simplest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slm.activations import POLICIES
from slm.distill.beside import Teachers, teacher_memory, teachers_of
from slm.forecast import GPUs, StepTime, Work, step_time
from slm.hardware import GPU, HOST_MEMORY
from slm.layout import sequence_problems
from slm.memory import Layout, RankMemory, Zero, rank_memory
from slm.recipe import Phase, Recipe

STRATEGIES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
_FOLDER = Path(__file__).parents[1] / "ds_configs"
_EQUAL = 0.98  # of the fastest
_LAUNCH_SECONDS = 1e-3  # about what Python needs to start the kernels of one block, both passes
_TILE_TOKENS = 8192
_ZERO_PLUS_PLUS = (
    "of ZeRO++ the second copy of the weights within a node (parameters x 2 bytes / zero_hpz_partition_size, on each GPU) is not "
    "in this memory, and its quantised traffic not in this time, which is plain ZeRO-3's"
)
GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    deepspeed: str  # the JSON's name without folder and ending
    zero: Zero
    sequence_parallel: int
    policy: str
    micro_batch: int
    gradient_accumulation: int
    mlp_tile_tokens: int | None
    offload_activations: bool
    memory: RankMemory
    time: StepTime
    tokens_per_second: float  # of all GPUs
    fits: bool  # the GPUs; of the host's memory, see too_much_for_a_host
    host_bytes_per_node: int  # what is offloaded, and the copy that a checkpoint is written from
    has_forecast: bool  # else the GPU would wait for its kernels to be started, which the rule of speed does not know
    not_counted: tuple[str, ...] = ()  # what comes on top of memory and time, in words
    is_own: bool = False  # what the recipe says

    @property
    def too_much_for_a_host(self) -> bool:
        return self.host_bytes_per_node > HOST_MEMORY

    @property
    def overrides(self) -> dict[str, Any]:
        """The recipe's fields that make it, of phases.NAME."""
        found: dict[str, Any] = {
            "deepspeed": f"ds_configs/{self.deepspeed}.json",
            "sequence_parallel": self.sequence_parallel,
            "activation_checkpointing": self.policy,
            "micro_batch": self.micro_batch,
        }
        if self.offload_activations:
            found["offload_activations"] = "true"
        if self.mlp_tile_tokens is not None:
            found["mlp_tile_tokens"] = self.mlp_tile_tokens
        return found

    def rank(self) -> tuple[Any, ...]:
        """Lower is simpler."""
        offloads = (self.zero.offload_parameters, self.zero.offload_optimizer, self.offload_activations)
        return (POLICIES.index(self.policy), *offloads, self.sequence_parallel, self.zero.stage, -self.micro_batch)


@dataclass(frozen=True)
class Candidates:
    own: Candidate
    rows: tuple[
        Candidate, ...
    ]  # the recipe's own, then one for each strategy, degree and policy, at the largest micro-batch that fits


def candidates(recipe: Recipe, phase: Phase, gpu: GPU, gpus: GPUs) -> Candidates:
    """gpus.count must divide the phase's work as it is (layout.check_ranks). The rows are those with the phase's tiles
    and offloading of activations; those with tiles, then with both, where of the others none fits with its optimiser and weights
    on the GPUs and no more in host memory than servers have. If that never does, the first of these lists in which anything
    fits, without too much host memory if that can be."""
    teachers = teachers_of(recipe, phase)
    own = replace(evaluate(recipe, phase, gpu, gpus, teachers), is_own=True)
    names = [name for name in STRATEGIES if (_FOLDER / f"{name}.json").exists()]
    if recipe.precision != "float32":
        names = [name for name in names if name != "zero0"]  # the engine refuses it
    paths = {name: str(_FOLDER / f"{name}.json") for name in names}
    if own.deepspeed not in paths and not own.zero.plus_plus:
        paths[own.deepspeed] = phase.deepspeed
    tiles = phase.mlp_tile_tokens or _TILE_TOKENS
    relief: list[dict[str, Any]] = [
        {},
        {"mlp_tile_tokens": tiles},
        {"mlp_tile_tokens": tiles, "offload_activations": True},
    ]
    tried: list[list[Candidate]] = []
    for more in relief:
        rows = [own]
        for degree in degrees(recipe, phase, gpus):
            for path in paths.values():
                for policy in POLICIES:
                    asked = {"sequence_parallel": degree, "deepspeed": path, "activation_checkpointing": policy, **more}
                    if policy == "none":
                        asked["offload_activations"] = False  # nothing is kept apart that could go
                    if (row := largest(recipe, phase.model_copy(update=asked), gpu, gpus, teachers)) is not None:
                        rows.append(row)
        tried.append(rows)
        if any(row.fits and not row.zero.offloads and not row.too_much_for_a_host for row in rows):
            return Candidates(own, tuple(rows))
    fitting = [rows for rows in tried if any(row.fits for row in rows)]
    sound = [rows for rows in fitting if any(row.fits and not row.too_much_for_a_host for row in rows)]
    return Candidates(own, tuple((sound or fitting or tried[-1:])[0]))


def degrees(recipe: Recipe, phase: Phase, gpus: GPUs) -> list[int]:
    """Sequence degrees within a node that the heads allow; and the phase's own."""
    within = {d for d in range(1, min(gpus.count, gpus.per_node) + 1) if gpus.count % d == 0}
    allowed = {d for d in within if not sequence_problems(recipe.model, phase.seq_len, d, "")}
    return sorted(allowed | {phase.sequence_parallel})


def largest(recipe: Recipe, phase: Phase, gpu: GPU, gpus: GPUs, teachers: Teachers) -> Candidate | None:
    """With the largest micro-batch that fits, else the smallest; None if these GPUs cannot share the batch at this degree."""
    groups = gpus.count // phase.sequence_parallel
    if phase.global_batch % groups:
        return None
    each = phase.global_batch // groups
    found = None
    for micro_batch in (m for m in range(1, each + 1) if each % m == 0):
        row = evaluate(recipe, phase.model_copy(update={"micro_batch": micro_batch}), gpu, gpus, teachers)
        if found is None or row.fits:
            found = row
        if not row.fits:
            break
    return found


def evaluate(recipe: Recipe, phase: Phase, gpu: GPU, gpus: GPUs, teachers: Teachers) -> Candidate:
    """The phase as it stands. teachers: teachers_of it."""
    config, zero = recipe.model, Zero.read(phase.deepspeed)
    groups = gpus.count // phase.sequence_parallel
    accumulation = phase.global_batch // (phase.micro_batch * groups)
    tokens = phase.micro_batch * phase.seq_len // phase.sequence_parallel
    value_bytes = 4 if recipe.precision == "float32" else 2
    offload = phase.offload_activations and phase.activation_checkpointing != "none"
    memory = rank_memory(
        config,
        zero,
        Layout(gpus.count, phase.sequence_parallel, accumulation),
        tokens,
        phase.activation_checkpointing,
        tile_tokens=phase.mlp_tile_tokens,
        offload_activations=offload,
        value_bytes=value_bytes,
        teacher=teacher_memory(teachers, config, tokens),
    )
    work = Work(
        zero,
        tokens,
        accumulation,
        phase.seq_len,
        phase.sequence_parallel,
        phase.activation_checkpointing,
        tiled=phase.mlp_tile_tokens is not None and phase.mlp_tile_tokens < tokens,
        offloaded_bytes=memory.offloaded_activations if offload else 0,
        value_bytes=value_bytes,
        teachers=teachers.beside,
    )
    unknown = teachers.not_counted + ((f"{Path(phase.deepspeed).name}: {_ZERO_PLUS_PLUS}",) if zero.plus_plus else ())
    time = step_time(config, work, gpu, gpus)
    return Candidate(
        Path(phase.deepspeed).stem,
        zero,
        phase.sequence_parallel,
        phase.activation_checkpointing,
        phase.micro_batch,
        accumulation,
        phase.mlp_tile_tokens,
        offload,
        memory,
        time,
        phase.batch_tokens / time.seconds,
        memory.peak.total_bytes <= gpu.usable_bytes,
        (memory.host_bytes + memory.save_bytes) * min(gpus.count, gpus.per_node),
        time.compute_seconds / accumulation > config.num_hidden_layers * _LAUNCH_SECONDS,
        unknown,
    )


# --- the choice -----------------------------------------------------------------------------------------------


def choose(rows: tuple[Candidate, ...]) -> Candidate | None:
    """By the rule at the top of this file; None if nothing fits. ZeRO++ is not counted in full, and not proposed."""
    fitting = [row for row in rows if row.fits and not row.zero.plus_plus]
    fitting = [row for row in fitting if not row.too_much_for_a_host] or fitting
    fitting = [row for row in fitting if not row.zero.offloads] or fitting
    fitting = [row for row in fitting if not _adds_in_half(row)] or fitting
    if not fitting:
        return None
    if not any(row.has_forecast for row in fitting):
        return min(fitting, key=Candidate.rank)
    fitting = [row for row in fitting if row.has_forecast]
    fastest = max(row.tokens_per_second for row in fitting)
    return min((row for row in fitting if row.tokens_per_second >= _EQUAL * fastest), key=Candidate.rank)


def _adds_in_half(row: Candidate) -> bool:
    return row.zero.stage == 1 and row.gradient_accumulation > 1 and row.memory.value_bytes == 2


def reasons(best: Candidate, rows: tuple[Candidate, ...], gpu: GPU) -> list[str]:
    """Why not something simpler, a line for each setting."""
    held = best.memory.peak.total_bytes
    spare = f"{gib(held)} of the {gib(gpu.usable_bytes)} GiB that tensors may fill"
    told = []
    all_rows, rows = rows, tuple(row for row in rows if row.zero.offloads <= best.zero.offloads)
    if best.policy == "none":
        told.append(f"no recomputation: it fits without, in {spare}")
    else:
        lighter = [r for r in rows if POLICIES.index(r.policy) < POLICIES.index(best.policy)]
        told.append(f"recomputation {best.policy}: {_why_not(lighter, best, 'less of it')}")
    shorter = [r for r in rows if r.sequence_parallel < best.sequence_parallel and r.policy == best.policy]
    if best.sequence_parallel > 1:
        told.append(f"{best.sequence_parallel} GPUs share a sequence: {_why_not(shorter, best, 'fewer')}")
    same = [
        r for r in rows if r.sequence_parallel == best.sequence_parallel and r.policy == best.policy and not r.is_own
    ]
    lower = [r for r in same if _strategy_order(r) < _strategy_order(best)]
    if best.zero.offloads:
        host = (
            " and no more host memory than servers have"
            if any(r.fits and not r.zero.offloads for r in all_rows)
            else ""
        )
        told.append(
            f"{best.deepspeed}: nothing that was looked at fits with its optimiser and weights on the GPUs{host}"
        )
    elif lower and all(_adds_in_half(r) for r in lower if r.fits) and any(r.fits for r in lower):
        told.append(
            f"{best.deepspeed}: ZeRO-1 would add {best.gradient_accumulation} micro-batches up in half precision"
        )
    elif lower:
        told.append(f"{best.deepspeed}: {_why_not(lower, best, 'a lower stage')}")
    told.append(f"micro-batch {best.micro_batch}: the largest that fits and divides the batch")
    if not best.has_forecast:
        told.append("by speed nothing was compared: at micro-batches so small there is no forecast")
    elif (faster := _faster(best, rows)) is not None:
        told.append(
            f"not the fastest row ({_named(faster)}): its {faster.tokens_per_second / best.tokens_per_second - 1:.1%} more are "
            f"less than the {1 - _EQUAL:.0%} that count here, and then less recomputation, fewer GPUs a sequence, and the lower "
            "ZeRO stage are taken, in this order"
        )
    return told


def _faster(best: Candidate, rows: tuple[Candidate, ...]) -> Candidate | None:
    """The fastest of those that the choice was among, if it is not the best."""
    among = [
        row
        for row in rows
        if row.fits
        and row.has_forecast
        and not row.zero.plus_plus
        and (_adds_in_half(best) or not _adds_in_half(row))
        and row.too_much_for_a_host <= best.too_much_for_a_host
    ]
    found = max(among, key=lambda row: row.tokens_per_second, default=best)
    return found if found.tokens_per_second > best.tokens_per_second else None


def _named(row: Candidate) -> str:
    shared = f", {row.sequence_parallel} GPUs a sequence" if row.sequence_parallel > 1 else ""
    return f"{row.deepspeed}{shared}, recomputation {row.policy}, micro-batch {row.micro_batch}"


def _strategy_order(row: Candidate) -> tuple[bool, bool, int]:
    return row.zero.offload_parameters, row.zero.offload_optimizer, row.zero.stage


def _why_not(others: list[Candidate], best: Candidate, what: str) -> str:
    fitting = [row for row in others if row.fits]
    if not others:
        return f"with {what} the GPUs cannot share the batch"
    if not fitting:
        return f"with {what} the least is {gib(min(r.memory.peak.total_bytes for r in others))} GiB, which does not fit"
    if not best.has_forecast or not any(row.has_forecast for row in fitting):
        return f"with {what} there is no forecast of speed"
    fitting = [row for row in fitting if row.has_forecast]
    slower = 1 - max(row.tokens_per_second for row in fitting) / best.tokens_per_second
    return f"with {what} it is {slower:.0%} slower"


def gib(num_bytes: float) -> str:
    size = num_bytes / GIB
    return f"{size:,.1f}" if size >= 1 or size == 0 else f"{size:.2g}" if size >= 0.001 else "<0.001"
