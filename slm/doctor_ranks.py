"""What is between ranks: their arithmetic, their clocks, and the order of what is measured between them.

How they meet is in doctor_meeting.py, the shared file system in doctor_files.py, the network in doctor_network.py; what one
machine has is doctor_node.py's.

    checks = measure(meeting, folder, backend, say)    # on rank 0; the others take part
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slm.doctor_files import shared_files
from slm.doctor_meeting import MEET_SECONDS, Meeting
from slm.doctor_network import network
from slm.doctor_node import OK, WARNING, WRONG, Check, apart

_FEW = 5  # times a measurement is repeated


def measure(meeting: Meeting, folder: Path, backend: str, say: Callable[[str], None]) -> list[Check]:
    """What rank 0 has found; empty on the others."""
    checks = []
    if len(meeting.nodes) > 1:
        say("clocks")
        checks += clocks(meeting)
        say("the shared file system")
        checks += shared_files(meeting, folder)
    say(f"{backend} between all {meeting.ranks.world_size} ranks")
    checks += network(meeting, backend, say)
    return checks


# --- arithmetic ----------------------------------------------------------------------------------------------


def rates_of_ranks(meeting: Meeting, backend: str) -> list[Check]:
    """Of a matrix product on every rank at the same time: a run is as fast as its slowest."""
    meeting.share("rate/ready", True, 1000.0)
    try:
        mine: dict[str, Any] = {"flops": apart(meeting.try_seconds, _matrix_product, backend, meeting.ranks.local_rank)}
    except (RuntimeError, TimeoutError) as error:
        mine = {"error": str(error)}
    outcomes = meeting.share("rate", mine, MEET_SECONDS + meeting.try_seconds)
    if meeting.ranks.rank != 0:
        return []
    checks = []
    rates = {rank: outcome["flops"] for rank, outcome in enumerate(outcomes) if "flops" in outcome}
    for rank, outcome in enumerate(outcomes):
        if "error" in outcome:
            told = f"rank {rank} on {meeting.names[rank]}: {outcome['error']}"
            checks.append(
                Check("arithmetic", WRONG, told, "see nvidia-smi there, and that this torch is built for that device")
            )
    if not rates:
        return checks
    middle = statistics.median(rates.values())
    kind = "bfloat16 on GPUs" if backend == "nccl" else "float32 on CPUs"
    told = f"{kind}: {min(rates.values()) / 1e12:.3g} to {max(rates.values()) / 1e12:.3g} TFLOP/s a rank"
    values = {"flops_per_second": {str(rank): rate for rank, rate in rates.items()}}
    slow = [
        f"rank {rank} on {meeting.names[rank]} ({rate / 1e12:.3g})"
        for rank, rate in rates.items()
        if rate < 0.7 * middle
    ]
    if slow:
        fix = "see what else runs there, its clocks and its temperature: every step waits for the slowest rank"
        return [*checks, Check("arithmetic", WARNING, f"{told}; slow: {', '.join(slow)}", fix, values)]
    return [*checks, Check("arithmetic", OK, told, "", values)]


def _matrix_product(backend: str, local_rank: int) -> float:
    """FLOP/s, the middle of a few."""
    on_gpu = backend == "nccl"
    device, size = (torch.device("cuda", local_rank), 8192) if on_gpu else (torch.device("cpu"), 1024)
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    measured = []
    for turn in range(_FEW + 1):
        began = time.monotonic()
        product = a @ a
        assert float(product[0, -1]) == size, "the product is wrong"  # also waits for the device
        if turn:  # the first one starts the device and its library
            measured.append(time.monotonic() - began)
    return 2.0 * size**3 / statistics.median(measured)


# --- clocks --------------------------------------------------------------------------------------------------


def clocks(meeting: Meeting) -> list[Check]:
    """How far each node's clock is from rank 0's: the time there, less the middle of the question's way and back."""
    firsts = {name: ranks[0] for name, ranks in meeting.nodes.items()}
    mine, skews = meeting.ranks.rank, {}
    for name, rank in firsts.items():
        if rank == 0 or mine not in (0, rank):
            continue
        measured = []
        for turn in range(_FEW):
            ask, answer = f"clock/{rank}/{turn}", f"time/{rank}/{turn}"
            if mine == rank:
                meeting.hear(ask, 0, MEET_SECONDS * len(firsts))  # the others are asked before
                meeting.tell(answer, time.time())
                continue
            began, began_at = time.monotonic(), time.time()
            meeting.tell(ask)
            there = meeting.hear(answer, rank)
            half = (time.monotonic() - began) / 2
            measured.append((half, there - began_at - half))
        if measured:
            skews[name] = min(measured)
    if mine != 0:
        return []
    checks = []
    for name, (half, ahead) in skews.items():
        told = f"{name} is {ahead * 1e3:+.2f} ms from {meeting.names[0]} (± {half * 1e3:.2f} ms)"
        values = {"node": name, "ahead_seconds": ahead, "error_seconds": half}
        late = abs(ahead) - half > 1
        fix = "run chrony or ntpd on both: logs and file times of nodes cannot be compared" if late else ""
        checks.append(Check("clock", WARNING if late else OK, told, fix, values))
    return checks
