"""From token shards to tensors: a phase's sequences in their order, cut into this rank's micro-batches.

Owns assembling; the packing is packing.py's, the order order.py's, the bytes tokens.py's.

    data = PhaseData({"web": TokenDataset("tokens/web")}, {"web": 1.0}, seq_len=8192, seed=0, phase_name="a")
    batches = data.step_batches(step, global_batch=512, micro_batch=4, share=Share.of(rank, world_size))

`B` sequences of a micro-batch, `T` tokens of them on this rank: seq_len, or a part of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from slm import parallel
from slm.data.order import PhaseOrder, phase_key
from slm.data.packing import PACKING, PackingPlan, load_plan, pack, save_plan
from slm.data.selection import Selection, selection_digest
from slm.data.tokens import TokenDataset
from slm.errors import CorruptArtefact, UserError
from slm.losses import IGNORE
from slm.parallel import Share

if TYPE_CHECKING:
    from slm.distill.codec import RawTargets
    from slm.distill.student import CachedTeacher


Record = TypeVar("Record", bound=Any)  # a dataclass


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Labels are shifted already: labels[b, t] is the token after tokens[b, t], or -100."""

    tokens_BT: torch.Tensor  # int64
    labels_BT: torch.Tensor  # int64
    positions_BT: torch.Tensor  # int64, from 0 in each piece
    # int32, starts of the pieces in the flattened [B*T], every row start among them; of a fixed size (filled
    # up with B*T), so that compiled code sees one shape. Padding at a row's end is a piece of its own.
    piece_bounds: torch.Tensor
    num_targets: int
    # These three, of a sequence that several ranks share, are told by the first of them.
    num_tokens: int  # without padding
    attention_pairs: int  # (query, key) pairs a causal kernel touches: sum of n (n + 1) / 2 over the pieces
    attention_pairs_full: int  # sum of n^2
    teachers: tuple[RawTargets, ...] = ()  # cached rows of the tokens, teacher by teacher
    teacher_nll: tuple[float, ...] = ()  # each teacher's own loss on the targets, summed
    num_known: int = 0  # targets whose rows are known
    present_N: torch.Tensor | None = None  # bool [B * T]: tokens whose rows are known; None: all are

    @property
    def is_one_piece_B(self) -> torch.Tensor:
        """bool [B]: the sequence is one piece of one document, without padding (or, where it is empty, padding alone)."""
        B = len(self.tokens_BT)
        S = int(self.piece_bounds[-1]) // B
        starts = self.piece_bounds[self.piece_bounds < B * S]
        return torch.bincount(starts // S, minlength=B) == 1

    def part(self, number: int, of: int) -> Batch:
        """Of each sequence the `number`th of `of` equal parts, for ranks that share it; piece_bounds stay those of the whole."""
        if of == 1:
            return self
        T = self.tokens_BT.shape[1] // of
        columns = slice(number * T, (number + 1) * T)
        labels_BT = self.labels_BT[:, columns].contiguous()
        first = int(number == 0)
        return replace(
            self,
            tokens_BT=self.tokens_BT[:, columns].contiguous(),
            labels_BT=labels_BT,
            positions_BT=self.positions_BT[:, columns].contiguous(),
            num_targets=int((labels_BT != IGNORE).sum()),
            num_tokens=first * self.num_tokens,
            attention_pairs=first * self.attention_pairs,
            attention_pairs_full=first * self.attention_pairs_full,
        )

    def to(self, device: torch.device | str) -> Batch:
        if torch.device(device).type == "cpu":
            return self
        return replace(tensors_on(self, device), teachers=tuple(rows.to(device) for rows in self.teachers))


def tensors_on(record: Record, device: torch.device | str) -> Record:
    """A copy of a dataclass with its tensors on another device, sent from pinned memory."""
    names = [f.name for f in fields(record) if isinstance(getattr(record, f.name), torch.Tensor)]
    return replace(record, **{name: getattr(record, name).pin_memory().to(device, non_blocking=True) for name in names})


ALONE = Share()
_CHUNK = 1024  # places of the order that are located at once
_SECONDS_BETWEEN_LOOKS = 1.0

# A piece to place in a row: the tokens it reads and the token after its last (or None at the document's end).
Piece = tuple[np.ndarray, int | None]


@dataclass(frozen=True)
class Arena:
    """Memory of a micro-batch, to be filled again and again: int64 [B * T], and int32 [B * (max_pieces + 1) + 1]."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, rows: int, micro_batch: int, seq_len: int, max_pieces: int) -> list[Arena]:
        """One for each micro-batch of a step, cut from one piece: for a large one numpy asks the system for large pages."""
        count = rows // micro_batch
        tokens, labels, positions = np.empty((3, count, micro_batch * seq_len), np.int64)
        bounds = np.empty((count, micro_batch * (max_pieces + 1) + 1), np.int32)
        return [cls(tokens[i], labels[i], positions[i], bounds[i]) for i in range(count)]


def assemble(
    rows: Sequence[Sequence[Piece]], seq_len: int, pad_id: int, max_pieces: int, arena: Arena | None = None
) -> Batch:
    """Rows of pieces -> a micro-batch, in the arena's memory if one is given.

    max_pieces: the most pieces in any row of the whole data.
    """
    B = len(rows)
    if arena is None:
        (arena,) = Arena.of(B, B, seq_len, max_pieces)
    tokens, labels, positions, bounds = arena.tokens, arena.labels, arena.positions, arena.bounds
    ramp = _ramp(seq_len)
    starts: list[int] = []
    num_tokens = num_targets = squares = 0
    for b, row in enumerate(rows):
        at, row_end = b * seq_len, (b + 1) * seq_len
        for ids, token in row:
            length = len(ids)
            end = at + length
            assert end <= row_end, f"a row of more than {seq_len} tokens"
            tokens[at:end] = ids
            labels[at : end - 1] = ids[1:]
            positions[at:end] = ramp[:length]
            starts.append(at)
            labels[end - 1] = IGNORE if token is None else token
            num_targets += length - (token is None)
            squares += length * length
            at = end
        num_tokens += at - b * seq_len
        if at < row_end:
            tokens[at:row_end] = pad_id
            positions[at:row_end] = ramp[: row_end - at]
            starts.append(at)
            labels[at:row_end] = IGNORE
    bounds[: len(starts)] = starts
    bounds[len(starts) :] = B * seq_len
    return Batch(
        tokens_BT=torch.from_numpy(tokens).view(B, seq_len),
        labels_BT=torch.from_numpy(labels).view(B, seq_len),
        positions_BT=torch.from_numpy(positions).view(B, seq_len),
        piece_bounds=torch.from_numpy(bounds),
        num_targets=num_targets,
        num_tokens=num_tokens,
        attention_pairs=(squares + num_tokens) // 2,
        attention_pairs_full=squares,
    )


def packed(dataset: TokenDataset, seq_len: int, selection: Selection | None, path: Path | None) -> PackingPlan:
    """The packing plan, from the file if it is of this very dataset, length and choice; else made, and kept there."""
    key = f"{PACKING}/{dataset.fingerprint}/{seq_len}/{selection_digest(selection)}"
    plan = load_plan(path, key) if path is not None else None
    if plan is None:
        plan = pack([shard.doc_offsets for shard in dataset.shards], seq_len, selection=selection)
        if path is not None and parallel.rank() == 0:
            save_plan(plan, path, key)
    return plan


@lru_cache(maxsize=8)
def _ramp(length: int) -> np.ndarray:
    return np.arange(length)


class _Source:
    """One dataset packed at one length."""

    def __init__(self, dataset: TokenDataset, plan: PackingPlan) -> None:
        self.dataset, self.plan = dataset, plan
        self._tokens = [shard.tokens for shard in dataset.shards]

    def row(self, sequence: int) -> list[Piece]:
        tokens = self._tokens
        return [
            (tokens[shard][start : start + length], None if last else int(tokens[shard][start + length]))
            for shard, start, length, last in self.addresses(sequence)
        ]

    def addresses(self, sequence: int) -> Iterator[tuple[int, int, int, bool]]:
        """(shard, first token, tokens, whether it ends its document) of the pieces of a row."""
        plan = self.plan
        of_row = slice(*plan.sequence_offsets[sequence : sequence + 2].tolist())
        columns = (plan.piece_shard, plan.piece_start, plan.piece_length, plan.piece_is_last)
        return zip(*(column[of_row].tolist() for column in columns), strict=True)


class PhaseData:
    """All sequences of a phase, by step. A thread prepares the next step's batches while this one trains.

    selections: which documents of a source; all, where it is not named. plans_folder: where packing plans are kept.
    teachers: whose cached rows go with the tokens.
    weights: how often each source is drawn; None for as often as it has sequences (of the documents that the filters
    leave), so that the epochs of all sources end together; times its `repeats`.
    """

    def __init__(
        self,
        sources: dict[str, TokenDataset],
        weights: dict[str, float] | None,
        *,
        seq_len: int,
        seed: int,
        phase_name: str,
        pad_id: int = 0,
        repeats: dict[str, float] | None = None,
        selections: dict[str, Selection] | None = None,
        plans_folder: Path | None = None,
        teachers: Sequence[CachedTeacher] = (),
    ) -> None:
        self.teachers = teachers
        self.sources, self.seq_len, self.pad_id = sources, seq_len, pad_id
        self._sources = [
            _Source(
                dataset,
                packed(dataset, seq_len, (selections or {}).get(name), plans_folder and plans_folder / f"{name}.npz"),
            )
            for name, dataset in sources.items()
        ]
        for name, s in zip(sources, self._sources, strict=True):
            if (weights is None or weights[name]) and not s.plan.num_sequences:
                raise UserError(
                    f"phase {phase_name}: the source {name!r} has no document to train on",
                    fix="loosen its filters or give it weight 0",
                )
        if weights is None:
            times = repeats or {}
            weights = {
                name: s.plan.num_sequences * times.get(name, 1.0)
                for name, s in zip(sources, self._sources, strict=True)
            }
        self.max_pieces = max(s.plan.max_pieces_per_sequence for s in self._sources)
        self._vocab_size = max(dataset.vocab_size for dataset in sources.values())
        identities = [f"{s.dataset.fingerprint}/{s.plan.fingerprint}" for s in self._sources]
        key = phase_key(seed, phase_name, identities)
        # What the order of this phase depends on, as one string.
        self.fingerprint = f"{key:016x}-{'/'.join(repr(float(weights[name])) for name in sources)}"
        counts = [s.plan.num_sequences for s in self._sources]
        self._weights = [weights[name] for name in sources]
        self.order = PhaseOrder(counts, [float(weights[name]) for name in sources], key)
        # Of 1,024 places at a time: for a few, numpy's calls would cost more than the copying of their tokens.
        self._located = lru_cache(maxsize=2)(lambda chunk: self.order.locate_many(chunk * _CHUNK, _CHUNK))
        self._ahead: tuple[tuple[Any, ...], Future[list[Batch]]] | None = None
        # One step's batches are trained on while the next one's are filled.
        self._arenas = lru_cache(maxsize=1)(
            lambda rows, micro_batch: [Arena.of(rows, micro_batch, seq_len, self.max_pieces) for _ in range(2)]
        )
        self._looked_at = time.monotonic()  # at the files of the sources, whether they are as they were
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    @property
    def num_sequences(self) -> int:
        """Of one epoch of every source."""
        return sum(s.plan.num_sequences for s in self._sources)

    @property
    def longest_piece(self) -> int:
        """Tokens of the longest stretch of one document in a sequence of a source that is drawn."""
        drawn = (s for s, weight in zip(self._sources, self._weights, strict=True) if weight > 0)
        return max(int(s.plan.piece_length.max(initial=0)) for s in drawn)

    def report(self) -> dict[str, dict[str, Any]]:
        """Per source: its share of the phase's sequences; documents, sequences, and tokens packed, padded, dropped and filtered
        (PackingPlan), of one epoch of it."""
        total = sum(self._weights)
        return {
            name: {
                "share": weight / total,
                "documents": s.dataset.num_docs,
                "sequences": s.plan.num_sequences,
                "tokens": s.plan.num_tokens,
                "padding": s.plan.num_padding,
                "dropped": s.plan.num_dropped,
                "filtered": s.plan.num_filtered,
            }
            for name, s, weight in zip(self.sources, self._sources, self._weights, strict=True)
        }

    def describe(self) -> str:
        """The report in words, one source after the other."""
        return "; ".join(
            f"{name}: {r['documents']:,} documents, {r['tokens']:,} tokens in {r['sequences']:,} sequences "
            f"({r['padding'] / max(1, r['sequences'] * self.seq_len):.2%} padding, {r['dropped']:,} tokens "
            f"dropped, {r['filtered']:,} filtered out)"
            for name, r in self.report().items()
        )

    def _batch(self, places: list[tuple[int, int, int]], arena: Arena, share: Share) -> Batch:
        rows = [self._sources[source].row(sequence) for source, sequence, _ in places]
        batch = assemble(rows, self.seq_len, self.pad_id, self.max_pieces, arena)
        tokens = batch.tokens_BT.numpy()
        if tokens.view(np.uint64).max() >= self._vocab_size:  # damaged; as an index it would be a crash without a name
            low, high = int(tokens.min()), int(tokens.max())
            folders = ", ".join(str(self._sources[s].dataset.path) for s in {source for source, _, _ in places})
            raise CorruptArtefact(
                f"a sequence of {folders} holds the token {low if low < 0 else high}, and its tokenizer has "
                f"{self._vocab_size}: the shards are damaged",
                fix=f"slm-data verify {folders.split(',')[0]}, then copy the files again or make them anew",
            )
        batch = batch.part(share.sequence_rank, share.sequence_world)
        return self._with_teachers(batch, places, share) if self.teachers else batch

    def _with_teachers(self, batch: Batch, places: list[tuple[int, int, int]], share: Share) -> Batch:
        T = self.seq_len // share.sequence_world
        first = share.sequence_rank * T  # of this rank's columns
        pieces = []
        for row, (source, sequence, _) in enumerate(places):
            column = 0
            for shard, start, length, _ in self._sources[source].addresses(sequence):
                low, high = max(column, first), min(column + length, first + T)
                if low < high:
                    pieces.append((row * T + low - first, source, shard, start + low - column, high - low))
                column += length
        found = [teacher.rows(pieces, batch) for teacher in self.teachers]
        present = [known for _, known, _ in found if known is not None]
        present_N = torch.stack(present).all(0) if present else None
        is_target_N = batch.labels_BT.flatten() != IGNORE
        return replace(
            batch,
            teachers=tuple(rows for rows, _, _ in found),
            teacher_nll=tuple(nll for _, _, nll in found),
            num_known=batch.num_targets if present_N is None else int((present_N & is_target_N).sum()),
            present_N=present_N,
        )

    def sample_ids(self, step: int, global_batch: int) -> list[tuple[str, int, int]]:
        """(source, sequence, epoch) of every sequence of a step, over all ranks."""
        names = list(self.sources)
        places = self._places(step * global_batch, global_batch)
        return [(names[source], sequence, epoch) for source, sequence, epoch in places]

    def _places(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """(source, sequence, epoch) of `count` places of the order."""
        places: list[tuple[int, int, int]] = []
        while count > 0:
            chunk, at = divmod(first, _CHUNK)
            columns = (column[at : at + count].tolist() for column in self._located(chunk))
            found = list(zip(*columns, strict=True))
            places += found
            first, count = first + len(found), count - len(found)
        return places

    def step_batches(self, step: int, *, global_batch: int, micro_batch: int, share: Share = ALONE) -> list[Batch]:
        """This rank's micro-batches of a step: a contiguous share of the step's global_batch places.

        They are valid until the next call, which gives their memory away. An error of the thread is raised by the call
        that asks for its step.
        """
        if global_batch % (micro_batch * share.data_world) or not 0 <= share.data_rank < share.data_world:
            raise ValueError(f"{global_batch} sequences cannot be split by {share} in micro-batches of {micro_batch}")
        asked = (step, global_batch, micro_batch, share)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == asked:
            batches = ahead[1].result()
        else:
            if ahead is not None and not ahead[1].cancel():
                wait([ahead[1]])  # it may be writing where this step's batches go
            batches = self._make(*asked)
        following = (step + 1, *asked[1:])
        self._ahead = (following, self._thread.submit(self._make, *following))
        return batches

    def _make(self, step: int, global_batch: int, micro_batch: int, share: Share) -> list[Batch]:
        if (now := time.monotonic()) - self._looked_at > _SECONDS_BETWEEN_LOOKS:
            self._looked_at = now
            for dataset in self.sources.values():
                dataset.check_unchanged()
        per_rank = global_batch // share.data_world
        places = self._places(step * global_batch + share.data_rank * per_rank, per_rank)
        arenas = self._arenas(per_rank, micro_batch)[step % 2]
        return [
            self._batch(places[i * micro_batch : (i + 1) * micro_batch], arena, share) for i, arena in enumerate(arenas)
        ]


@lru_cache(maxsize=16)
def _packed(dataset: TokenDataset, seq_len: int) -> PackingPlan:
    """The plan of a held-out dataset, made once for all evaluations of a run."""
    return packed(dataset, seq_len, None, None)


class EvaluationBatches:
    """A dataset in packed order, split over the ranks; of more than max_sequences, that many evenly spaced (the
    first ones would be the longest documents). Made as they are iterated.

    Every rank gets equally many batches of one shape: rows that are missing at the end are empty, so that a
    collective forward never waits for a rank that is done.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        seq_len: int,
        micro_batch: int,
        share: Share = ALONE,
        max_sequences: int | None = None,
        pad_id: int = 0,
    ) -> None:
        self.seq_len, self.micro_batch, self.pad_id, self.share = seq_len, micro_batch, pad_id, share
        self._source = _Source(dataset, _packed(dataset, seq_len))
        available = self._source.plan.num_sequences
        self.num_sequences = min(available, max_sequences or available)

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-self.num_sequences // (self.micro_batch * self.share.data_world))

    def __iter__(self) -> Iterator[Batch]:
        plan = self._source.plan
        for i in range(len(self)):
            first = (i * self.share.data_world + self.share.data_rank) * self.micro_batch
            picked = [s * plan.num_sequences // self.num_sequences for s in range(first, first + self.micro_batch)]
            rows = [self._source.row(s) if s < plan.num_sequences else [] for s in picked]
            batch = assemble(rows, self.seq_len, self.pad_id, plan.max_pieces_per_sequence)
            yield batch.part(self.share.sequence_rank, self.share.sequence_world)
