"""What in a recipe contradicts something else in it: one phase against another, against the model, the data, the evaluation.

Owns the checks that need more than one section; those of one section stand beside its fields, those of a gate in gate.py,
of recall, the loss and shared sequences in their own files. Pure; imports no torch and opens no file.

    problems = contradictions(recipe)      # in words: value, field, consequence, fix

Beside a field that is bad in itself only what is true whatever stands there is listed: every check below is made only
where all that it reads is sure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slm.distill.settings import loss_problems
from slm.gate import gate_problems
from slm.layout import sequence_problems
from slm.recall.settings import recall_problems

if TYPE_CHECKING:
    from slm.model.config import RopeScaling
    from slm.recipe import Phase, Recipe


def contradictions(recipe: Recipe, doubtful: Collection[str] = (), unsure_from: int | None = None) -> list[str]:
    """doubtful: sections of which a bad value was left out; unsure_from: from this phase on, a bad one is missing before."""

    def sure(*sections: str) -> bool:
        return not any(section in doubtful for section in sections)

    problems = []
    for i, phase in enumerate(recipe.phases):
        before, all_before = recipe.phases[:i], unsure_from is None or i < unsure_from
        problems += _phase_problems(phase)
        if sure("model"):
            problems += _shape_problems(recipe, phase)
        if sure("model") and all_before:
            problems += _rope_problems(recipe, phase)
        if sure("data"):
            problems += _source_problems(phase, list(recipe.data.sources))
        if all_before:
            problems += _seen_problems(phase, [p.name for p in before])
        if sure("data", "eval") and all_before:
            problems += gate_problems(phase, before, recipe.eval, list(recipe.data.validation))
        if sure("teacher"):
            problems += loss_problems(phase.loss, recipe.teacher, f"phases.{phase.name}.loss")
    if sure("model"):
        problems += _model_problems(recipe)
    every, kept = recipe.checkpoint.every_steps, recipe.checkpoint.keep_every_steps
    if sure("checkpoint") and kept % every:
        problems.append(
            f"checkpoint.keep_every_steps is {kept}, no multiple of checkpoint.every_steps {every}: most of what is to be "
            f"kept would not be saved; try {-(-kept // every) * every}"
        )
    names = [phase.name for phase in recipe.phases]
    for name in sorted({n for n in names if names.count(n) > 1}):
        problems.append(f"phases: the name {name!r} is used twice; checkpoints are named by phase, so rename one")
    if sure("data", "eval", "tokenizer") and unsure_from is None:
        problems += _eval_problems(recipe)
    return problems


def sections_in_doubt(errors: Sequence[Mapping[str, Any]], given: Collection[str]) -> dict[str, Any]:
    """The arguments of contradictions where these fields (pydantic's errors) are left out, and with them the phases that hold
    one. given: the sections that the recipe has. One that it lacks may stand there under a name that nobody knows."""
    sections, locations = (
        {"model", "data", "eval", "tokenizer", "teacher", "checkpoint"},
        [error["loc"] for error in errors],
    )
    doubtful = {location[0] for location in locations if location} & sections
    if any(error["type"] == "extra_forbidden" and len(error["loc"]) == 1 for error in errors):
        doubtful |= sections - set(given)
    bad_phases = [location[1] for location in locations if location[:1] == ("phases",) and len(location) > 1]
    return {"doubtful": doubtful, "unsure_from": min(bad_phases, default=None)}


def _phase_problems(phase: Phase) -> list[str]:
    """What contradicts itself within a phase."""
    at = f"phases.{phase.name}"
    problems = []
    if phase.batch_tokens % phase.seq_len:
        problems.append(
            f"{at}.batch_tokens is {phase.batch_tokens}, not a multiple of seq_len {phase.seq_len}: a step could "
            f"not be made of whole sequences; try {max(1, phase.global_batch) * phase.seq_len}"
        )
    elif phase.global_batch % phase.micro_batch:
        problems.append(
            f"{at}.micro_batch is {phase.micro_batch}, which does not divide the {phase.global_batch} sequences "
            f"of a step (batch_tokens / seq_len)"
        )
    if phase.offload_activations and phase.activation_checkpointing == "none":
        problems.append(
            f"{at}.offload_activations is true, but activation_checkpointing is none: there are no checkpoints to "
            f"move, everything is kept; set activation_checkpointing to full or selective"
        )
    if phase.schedule.warmup_steps > phase.num_steps:
        problems.append(
            f"{at}.schedule.warmup_steps is {phase.schedule.warmup_steps}, but the phase has only "
            f"{phase.num_steps} steps (tokens / batch_tokens): the learning rate would never reach its peak"
        )
    if phase.mixture and phase.repeats:
        problems.append(f"{at} has a mixture and repeats, which both say how often a source is drawn: give one of them")
    if any(not 1e-3 <= r <= 1e3 for r in phase.repeats.values()):
        problems.append(
            f"{at}.repeats is {phase.repeats}: a source would hardly be drawn, or alone; give 0.001 to 1000"
        )
    if any(w < 0 for w in phase.mixture.values()) or (phase.mixture and not sum(phase.mixture.values()) > 0):
        problems.append(f"{at}.mixture has weights {phase.mixture}: none may be negative and their sum must be > 0")
    elif any(0 < w < 1e-6 * sum(phase.mixture.values()) for w in phase.mixture.values()):
        problems.append(
            f"{at}.mixture has weights {phase.mixture}: one below a millionth would hardly ever be drawn; use 0 instead"
        )
    return problems


def _shape_problems(recipe: Recipe, phase: Phase) -> list[str]:
    """What contradicts the model's heads and context."""
    at, context = f"phases.{phase.name}", recipe.model.max_position_embeddings
    problems = sequence_problems(recipe.model, phase.seq_len, phase.sequence_parallel, at)
    if phase.seq_len > context:
        problems.append(
            f"{at}.seq_len is {phase.seq_len}, longer than model.max_position_embeddings {context}: raise that too"
        )
    return problems


def _source_problems(phase: Phase, sources: list[str]) -> list[str]:
    return [
        f"phases.{phase.name}.{field} names {name!r}, which is not among data.sources ({', '.join(sources)})"
        for field, names in (("mixture", phase.mixture), ("repeats", phase.repeats), ("filters", phase.filters))
        for name in names
        if name not in sources
    ]


def _seen_problems(phase: Phase, earlier: list[str]) -> list[str]:
    return [
        f"phases.{phase.name}.filters.{name}.exclude_seen names {other!r}, which is no earlier phase "
        f"({', '.join(earlier) or 'there is none'})"
        for name, filtered in phase.filters.items()
        for other in filtered.exclude_seen
        if other not in earlier
    ]


# --- rotary embedding ----------------------------------------------------------------------------------------


def _model_problems(recipe: Recipe) -> list[str]:
    """What contradicts the context in the model's own scaling."""
    scaling, context = recipe.model.rope_scaling, recipe.model.max_position_embeddings
    if scaling is None:
        return []
    problems = _without_effect(scaling, recipe.model.rope_theta, "model.rope_scaling")
    if (scaling.reach_tokens or context) < context:
        problems.append(
            f"model.max_position_embeddings is {context}, but model.rope_scaling says {scaling.told(context)}"
        )
    return problems


def _rope_problems(recipe: Recipe, phase: Phase) -> list[str]:
    """What contradicts the length in the scaling that the phase gives, or keeps from an earlier one."""
    name, scaling = recipe.scaling_of(phase)
    if scaling is None:
        return []  # the model's own is held against its max_position_embeddings
    at, model, problems = f"phases.{name}.rope_scaling", recipe.model, []
    if name == phase.name:
        problems = [f"{at}.{p}" for p in scaling.misfits(model.head_dim, model.max_position_embeddings)]
        if unscaled := _without_effect(scaling, model.rope_theta, at):
            return problems + unscaled  # how far nothing reaches is no second problem
    if phase.seq_len > (scaling.reach_tokens or phase.seq_len):
        problems.append(f"phases.{phase.name}.seq_len is {phase.seq_len}, but {at} says {scaling.told(phase.seq_len)}")
    return problems


def _without_effect(scaling: RopeScaling, rope_theta: float, at: str) -> list[str]:
    """A scaling that is asked for and changes nothing: the run would go on as if it were there."""
    if scaling.rope_type == "default" or not scaling.is_plain(rope_theta):
        return []
    if scaling.rope_type == "theta":
        return [
            f"{at}.rope_theta is {scaling.rope_theta:g}, which is model.rope_theta, so nothing would change: give a larger base "
            f"(the 2θ rule: {2 * rope_theta:g}), or rope_type: default for none"
        ]
    return [
        f"{at}.factor is {scaling.factor:g}, with which rope_type {scaling.rope_type} changes nothing: give new / original "
        "context, or rope_type: default for none"
    ]


def is_made_for_another_context(recipe: Recipe, phase: Phase, longest_before: int) -> bool:
    """Whether a phase stretches angles from another original context than the model has seen. longest_before: the longest
    seq_len before the phase; 0 if unknown."""
    scaling = phase.rope_scaling
    if scaling is None or scaling.factor <= 1 or not longest_before or phase.seq_len <= longest_before:
        return False  # nothing is stretched, or nobody knows from what, or not further
    original = scaling.original_max_position_embeddings
    earlier = [p.rope_scaling for p in recipe.phases[: recipe.phases.index(phase)] if p.rope_scaling]
    if any(s.factor > 1 and s.original_max_position_embeddings == original for s in earlier):
        return False  # further than before, from the same original context
    return original != longest_before


# --- evaluation ----------------------------------------------------------------------------------------------


def _eval_problems(recipe: Recipe) -> list[str]:
    settings, seq_lens = recipe.eval, [phase.seq_len for phase in recipe.phases]
    problems = []
    if too_long := [n for n in settings.seq_lens if n >= max(seq_lens)]:
        problems.append(
            f"eval.seq_lens has {', '.join(map(str, too_long))}, no shorter than the longest seq_len of a phase "
            f"({max(seq_lens)}): no phase would measure it; leave it out (each phase measures its own seq_len)"
        )
    for phase in recipe.phases:
        if cut := [n for n in settings.seq_lens if n < phase.seq_len and n % phase.sequence_parallel]:
            problems.append(
                f"eval.seq_lens has {', '.join(map(str, cut))}, which phases.{phase.name}.sequence_parallel "
                f"{phase.sequence_parallel} does not divide: each rank has an equal part; use multiples of it"
            )
    if settings.recall is not None:
        validation = list(recipe.data.validation)
        problems += recall_problems(settings.recall, settings.every_steps, seq_lens, validation, recipe.tokenizer)
    return problems
