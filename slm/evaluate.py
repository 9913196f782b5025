"""What an evaluation measures: held-out loss, per source and over all, by position; and recall (slm/recall).

Owns the sums, which are the same at any number of ranks; the batches come from slm/data/batches.py and
slm/recall/score.py, the losses from an engine or a model. What is done with the results is findings.py's.

    results = evaluate(engine.token_losses, {"stdlib": batches}, device)
    results["stdlib"].perplexity

`B` sequences, `T` tokens of one, `N` = B * T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from slm import parallel, watchdog
from slm.data.batches import Batch
from slm.losses import IGNORE
from slm.model.llama import Visit, uncompiled
from slm.recall.score import Found, RecallBatches, find

ALL = "all"  # the name under which the sum over the sources stands
_NUM_BUCKETS = 32  # the last one ends at 2^31 tokens


@dataclass(frozen=True)
class Bucket:
    """Sum of -log p in nats over num_targets tokens that were predicted from more than up_to / 2 and at most up_to tokens
    of their document piece (1, 2, 3-4, 5-8, 9-16, ...)."""

    up_to: int
    loss_sum: float
    num_targets: int

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.num_targets)


@dataclass(frozen=True)
class Result:
    """Sum of -log p in nats over num_targets predicted tokens, and the same by position.

    by_position_full: of the pieces alone that fill a sequence. By position all documents count in the first buckets and
    the long ones alone in the last, so what looks like a gain of context may be another kind of text; here every bucket
    is of the same documents.
    """

    loss_sum: float
    num_targets: int
    by_position: tuple[Bucket, ...] = ()
    by_position_full: tuple[Bucket, ...] = ()

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.num_targets)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


class Scorer(Protocol):
    """What an evaluation wants of an engine, or of a model (slm.loading.ModelScorer)."""

    def token_losses(self, batch: Batch) -> torch.Tensor: ...  # -log p of every label, [B, T]

    def visit_logits(self, batch: Batch, visit: Visit) -> None: ...  # see VisitLogits


@dataclass(frozen=True)
class HeldOut:
    """What one evaluation looks at. sources: of the phase's own seq_len; other_lengths: packed at others."""

    seq_len: int
    sources: Mapping[str, Iterable[Batch]]
    other_lengths: Mapping[int, Mapping[str, Iterable[Batch]]] = field(default_factory=dict)
    recall: RecallBatches | None = None


@dataclass(frozen=True)
class Findings:
    """What one evaluation found. losses: seq_len -> source, or ALL -> its result; recall: a row for each cell."""

    seq_len: int
    losses: dict[int, dict[str, Result]]
    recall: list[Found]

    @property
    def main(self) -> dict[str, Result]:
        """At the phase's own seq_len."""
        return self.losses[self.seq_len]

    def lower_than(self, best: float | None) -> float | None:
        """The loss over all sources if it is the first or lower than `best`; None if not, or if nothing was held out."""
        overall = self.main[ALL]
        return overall.loss if overall.num_targets and (best is None or overall.loss < best) else None


def examine(
    scorer: Scorer,
    held_out: HeldOut,
    device: torch.device,
    progress: Callable[[int], None] = lambda num_batches: None,
    *,
    recall: bool = True,
) -> Findings:
    """All that is looked at (without recall if it is not asked for), on every rank alike.

    progress: called with the number of batches so far.
    """
    done = 0

    def count(_: int) -> None:
        nonlocal done
        done += 1
        watchdog.at("an evaluation, after batch", done)
        progress(done)

    losses = {held_out.seq_len: evaluate(scorer.token_losses, held_out.sources, device, count)}
    found: list[Found] = []
    with uncompiled():  # compiled blocks would be compiled anew for each of these lengths
        for seq_len, sources in held_out.other_lengths.items():
            losses[seq_len] = evaluate(scorer.token_losses, sources, device, count)
        if recall and held_out.recall is not None:
            found = find(scorer.visit_logits, held_out.recall, device, count)
    return Findings(held_out.seq_len, losses, found)


def evaluate(
    token_losses: Callable[[Batch], torch.Tensor],
    sources: Mapping[str, Iterable[Batch]],
    device: torch.device,
    progress: Callable[[int], None] = lambda num_batches: None,
) -> dict[str, Result]:
    """Every rank must bring equally many batches of each source (EvaluationBatches sees to it).

    progress: called after each batch with their number so far.
    """
    num_batches = 0
    # source, all pieces or full ones, bucket, sum and count
    sums = torch.zeros(len(sources) + 1, 2, _NUM_BUCKETS, 2, dtype=torch.float64, device=device)
    for i, batches in enumerate(sources.values()):
        for batch in batches:
            is_full_N = batch.is_one_piece_B[:, None].expand_as(batch.labels_BT).flatten()
            bucket_N = bucket_of(batch.positions_BT).flatten().to(device)
            is_target_N = (batch.labels_BT != IGNORE).flatten().to(device)
            losses_N = token_losses(batch.to(device)).flatten()
            columns_N2 = torch.stack([losses_N.double(), is_target_N.double()], -1)
            sums[i, 0].index_add_(0, bucket_N, columns_N2)
            sums[i, 1].index_add_(0, bucket_N, columns_N2 * is_full_N.to(device)[:, None])
            num_batches += 1
            progress(num_batches)
    parallel.reduce_tensor(sums)
    sums[-1] = sums[:-1].sum(0)
    return {name: _result(rows) for name, rows in zip([*sources, ALL], sums.tolist(), strict=True)}


def bucket_of(positions_BT: torch.Tensor) -> torch.Tensor:
    """Number of the bucket, [B, T]: b where the token at this position is one of those that have seen more than 2^(b-1)
    and at most 2^b tokens, itself included."""
    powers = 2 ** torch.arange(_NUM_BUCKETS - 1, device=positions_BT.device)
    return torch.bucketize(positions_BT, powers, right=True)


def _result(rows: list[list[list[float]]]) -> Result:
    every, full = (
        tuple(Bucket(2**b, float(loss), int(count)) for b, (loss, count) in enumerate(row) if count) for row in rows
    )
    return Result(sum(b.loss_sum for b in every), sum(b.num_targets for b in every), every, full)
