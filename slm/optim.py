"""AdamW's parameter groups and the learning-rate schedules, as pure functions of the step.

Owns what is decided about an update; DeepSpeed applies it (engine.py).

    lr = learning_rate(phase.schedule, peak=3e-4, step=0, num_steps=1000)   # of the first step
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from slm.recipe import Optim, Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, num_steps: int) -> float:
    """Learning rate of step `step` (0-based) of a phase of num_steps.

    Linear warm-up over warmup_steps (the first step is already above 0, the last of them at the peak), then
    cosine, linear or constant down to min_ratio at the last step; wsd: constant, then linear over the last
    decay_fraction.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.type == "constant":
        return peak
    start = schedule.warmup_steps
    if schedule.type == "wsd":
        start = max(start, num_steps - round(schedule.decay_fraction * num_steps))
    progress = min(1.0, max(0.0, (step - start + 1) / max(1, num_steps - start)))
    if step < start:
        progress = 0.0
    shape = (1 + math.cos(math.pi * progress)) / 2 if schedule.type == "cosine" else 1 - progress
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * shape)


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay, vectors (norm weights) without. A tied weight appears once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter's own tensor is empty; its shape is kept as ds_shape.
    dims = [len(getattr(p, "ds_shape", p.shape)) for p in parameters]
    matrices = [p for p, d in zip(parameters, dims, strict=True) if d >= 2]
    vectors = [p for p, d in zip(parameters, dims, strict=True) if d < 2]
    groups = [(matrices, optim.weight_decay), (vectors, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]
