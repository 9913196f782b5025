"""Which teacher caches a recipe means: one file for each (teacher, token shard, piece length).

Owns their places, what each must hold, and whether one that is there serves; the bytes are cache.py's, the making
build.py's.

    for w in wanted_caches(recipe):
        print(w.path)                # tokens/web/teacher/big/8192/corpus-00000.kdc
        problems = misfits(open_cache(w).spec, cache_spec(recipe.teacher[w.teacher], identity, w))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slm.data.tokens import TokenDataset
from slm.distill.cache import Cache, CacheSpec, partial_path, read_spec
from slm.distill.settings import Teacher, teacher_field
from slm.errors import UserError
from slm.recipe import Phase, Recipe


@dataclass(frozen=True)
class Wanted:
    teacher: str
    source: str
    dataset: TokenDataset
    shard: int  # of the dataset
    piece_length: int
    path: Path


def cache_path(recipe: Recipe, teacher: str, source: str, shard_name: str, piece_length: int) -> Path:
    cache = recipe.teacher[teacher].cache
    assert cache is not None
    root = (
        Path(cache.folder) / teacher / source
        if cache.folder
        else Path(recipe.data.sources[source]) / "teacher" / teacher
    )
    return root / str(piece_length) / f"{shard_name}.kdc"


def cached_teachers(recipe: Recipe, phase: Phase) -> dict[str, float]:
    """{teacher: weight} of the caches that a phase learns from."""
    if phase.loss.type != "distill":
        return {}
    mixing = phase.loss.mixing(recipe.teacher)
    return {name: weight for name, weight in mixing.items() if recipe.teacher[name].cache is not None}


def wanted_caches(recipe: Recipe) -> Iterator[Wanted]:
    """Every cache of the recipe's phases, once each. Raises UserError if there is none."""
    asked = {
        (teacher, source, phase.seq_len): None
        for phase in recipe.phases
        for teacher in cached_teachers(recipe, phase)
        for source in phase.mixture or recipe.data.sources
        if phase.mixture.get(source, 1.0) > 0
    }
    if not asked:
        online = [
            name
            for phase in recipe.phases
            if phase.loss.type == "distill"
            for name in phase.loss.mixing(recipe.teacher)
        ]
        raise UserError(
            "no phase of the recipe learns from a cache, so there is nothing for slm teacher to do"
            + (f": {', '.join(dict.fromkeys(online))} runs beside the student" if online else ""),
            fix="go on with slm train, or give the teacher a cache: {}"
            if online
            else "give a phase loss: {type: distill} and the recipe a teacher with a cache",
        )
    datasets = {source: TokenDataset(recipe.data.sources[source]) for _, source, _ in asked}
    for teacher, source, piece_length in asked:
        yield from wanted_of(recipe, teacher, source, datasets[source], piece_length)


def wanted_of(recipe: Recipe, teacher: str, source: str, dataset: TokenDataset, piece_length: int) -> list[Wanted]:
    """One for each shard of a source, in their order."""
    paths = [cache_path(recipe, teacher, source, shard.name, piece_length) for shard in dataset.shards]
    return [Wanted(teacher, source, dataset, index, piece_length, path) for index, path in enumerate(paths)]


def open_cache(w: Wanted, *, allow_partial: bool = False) -> Cache:
    return Cache(w.path, doc_offsets=w.dataset.shards[w.shard].doc_offsets, allow_partial=allow_partial)


def cache_spec(settings: Teacher, identity: dict[str, Any], w: Wanted) -> CacheSpec:
    """What the recipe asks for. identity: of the teacher (TeacherInfo)."""
    cache = settings.cache
    assert cache is not None
    entry = w.dataset.manifest["shards"][w.shard]
    return CacheSpec(
        kind=cache.kind,
        k=cache.k,
        temperatures=tuple(cache.temperatures),
        vocab_size=w.dataset.vocab_size,
        num_tokens=w.dataset.shards[w.shard].num_tokens,
        piece_length=w.piece_length,
        block_tokens=cache.block_tokens,
        seed=cache.seed,
        teacher=identity,
        tokenizer=w.dataset.tokenizer_fingerprint,
        shard={"name": entry["name"], "sha256": entry["sha256_bin"], "index_sha256": entry["sha256_idx"]},
    )


def misfits(found: CacheSpec, wanted: CacheSpec) -> list[str]:
    """What keeps a cache from serving in the place of another, in words. More entries and temperatures do no harm."""
    other_text, other_contexts = "the same ids mean other text", "the teacher saw other contexts than the student will"
    pairs: list[tuple[str, Any, Any, str]] = [
        ("kind", found.kind, wanted.kind, "its rows mean something else"),
        ("vocabulary", found.vocab_size, wanted.vocab_size, other_text),
        ("tokenizer", found.tokenizer, wanted.tokenizer, other_text),
        ("piece length (seq_len)", found.piece_length, wanted.piece_length, other_contexts),
        ("token shard", found.shard["sha256"], wanted.shard["sha256"], "its rows belong to other tokens"),
        ("documents", found.shard["index_sha256"], wanted.shard["index_sha256"], other_contexts),
    ]
    if found.kind == "sampled":
        pairs += [
            ("k", found.k, wanted.k, "a sample does not contain one of another size"),
            ("seed", found.seed, wanted.seed, "another sample was drawn"),
        ]
    elif found.k < wanted.k:
        pairs.append(("k", found.k, wanted.k, "it has not so many entries"))
    told = [
        f"its {what} is {_short(was)}, and the recipe's is {_short(now)}: {why}"
        for what, was, now, why in pairs
        if was != now
    ]
    if missing := sorted(set(wanted.temperatures) - set(found.temperatures)):
        told.append(
            f"it has the temperatures {_listed(found.temperatures)}, and the recipe's cache.temperatures also names "
            f"{_listed(missing)}, which cannot be worked out from it"
        )
    was, now = (spec.teacher.get("fingerprint", "") for spec in (found, wanted))
    if was != now:
        told.append(
            f"it was made by another teacher ({found.teacher.get('name')}, fingerprint {was[:12]}) than the recipe's "
            f"({wanted.teacher.get('name')}, {now[:12]})"
        )
    return told


def check_begun(w: Wanted, wanted: CacheSpec) -> None:
    """Raises UserError if a cache that is not complete was begun with other settings than these."""
    partial = partial_path(w.path)
    if not partial.exists() or w.path.exists():
        return
    found = read_spec(partial)
    problems = misfits(found, wanted) + [
        f"it was begun with {field} {was}, and the recipe says {now}"
        for field in ("k", "temperatures", "block_tokens", "seed")
        if (was := getattr(found, field)) != (now := getattr(wanted, field))
    ]
    if problems:
        raise misfit(replace(w, path=partial), problems[0])


def misfit(w: Wanted, problem: str) -> UserError:
    """A cache that does not serve the recipe: it may have cost days, so nothing overwrites it."""
    return UserError(
        f"{w.path}: {problem}",
        fix=f"put the recipe back; or set another {teacher_field(w.teacher)}.cache.folder, or remove the file, and run slm "
        "teacher RECIPE",
    )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{x:g}" for x in numbers)
