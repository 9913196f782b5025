"""Arithmetic of a run, before it costs anything: parameters, steps, batch, FLOPs, activation memory. No torch.

Owns the FLOP conventions used everywhere, and what can be held against a recipe without starting it; the activations' formula is
in activations.py. What named GPUs make of it, memory, time and cost, is in budget.py.

    print(describe(recipe, world_size=8))

Two conventions, both stated wherever a figure is shown: `full` counts every query against all keys of its
sequence (PaLM, nanochat, torchtitan); `causal` counts only the keys that a causal kernel really has to touch.
Recomputation is never counted. Embedding look-up is free; the head, tied or not, is a matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slm.activations import POLICIES, ActivationMemory, activation_memory
from slm.data.selection import selected_documents
from slm.data.tokens import MANIFEST, TokenDataset
from slm.distill.settings import describe_loss
from slm.errors import UserError
from slm.gate import ASKED, repetition
from slm.layout import check_ranks, gradient_accumulation
from slm.model.config import ModelConfig, effective_theta
from slm.model.shape import QUANTIZED_TYPE, only_read, shape_fields
from slm.recall.samples import Form, fitting_lengths
from slm.recipe import Phase, Recipe
from slm.runtime import look_at_lock
from slm.tokenizer import load_tokenizer


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


def check_what_is_here(recipe: Recipe) -> None:
    """Holds the recipe against its tokenizer and token shards, as far as they are here; the rest is `slm train`'s to check.

    Raises UserError for lengths of recall that the needles do not fit in, for filters that leave no document, and for weights to
    start from that are of another shape, or codes; so for teachers.
    """
    if recipe.eval.recall is not None and Path(recipe.tokenizer).exists():
        form = Form(recipe.eval.recall, load_tokenizer(recipe.tokenizer).encode)
        for phase in recipe.phases:
            fitting_lengths(form, phase.seq_len, "eval.recall.lengths")
    for phase in recipe.phases:
        for source in phase.filters:
            if (Path(recipe.data.sources[source]) / MANIFEST).exists():
                selected_documents(recipe, phase, source, TokenDataset(recipe.data.sources[source]))
    origins = [recipe.init_from.path] if recipe.init_from is not None else []
    for path in [*origins, *(teacher.model for teacher in recipe.teacher.values())]:
        if shape_fields(Path(path)).get("model_type") == QUANTIZED_TYPE:
            raise only_read(f"{path} is a quantised model")
    if recipe.init_from is not None:
        _check_shape_of_origin(recipe, Path(recipe.init_from.path))


def _check_shape_of_origin(recipe: Recipe, path: Path) -> None:
    """Raises UserError if the weights of init_from, as far as they are here and say so, are of another shape."""
    theirs = shape_fields(path)
    fields = [name for name in ModelConfig.model_fields if name.endswith("_size") or name.startswith("num_")]
    other = [name for name in fields if name in theirs and theirs[name] != getattr(recipe.model, name)]
    if other:
        raise UserError(
            f"init_from: {path} has "
            + ", ".join(f"{name} {theirs[name]} (the recipe's model {getattr(recipe.model, name)})" for name in other)
            + ": its weights do not fit",
            fix=f"set model.{other[0]} to {theirs[other[0]]}, or start from another model",
        )


def check_before_start(recipe: Recipe, world_size: int, until: str = "") -> None:
    """What `slm train` on so many ranks would refuse, as far as that needs neither ranks nor torch: a launcher asks before it
    starts them. Of a run that has checkpoints, part may be over, and no longer need what it needed: it is left to the ranks.

    Raises UserError and CorruptArtefact.
    """
    names = [phase.name for phase in recipe.phases]
    check_until(until, names)
    look_at_lock(recipe.run_dir)
    if any((recipe.run_dir / "checkpoints").glob("*/manifest.json")):
        return
    phases = recipe.phases[: names.index(until) + 1] if until else recipe.phases
    check_ranks(phases, world_size)
    if recipe.init_from is not None and not Path(recipe.init_from.path).exists():
        raise missing_origin(recipe.init_from.path)
    sources = [recipe.data.sources[name] for phase in phases for name in phase.mixture or recipe.data.sources]
    for path in dict.fromkeys([*sources, *recipe.data.validation.values()]):
        TokenDataset(path)
    check_what_is_here(recipe)


def check_until(until: str, names: Sequence[str]) -> None:
    if until and until not in names:
        raise UserError(
            f"--until is {until!r}, which is no phase of the recipe ({', '.join(names)})", fix="name one of them"
        )


def missing_origin(path: str) -> UserError:
    return UserError(f"init_from.path {path} does not exist", fix="give a run, a checkpoint or a Hugging Face folder")


def describe(recipe: Recipe, world_size: int | None, phases: Sequence[Phase] | None = None) -> str:
    """The plan of a run, or of some of its phases, in words, one fact a line. world_size: None for each phase's fewest ranks.

    Raises UserError as check_ranks does.
    """
    config = recipe.model
    phases = recipe.phases if phases is None else phases
    if world_size is not None:
        check_ranks(phases, world_size)
    lines = [
        f"run {recipe.name} -> {recipe.run_dir}",
        f"model: {config.num_parameters():,} parameters ({config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads over {config.num_key_value_heads} kv heads, vocabulary {config.vocab_size:,})",
    ]
    if recipe.init_from is not None:
        here = "" if Path(recipe.init_from.path).exists() else " (not here: nothing of it was looked at)"
        lines.append(f"weights: from {recipe.init_from.path}{here}")
    for phase in phases:
        num_ranks = world_size or phase.sequence_parallel
        plan = plan_phase(recipe, phase, num_ranks)
        lines += [
            f"phase {phase.name}: {plan.steps:,} steps x {phase.batch_tokens:,} tokens = {plan.tokens:,} tokens",
            f"  a step: {plan.global_batch:,} sequences of {phase.seq_len:,} = {num_ranks} ranks"
            + (f" / {phase.sequence_parallel} that share a sequence" if phase.sequence_parallel > 1 else "")
            + f" x micro-batch {phase.micro_batch} x {plan.gradient_accumulation} accumulated",
            f"  training FLOPs: {plan.flops_causal:.3e} causal, {plan.flops_full:.3e} full convention; a token "
            f"{plan.flops_causal / plan.tokens:.3e} and {plan.flops_full / plan.tokens:.3e} "
            "(unpacked sequences; packed documents need less attention)",
            f"  peak activations a rank, GPU, {'float32' if recipe.precision == 'float32' else '16 bits'}: "
            + ", ".join(f"{policy} {_gib(m.peak_bytes)}" for policy, m in plan.activations.items())
            + f" (this phase: {_recomputation(phase, plan.activations[phase.activation_checkpointing])})",
            f"  learning rate: {phase.schedule.type}, peak {phase.lr or recipe.optim.lr:g}, "
            f"{phase.schedule.warmup_steps:,} warm-up steps; loss {phase.loss.type}; DeepSpeed {phase.deepspeed}",
        ]
        lines.append(f"  rotary embedding: {_rotary(recipe, phase)}")
        if phase.gate is not None:
            asked = ", ".join(f"{name} {value:g}" for name in ASKED if (value := getattr(phase.gate, name)) is not None)
            lines.append(f"  gate at its end: {asked}; else {repetition(phase) or 'the run stops'}")
        if phase.loss.type == "distill":
            lines += [f"  {line}" for line in describe_loss(phase.loss, recipe.teacher)]
    return "\n".join(lines)


def _rotary(recipe: Recipe, phase: Phase) -> str:
    """Base and scaling as they are in a phase, and where they come from."""
    config, (given_by, _) = recipe.model_of(phase), recipe.scaling_of(phase)
    scaling, base = config.rope_scaling, f"base {effective_theta(config):,.10g}"
    since = {"": "the model's own", phase.name: "from here on"}.get(given_by, f"since phase {given_by}")
    if scaling is None or scaling.rope_type == "default":
        return f"{base}, no scaling ({since})"
    by = f", factor {scaling.factor:g} over {scaling.original_max_position_embeddings:,}"
    reach = f", reaches {scaling.reach_tokens:,} tokens" if scaling.reach_tokens else ""
    return f"{base}, {scaling.rope_type}{'' if scaling.rope_type == 'theta' else by}{reach} ({since})"


def _recomputation(phase: Phase, memory: ActivationMemory) -> str:
    words: list[str] = [phase.activation_checkpointing]
    if phase.mlp_tile_tokens is not None:
        words.append(f"MLP in tiles of {phase.mlp_tile_tokens:,} tokens")
    if phase.offload_activations:
        words.append(f"{_gib(memory.host_bytes)} in host memory")
    return ", ".join(words)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
