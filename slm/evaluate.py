"""Held-out loss: the mean -log p per target, per source and over all, the same at any number of ranks.

Owns the sums; the batches come from slm/data/batches.py, the losses from an engine or a model.

    results = evaluate(engine.token_losses, {"stdlib": batches}, device)
    results["stdlib"].perplexity
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from slm import parallel
from slm.data.batches import Batch

ALL = "all"  # the name under which the sum over the sources stands


@dataclass(frozen=True)
class Result:
    """Sum of -log p in nats over num_targets predicted tokens."""

    loss_sum: float
    num_targets: int

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.num_targets)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


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
    sums = torch.zeros(len(sources), 2, dtype=torch.float64, device=device)
    for i, batches in enumerate(sources.values()):
        for batch in batches:
            sums[i, 0] += token_losses(batch.to(device)).sum(dtype=torch.float64)
            sums[i, 1] += batch.num_targets
            num_batches += 1
            progress(num_batches)
    parallel.reduce_tensor(sums)
    results = {name: Result(float(s), int(n)) for name, (s, n) in zip(sources, sums.tolist(), strict=True)}
    total = sums.sum(0).tolist()
    return {**results, ALL: Result(float(total[0]), int(total[1]))}
