"""Packing: documents cut at multiples of seq_len, and the pieces put best-fit into sequences.

Owns the plan of a phase at one seq_len, from document lengths alone: tokens are neither read nor copied.

    plan = pack([shard.doc_offsets for shard in dataset.shards], seq_len=8192)
    pieces = range(plan.sequence_offsets[i], plan.sequence_offsets[i + 1])      # of sequence i

Best-fit decreasing by whole-document pieces cuts nothing that fits (arXiv 2404.10830). Blocks of pieces are
packed independently, so the cost is linear and the plan is the same however it is computed.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from slm.data.selection import Selection
from slm.runtime import atomic_write

PACKING = 2  # raised whenever the same documents would be packed otherwise: plans in files are then made again


@dataclass(frozen=True)
class PackingPlan:
    """Sequence i holds the pieces sequence_offsets[i] … sequence_offsets[i + 1]; piece p is piece_length[p]
    tokens of shard piece_shard[p] from token piece_start[p]. piece_is_last: the piece ends its document, so
    its last token has no label. Every token is packed, dropped or filtered.

    num_padding: places that no token fills. num_dropped: tokens alone at their document's end, which predict
    nothing (they stay the label of the token before). num_filtered: tokens of documents that are not selected.
    """

    seq_len: int
    piece_shard: np.ndarray  # int32 [P]
    piece_start: np.ndarray  # int64 [P]
    piece_length: np.ndarray  # int32 [P]
    piece_is_last: np.ndarray  # bool [P]
    sequence_offsets: np.ndarray  # int64 [num_sequences + 1]
    num_tokens: int
    num_padding: int
    num_dropped: int
    num_filtered: int
    max_pieces_per_sequence: int
    fingerprint: str

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_offsets) - 1


def pack(
    doc_offsets_by_shard: Sequence[np.ndarray],
    seq_len: int,
    *,
    selection: Selection | None = None,
    block_pieces: int = 1 << 16,
) -> PackingPlan:
    """doc_offsets_by_shard: int64 [num_docs + 1] per shard, in tokens. selection: bool [num_docs] per shard; None for all."""
    if seq_len < 1 or block_pieces < 1:
        raise ValueError(f"seq_len {seq_len} and block_pieces {block_pieces} must be positive")
    cut, num_dropped = _cut(doc_offsets_by_shard, seq_len, selection)
    shard, start, length, is_last = cut
    order_parts, counts = [], []
    for first in range(0, len(length), block_pieces):
        order, sizes = best_fit(length[first : first + block_pieces], seq_len)
        order_parts.append(order + first)
        counts.append(sizes)
    order = np.concatenate(order_parts) if order_parts else np.zeros(0, dtype=np.int64)
    pieces_in = np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)
    sequence_offsets = np.concatenate([[0], np.cumsum(pieces_in)]).astype(np.int64)
    arrays = (shard[order], start[order], length[order], is_last[order], sequence_offsets)
    num_tokens = int(length.sum())
    return PackingPlan(
        seq_len,
        *arrays,
        num_tokens=num_tokens,
        num_padding=len(pieces_in) * seq_len - num_tokens,
        num_dropped=num_dropped,
        num_filtered=sum(int(o[-1] - o[0]) for o in doc_offsets_by_shard) - num_tokens - num_dropped,
        max_pieces_per_sequence=int(pieces_in.max(initial=0)),
        fingerprint=_fingerprint(seq_len, arrays),
    )


def _fingerprint(seq_len: int, arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256(str(seq_len).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


# --- files ---------------------------------------------------------------------------------------------------

_ARRAYS = ("piece_shard", "piece_start", "piece_length", "piece_is_last", "sequence_offsets")


def save_plan(plan: PackingPlan, path: Path, key: str) -> None:
    """Writes a plan as an .npz that numpy.load reads; `key` says what it was made from."""
    numbers = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in _ARRAYS}
    header = np.frombuffer(json.dumps({"key": key, **numbers}).encode(), dtype=np.uint8)
    content = io.BytesIO()
    np.savez(content, header=header, **{name: getattr(plan, name) for name in _ARRAYS})
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content.getvalue())


def load_plan(path: Path, key: str) -> PackingPlan | None:
    """The plan in a file; None if there is none, or it is of another key or not whole: then it is made again."""
    try:
        with np.load(path, allow_pickle=False) as content:
            header = json.loads(content["header"].tobytes())
            arrays = {name: content[name] for name in _ARRAYS}
        if header.pop("key") != key or header["fingerprint"] != _fingerprint(header["seq_len"], list(arrays.values())):
            return None
        return PackingPlan(**header, **arrays)
    except Exception:  # whatever numpy makes of a damaged file
        return None


def pieces_of(
    doc_offsets: np.ndarray, seq_len: int, kept: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, length, is_last) of every piece of a shard's documents (of those kept), int64, int64 and bool, in order."""
    starts, lengths = np.asarray(doc_offsets[:-1], np.int64), np.diff(doc_offsets).astype(np.int64)
    chosen = lengths > 0 if kept is None else (lengths > 0) & kept
    starts, lengths = starts[chosen], lengths[chosen]
    pieces = -(-lengths // seq_len)
    doc = np.repeat(np.arange(len(lengths)), pieces)
    nth = np.arange(len(doc)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return starts[doc] + nth * seq_len, np.minimum(seq_len, lengths[doc] - nth * seq_len), nth == pieces[doc] - 1


def _cut(
    doc_offsets_by_shard: Sequence[np.ndarray], seq_len: int, selection: Selection | None
) -> tuple[tuple[np.ndarray, ...], int]:
    """((shard, start, length, is_last) of every piece in document order, number of tokens dropped)."""
    columns: list[tuple[np.ndarray, ...]] = []
    num_dropped = 0
    for shard, offsets in enumerate(doc_offsets_by_shard):
        kept = None if selection is None else selection[shard]
        piece_start, piece_length, is_last = pieces_of(offsets, seq_len, kept)
        # One token alone at a document's end predicts nothing and is predicted by the piece before.
        useful = ~(is_last & (piece_length == 1))
        num_dropped += int((~useful).sum())
        table = (np.full(len(piece_start), shard, np.int32), piece_start, piece_length.astype(np.int32), is_last)
        columns.append(tuple(column[useful] for column in table))
    if not columns:
        columns = [(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, bool))]
    return tuple(np.concatenate(parts) for parts in zip(*columns, strict=True)), num_dropped


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: (piece indices, sequence by sequence; pieces per sequence), both int64.

    Longest first, each into the fullest sequence that still has room, else into a new one (Johnson, 1973). The open
    sequences stand in a list sorted by their room; pieces that fill a sequence alone take no search.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    num_full = int((lengths == capacity).sum())
    open_: list[int] = []  # room << 32 | sequence
    assigned: list[int] = []  # the sequence of each piece
    num_sequences = 0
    for length in lengths[order[num_full:]].tolist():
        at = bisect_left(open_, length << 32)
        if at < len(open_):
            entry = open_.pop(at)
            room, sequence = entry >> 32, entry & 0xFFFFFFFF
        else:
            room, sequence = capacity, num_sequences
            num_sequences += 1
        assigned.append(sequence)
        if room > length:
            insort(open_, (room - length) << 32 | sequence)
    sequence_of = np.array(assigned, dtype=np.int64)
    by_sequence = np.argsort(sequence_of, kind="stable")
    sizes = np.bincount(sequence_of, minlength=num_sequences)
    full = np.ones(num_full, np.int64)
    return np.concatenate([order[:num_full], order[num_full:][by_sequence]]), np.concatenate([full, sizes])
