"""Arithmetic of a run, before it costs anything: parameters, steps, batch, FLOPs, activation memory. No torch.

Owns the FLOP conventions used everywhere; the memory's formula is in activations.py. Does not know time yet.

    print(describe(recipe, world_size=8))

Two conventions, both stated wherever a figure is shown: `full` counts every query against all keys of its
sequence (PaLM, nanochat, torchtitan); `causal` counts only the keys that a causal kernel really has to touch.
Recomputation is never counted. Embedding look-up is free; the head, tied or not, is a matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slm.activations import POLICIES, ActivationMemory, activation_memory
from slm.distill.settings import describe_loss
from slm.gate import ASKED
from slm.layout import gradient_accumulation
from slm.model.config import ModelConfig
from slm.recipe import Phase, Recipe


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
    activations: dict[str, ActivationMemory]  # of one rank on a GPU, by policy, with the phase's tiles and offloading


def plan_phase(recipe: Recipe, phase: Phase, world_size: int) -> PhasePlan:
    """Raises UserError if world_size does not divide the batch."""
    tokens = phase.num_steps * phase.batch_tokens
    activations = {
        policy: activation_memory(
            recipe.model,
            phase.micro_batch * phase.seq_len // phase.sequence_parallel,
            policy,
            tile_tokens=phase.mlp_tile_tokens,
            offload=phase.offload_activations and policy != "none",
            value_bytes=4 if recipe.precision == "float32" else 2,
        )
        for policy in POLICIES
    }
    return PhasePlan(
        name=phase.name,
        steps=phase.num_steps,
        tokens=tokens,
        global_batch=phase.global_batch,
        gradient_accumulation=gradient_accumulation(phase, world_size),
        flops_full=tokens * flops_per_token(recipe.model, phase.seq_len, causal=False),
        flops_causal=tokens * flops_per_token(recipe.model, phase.seq_len, causal=True),
        activations=activations,
    )


def describe(recipe: Recipe, world_size: int, phases: Sequence[Phase] | None = None) -> str:
    """The plan of a run, or of some of its phases, in words, one fact a line."""
    config = recipe.model
    lines = [
        f"run {recipe.name} -> {recipe.run_dir}",
        f"model: {config.num_parameters():,} parameters ({config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads over {config.num_key_value_heads} kv heads, vocabulary {config.vocab_size:,})",
    ]
    for phase in recipe.phases if phases is None else phases:
        plan = plan_phase(recipe, phase, world_size)
        lines += [
            f"phase {phase.name}: {plan.steps:,} steps x {phase.batch_tokens:,} tokens = {plan.tokens:,} tokens",
            f"  a step: {plan.global_batch:,} sequences of {phase.seq_len:,} = {world_size} ranks"
            + (f" / {phase.sequence_parallel} that share a sequence" if phase.sequence_parallel > 1 else "")
            + f" x micro-batch {phase.micro_batch} x {plan.gradient_accumulation} accumulated",
            f"  training FLOPs: {plan.flops_causal:.3e} causal, {plan.flops_full:.3e} full convention "
            "(unpacked sequences; packed documents need less attention)",
            f"  peak activations a rank, GPU, {'float32' if recipe.precision == 'float32' else '16 bits'}: "
            + ", ".join(f"{policy} {_gib(m.peak_bytes)}" for policy, m in plan.activations.items())
            + f" (this phase: {_recomputation(phase, plan.activations[phase.activation_checkpointing])})",
            f"  learning rate: {phase.schedule.type}, peak {phase.lr or recipe.optim.lr:g}, "
            f"{phase.schedule.warmup_steps:,} warm-up steps; loss {phase.loss.type}; DeepSpeed {phase.deepspeed}",
        ]
        if phase.rope_scaling is not None:
            scaling = phase.rope_scaling
            by = (
                f", factor {scaling.factor:g} over {scaling.original_max_position_embeddings:,}"
                if scaling.factor > 1
                else ""
            )
            lines.append(f"  rotary embedding from here on: {scaling.rope_type}{by}")
        if phase.gate is not None:
            asked = ", ".join(f"{name} {value:g}" for name in ASKED if (value := getattr(phase.gate, name)) is not None)
            then = (
                f"{phase.gate.repeats} x {phase.gate.repeat_tokens:,} tokens more"
                if phase.gate.repeat_tokens
                else "the run stops"
            )
            lines.append(f"  gate at its end: {asked}; else {then}")
        if phase.loss.type == "distill":
            lines += [f"  {line}" for line in describe_loss(phase.loss, recipe.teacher)]
    return "\n".join(lines)


def _recomputation(phase: Phase, memory: ActivationMemory) -> str:
    words: list[str] = [phase.activation_checkpointing]
    if phase.mlp_tile_tokens is not None:
        words.append(f"MLP in tiles of {phase.mlp_tile_tokens:,} tokens")
    if phase.offload_activations:
        words.append(f"{_gib(memory.host_bytes)} in host memory")
    return ", ".join(words)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
