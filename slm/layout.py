"""How ranks share the work: world = data x sequence. Pure; imports no torch.

data_parallel(phase, world_size=16)            # 4 where sequence_parallel is 4
gradient_accumulation(phase, world_size=16)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm.errors import UserError
from slm.model.config import ModelConfig

if TYPE_CHECKING:
    from slm.recipe import Phase


def sequence_problems(model: ModelConfig, seq_len: int, degree: int, at: str) -> list[str]:
    """Why `degree` ranks cannot share a sequence of this model, in words."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if heads % degree or (kv_heads % degree and degree % kv_heads):
        fitting = [d for d in range(1, heads + 1) if heads % d == 0 and (kv_heads % d == 0 or d % kv_heads == 0)]
        return [
            f"{at}.sequence_parallel is {degree}, but inside attention each rank has some of the {heads} heads for the whole "
            f"sequence, and {degree} ranks cannot have equally many of them and of the {kv_heads} key/value heads: use "
            f"{', '.join(map(str, fitting))}"
        ]
    if seq_len % degree:
        return [
            f"{at}.seq_len is {seq_len}, which sequence_parallel {degree} does not divide: each rank has an equal part"
        ]
    return []


def data_parallel(phase: Phase, world_size: int) -> int:
    """Ranks, or groups of sequence_parallel ranks, that share a batch. Raises UserError if they are not whole."""
    if world_size % phase.sequence_parallel:
        check_ranks([phase], world_size)
    return world_size // phase.sequence_parallel


def gradient_accumulation(phase: Phase, world_size: int) -> int:
    """Micro-batches per rank and step. Raises UserError if the world does not divide the batch."""
    check_ranks([phase], world_size)
    return phase.global_batch // (phase.micro_batch * data_parallel(phase, world_size))


def fitting_ranks(phases: Sequence[Phase]) -> list[int]:
    """Numbers of ranks that share the work of each of these phases equally, ascending; may be none."""
    found = [
        {
            groups * phase.sequence_parallel
            for groups in range(1, phase.global_batch // phase.micro_batch + 1)
            if phase.global_batch % (groups * phase.micro_batch) == 0
        }
        for phase in phases
    ]
    return sorted(set.intersection(*found)) if found else []


def check_ranks(phases: Sequence[Phase], world_size: int) -> None:
    """Raises UserError if world_size ranks cannot share the work of all these phases, and names the numbers that can."""
    misfits = {phase.name: problem for phase in phases if (problem := _misfit(phase, world_size))}
    if not misfits:
        return
    fitting = fitting_ranks(phases)
    if len(phases) == 1:
        fix = f"use {_listed(fitting, world_size)}, {_or_change(phases[0], world_size)}"
    elif fitting:
        names = ", ".join(phase.name for phase in phases)
        fix = (
            f"use {_listed(fitting, world_size)}, which fit all phases that are to run ({names}); or --until PHASE, so that each "
            f"has a job of its own; or another micro_batch or batch_tokens in {', '.join(misfits)}"
        )
    else:
        jobs = "; ".join(f"--until {phase.name} with {_listed(fitting_ranks([phase]), world_size)}" for phase in phases)
        fix = f"no number of ranks fits all phases that are to run, so give each a job of its own: {jobs}"
    raise UserError("; ".join(misfits.values()), fix=fix)


def _misfit(phase: Phase, world_size: int) -> str:
    degree = phase.sequence_parallel
    if world_size % degree:
        return (
            f"phases.{phase.name}.sequence_parallel is {degree}, which does not divide the {world_size} ranks: some would have "
            "no part of a sequence"
        )
    if phase.global_batch % (phase.micro_batch * (world_size // degree)):
        shared = f" / sequence_parallel {degree}" if degree > 1 else ""
        return (
            f"phases.{phase.name}: a step has {phase.global_batch} sequences (batch_tokens {phase.batch_tokens} / "
            f"seq_len {phase.seq_len}), which {world_size} ranks{shared} x micro_batch {phase.micro_batch} do not divide, so "
            "ranks would do unequal work"
        )
    return ""


def _or_change(phase: Phase, world_size: int) -> str:
    if world_size % phase.sequence_parallel:
        return f"or set sequence_parallel to a divisor of {world_size}"
    per_step = phase.micro_batch * (world_size // phase.sequence_parallel) * phase.seq_len
    return f"another micro_batch, or batch_tokens = a multiple of {per_step}"


def _listed(fitting: list[int], world_size: int) -> str:
    """The eight that are nearest to what was given."""
    nearest = sorted(sorted(fitting, key=lambda ranks: abs(ranks - world_size))[:8])
    return f"{', '.join(map(str, nearest))} rank{'s' * (nearest != [1])}"
