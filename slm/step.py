"""One optimiser step over a rank's micro-batches, and what came of it.

done = train_step(engine, batches, lr, timer, loss_limit=spikes.limit)
totals = totals.plus(done)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from slm import parallel
from slm.data.batches import Batch
from slm.distill.student import Targets
from slm.engine import Engine, StepResult
from slm.errors import EnvironmentProblem
from slm.metrics import StepTimer


class SaveFailed(EnvironmentProblem):
    """A checkpoint could not be written, by this rank or another."""

    def __init__(self) -> None:
        super().__init__("a checkpoint could not be written by another rank, which says why")


@dataclass(frozen=True)
class StepDone:
    """One step's outcome, of all ranks. why_skipped: empty for a step that was taken, and for one that float16 lost because it
    is still looking for its loss scale."""

    loss: float  # mean over num_targets
    num_targets: float
    num_tokens: float
    pairs_full: float
    pairs_causal: float
    stop_requested: bool
    result: StepResult
    why_skipped: str
    # Distillation, this rank's sums: CE, T^2 * divergence, targets that the teachers are known for, each one's own loss.
    parts: torch.Tensor


@dataclass(frozen=True)
class StepTotals:
    num_tokens: float = 0.0
    pairs_full: float = 0.0
    pairs_causal: float = 0.0

    def plus(self, done: StepDone) -> StepTotals:
        return StepTotals(
            self.num_tokens + done.num_tokens, self.pairs_full + done.pairs_full, self.pairs_causal + done.pairs_causal
        )


def train_step(
    engine: Engine,
    batches: list[Batch],
    lr: float,
    timer: StepTimer,
    targets: Targets | None = None,
    fraction: float = 0.0,
    *,
    loss_limit: float = float("inf"),
    stop_requested: bool = False,
    save_failed: bool = False,
) -> StepDone:
    """One optimiser step over this rank's micro-batches: the gradient of the mean loss over all ranks' targets.

    The targets of all micro-batches and ranks are counted before the first forward, so the division is the same
    however the step is split. A loss above loss_limit skips the update, as does a gradient that is not finite. The ranks
    also agree here on whether to stop, and raise SaveFailed together if a checkpoint could not be written on one of them.
    """
    num_targets, num_tokens, pairs_full, pairs_causal, stop, failed = parallel.reduce_sum(
        [
            sum(b.num_targets for b in batches),
            sum(b.num_tokens for b in batches),
            sum(b.attention_pairs_full for b in batches),
            sum(b.attention_pairs for b in batches),
            float(stop_requested),
            float(save_failed),
        ]
    )
    if failed:
        raise SaveFailed
    loss_sum = torch.zeros((), device=batches[0].tokens_BT.device)
    parts = torch.zeros(3 + len(batches[0].teacher_nll), device=loss_sum.device)
    for batch in batches:
        is_last = batch is batches[-1]
        with timer.part("teacher"):
            distillation = targets.of(batch, fraction) if targets else None
        with timer.part("forward"):
            micro_loss, of_micro_batch = engine.forward(batch, distillation)
        if distillation is not None:
            parts[:2] += of_micro_batch
            parts[2:] += torch.tensor(
                [batch.num_known if batch.teachers else batch.num_targets, *batch.teacher_nll], device=parts.device
            )
        loss_sum += micro_loss.detach()
        with timer.part("backward"):
            if is_last:
                loss_of_all = parallel.reduce_tensor(loss_sum.double()) / max(1.0, num_targets)
                # A gradient of NaN is what every ZeRO stage skips a step for, on all ranks, without waiting for the device here.
                micro_loss = micro_loss * torch.where(loss_of_all > loss_limit, float("nan"), 1.0).to(micro_loss.dtype)
            engine.backward(micro_loss, max(1.0, num_targets))
    with timer.part("optimizer"):
        result = engine.step(lr)
    loss = float(loss_of_all)  # the step has waited for the device already, to know the gradient's norm
    why_skipped = ""
    if result.skipped and not (engine.is_scaling_down and math.isfinite(loss) and loss <= loss_limit):
        why_skipped = f"loss {loss:.4g} is above {loss_limit:.4g}" if loss > loss_limit else "gradient not finite"
    return StepDone(loss, num_targets, num_tokens, pairs_full, pairs_causal, stop > 0, result, why_skipped, parts)
