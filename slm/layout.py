"""How ranks share the work: world = data x sequence. Pure; imports no torch.

data_parallel(phase, world_size=16)            # 4 where sequence_parallel is 4
gradient_accumulation(phase, world_size=16)
"""

from __future__ import annotations

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
        raise UserError(
            f"phases.{phase.name}.sequence_parallel is {phase.sequence_parallel}, which does not divide the {world_size} "
            "ranks: some would have no part of a sequence",
            fix=f"start a multiple of {phase.sequence_parallel} ranks, or set sequence_parallel to a divisor of {world_size}",
        )
    return world_size // phase.sequence_parallel


def gradient_accumulation(phase: Phase, world_size: int) -> int:
    """Micro-batches per rank and step. Raises UserError if the world does not divide the batch."""
    data_world, degree = data_parallel(phase, world_size), phase.sequence_parallel
    per_forward = phase.micro_batch * data_world
    if phase.global_batch % per_forward:
        fitting = [
            w * degree for w in range(1, phase.global_batch + 1) if phase.global_batch % (w * phase.micro_batch) == 0
        ]
        shared = f" / sequence_parallel {degree}" if degree > 1 else ""
        raise UserError(
            f"phases.{phase.name}: a step has {phase.global_batch} sequences (batch_tokens {phase.batch_tokens} / "
            f"seq_len {phase.seq_len}), which {world_size} ranks{shared} x micro_batch {phase.micro_batch} do not divide, so "
            "ranks would do unequal work",
            fix=f"use {', '.join(map(str, fitting[:8]))} ranks, another micro_batch, or batch_tokens = a multiple of "
            f"{per_forward * phase.seq_len}",
        )
    return phase.global_batch // per_forward
