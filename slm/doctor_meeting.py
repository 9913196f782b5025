"""How the doctor's ranks meet: a key-value store, through which they share values and learn who gives no word.

meeting = Meeting(ranks, try_seconds=60)      # or Absent, which says who did not come
meeting.meet(node_name())
facts = meeting.share("facts", {...})         # each rank's, on every rank
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from slm.runtime import Ranks

MEET_SECONDS = 120.0  # for all to arrive: torch may come from a slow file system
_LEAVE_SECONDS = 10.0  # for those that are there to hear the end


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
        self.store = self.join(self.listens)
        self.names: list[str] = []  # of nodes, by rank; from `meet`

    def join(self, listens: bool) -> dist.Store:
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


def node_name() -> str:
    """Of this machine; as SLURM calls it, where it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
