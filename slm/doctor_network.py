"""The network between ranks, measured with the collectives of a run: all together, then every two nodes.

Every measurement runs in a child of its own (`apart`), and is ended with a word on who did not answer.

    checks = network(meeting, backend, say)       # on rank 0; the others take part
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from slm.doctor_meeting import MEET_SECONDS, Meeting
from slm.doctor_node import OK, WARNING, WRONG, Check, apart

_FEW = 5  # times a measurement is repeated


def network(meeting: Meeting, backend: str, say: Callable[[str], None]) -> list[Check]:
    """All ranks together, then every two nodes, with all their ranks at once: the first of one with the first of the other, and
    so on, so that every GPU's way out is taken. (On one node every two ranks.) Each pair is measured while others are busy with
    other pairs: in n - 1 rounds all have met. A pair that gives no result is named and does not hold up the rest."""
    mine, world_size = meeting.ranks.rank, meeting.ranks.world_size
    together = _try(meeting, "all", list(range(world_size)), [], backend)
    outcomes = meeting.share("all/outcome", together, MEET_SECONDS + meeting.try_seconds)
    units = meeting.nodes if len(meeting.nodes) > 1 else {f"rank {rank}": [rank] for rank in range(world_size)}
    names, found = list(units), list[dict[str, Any]]()
    if world_size == 2:  # they are the one pair
        if "error" in together:
            found.append({"units": names, "lane": [0, 1], **together})
    else:
        turns = rounds(list(range(len(units))))
        for number, pairs in enumerate(turns):
            if mine == 0:
                say(f"pairs, round {number + 1} of {len(turns)}")
            for a, b in pairs:
                lanes = lanes_of(units[names[a]], units[names[b]])
                for lane in lanes:
                    if mine in lane:
                        outcome = _try(meeting, f"pair/{lane[0]}-{lane[1]}", lane, sum(lanes, []), backend)
                        found.append({"units": [names[a], names[b]], "lane": lane, **outcome})
            meeting.share(f"round/{number}", True, MEET_SECONDS + meeting.try_seconds)
    told = [outcome for of_rank in meeting.share("pairs", found) for outcome in of_rank]
    return [_of_all(meeting, backend, outcomes), *of_pairs(told)] if mine == 0 else []


def lanes_of(first: list[int], second: list[int]) -> list[list[int]]:
    """The ranks of two nodes in pairs, by their numbers there; those that one node has more are in none."""
    return [list(lane) for lane in zip(first, second, strict=False)]


def rounds(units: list[int]) -> list[list[tuple[int, int]]]:
    """Every two of them once, each at most once in a round (the circle method of tournaments)."""
    circle: list[int | None] = [*units, *[None] * (len(units) % 2)]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def _try(meeting: Meeting, name: str, members: list[int], beside: list[int], backend: str) -> dict[str, Any]:
    """Rates of the collectives among these ranks, of which this is one; or why there are none. beside: all ranks of pairs that
    are to be measured at the same time."""
    try:
        return apart(meeting.try_seconds, _collectives, meeting, name, members, beside, backend)
    except (RuntimeError, TimeoutError) as error:
        return {"error": str(error)}


def _collectives(meeting: Meeting, name: str, members: list[int], beside: list[int], backend: str) -> dict[str, Any]:
    """In a child. Bus bandwidths as of github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md: bytes x 2(n-1)/n of an all-reduce,
    x (n-1)/n of an all-to-all, by its seconds: what a link carries, whatever the number of ranks."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", meeting.ranks.local_rank)
        torch.cuda.set_device(device)
    shared = meeting.join(False)
    store = dist.PrefixStore(name, shared)
    rank, size = members.index(meeting.ranks.rank), len(members)
    limit = timedelta(seconds=meeting.try_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    num_values = (64 if backend == "nccl" else 4) * 2**20 // size * size  # of 4 bytes

    def reduce() -> None:
        summed = torch.full((num_values,), float(rank + 1), device=device)
        dist.all_reduce(summed)
        assert bool((summed == size * (size + 1) / 2).all()), "the sum is wrong"

    source = torch.arange(num_values, device=device, dtype=torch.float32) + rank
    received = torch.empty_like(source)

    def exchange() -> None:
        dist.all_to_all_single(received, source)

    reduce()
    exchange()
    part = num_values // size
    wanted = torch.arange(rank * part, (rank + 1) * part, device=device, dtype=torch.float32)
    for other in range(size):
        got = received[other * part : (other + 1) * part]
        assert torch.equal(got, wanted + other), f"what came of rank {members[other]} is wrong"
    buffer = torch.zeros(num_values, device=device)
    num_bytes = 4 * num_values
    if len(beside) > len(members):
        ready = {rank: f"ready/{beside[0]}-{beside[1]}/{rank}" for rank in beside}
        shared.set(ready[meeting.ranks.rank], "")
        with suppress(RuntimeError):  # one that fails holds the others up for so long
            shared.wait(list(ready.values()), timedelta(seconds=meeting.try_seconds / 4))
    reduced, exchanged = _seconds(lambda: dist.all_reduce(buffer), device), _seconds(exchange, device)
    dist.barrier()
    return {
        "all_reduce_bytes_per_second": num_bytes * 2 * (size - 1) / size / reduced,
        "all_to_all_bytes_per_second": num_bytes * (size - 1) / size / exchanged,
        "bytes": num_bytes,
    }


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Of one call: the middle of a few."""
    measured = []
    for _ in range(_FEW):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.monotonic()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        measured.append(time.monotonic() - began)
    return statistics.median(measured)


def _rates(outcome: dict[str, Any]) -> str:
    reduced, exchanged = outcome["all_reduce_bytes_per_second"], outcome["all_to_all_bytes_per_second"]
    return f"all-reduce {reduced / 1e9:.2f}, all-to-all {exchanged / 1e9:.2f} GB/s"


def _of_all(meeting: Meeting, backend: str, outcomes: list[dict[str, Any]]) -> Check:
    failed = {rank: outcome["error"] for rank, outcome in enumerate(outcomes) if "error" in outcome}
    if failed:
        rank, why = next(iter(failed.items()))
        told = f"{backend} fails on {len(failed)} of {len(outcomes)} ranks; rank {rank} on {meeting.names[rank]}: {why}"
        fix = (
            "see the pairs below; open all ports between nodes, and name their interface in GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO says more)"
        )
        return Check("collectives", WRONG, told, fix)
    slowest = min(outcomes, key=lambda outcome: outcome["all_reduce_bytes_per_second"])
    told = (
        f"{backend}, {len(outcomes)} ranks, {slowest['bytes'] >> 20} MiB, sums and parts right: {_rates(slowest)} (bus)"
    )
    return Check("collectives", OK, told, "", slowest)


def of_pairs(told: list[dict[str, Any]]) -> list[Check]:
    """told: what each rank found with each rank that it was paired with: the names of the two units, the two ranks (lane), and
    rates or an error. A check for each two units: of their lanes the sum and the slowest."""
    pairs: dict[tuple[str, str], dict[tuple[int, int], list[dict[str, Any]]]] = {}
    for outcome in told:
        lanes = pairs.setdefault((outcome["units"][0], outcome["units"][1]), {})
        lanes.setdefault((outcome["lane"][0], outcome["lane"][1]), []).append(outcome)
    checks, rates = [], dict[tuple[str, str], list[dict[str, Any]]]()
    for (first, second), lanes in pairs.items():
        errors = [
            f"{_lane_name(lane, lanes)}{outcome['error']}"
            for lane, outcomes in lanes.items()
            for outcome in outcomes
            if "error" in outcome
        ]
        if errors:
            fix = f"see the way between {first} and {second}: firewall, cable, switch, interface"
            checks.append(Check("pair", WRONG, f"{first} – {second}: {errors[0]}", fix, {"pair": [first, second]}))
        else:  # of each lane what its slower end found
            rates[first, second] = [min(found, key=_reduced) for found in lanes.values()]
    if not rates:
        return checks
    middle = statistics.median(_reduced(lane) for found in rates.values() for lane in found)
    for (first, second), found in rates.items():
        slowest = min(found, key=_reduced)
        total = {name: sum(lane[name] for lane in found) for name in slowest if name.endswith("_per_second")}
        values = {**total, "bytes": slowest["bytes"], "pair": [first, second], "lanes": found}
        name = _lane_name(tuple(slowest["lane"]), found)
        told_of = f"{first} – {second}: {_rates(total)}"
        if name:
            told_of += f" over {len(found)} pairs of ranks at once; the slowest, {name}{_rates(slowest)}"
        if _reduced(slowest) < middle / 2:
            told_of += f", less than half of the middle pair's {middle / 1e9:.2f}"
            checks.append(Check("pair", WARNING, told_of, "see its cable, switch and interface", values))
        else:
            checks.append(Check("pair", OK, told_of, "", values))
    return checks


def _reduced(outcome: dict[str, Any]) -> float:
    return outcome["all_reduce_bytes_per_second"]


def _lane_name(lane: tuple[int, ...], lanes: Any) -> str:
    return f"rank {lane[0]} – rank {lane[1]}: " if len(lanes) > 1 else ""
