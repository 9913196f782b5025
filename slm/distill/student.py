"""What a student learns from at each step: the cached rows of its batch, or a teacher that runs beside it.

Owns opening a phase's caches with all their refusals, the guard on every batch, and the way from a batch to the loss's
Distillation. The bytes are cache.py's, the loss slm/losses.py's.

    caches = open_caches(recipe, phase, datasets)             # PhaseData puts their rows into its batches
    targets = Targets(recipe, phase, device, vocab_size)
    engine.forward(batch, targets.of(batch, fraction))
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from slm.data.batches import Batch
from slm.data.tokens import TokenDataset
from slm.distill.cache import REPAIR, Cache, CacheSpec, new_planes, partial_path
from slm.distill.codec import RawTargets, token_tags
from slm.distill.models import TeacherInfo, TeacherModel, check_teacher, describe_teacher, load_teacher
from slm.distill.targets import top_k
from slm.distill.wanted import Wanted, cache_spec, cached_teachers, misfit, misfits, open_cache, wanted_of
from slm.errors import CorruptArtefact, UserError
from slm.layout import sequence_problems
from slm.losses import IGNORE, DenseTarget, Distillation, SparseTarget
from slm.recipe import Phase, Recipe

log = logging.getLogger("slm")

# What the 8-bit value of the real next token may differ by from the teacher's loss on it, which stands beside it: the codec's
# error of an unlikely entry, of the likeliest, and of float16.
_LABEL_ERROR = 0.4
_GUARDED_ROWS = 256  # of each batch
_SAMPLED_ROWS = 4096  # looked at when a cache is opened

# A piece in a batch: (its first place in the flattened batch, source, shard, first token in the shard, tokens).
PieceAddress = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class CachedTeacher:
    """One teacher's caches over the sources of a phase."""

    name: str
    caches: list[list[Cache | None]]  # by source, by shard; None where nothing is there yet (allow_partial)

    @property
    def spec(self) -> CacheSpec:
        """Of the first; the others have rows of the same kind (_check_alike)."""
        return next(cache.spec for of_source in self.caches for cache in of_source if cache is not None)

    @property
    def fingerprint(self) -> str:
        """Of all files: another teacher, or other rows, in one of them is another teacher."""
        specs = [cache.spec.fingerprint if cache else "-" for of_source in self.caches for cache in of_source]
        return hashlib.sha256("/".join(specs).encode()).hexdigest()

    def rows(self, pieces: list[PieceAddress], batch: Batch) -> tuple[RawTargets, torch.Tensor | None, float]:
        """(The rows of a batch's tokens, bool [B*T] of those that are known or None for all, the teacher's own loss summed).

        Raises CorruptArtefact if they are not the rows of these tokens.
        """
        spec = self.spec
        planes = new_planes(spec, batch.labels_BT.numel())
        address = np.full(batch.labels_BT.numel(), -1, dtype=np.int64)
        for at, source, shard, start, length in pieces:
            cache = self.caches[source][shard]
            if cache is not None and not (cache.missing.any() and cache.missing_at(np.array([start]))[0]):
                cache.copy_into(planes, at, start, length)
                address[at : at + length] = np.arange(start, start + length)
        known = address >= 0
        nll = self._guard(planes, address, batch, {(source, shard) for _, source, shard, _, _ in pieces})
        placed = sum(length for *_, length in pieces)
        present = torch.from_numpy(known) if int(known.sum()) < placed else None
        return RawTargets.of(spec.kind, spec.temperatures, planes), present, nll

    def _guard(
        self, planes: dict[str, np.ndarray], address: np.ndarray, batch: Batch, shards: set[tuple[int, int]]
    ) -> float:
        """The rows are those of these very tokens, and the teacher's loss on them is what it was."""
        labels = batch.labels_BT.flatten().numpy()
        known = np.flatnonzero(address >= 0)
        following = np.where(labels[known] == IGNORE, -1, labels[known])
        tags = token_tags(batch.tokens_BT.flatten().numpy()[known], following, address[known])
        where = ", ".join(str(cache.path) for source, shard in sorted(shards) if (cache := self.caches[source][shard]))
        damaged = CorruptArtefact(
            f"{where}: rows of a batch hold what no teacher says (entries, masses or its loss do not fit together)",
            fix=REPAIR,
        )
        if not np.array_equal(tags, planes["tag"][known]):
            wrong = int((tags != planes["tag"][known]).sum())
            raise CorruptArtefact(
                f"{where}: {wrong} of {len(known)} rows of a batch belong to other tokens than it holds",
                fix=REPAIR,
            )
        targets = known[labels[known] != IGNORE]
        if not len(targets):
            return 0.0
        if not (np.isfinite(planes["label"][targets]).all() and (planes["log_tail"][targets] <= 1e-3).all()):  # nor NaN
            raise damaged
        looked_at = targets[:: -(-len(targets) // _GUARDED_ROWS)]
        rows = RawTargets.of(self.spec.kind, self.spec.temperatures, {n: p[looked_at] for n, p in planes.items()})
        label = torch.from_numpy(planes["label"][looked_at].astype(np.float32))
        if not rows.plausible(torch.from_numpy(labels[looked_at]), label, self.spec.vocab_size, _LABEL_ERROR):
            raise damaged
        return -float(planes["label"][targets].astype(np.float64).sum())


def open_caches(recipe: Recipe, phase: Phase, datasets: dict[str, TokenDataset]) -> list[CachedTeacher]:
    """The caches of a phase's teachers, in the order of Loss.mixing, checked. Raises UserError, CorruptArtefact."""
    teachers = []
    for name in cached_teachers(recipe, phase):
        model = recipe.teacher[name].model
        # A cache outlives its teacher. Once for all shards: a fingerprint reads a part of every file of weights.
        now = describe_teacher(model) if Path(model).exists() else None
        if now is None:
            log.warning(
                "teacher %s: %s is not there, so that its cache is of this very teacher is not checked", name, model
            )
        by_source = []
        for source, dataset in datasets.items():
            # A source that is never drawn needs no cache.
            drawn = phase.mixture.get(source, 1.0) > 0
            wanted = wanted_of(recipe, name, source, dataset, phase.seq_len) if drawn else []
            by_source.append([_open(recipe, phase, now, w) for w in wanted])
        _check_alike(name, [cache for of_source in by_source for cache in of_source if cache is not None])
        _report_missing(name, phase, by_source, datasets)
        teachers.append(CachedTeacher(name, by_source))
    return teachers


def _check_alike(teacher: str, caches: list[Cache]) -> None:
    """One decoding serves the rows of all."""
    if not caches:
        raise UserError(f"there is no cache of teacher {teacher} at all", fix="make it with: slm teacher RECIPE")
    for cache in caches:
        for field in ("kind", "k", "temperatures", "vocab_size"):
            was, first = getattr(cache.spec, field), getattr(caches[0].spec, field)
            if was != first:
                raise UserError(
                    f"{cache.path} was made with {field} {was}, and {caches[0].path} with {first}: a batch holds rows of both",
                    fix="cache one of them anew, with the settings of the other",
                )
        if cache.spec.teacher.get("fingerprint") != caches[0].spec.teacher.get("fingerprint"):
            raise UserError(
                f"{cache.path} and {caches[0].path} were made by different teachers", fix="cache one of them anew"
            )


def _open(recipe: Recipe, phase: Phase, now: TeacherInfo | None, w: Wanted) -> Cache | None:
    """None if nothing is there yet and that is allowed. now: the teacher, None if it is no longer there."""
    if phase.loss.allow_partial and not w.path.exists() and not partial_path(w.path).exists():
        return None
    cache = open_cache(w, allow_partial=phase.loss.allow_partial)
    wanted = cache_spec(recipe.teacher[w.teacher], now.identity if now else cache.spec.teacher, w)
    if problems := misfits(cache.spec, replace(wanted, k=phase.loss.k or wanted.k)):
        raise misfit(w, problems[0])
    _check_rows(cache, w.dataset, w.shard)
    return cache


def _check_rows(cache: Cache, dataset: TokenDataset, shard: int) -> None:
    """A sample of rows carry the tags of these tokens: not shifted, not of another shard, not blank."""
    tokens = dataset.shards[shard].tokens
    ends = np.zeros(len(tokens), dtype=bool)
    ends[dataset.shards[shard].doc_offsets[1:] - 1] = True
    every = max(1, len(tokens) // _SAMPLED_ROWS)
    places = np.arange(0, len(tokens) - 1, every)
    places = places[~cache.missing_at(places) & ~ends[places]]  # a token alone at a document's end has no row
    tags = token_tags(tokens[places], tokens[places + 1].astype(np.int64), places)
    wrong = tags != cache.plane("tag")[places]
    if wrong.any():
        raise CorruptArtefact(
            f"{cache.path}: {int(wrong.sum())} of {len(places)} rows looked at belong to other tokens (shifted, or of another "
            "shard)",
            fix=REPAIR,
        )
    if np.isnan(cache.plane("log_tail")[places]).any() or not np.isfinite(cache.plane("label")[places]).all():
        raise CorruptArtefact(f"{cache.path}: holds a value that is not a number", fix=REPAIR)


def _report_missing(
    teacher: str, phase: Phase, by_source: list[list[Cache | None]], datasets: dict[str, TokenDataset]
) -> None:
    total = missing = 0
    for caches, dataset in zip(by_source, datasets.values(), strict=True):
        for cache, shard in zip(caches, dataset.shards, strict=False):
            total += shard.num_tokens
            missing += shard.num_tokens if cache is None else cache.num_missing_tokens
    if missing == total:
        raise UserError(
            f"the cache of teacher {teacher} has no complete block yet, so phases.{phase.name} would learn from labels alone",
            fix="slm teacher RECIPE; or set the phase's loss to type: ce",
        )
    if missing:
        log.warning(
            "phases.%s: the cache of teacher %s lacks %.2f%% of the tokens, which are learned from their labels alone",
            phase.name, teacher, 100 * missing / total,
        )  # fmt: skip


def check_online(recipe: Recipe, phase: Phase, dataset: TokenDataset) -> list[str]:
    """Looks at the teachers that run beside the student, before anything is built; their fingerprints. Raises UserError."""
    if phase.loss.type != "distill":
        return []
    fingerprints = []
    form = phase.loss.form(recipe.teacher)
    for name in phase.loss.mixing(recipe.teacher):
        settings = recipe.teacher[name]
        if settings.cache is None:
            info = describe_teacher(settings.model)
            check_teacher(settings.model, info, dataset.vocab_size, dataset.tokenizer_fingerprint)
            _check_online(info, name, phase, form, dataset.vocab_size)
            fingerprints.append(info.identity["fingerprint"])
    return fingerprints


class Targets:
    """Of one phase, on one device: batch -> Distillation."""

    def __init__(self, recipe: Recipe, phase: Phase, device: torch.device, vocab_size: int) -> None:
        loss = self.loss = phase.loss
        self.weights = loss.mixing(recipe.teacher)
        self.form = loss.form(recipe.teacher)
        self.vocab_size = vocab_size
        self.online: list[TeacherModel] = []
        # A cache may hold more entries than the recipe asks for.
        self.ks = [loss.k or cache.k for name in self.weights if (cache := recipe.teacher[name].cache) is not None]
        for name in self.weights:
            settings = recipe.teacher[name]
            if settings.cache is None:
                self.online.append(load_teacher(settings.model, device))
                if (llama := self.online[-1].llama) is not None:  # others: check_online
                    llama.share_sequences(phase.sequence_parallel)

    def named(self, sums: list[float], num_targets: float, fraction: float) -> dict[str, float]:
        """Of a step's sums (train_step), means as they stand in the log: CE over all targets, what is of the teacher over
        those that it is known for. loss/distill: T^2 times the divergence; of samples, -sum t log q, which is right on
        the average where the divergence is not."""
        ce, distilled, num_known, *nll = sums
        cached = list(self.weights)[: len(nll)]
        known = max(1.0, num_known)
        found = {"loss/ce": ce / max(1.0, num_targets), "loss/distill": distilled / known}
        found |= {"loss/alpha": self.loss.alpha_at(fraction), "loss/temperature": self.loss.temperature_at(fraction)}
        found |= {f"teacher/{name}/loss": value / known for name, value in zip(cached, nll, strict=True)}
        return found if num_known == num_targets else {**found, "teacher/known": num_known / max(1.0, num_targets)}

    def of(self, batch: Batch, fraction: float) -> Distillation:
        """What the loss of this batch is computed from, at a fraction of the phase."""
        temperature = self.loss.temperature_at(fraction)
        weights = list(self.weights.values())
        targets: list[SparseTarget | DenseTarget] = []
        if self.form == "full":
            targets = [m.dense(batch, self.vocab_size, w) for m, w in zip(self.online, weights, strict=True)]
        elif self.online:
            targets = [self._sparse(m, batch, temperature, w) for m, w in zip(self.online, weights, strict=True)]
        else:
            decoded = (rows.decode(temperature, k) for rows, k in zip(batch.teachers, self.ks, strict=True))
            targets = [SparseTarget(*of_rows, w) for of_rows, w in zip(decoded, weights, strict=True)]
        form = "bucket" if self.form == "full" else self.form
        return Distillation(
            tuple(targets), self.loss.alpha_at(fraction), temperature, form, self.loss.divergence, batch.present_N
        )

    def _sparse(self, model: TeacherModel, batch: Batch, temperature: float, weight: float) -> SparseTarget:
        """The likeliest k of a teacher that runs beside, as a cache would hold them."""
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        labels_N = batch.labels_BT.flatten()

        def visit(first: int, logits_CV: torch.Tensor) -> None:
            labels_C = labels_N[first : first + len(logits_CV)]
            entries = top_k(logits_CV[:, : self.vocab_size] / temperature, labels_C, self.loss.k or 64, (1.0,))
            found.append((entries.index_CPK[:, 0], entries.log_p_CPK[:, 0], entries.log_tail_CT[:, 0]))

        model.visit(batch, visit)
        index_NK, log_p_NK, log_tail_N = (torch.cat(parts) for parts in zip(*found, strict=True))
        return SparseTarget(index_NK, log_p_NK, log_tail_N, weight)


def _check_online(model: TeacherInfo, name: str, phase: Phase, form: str, vocab_size: int) -> None:
    if form != "full" and (phase.loss.k or 64) > vocab_size:
        raise UserError(
            f"phases.{phase.name}.loss.k is {phase.loss.k or 64}, and the tokenizer has only {vocab_size} tokens",
            fix="use a smaller k, or targets: full",
        )
    if phase.seq_len > model.context:
        raise UserError(
            f"phases.{phase.name}.seq_len is {phase.seq_len}, beyond teacher {name}'s context of {model.context}: its "
            "distribution there would mean nothing",
            fix="use a teacher of a longer context, or distil in a phase of shorter seq_len",
        )
    if phase.sequence_parallel > 1:
        if model.config is None:
            raise UserError(
                f"phases.{phase.name}.sequence_parallel is {phase.sequence_parallel}, and teacher {name} is a "
                f"{model.identity['model_type']!r} model, which cannot run on a part of a sequence",
                fix="cache it (teacher.NAME.cache), or use a Llama-family teacher",
            )
        if problems := sequence_problems(model.config, phase.seq_len, phase.sequence_parallel, f"phases.{phase.name}"):
            raise UserError(
                f"teacher {name}: {problems[0]}", fix="cache it (teacher.NAME.cache), or use another degree"
            )
    if form == "full" and model.config is None:
        raise UserError(
            f"phases.{phase.name}.loss.targets is full, and teacher {name} is a {model.identity['model_type']!r} model, whose "
            "last hidden states are not at hand",
            fix="use targets: bucket, or a cache",
        )
