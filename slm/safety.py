"""What a run does about steps that go wrong: which losses are spikes, when to go back, which rank is slow. Pure; no torch.

    spikes = Spikes(recipe.safety)
    if loss > spikes.limit: ...                 # every rank sees the same loss, so every rank skips the same step
    spikes.accept(loss)                         # of a step that was taken

A gradient that is not finite, or a spike, skips the update. So many skips in a row go back to the checkpoint before them
and leave out the data in between (Chowdhery et al., PaLM, arXiv 2204.02311, section 5.1); in the end the run gives up.
The rule for a spike is that of OLMo's SkipStepOptimizer, but losses of skipped steps do not count.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping

from pydantic import Field

from slm.errors import SLMError
from slm.fields import Count, Real, Section

_FEWEST_LOSSES = 32  # before anything is called a spike
_LEAST_DELAY_SECONDS = 0.02
_LEAST_RISE = 0.2  # of the mean: where losses hardly differ, a batch of rarer text is no spike


class Safety(Section):
    """Steps that go wrong, the same on every rank. docs/reliability.md says how they are found and what follows."""

    spike_sigmas: Real = Field(
        6.0,
        ge=0,
        description="a loss so many standard deviations, and a fifth, above the mean of the last is not learned from; 0: off",
    )
    spike_window: Count = Field(128, ge=_FEWEST_LOSSES, description="the last losses that it is held against")
    skips_before_rollback: Count = Field(
        10,
        gt=0,
        description="steps skipped in a row before going back to the checkpoint before them, without that data",
    )
    rollbacks: Count = Field(2, ge=0, description="times within a phase; after that the run ends with exit code 76")
    check_replicas_every_steps: Count = Field(
        100,
        ge=0,
        description="steps between comparing what every rank should hold alike, also before each save; 0: never",
    )


class ReplicasDiffer(SLMError):
    """Ranks hold different values of what should be the same. suspect_node: of a rank that most others differ from, as SLURM
    calls it; empty if unknown."""

    exit_code = 80
    title = "Replicas differ"

    def __init__(self, problem: str, *, fix: str = "", suspect_node: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.suspect_node = suspect_node


class RollBack(Exception):
    """Too many steps were skipped in a row: the phase goes on from an earlier checkpoint."""


class Spikes:
    """The last losses of a phase, and above which the next is a spike. Checkpoints keep `losses`."""

    def __init__(self, settings: Safety, losses: Iterable[float] = ()) -> None:
        self._sigmas = settings.spike_sigmas
        self.losses: deque[float] = deque(losses, maxlen=settings.spike_window)

    @property
    def limit(self) -> float:
        if not self._sigmas or len(self.losses) < _FEWEST_LOSSES:
            return float("inf")
        mean = statistics.fmean(self.losses)
        variance = statistics.fmean((loss - mean) ** 2 for loss in self.losses)
        return mean + max(self._sigmas * math.sqrt(variance), _LEAST_RISE * abs(mean))

    def accept(self, loss: float) -> None:
        self.losses.append(loss)


def stragglers(own_seconds: Mapping[int, float], step_seconds: float) -> dict[int, float]:
    """Ranks that keep the others waiting: {rank: how much longer its own part of a step took than the median's}.

    own_seconds: of each rank, what it did in a step without waiting for another (data and forward). A rank is slow if it
    took half as long again as the median, a tenth of the step more, and more than machines with other work differ by.
    """
    median = statistics.median_low(own_seconds.values())
    slow = {rank: own - median for rank, own in own_seconds.items() if own > 1.5 * median}
    return {rank: more for rank, more in slow.items() if more > max(0.1 * step_seconds, _LEAST_DELAY_SECONDS)}
