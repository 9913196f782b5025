"""Do the ranks still hold the same weights? A sum over the bits of every tensor that each rank has a copy of.

Owns the comparison; which tensors are copies the engine knows (Engine.replicated). Finds a bit that flipped in a rank's
memory, or an update that went wrong on one of them, before it is saved and before it is averaged into the others.

    check(engine.replicated(), step)        # on every rank; raises ReplicasDiffer on every rank
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

import torch

from slm import parallel
from slm.safety import ReplicasDiffer

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_A_TIME = 1 << 24  # elements: their sum needs a copy of them in 64 bits


def check(replicated: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
    """Raises ReplicasDiffer, on all ranks, if a tensor is not the same on all of them. Every rank must call it."""
    if parallel.world_size() == 1:
        return
    sums = {name: _sum_of_bits(tensor) for name, tensor in replicated}
    if not sums:  # ZeRO-3 keeps no copies
        return
    mine = torch.stack(list(sums.values()))
    of_ranks = parallel.gather(mine)
    if all(torch.equal(mine, other) for other in of_ranks):
        return
    nodes = parallel.gather_objects(os.environ.get("SLURMD_NODENAME", ""))
    told = []
    minority: list[int] = []
    for i, name in enumerate(sums):
        values = [int(of_rank[i]) for of_rank in of_ranks]
        ((most, count), *others) = Counter(values).most_common()
        if not others:
            continue
        odd = [rank for rank, value in enumerate(values) if value != most]
        if count > len(values) / 2:
            minority += odd
            told.append(f"{name} of rank {', '.join(map(str, odd))}")
        else:
            told.append(f"{name} (no majority: ranks {', '.join(map(str, range(len(values))))})")
    raise ReplicasDiffer(
        f"after step {step} ranks hold different weights: {'; '.join(told[:5])}"
        + (f"; and {len(told) - 5} tensors more" if len(told) > 5 else ""),
        fix="the same command goes on from the last checkpoint, before which they were compared too; if it happens again on "
        "the same rank, its machine has bad memory or a bad device: leave it out",
        suspect_node=next((nodes[rank] for rank in minority), ""),
    )


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Exact, whatever the order; changes with every single bit."""
    flat = tensor.detach().contiguous().view(-1)
    flat = flat.view(_INTEGERS[flat.element_size()])
    return sum(
        (flat[at : at + _AT_A_TIME].sum(dtype=torch.int64) for at in range(0, flat.numel(), _AT_A_TIME)),
        torch.zeros((), dtype=torch.int64, device=flat.device),
    )
