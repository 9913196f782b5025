"""Arithmetic of a run, before it costs anything: parameters, steps, batch, FLOPs. No torch.

Owns the FLOP conventions used everywhere; does not know memory or time yet.

    print(describe(recipe, world_size=8))

Two conventions, both stated wherever a figure is shown: `full` counts every query against all keys of its
sequence (PaLM, nanochat, torchtitan); `causal` counts only the keys that a causal kernel really has to touch.
Recomputation is never counted. Embedding look-up is free; the head, tied or not, is a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

from slm.distill.settings import describe_loss
from slm.model.config import ModelConfig
from slm.recipe import Phase, Recipe, gradient_accumulation


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool) -> float:
    """Training FLOPs (forward and backward) per token of an unpacked sequence of seq_len tokens."""
    pairs = (seq_len + 1) / 2 if causal else seq_len
    return training_flops(config, 1, pairs)


def training_flops(config: ModelConfig, num_tokens: float, attention_pairs: float) -> float:
    """Training FLOPs of num_tokens tokens whose queries see attention_pairs keys in all.

    6 per weight and token (2 forward, 4 backward); 12 x heads x head_dim x layers per (query, key) pair
    (two products forward, four backward, 2 FLOPs each).
    """
    per_pair = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6.0 * config.matmul_parameters() * num_tokens + per_pair * attention_pairs


@dataclass(frozen=True)
class PhasePlan:
    """What one phase comes to."""

    name: str
    steps: int
    tokens: int
    global_batch: int
    gradient_accumulation: int
    flops_full: float
    flops_causal: float


def plan_phase(recipe: Recipe, phase: Phase, world_size: int) -> PhasePlan:
    """Raises UserError if world_size does not divide the batch."""
    tokens = phase.num_steps * phase.batch_tokens
    return PhasePlan(
        name=phase.name,
        steps=phase.num_steps,
        tokens=tokens,
        global_batch=phase.global_batch,
        gradient_accumulation=gradient_accumulation(phase, world_size),
        flops_full=tokens * flops_per_token(recipe.model, phase.seq_len, causal=False),
        flops_causal=tokens * flops_per_token(recipe.model, phase.seq_len, causal=True),
    )


def describe(recipe: Recipe, world_size: int) -> str:
    """The plan of a run in words, one fact a line."""
    config = recipe.model
    lines = [
        f"run {recipe.name} -> {recipe.run_dir}",
        f"model: {config.num_parameters():,} parameters ({config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads over {config.num_key_value_heads} kv heads, vocabulary {config.vocab_size:,})",
    ]
    for phase in recipe.phases:
        plan = plan_phase(recipe, phase, world_size)
        lines += [
            f"phase {phase.name}: {plan.steps:,} steps x {phase.batch_tokens:,} tokens = {plan.tokens:,} tokens",
            f"  a step: {plan.global_batch:,} sequences of {phase.seq_len:,} = {world_size} ranks"
            + (f" / {phase.sequence_parallel} that share a sequence" if phase.sequence_parallel > 1 else "")
            + f" x micro-batch {phase.micro_batch} x {plan.gradient_accumulation} accumulated",
            f"  training FLOPs: {plan.flops_causal:.3e} causal, {plan.flops_full:.3e} full convention "
            "(unpacked sequences; packed documents need less attention)",
            f"  learning rate: {phase.schedule.type}, peak {phase.lr or recipe.optim.lr:g}, "
            f"{phase.schedule.warmup_steps:,} warm-up steps; loss {phase.loss.type}; DeepSpeed {phase.deepspeed}",
        ]
        if phase.loss.type == "distill":
            lines += [f"  {line}" for line in describe_loss(phase.loss, recipe.teacher)]
    return "\n".join(lines)
