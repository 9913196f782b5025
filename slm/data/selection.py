"""Which documents of a source a phase trains on: by length, by a share, and not those of an earlier phase.

Owns the choice, from document lengths and positions alone; a choice is one boolean array per shard. Packing what is chosen
is packing.py's.

    chosen = by_length(offsets, 4096, None)
    chosen = chosen & by_share(shard=0, num_docs=len(chosen), share=0.5)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from slm.data.order import GOLDEN, mix_many

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
