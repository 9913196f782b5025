"""Sharing one job's units among processes: any number of them, of MPI, of SLURM, or simply started twice.

Owns who does what. There is no coordinator: whoever holds the lock of a unit does it, and the kernel frees the lock of a
process that died, so its unit is taken by another. Each begins with a share of its own, so that they seldom meet.

    share = find_share()
    with claim(folder / "00007.lock") as mine:
        if mine: ...
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from slm.errors import EnvironmentProblem

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process is number index of count. comm: the ranks of an mpirun, else None."""

    index: int = 0
    count: int = 1
    comm: Any = None

    @property
    def leads(self) -> bool:
        return self.index == 0

    def from_first(self, function: Callable[[], T]) -> T:
        """What function gives on the first rank of an mpirun; without MPI everyone's own. Its exception on all."""
        if self.comm is None:
            return function()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.leads:
            try:
                outcome = (function(), None)
            except Exception as error:
                outcome = (None, error)
        result, failure = self.comm.bcast(outcome, root=0)
        if failure is not None:
            failure.told = not self.leads  # cli.main prints it once
            raise failure
        return result


def find_share() -> Share:
    """From mpirun (mpi4py), else from srun and SLURM's job arrays, else one alone."""
    env = os.environ
    by_pmi = int(env.get("PMI_SIZE", "1")) > 1 and "SLURM_PROCID" not in env  # which srun sets too
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 or by_pmi:
        from mpi4py import MPI

        return Share(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), MPI.COMM_WORLD)
    task, num_tasks = 0, 1
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        task, num_tasks = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
    if "SLURM_ARRAY_TASK_ID" in env:
        first, step = int(env.get("SLURM_ARRAY_TASK_MIN", 0)), int(env.get("SLURM_ARRAY_TASK_STEP", 1))
        member = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // max(1, step)
        count = int(env.get("SLURM_ARRAY_TASK_COUNT", 1))
        task, num_tasks = (member % count) * num_tasks + task, count * num_tasks
    return Share(task, num_tasks)


def take(path: Path, *, wait: bool = False, shared: bool = False) -> IO[bytes] | None:
    """The lock file, held until it is closed; None if another process holds it (wait: until it no longer does). Several
    may hold it that take it shared.

    Raises FileNotFoundError if its folder is gone: the job is finished. Raises EnvironmentProblem where the file system
    has no locks.
    """
    file = open(path, "a+b")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        raise EnvironmentProblem(
            f"{path} cannot be locked ({error.strerror}), so several processes could do the same work at once",
            fix="write to a file system with locks (for Lustre, mount it with -o flock)",
        ) from None
    return file


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Waits for the lock and holds it."""
    file = take(path, wait=True)
    assert file is not None
    with file:
        yield
