"""Which teacher caches a recipe means: one file for each (teacher, token shard, piece length).

Owns their places and what each must hold; the bytes are cache.py's, the making build.py's.

    for cache in wanted_caches(recipe):
        print(cache.path)            # tokens/web/teacher/big/8192/corpus-00000.kdc
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slm.data.tokens import TokenDataset
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
    root = Path(cache.folder) / source if cache.folder else Path(recipe.data.sources[source]) / "teacher" / teacher
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
        raise UserError(
            "no phase of the recipe learns from a cache, so there is nothing for slm teacher to do",
            fix="give a phase loss: {type: distill} and the recipe a teacher with a cache",
        )
    datasets = {source: TokenDataset(recipe.data.sources[source]) for _, source, _ in asked}
    for teacher, source, piece_length in asked:
        for index, shard in enumerate(datasets[source].shards):
            path = cache_path(recipe, teacher, source, shard.name, piece_length)
            yield Wanted(teacher, source, datasets[source], index, piece_length, path)
