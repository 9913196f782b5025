"""What a recipe says about distillation: the teachers, their caches, and the loss of a phase. Imports no torch.

teacher:
  big: {model: models/Llama-3.1-8B, cache: {kind: sampled, k: 12}}
phases:
  - loss: {type: distill, alpha: 0.1}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from slm.fields import Count, OverPhase, Real, Section, points, stepwise, straight
from slm.names import Output, Text


class TeacherCache(Section):
    """What `slm teacher` keeps of the teacher's distribution at every token."""

    kind: Literal["top_k", "sampled"] = Field(
        "top_k",
        description="top_k: the likeliest k and the exact rest; sampled: k drawn without bias (best for small k)",
    )
    k: Count = Field(64, gt=0, le=4096, description="entries a token")
    temperatures: list[Annotated[Real, Field(gt=0)]] = Field(
        [1.0], min_length=1, description="those that a loss may ask for"
    )
    folder: Output = Field("", description="where to; empty for TOKENS/teacher/NAME beside each source")
    block_tokens: Count = Field(65536, ge=1, description="tokens between two points that a killed job goes on from")
    seed: Count = Field(0, ge=0, lt=2**63, description="of the draws of kind sampled")

    @model_validator(mode="after")
    def _fits(self) -> TeacherCache:
        if self.kind == "sampled" and self.k > 255:
            raise ValueError(f"k is {self.k}; a sample has at most 255 entries, and 12 to 64 are plenty")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures {self.temperatures} names one twice")
        return self


class Teacher(Section):
    model: Text = Field(min_length=1, description="a Hugging Face folder, a run, or a checkpoint")
    cache: TeacherCache | None = Field(
        None, description="read from files that `slm teacher` writes; null to run it online"
    )
    batch_tokens: Count = Field(8192, gt=0, description="tokens of one forward pass of the teacher")
    zero3: bool = Field(False, description="split its weights over all ranks (ZeRO-3), if one device cannot hold them")

    @model_validator(mode="after")
    def _has_a_place(self) -> Teacher:
        if self.zero3 and self.cache is None:
            raise ValueError("zero3 is for slm teacher: a teacher that runs beside the student is whole on each device")
        return self


def teacher_field(name: str) -> str:
    """Where a teacher stands in a recipe: one alone needs no name there."""
    return "teacher" if name == "teacher" else f"teacher.{name}"


Form = Literal["auto", "bucket", "sampled", "renormalised", "raw", "full"]


def _form(value: object) -> object:
    if value == "both_renormalised":
        raise ValueError(
            "both_renormalised divides teacher and student by their mass on the k entries, which leaves the student "
            "unpunished for all it puts elsewhere: it ends worse than without a teacher; use bucket or sampled"
        )
    return value


class Loss(Section):
    type: Literal["ce", "distill"] = Field(
        "ce",
        description="ce: cross-entropy of the next token; distill: alpha * CE + (1 - alpha) * T^2 * KL(teacher, student)",
    )
    z_loss: Real = Field(
        0.0, ge=0, description="weight of log(Z)^2, which keeps logits from drifting (arXiv 2204.02311)"
    )
    alpha: OverPhase = Field(
        0.1, description="distill: weight of the labels; {0: 0.5, 1: 0.0} goes in a straight line over the phase"
    )
    temperature: OverPhase = Field(1.0, description="distill: T; {0: 2, 0.5: 1} changes at half of the phase")
    targets: Annotated[Form, BeforeValidator(_form)] = Field(
        "auto",
        description="distill: bucket (k and one bucket for the rest), sampled, full (online only); renormalised and raw are "
        "biased, for comparison. auto: as the cache is, full online",
    )
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        "forward",
        description="distill: KL(teacher, student), the reverse, or Jensen-Shannon; the latter two with bucket only",
    )
    k: Count | None = Field(None, gt=0, description="distill: entries to use; null for all of the cache (online: 64)")
    teachers: dict[str, Real] = Field({}, description="distill: teacher: weight; empty for all alike")
    allow_partial: bool = Field(
        False, description="distill: tokens that the cache does not hold yet are learned from their labels alone"
    )

    def alpha_at(self, fraction: float) -> float:
        return straight(self.alpha, fraction)

    def temperature_at(self, fraction: float) -> float:
        return stepwise(self.temperature, fraction)

    def mixing(self, teachers: dict[str, Teacher]) -> dict[str, float]:
        """The weight of each teacher of this loss; they add up to 1."""
        weights = self.teachers or dict.fromkeys(teachers, 1.0)
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items() if weight > 0}

    def form(self, teachers: dict[str, Teacher]) -> str:
        """`targets` without auto, for loss_problems has seen to it that all teachers of a loss are of one sort."""
        if self.targets != "auto":
            return self.targets
        cache = teachers[next(iter(self.mixing(teachers)))].cache
        return "full" if cache is None else "bucket" if cache.kind == "top_k" else "sampled"


def describe_loss(loss: Loss, teachers: dict[str, Teacher]) -> list[str]:
    """A distilling loss in words: what is minimised, then a line for each teacher."""
    alpha, T = (
        ", ".join(f"{y:g} from {x:.0%}" if x else f"{y:g}" for x, y in points(value))
        for value in (loss.alpha, loss.temperature)
    )
    lines = [
        f"distillation: {loss.divergence} divergence on {loss.form(teachers)} targets, alpha {alpha}, temperature {T}"
    ]
    for name, weight in loss.mixing(teachers).items():
        cache = teachers[name].cache
        how = "runs beside the student" if cache is None else f"cache of kind {cache.kind}, k = {loss.k or cache.k}"
        there = "" if Path(teachers[name].model).exists() else " (not there yet)"
        lines.append(f"  teacher {name}, weight {weight:g}: {teachers[name].model}{there}, {how}")
    return lines


def loss_problems(loss: Loss, teachers: dict[str, Teacher], at: str) -> list[str]:
    """What contradicts itself in a phase's loss, in words."""
    if loss.type == "ce":
        fields = {k: f for k, f in Loss.model_fields.items() if k not in ("type", "z_loss")}
        given = [k for k, f in fields.items() if getattr(loss, k) != f.get_default(call_default_factory=True)]
        return (
            [f"{at} is ce, so {', '.join(given)} would have no effect: set type: distill, or remove it"]
            if given
            else []
        )
    if not teachers:
        return [f"{at} is distill, but the recipe has no teacher: add teacher: {{model: FOLDER}}"]
    if unknown := [name for name in loss.teachers if name not in teachers]:
        return [f"{at}.teachers names {', '.join(map(repr, unknown))}, which is not among {', '.join(teachers)}"]
    if any(w < 0 for w in loss.teachers.values()) or (loss.teachers and not sum(loss.teachers.values()) > 0):
        return [f"{at}.teachers has weights {loss.teachers}: none may be negative and their sum must be > 0"]
    problems = _range_problems(loss, at)
    used = {name: teachers[name] for name in loss.mixing(teachers)}
    sorts = {("online" if t.cache is None else t.cache.kind) for t in used.values()}
    if len(sorts) > 1:
        return [
            *problems,
            f"{at} mixes teachers that are {' and '.join(sorted(sorts))}: their targets must be of one sort",
        ]
    (sort,) = sorts
    form = loss.form(teachers)
    buckets = ("bucket", "renormalised", "raw")
    fitting = {"top_k": buckets, "sampled": ("sampled",), "online": ("full", *buckets)}[sort]
    if form not in fitting:
        what = "a teacher that runs online does not give" if sort == "online" else f"a {sort} cache does not hold"
        problems.append(
            f"{at}.targets is {form}, which {what}: use {' or '.join(fitting)}"
            + ("" if sort == "online" else ", or another cache")
        )
    if form == "full" and loss.k is not None:
        problems.append(f"{at}.k is {loss.k}, which has no effect on targets: full: remove it")
    if loss.divergence != "forward" and form != "bucket":
        problems.append(
            f"{at}.divergence is {loss.divergence}, which is not linear in the teacher, so it is wrong on {form} targets: use "
            + ("forward" if sort == "sampled" else "targets: bucket")
            + (", or a cache of kind: top_k in another folder (teacher.NAME.cache.folder)" if sort == "sampled" else "")
        )
    for name, teacher in used.items():
        if teacher.cache is not None:
            problems += _cache_problems(loss, name, teacher.cache, form, at)
    return problems


def _range_problems(loss: Loss, at: str) -> list[str]:
    problems = []
    if any(not 0 <= value <= 1 for _, value in points(loss.alpha)):
        problems.append(f"{at}.alpha is {loss.alpha}: it weighs the labels against the teacher; give 0 to 1")
    if any(value <= 0 for _, value in points(loss.temperature)):
        problems.append(f"{at}.temperature is {loss.temperature}: logits are divided by it; give more than 0")
    for field in ("alpha", "temperature"):
        value = getattr(loss, field)
        if isinstance(value, dict) and any(not 0 <= x <= 1 for x in value):
            problems.append(f"{at}.{field} is {value}: its keys are fractions of the phase; give them from 0 to 1")
    return problems


def _cache_problems(loss: Loss, name: str, cache: TeacherCache, form: str, at: str) -> list[str]:
    problems = []
    wanted = {value for _, value in points(loss.temperature) if value > 0}
    if missing := sorted(wanted - set(cache.temperatures)):
        problems.append(
            f"{at}.temperature asks for {', '.join(f'{t:g}' for t in missing)}, and {teacher_field(name)}.cache.temperatures has "
            f"{', '.join(f'{t:g}' for t in cache.temperatures)}: the mass outside of the k entries at another temperature "
            "is not in the cache and cannot be worked out from it; declare it there before slm teacher runs (a cache that is "
            f"there already stays as it is: give {teacher_field(name)}.cache.folder another folder, or remove it)"
        )
    if loss.k is not None and loss.k > cache.k:
        problems.append(
            f"{at}.k is {loss.k}, but {teacher_field(name)}.cache.k is {cache.k}: use at most that, or cache more in another "
            "folder"
        )
    if loss.k is not None and form == "sampled" and loss.k != cache.k:
        problems.append(
            f"{at}.k is {loss.k}, but a sample of {cache.k} does not contain one of another size: leave k out here"
        )
    return problems
