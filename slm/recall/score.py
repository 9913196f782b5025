"""What a model finds: the share of exact answers and their log-probability, by length, depth and number of needles.

By teacher forcing: one forward over question and answer, and an answer is right if the likeliest token is the answer's at
each of its places. Greedy decoding writes the answer exactly then: its first token is the likeliest after the same
context, and as long as all were right the context of the next one is the same too. So the two agree on every sample, but
for ties within rounding, and there is one forward instead of one for each token.

    found = find(engine.visit_logits, RecallBatches(grid, micro_batch, share), device)
    found[0].accuracy

`B` samples' rows, `T` tokens of a row, `N` = B * T, `C` of them, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from slm import parallel
from slm.data.batches import ALONE, Batch, assemble
from slm.losses import IGNORE
from slm.model.llama import Visit
from slm.parallel import Share
from slm.recall.samples import Cell, Grid

# Calls the Visit with (first token, logits [C, V]) of all tokens of a batch, in order.
VisitLogits = Callable[[Batch, Visit], None]


@dataclass(frozen=True)
class Found:
    """A cell's outcome. loss_sum: -log p in nats of num_tokens answer tokens."""

    cell: Cell
    num_samples: int
    num_exact: int
    loss_sum: float
    num_tokens: int

    @property
    def accuracy(self) -> float:
        return self.num_exact / max(1, self.num_samples)

    @property
    def loss(self) -> float:
        """Nats per token of the answer: tells models apart also where none, or all, of the answers are right."""
        return self.loss_sum / max(1, self.num_tokens)


@dataclass(frozen=True)
class RecallBatch:
    """batch: its labels are the answers' tokens alone. sample_BT: int64, the number of the sample that a token is of."""

    batch: Batch
    sample_BT: torch.Tensor


class RecallBatches:
    """This rank's share of a grid's samples, short ones side by side in a row, made as they are iterated.

    Every rank gets equally many batches, all of one shape: rows that are missing at the end are empty, so that a
    collective forward never waits for a rank that is done.
    """

    def __init__(self, grid: Grid, micro_batch: int, share: Share = ALONE, pad_id: int = 0) -> None:
        self.grid, self.micro_batch, self.pad_id, self.share = grid, micro_batch, pad_id, share
        longest = max((cell.length for cell in grid.cells), default=0)
        self.row_length = -(-longest // share.sequence_world) * share.sequence_world
        self._rows: list[list[int]] = []  # numbers of samples
        used = self.row_length + 1
        for number in range(grid.num_samples):
            length = grid.cells[number // grid.settings.samples].length
            if used + length > self.row_length:
                self._rows.append([])
                used = 0
            self._rows[-1].append(number)
            used += length

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self._rows) // (self.micro_batch * self.share.data_world))

    def __iter__(self) -> Iterator[RecallBatch]:
        most = max(map(len, self._rows), default=0)
        for i in range(len(self)):
            first = (i * self.share.data_world + self.share.data_rank) * self.micro_batch
            yield self._batch([*self._rows[first : first + self.micro_batch], *([[]] * self.micro_batch)], most)

    def _batch(self, rows: list[list[int]], most: int) -> RecallBatch:
        rows = rows[: self.micro_batch]
        drawn = [[(number, self.grid.sample(number)) for number in row] for row in rows]
        pieces = [[(s.tokens[:-1], int(s.tokens[-1])) for _, s in row] for row in drawn]
        batch = assemble(pieces, self.row_length, self.pad_id, most)
        is_answer_BT = np.zeros((len(rows), self.row_length), bool)
        sample_BT = np.zeros((len(rows), self.row_length), np.int64)
        for b, row in enumerate(drawn):
            at = 0
            for number, s in row:
                end = at + len(s.tokens) - 1
                is_answer_BT[b, at + s.answer_start - 1 : end] = True
                sample_BT[b, at:end] = number
                at = end
        batch.labels_BT[~torch.from_numpy(is_answer_BT)] = IGNORE
        number, of = self.share.sequence_rank, self.share.sequence_world
        return RecallBatch(batch.part(number, of), torch.from_numpy(sample_BT).chunk(of, 1)[number])


def find(
    visit_logits: VisitLogits,
    batches: RecallBatches,
    device: torch.device,
    progress: Callable[[int], None] = lambda num_batches: None,
) -> list[Found]:
    """Over all ranks, the same at any number of them. Under ZeRO-3 every rank must call it."""
    grid = batches.grid
    sums = torch.zeros(grid.num_samples, 3, dtype=torch.float64, device=device)  # wrong tokens, -log p, tokens
    for done, recall in enumerate(batches, 1):
        loss_BT, is_exact_BT = answers(visit_logits, recall.batch.to(device), grid.filler.vocab_size)
        is_answer_BT = recall.batch.labels_BT.to(device) != IGNORE
        columns = torch.stack([x.double() for x in (~is_exact_BT, loss_BT, is_answer_BT)], -1)
        sums.index_add_(0, recall.sample_BT.to(device)[is_answer_BT], columns[is_answer_BT])
        progress(done)
    parallel.reduce_tensor(sums)
    each = grid.settings.samples
    by_cell = sums.view(len(grid.cells), each, 3)
    num_exact = (by_cell[:, :, 0] == 0).sum(1).tolist()
    totals = by_cell.sum(1).tolist()
    return [
        Found(cell, each, int(exact), loss, int(num_tokens))
        for cell, exact, (_, loss, num_tokens) in zip(grid.cells, num_exact, totals, strict=True)
    ]


def answers(visit_logits: VisitLogits, batch: Batch, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every label: -log p, float32 [B, T] (0 where there is none), and whether it is the likeliest of the first
    num_tokens of the vocabulary (further rows of it are no tokens), bool [B, T]."""
    labels_N = batch.labels_BT.flatten()
    loss_N = torch.zeros(labels_N.shape, dtype=torch.float32, device=labels_N.device)
    is_exact_N = torch.zeros_like(labels_N, dtype=torch.bool)

    def look(start: int, logits_CV: torch.Tensor) -> None:
        at_C = start + (labels_N[start : start + len(logits_CV)] != IGNORE).nonzero()[:, 0]
        logits_CV, label_C = logits_CV[at_C - start].float(), labels_N[at_C]
        loss_N[at_C] = torch.nn.functional.cross_entropy(logits_CV, label_C, reduction="none")
        is_exact_N[at_C] = logits_CV[:, :num_tokens].argmax(1) == label_C

    visit_logits(batch, look)
    return loss_N.view_as(batch.labels_BT), is_exact_N.view_as(batch.labels_BT)
