"""What a run needs from the machine it is on: ranks, signals, a lock, an exit record, a log.

Owns the translation of launcher environments (deepspeed, torchrun, mpirun, srun, none) into one set of
variables, the stop flag, the run directory's lock and exit.json, logging, and how a command imports. It opens no process group
(parallel.py does) and imports no torch, so that a stop request is heard from the first moment of a rank.

    stop = StopRequest()
    ranks = discover_ranks()
    with RunLock(run_dir):           # rank 0 only
        log = setup_logging(ranks.rank, run_dir)
        ...
        write_exit(run_dir, 75 if stop.signal_name else 0, "stopped by SIGTERM")
"""

from __future__ import annotations

import fcntl
import gc
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from slm.errors import SLMError, UserError
from slm.redact import redact_record, redacted

if TYPE_CHECKING:
    from rich.console import Console

EXIT_CODES = {
    0: "done",
    2: "a mistake in what the user gave; the message says which",
    3: "the machine lacks something",
    4: "a file is not whole",
    5: "crashed; the traceback is in logs/rank-N.log",
    75: "stopped by a signal after saving; start again to go on (EX_TEMPFAIL)",
    76: "diverged: the loss is not finite",
    77: "out of memory",
    78: "a phase did not pass its gate",
    79: "a rank hung; every rank's stack is in logs/rank-N.stacks",
    80: "ranks held different weights; start again to go on from before",
}

# A launcher that waits for this attempt names a file here: it then knows how the attempt ended also when
# there is no run directory yet, and never mistakes the record of an earlier attempt for this one's. No two attempts are
# given the same name, so it tells their ranks apart as well.
EXIT_FILE_VARIABLE = "SLM_EXIT_FILE"

# SLURM numbers real steps from 0; batch scripts and interactive shells have reserved ids near 2**32.
_SLURM_FIRST_RESERVED_STEP = 0xFFFFFFF0


# ------------------------------------------------------------------------------------------- ranks
@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def launched_ranks() -> Ranks | None:
    """What a launcher says that this process is; None without one."""
    found = _from_torch_environment() or _from_mpi() or _from_slurm()
    return found[0] if found else None


@contextmanager
def said_once() -> Iterator[None]:
    """For what every rank reads and finds wrong alike: the first of each machine says it, the others leave with its code."""
    try:
        yield
    except SLMError as error:
        ranks = launched_ranks()
        if ranks is None or ranks.local_rank == 0:
            raise
        write_exit(None, error.exit_code, str(error))
        sys.exit(error.exit_code)


def discover_ranks() -> Ranks:
    """Ranks from deepspeed or torchrun, else mpirun, else srun, else one process alone.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where they are missing,
    so that `init_process_group` and DeepSpeed need no discovery of their own.
    """
    env = os.environ
    found = _from_torch_environment() or _from_mpi() or _from_slurm()
    ranks, rendezvous = found or (Ranks(0, 1, 0, 1), _alone)
    if not 0 <= ranks.rank < ranks.world_size or not 0 <= ranks.local_rank < ranks.local_world_size:
        raise UserError(
            f"the launcher's environment contradicts itself: {ranks}",
            fix="unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE",
        )
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        address, port = rendezvous(ranks)
        env.setdefault("MASTER_ADDR", address)
        env.setdefault("MASTER_PORT", str(port))
    for name, value in vars(ranks).items():
        env[name.upper()] = str(value)
    return ranks


def _from_torch_environment() -> tuple[Ranks, Any] | None:
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    # DeepSpeed says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE. With neither, one node is assumed.
    local_world_size = _first_int("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=world_size)
    local_rank = _first_int("LOCAL_RANK", default=rank % local_world_size)
    return Ranks(rank, world_size, local_rank, local_world_size), _alone


def _from_mpi() -> tuple[Ranks, Any] | None:
    """Open MPI, else the PMI variables of MPICH and Intel MPI (srun sets those too: then srun it is)."""
    env = os.environ
    if "OMPI_COMM_WORLD_RANK" in env:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        return Ranks(*(int(env[f"OMPI_COMM_WORLD_{name}"]) for name in names)), _broadcast_by_mpi
    if "PMI_RANK" not in env or env.get("PMI_SIZE") == env.get("SLURM_STEP_NUM_TASKS", ""):
        return None
    rank, world_size = int(env["PMI_RANK"]), int(env["PMI_SIZE"])
    local_world_size = _first_int("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", default=world_size)
    local_rank = _first_int("MPI_LOCALRANKID", "PMI_LOCAL_RANK", default=rank % local_world_size)
    return Ranks(rank, world_size, local_rank, local_world_size), _broadcast_by_mpi


def _from_slurm() -> tuple[Ranks, Any] | None:
    """srun with more than one task. A batch script or an interactive shell is one process alone."""
    env = os.environ
    step = _first_int("SLURM_STEP_ID", default=-1)
    num_tasks = _first_int("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1)
    if "SLURM_PROCID" not in env or num_tasks < 2 or not 0 <= step < _SLURM_FIRST_RESERVED_STEP:
        return None
    tasks_by_node = _expand_tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", str(num_tasks)))
    local_world_size = tasks_by_node[_first_int("SLURM_NODEID", default=0)]
    ranks = Ranks(int(env["SLURM_PROCID"]), num_tasks, int(env["SLURM_LOCALID"]), local_world_size)
    return ranks, _slurm_rendezvous


def _first_int(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def _expand_tasks_per_node(text: str) -> list[int]:
    """SLURM's "2(x3),1" is [2, 2, 2, 1]."""
    nodes: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        nodes += [int(count)] * int(repeat or 1)
    return nodes


def _first_host(nodelist: str) -> str:
    """First name of a SLURM list: "gpu[03-07,9],cpu1" begins with gpu03. (Containers lack scontrol.)"""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def _alone(ranks: Ranks) -> tuple[str, int]:
    if ranks.world_size > 1:
        raise UserError(
            f"WORLD_SIZE is {ranks.world_size} and MASTER_ADDR or MASTER_PORT is missing: ranks cannot meet",
            fix="set both, or start through launchers/local.sh, torchrun, mpirun or srun",
        )
    return "127.0.0.1", free_port()


def _broadcast_by_mpi(ranks: Ranks) -> tuple[str, int]:
    from mpi4py import MPI

    one_node = ranks.local_world_size == ranks.world_size
    mine = ("127.0.0.1" if one_node else socket.gethostname(), free_port()) if ranks.rank == 0 else None
    return MPI.COMM_WORLD.bcast(mine, root=0)


def _slurm_rendezvous(ranks: Ranks) -> tuple[str, int]:
    """Each task computes the same answer. The port is below Linux's ephemeral range, and differs by step."""
    nodelist = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    job_and_step = 101 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    return _first_host(nodelist), 12000 + job_and_step % 20000


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def process_start_ticks(pid: int | str) -> int:
    """When a process began, in clock ticks since the machine's start (proc(5): stat, field 22, after the name in
    parentheses). Raises OSError without /proc and where there is no such process."""
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])


# ----------------------------------------------------------------------------------------- signals
class StopRequest:
    """SIGTERM, SIGUSR1 (SLURM's warning), SIGINT and SIGHUP only leave a note, `signal_name`; the loop stops on it.

    SIGHUP (a closed terminal) stays ignored where it is, as under nohup. A second SIGINT raises KeyboardInterrupt, for a
    user who does not want to wait. Main thread only.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._num_interrupts = 0
        wanted = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in wanted}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None and os.environ.get("RANK", "0") == "0":
            text = f"{signal.Signals(number).name}: stopping after this step, then saving"
            text += " (Ctrl-C once more gives up at once, without saving)" * (number == signal.SIGINT)
            with suppress(OSError):  # not through logging or print, which this may interrupt
                os.write(2, f"\n{text}\n".encode())
        self.signal_name = signal.Signals(number).name
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 1:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


# --------------------------------------------------------------------------------- the run directory
def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write so that `path` holds either the old content or all of the new, also after a power cut."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Makes what was made or renamed in a folder last."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class RunLock:
    """Keeps a second job out of a run directory. The kernel frees it when the process dies, however it dies.

    Taking it removes exit.json: a run in progress has none. The file `lock` says who holds it or held it
    last; whether it is held only the kernel knows. One process of a run takes it: rank 0.
    """

    def __init__(self, run_dir: str | Path) -> None:
        run_dir = self._folder = Path(run_dir)
        self.made_folder = not run_dir.exists()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] | None = open(run_dir / "lock", "a+")
        except OSError as error:
            raise UserError(
                f"run directory {run_dir} cannot be written: {error}", fix="give the run another directory"
            ) from None
        try:
            _lock(self._file, fcntl.LOCK_EX, seconds=0.2)  # longer than look_at_lock holds it
        except BlockingIOError:
            with self._file:
                raise _in_use(run_dir, self._file) from None
        except OSError as error:  # some network file systems have no locks; the run is more important
            log = logging.getLogger("slm")
            log.warning("%s cannot be locked (%s): start no second job there", run_dir, error)
        self._file.truncate(0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "attempt": os.environ.get(EXIT_FILE_VARIABLE)}
        holder["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._file.write(json.dumps(holder) + "\n")
        self._file.flush()
        (run_dir / "exit.json").unlink(missing_ok=True)

    def remove_folder(self) -> bool:
        """Removes the run directory if it holds no more than every attempt leaves; whether it did. While it is locked."""
        if {path.name for path in self._folder.iterdir()} - {"lock", "logs"}:
            return False
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()  # which unlocks; the file stays, for removing it would race with the next job
            self._file = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def look_at_lock(run_dir: Path) -> None:
    """Raises UserError if another job holds the run directory, and for seconds: one that was just killed may hold it yet."""
    try:
        with open(run_dir / "lock") as file:
            try:
                _lock(file, fcntl.LOCK_SH, seconds=3.0)
            except BlockingIOError:
                raise _in_use(run_dir, file) from None
    except OSError:  # there is none, or there are no locks
        return


def _lock(file: IO[str], kind: int, seconds: float) -> None:
    """Raises BlockingIOError if another holds it for so long."""
    until = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _in_use(run_dir: Path, file: IO[str]) -> UserError:
    file.seek(0)
    holder = _json_or_empty(file.read())
    return UserError(
        f"run directory in use by another job: {run_dir} is held by process {holder.get('pid', '?')} "
        f"on host {holder.get('host', '?')} since {holder.get('started', '?')}",
        fix="wait for that job, stop it, or give this run another directory",
    )


def write_exit(run_dir: str | Path | None, code: int, reason: str, **extra: Any) -> None:
    """Record how this attempt ended, in run_dir/exit.json and for the launcher that waits. For any rank.

    The first code that is not 0 stays: when one rank dies, the others fail after it and for a lesser reason.
    `run_dir` is None when the run failed before it had one. A rank that outlives its attempt writes nothing into the next.
    """
    assert code in EXIT_CODES, code
    record = {"code": code, "meaning": EXIT_CODES[code], "reason": redacted(reason), **extra}
    record |= {"rank": int(os.environ.get("RANK", 0)), "host": socket.gethostname(), "pid": os.getpid()}
    record["time"] = time.time()
    targets = [Path(run_dir) / "exit.json"] if run_dir is not None and not _is_left_over(Path(run_dir)) else []
    waiting = Path(os.environ.get(EXIT_FILE_VARIABLE, ""))
    if EXIT_FILE_VARIABLE in os.environ and waiting.parent.is_dir():  # on another machine nobody waits for it
        targets.append(waiting)
    for path in targets:
        try:
            if not (path.exists() and _json_or_empty(path.read_text()).get("code")):
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, json.dumps(record, indent=2, default=str) + "\n")
        except OSError as error:  # a full disk: the process's own code still says it
            logging.getLogger("slm").warning("%s could not be written: %s", path, error)


def _is_left_over(run_dir: Path) -> bool:
    """Whether the run is another attempt's by now, as far as launchers have told them apart: those of other machines have
    names of their own for the same attempt."""
    try:
        holder = _json_or_empty((run_dir / "lock").read_text())
    except OSError:
        return False
    mine, others = os.environ.get(EXIT_FILE_VARIABLE), holder.get("attempt")
    return holder.get("host") == socket.gethostname() and bool(mine and others) and mine != others


def _json_or_empty(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError:
        return {}


# ----------------------------------------------------------------------------------------- logging
def setup_logging(rank: int, run_dir: str | Path | None) -> logging.Logger:
    """The logger "slm": rank 0 tells the user everything, other ranks only warnings; each rank keeps a file.

    Files are run_dir/logs/rank-N.log (none without run_dir), appended to by each attempt.
    """
    log = logging.getLogger("slm")
    for handler in log.handlers[:]:  # called again in the same process, as tests and notebooks do
        log.removeHandler(handler)
        with suppress(OSError):  # what it still holds for a full disk
            handler.close()
    log.setLevel(logging.INFO)
    _add(log, _screen(rank))
    if run_dir is not None:
        path = Path(run_dir) / "logs" / f"rank-{rank}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            to_file = _LogFile(path)
        except OSError as error:
            log.warning("%s cannot be written, the run goes on without: %s", path, error)
            return log
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _add(log, to_file)
    return log


def _add(log: logging.Logger, handler: logging.Handler) -> None:
    handler.addFilter(redact_record)
    log.addHandler(handler)


class _LogFile(logging.FileHandler):
    """What can no longer be written (disk full, folder gone read-only) is said once, and no line is worth a run."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            log = logging.getLogger("slm")
            log.warning("%s cannot be written, the run goes on without: %s", self.baseFilename, sys.exc_info()[1])


@cache
def terminal() -> Console:
    """The one that log lines and progress bars share: a line then goes above the bar, and not through it."""
    from rich.console import Console

    return Console(stderr=True)


def _screen(rank: int) -> logging.Handler:
    if rank == 0 and sys.stderr.isatty():  # rich folds lines at 80 columns where there is no terminal
        from rich.logging import RichHandler

        return RichHandler(console=terminal(), show_path=False, log_time_format="[%X]")
    handler = logging.StreamHandler(sys.stderr)
    who = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    return handler


# ----------------------------------------------------------------------------------------- imports
@contextmanager
def lasting_imports() -> Iterator[None]:
    """For a command's imports of torch and the like: the million objects that they make stay, so nobody looks for garbage among
    them, now or later. A sixth of the CPU time of a small run's start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
