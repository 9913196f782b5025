"""Which documents of a source a phase trains on: by length, by a share, and not those of an earlier phase.

Owns the choice, from document lengths and positions alone; a choice is one boolean array per shard. Packing what is chosen
is packing.py's.

    chosen = by_length(offsets, 4096, None)
    chosen = chosen & by_share(shard=0, num_docs=len(chosen), share=0.5)
    selected_documents(recipe, phase, "books", TokenDataset("tokens/books"))    # what a recipe's filters leave
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slm.data.order import GOLDEN, mix_many
from slm.errors import UserError

if TYPE_CHECKING:
    from slm.data.tokens import TokenDataset
    from slm.recipe import Phase, Recipe

Selection = list[np.ndarray]  # bool [num_docs], per shard


def by_length(doc_offsets: np.ndarray, min_tokens: int, max_tokens: int | None) -> np.ndarray:
    """Documents of min_tokens to max_tokens tokens, BOS and EOS included. doc_offsets: int64 [num_docs + 1], in tokens."""
    lengths = np.diff(doc_offsets)
    most = np.iinfo(np.int64).max if max_tokens is None else max_tokens
    return (lengths >= max(1, min_tokens)) & (lengths <= most)


def by_share(shard: int, num_docs: int, share: float) -> np.ndarray:
    """About `share` of the documents, the same ones in every phase: by splitmix64 of (shard, number of the document)."""
    if share >= 1:
        return np.ones(num_docs, dtype=bool)
    step = np.uint64((shard + 1) * GOLDEN & 0xFFFFFFFFFFFFFFFF)
    mixed = mix_many(np.arange(num_docs, dtype=np.uint64), step)
    return mixed < np.uint64(share * 2.0**64)


def selection_digest(selection: Selection | None) -> str:
    """SHA-256 of a choice; of None, which is all documents, a word."""
    if selection is None:
        return "all"
    digest = hashlib.sha256()
    for chosen in selection:
        digest.update(f"{len(chosen)}:".encode() + np.packbits(chosen).tobytes())
    return digest.hexdigest()


def without(selection: Selection, seen: Sequence[Selection]) -> Selection:
    """The choice less what other choices, over the same shards, contain."""
    return [chosen & ~np.any([s[i] for s in seen], axis=0) for i, chosen in enumerate(selection)] if seen else selection


def selected_documents(recipe: Recipe, phase: Phase, source: str, dataset: TokenDataset) -> Selection:
    """Which documents of a source the phase trains on: what its filters leave, less the documents of the earlier phases
    that exclude_seen names. Those are the documents of the plan, whatever was run of it, under any name of the folder.

    Raises UserError if a source that is drawn has none left.
    """
    folder, rules = Path(recipe.data.sources[source]).resolve(), phase.filters.get(source)
    phases = {p.name: p for p in recipe.phases}

    @cache  # a phase may be named by several later ones
    def chosen(phase_name: str, name: str) -> Selection:
        rule = phases[phase_name].filters.get(name)
        if rule is None:
            return [by_length(shard.doc_offsets, 0, None) for shard in dataset.shards]
        allowed = [
            by_length(shard.doc_offsets, rule.min_doc_tokens, rule.max_doc_tokens)
            & by_share(i, shard.num_docs, rule.share)
            for i, shard in enumerate(dataset.shards)
        ]
        seen = [
            chosen(earlier.name, other)
            for earlier in recipe.phases
            if earlier.name in rule.exclude_seen
            for other in earlier.mixture or recipe.data.sources
            if earlier.mixture.get(other, 1.0) > 0 and Path(recipe.data.sources[other]).resolve() == folder
        ]
        return without(allowed, seen)

    selection = chosen(phase.name, source)
    if rules is not None and phase.mixture.get(source, 1.0) > 0 and not any(docs.any() for docs in selection):
        lengths = np.concatenate([np.diff(shard.doc_offsets) for shard in dataset.shards])
        most, fields = int(lengths.max(initial=0)), type(rules).model_fields
        given = ", ".join(f"{field} {value}" for field, value in rules if value != fields[field].default)
        raise UserError(
            f"phases.{phase.name}.filters.{source} ({given}) leaves no document of {recipe.data.sources[source]}: its "
            f"{len(lengths):,} documents have {lengths.min(initial=most):,} to {most:,} tokens",
            fix=f"loosen the filter, or leave {source} out of the phase (mixture)",
        )
    return selection
