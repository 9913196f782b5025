"""What is between ranks: clocks, a file system that all see, and the network, measured with the collectives of a run.

Owns the meeting of the doctor's ranks, which is a key-value store alone: every measurement that may hang runs in a child of its
own (`apart`), and is ended with a word on who did not answer. What one machine has is doctor_node.py's.

    meeting = Meeting(ranks)                      # or Absent, which says who did not come
    facts = meeting.share("facts", {...})         # each rank's, on every rank
    checks = measure(meeting, folder, backend)    # on rank 0; the others take part
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from slm.doctor_node import OK, WARNING, WRONG, Check, apart
from slm.runtime import Ranks

MEET_SECONDS = 120.0  # for all to arrive: torch may come from a slow file system
_SEEN_SECONDS = 30.0  # for a new file to be seen elsewhere; NFS may keep what it knows of a folder so long
_LEAVE_SECONDS = 10.0  # for those that are there to hear the end
_FEW = 5  # times a measurement is repeated
_RENAMES = 20


class Absent(Exception):
    """Ranks that gave no word in time."""

    def __init__(self, ranks: list[int], seconds: float) -> None:
        self.ranks = ranks
        super().__init__(f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: no word in {seconds:.0f} s")


class Meeting:
    def __init__(self, ranks: Ranks, try_seconds: float) -> None:
        self.ranks, self.try_seconds = ranks, try_seconds  # for one measurement
        self.address, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun listens itself.
        self.listens = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.store = self._join(self.listens)
        self.names: list[str] = []  # of nodes, by rank; from `meet`

    def _join(self, listens: bool) -> dist.Store:
        limit = timedelta(seconds=MEET_SECONDS)
        store = dist.TCPStore(self.address, self.port, None, listens, limit, wait_for_workers=False)
        # torchrun restarts nothing of ours, but its store may hold keys of others.
        return dist.PrefixStore("slm-doctor", store)

    def meet(self, name: str) -> None:
        self.names = self.share("node", name)

    @property
    def nodes(self) -> dict[str, list[int]]:
        """Ranks by node, in order."""
        found: dict[str, list[int]] = {}
        for rank, name in enumerate(self.names):
            found.setdefault(name, []).append(rank)
        return found

    def share(self, key: str, value: Any, seconds: float | None = None) -> list[Any]:
        """Each rank's value (JSON), by rank, on every rank. Raises Absent."""
        self.store.set(f"{key}/{self.ranks.rank}", json.dumps(value))
        return [self._get(f"{key}/{rank}", rank, seconds) for rank in range(self.ranks.world_size)]

    def tell(self, key: str, value: Any = None) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, of: int, seconds: float | None = None) -> Any:
        return self._get(key, of, seconds)

    def _get(self, key: str, of: int, seconds: float | None) -> Any:
        seconds = MEET_SECONDS if seconds is None else seconds
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return json.loads(self.store.get(key))
        except RuntimeError:  # DistStoreError: the time is over; DistNetworkError: rank 0 has gone
            raise Absent([of], seconds) from None

    def leave(self, code: int = 0) -> int:
        """Rank 0's code, on every rank; it leaves last, since it holds the store."""
        if self.ranks.rank:
            code = self.hear("code", 0, 10 * MEET_SECONDS)
            self.tell(f"left/{self.ranks.rank}")
            return code
        self.tell("code", code)
        deadline = time.monotonic() + _LEAVE_SECONDS
        for rank in range(1, self.ranks.world_size):
            try:
                self.hear(f"left/{rank}", rank, max(0.01, deadline - time.monotonic()))
            except Absent:
                pass  # it has been said
        return code


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


# --- files ---------------------------------------------------------------------------------------------------


def shared_files(meeting: Meeting, folder: Path) -> list[Check]:
    """Rank 0 writes, renames and locks a file; the first rank of each other node looks on."""
    mine, others = meeting.ranks.rank, [ranks[0] for ranks in meeting.nodes.values() if ranks[0] != 0]
    scratch = folder / f".doctor-{meeting.port}-{os.environ.get('SLURM_JOB_ID', '')}"
    if mine == 0:
        return _write_for_others(meeting, scratch, others)
    if mine in others:
        meeting.hear("files/written", 0, 10 * MEET_SECONDS)
        meeting.tell(f"files/seen/{mine}", _seconds_until_seen(scratch / "name"))
        meeting.hear("files/renaming", 0)
        meeting.tell(f"files/read/{mine}", _torn_reads(meeting, scratch / "name"))
        meeting.hear("files/locked", 0)
        meeting.tell(f"files/lock/{mine}", _is_refused(scratch / "lock"))
    return []


def _write_for_others(meeting: Meeting, scratch: Path, others: list[int]) -> list[Check]:
    scratch.mkdir(parents=True, exist_ok=True)
    name = scratch / "name"
    try:
        _write(name, "a")
        meeting.tell("files/written")
        seen = {rank: meeting.hear(f"files/seen/{rank}", rank) for rank in others}
        meeting.tell("files/renaming")
        for turn in range(_RENAMES):
            _write(name, "ab"[turn % 2])
            time.sleep(0.02)
        meeting.tell("files/renamed")
        torn = {rank: meeting.hear(f"files/read/{rank}", rank) for rank in others}
        with open(scratch / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except OSError:
                held = False
            meeting.tell("files/locked")
            refused = {rank: meeting.hear(f"files/lock/{rank}", rank) for rank in others}
    finally:
        for path in scratch.glob("*"):
            path.unlink()
        scratch.rmdir()
    called = meeting.names
    blind = [called[rank] for rank, seconds in seen.items() if seconds is None]
    if blind:
        told = f"{', '.join(blind)} did not see in {_SEEN_SECONDS:.0f} s what {called[0]} wrote into {scratch.parent.absolute()}"
        return [
            Check(
                "shared files", WRONG, told, "mount one file system there on all nodes, or give another folder (output)"
            )
        ]
    slowest = max(seen.values())
    told = f"all nodes saw what {called[0]} wrote, the last after {slowest:.2f} s"
    checks = [Check("shared files", OK, told, "", {"seconds_until_seen": {called[r]: s for r, s in seen.items()}})]
    if broken := [called[rank] for rank, (num_torn, _) in torn.items() if num_torn]:
        told = f"{', '.join(broken)} found no whole file while {called[0]} renamed one over it"
        checks.append(Check("shared rename", WRONG, told, "give runs another file system: checkpoints rely on it"))
    else:
        reads = sum(count for _, count in torn.values())
        checks.append(
            Check("shared rename", OK, f"{reads:,} reads during {_RENAMES} renames elsewhere, each of a whole file")
        )
    passed = [called[rank] for rank, answer in refused.items() if not answer]
    if passed or not held:
        told = f"a lock that {called[0]} holds does not hold on {', '.join(passed)}" if held else "there are no locks"
        fix = "mount it with locks (NFS 4; Lustre with -o flock), and start no two jobs in one run"
        checks.append(Check("shared flock", WARNING, told, fix))
    else:
        checks.append(Check("shared flock", OK, f"a lock that {called[0]} holds is refused on all other nodes"))
    return checks


_LENGTH = 1 << 16  # more than a page: a reader in the middle of a change would find both letters


def _write(path: Path, letter: str) -> None:
    other = path.with_name("other")
    with open(other, "w") as file:
        file.write(letter * _LENGTH)
        file.flush()
        os.fsync(file.fileno())
    os.replace(other, path)


def _seconds_until_seen(path: Path) -> float | None:
    began = time.monotonic()
    while (waited := time.monotonic() - began) < _SEEN_SECONDS:
        try:
            if len(path.read_text()) == _LENGTH:
                return waited
        except OSError:
            pass
        time.sleep(0.01)
    return None


def _torn_reads(meeting: Meeting, path: Path) -> tuple[int, int]:
    """(reads that found no whole file, reads) until rank 0 has renamed for the last time."""
    torn = count = 0
    deadline = time.monotonic() + MEET_SECONDS
    while not meeting.store.check(["files/renamed"]) and time.monotonic() < deadline:
        count += 1
        try:
            text = path.read_text()
            torn += text not in ("a" * _LENGTH, "b" * _LENGTH)
        except FileNotFoundError:
            torn += 1
        except (
            OSError
        ):  # ESTALE of NFS: the file that was opened is no longer the one of that name; opened again it is whole
            pass
    return torn, count


def _is_refused(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


# --- network -------------------------------------------------------------------------------------------------


def network(meeting: Meeting, backend: str, say: Callable[[str], None]) -> list[Check]:
    """All ranks together, then every two nodes (or, on one node, every two ranks), each pair while others are busy with
    other pairs: in n - 1 rounds all have met. A pair that gives no result is named and does not hold up the rest."""
    ranks = meeting.ranks
    together = _try(meeting, "all", list(range(ranks.world_size)), backend)
    outcomes = meeting.share("all/outcome", together, MEET_SECONDS + meeting.try_seconds)
    nodes = {name: first[0] for name, first in meeting.nodes.items()}
    units = nodes if len(nodes) > 1 else {f"rank {rank}": rank for rank in range(ranks.world_size)}
    called = {rank: name for name, rank in units.items()}
    mine: dict[str, dict[str, Any]] = {}
    if ranks.world_size == 2:  # they are the one pair
        if "error" in together:
            mine["0-1"] = together
    else:
        for number, pairs in enumerate(rounds(list(units.values()))):
            if ranks.rank == 0:
                say(f"pairs, round {number + 1} of {len(rounds(list(units.values())))}")
            for pair in pairs:
                if ranks.rank in pair:
                    mine[f"{pair[0]}-{pair[1]}"] = _try(meeting, f"pair/{pair[0]}-{pair[1]}", list(pair), backend)
            meeting.share(f"round/{number}", True, MEET_SECONDS + meeting.try_seconds)
    by_pair: dict[str, list[dict[str, Any]]] = {}
    for found in meeting.share("pairs", mine):
        for pair, outcome in found.items():
            by_pair.setdefault(pair, []).append(outcome)
    if ranks.rank != 0:
        return []
    return [_of_all(meeting, backend, outcomes), *_of_pairs(called, by_pair)]


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


def _try(meeting: Meeting, name: str, members: list[int], backend: str) -> dict[str, Any]:
    """Rates of the collectives among these ranks, of which this is one; or why there are none."""
    try:
        return apart(meeting.try_seconds, _collectives, meeting, name, members, backend)
    except (RuntimeError, TimeoutError) as error:
        return {"error": str(error)}


def _collectives(meeting: Meeting, name: str, members: list[int], backend: str) -> dict[str, Any]:
    """In a child. Bus bandwidths as of github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md: bytes x 2(n-1)/n of an all-reduce,
    x (n-1)/n of an all-to-all, by its seconds: what a link carries, whatever the number of ranks."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", meeting.ranks.local_rank)
        torch.cuda.set_device(device)
    store = dist.PrefixStore(name, meeting._join(False))
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


def _of_pairs(called: dict[int, str], by_pair: dict[str, list[dict[str, Any]]]) -> list[Check]:
    checks, rates = [], {}
    for pair, outcomes in by_pair.items():
        first, second = (called[int(rank)] for rank in pair.split("-"))
        name = f"{first} – {second}"
        if errors := [outcome["error"] for outcome in outcomes if "error" in outcome]:
            fix = f"see the way between {first} and {second}: firewall, cable, switch, interface"
            checks.append(Check("pair", WRONG, f"{name}: {errors[0]}", fix, {"pair": [first, second]}))
        else:
            rates[name] = min(outcomes, key=lambda outcome: outcome["all_reduce_bytes_per_second"])
    if not rates:
        return checks
    middle = statistics.median(outcome["all_reduce_bytes_per_second"] for outcome in rates.values())
    for name, outcome in rates.items():
        slow = outcome["all_reduce_bytes_per_second"] < middle / 2
        values = outcome | {"pair": name.split(" – ")}
        told = f"{name}: {_rates(outcome)}"
        if slow:
            told, fix = (
                f"{told}, less than half of the middle pair's {middle / 1e9:.2f}",
                "see its cable, switch and interface",
            )
            checks.append(Check("pair", WARNING, told, fix, values))
        else:
            checks.append(Check("pair", OK, told, "", values))
    return checks


def node_name() -> str:
    """Of this machine; as SLURM calls it, where it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
