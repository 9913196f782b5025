"""Finds a rank that hangs, shows where every rank is, and ends the run with exit code 79.

Owns one thread in each rank, the files RUN/logs/rank-N.stacks and the `hang` event. The loop says what it is doing and
that it goes on; when nothing new is heard for the limit of that kind of work, the stacks of all ranks of this machine
are written (a stopped one is woken for it), and they leave together. Imports no torch.

    watchdog.start(run_dir, rank, step_seconds=900, slow_seconds=3600, everyone=parallel.gather_objects(watchdog.myself()))
    watchdog.at("step", 7)         # a step may take step_seconds; whatever has another name, slow_seconds
    watchdog.stop()

A rank that waits in a collective call for one that hangs is as silent as that one: whichever sees it first speaks. So
ranks must leave slow work together, as by a barrier, or those that are ahead would wait at a step's limit.
`kill -USR2 PID` writes a rank's stack at any time and ends nothing.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import logging
import os
import re
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from slm.metrics import append_event
from slm.runtime import process_start_ticks, write_exit

log = logging.getLogger("slm")

EXIT_HUNG = 79
STEP = "step"  # the one kind of work with the short limit
_GONE_SECONDS = 2.0
LEAVE_SECONDS = 120
_END_SECONDS = 60  # for stacks, event and log of a hung run; then it is ended all the same

Process = tuple[str, int, str]  # machine, id, and when it began

# What this rank does, and of which step. A new tuple is the sign of life: at() may be called in any hot loop.
_doing: tuple[str, int | None] = ("start-up", None)
_watch: _Watch | None = None


def myself() -> Process:
    """This process, for its siblings: machine, id, and when it began (ids are used again)."""
    try:  # host names are not unique, and containers on one machine do not see each other's processes
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        machine = socket.gethostname()
    return machine, os.getpid(), _began(os.getpid())


def start(
    run_dir: Path, rank: int, *, step_seconds: float, slow_seconds: float, everyone: list[Process], on_gpu: bool = False
) -> None:
    """Watches this process from now on. everyone: what `myself` says on each rank. A limit of 0 is none. on_gpu: a rank may then
    wait for others in any line that needs a result of the GPU."""
    global _watch
    stop()
    at("start-up")
    if step_seconds or slow_seconds:
        _watch = _Watch(run_dir, rank, (step_seconds, slow_seconds), everyone, on_gpu)


def at(what: str, step: int | None = None) -> None:
    """This rank goes on, with `what`."""
    global _doing
    before, _doing = _doing, (what, step)
    if _watch is not None and (before[0] == STEP) != (what == STEP):
        _watch.arm()


def stop() -> None:
    """Watches no more."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None


def leave(run_dir: Path, rank: int) -> None:
    """The last call of a rank whose run is over and whose code is written down: what is left to do (finalizers, the libraries'
    own, in which NCCL or gloo may wait for a rank that is gone) gets LEAVE_SECONDS. Then a timer in C writes the stack and
    leaves with code 1; the kernel does by SIGALRM where the interpreter is gone already."""
    try:
        file = os.open(_stacks(run_dir, rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:  # of a run that was refused, the folder is removed
        file = os.dup(2)
    faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True, file=file)
    _surely_end(LEAVE_SECONDS + 5)


def _stacks(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.stacks"


class _Watch:
    def __init__(
        self, run_dir: Path, rank: int, limits: tuple[float, float], everyone: list[Process], on_gpu: bool
    ) -> None:
        self.run_dir, self.rank, (self.step_seconds, self.slow_seconds) = run_dir, rank, limits
        self.world_size, self.on_gpu = len(everyone), on_gpu
        here, mine = everyone[rank][0], everyone[rank][1:]
        # By number, those on this machine beside this one. Ranks elsewhere watch themselves.
        self.siblings = {number: who[1:] for number, who in enumerate(everyone) if who[0] == here and who[1:] != mine}
        shortest = min(seconds for seconds in limits if seconds)
        self.poll_seconds = min(5.0, shortest / 20)
        self.stacks = self._open(rank)
        self.suspended = False
        faulthandler.register(signal.SIGUSR2, file=self.stacks, all_threads=True)
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():
            # Ctrl-Z, and what SLURM sends before it suspends a job: time that passes until SIGCONT is nobody's hang.
            self.before = signal.signal(signal.SIGTSTP, self._suspend)
        self.ended = threading.Event()
        self.arm()
        self.thread = threading.Thread(target=self._listen, name="watchdog", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        if self.before is not None:
            signal.signal(signal.SIGTSTP, self.before)
        os.close(self.stacks)

    def arm(self) -> None:
        """The backup for a hang that holds the interpreter's lock, under which our thread cannot run either: a timer
        of faulthandler's, in C, that writes the stacks and leaves with code 1. It takes 0.1 ms, so not each step."""
        seconds = self._limit()
        if seconds and not self.suspended:
            faulthandler.dump_traceback_later(1.25 * seconds, exit=True, file=self.stacks)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _limit(self) -> float:
        return self.step_seconds if _doing[0] == STEP else self.slow_seconds

    def _listen(self) -> None:
        heard, silent_seconds, unarmed_seconds, last = _doing, 0.0, 0.0, time.monotonic()
        while not self.ended.wait(self.poll_seconds):
            now = time.monotonic()
            # While this process did not run itself (stopped with all others, a laptop asleep) nobody hung.
            tick, last = min(now - last, 2 * self.poll_seconds), now
            silent_seconds = silent_seconds + tick if _doing is heard else 0.0
            heard, limit = _doing, self._limit()
            if 0 < limit < silent_seconds:
                self._end_run(heard, silent_seconds, limit)
            unarmed_seconds += tick
            if limit and unarmed_seconds > limit / 8:
                self.arm()
                unarmed_seconds = 0.0

    def _suspend(self, *_: Any) -> None:
        self.suspended = True
        faulthandler.cancel_dump_traceback_later()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.suspended = False
        self.arm()

    # --- the end --------------------------------------------------------------------------------------------

    def _end_run(self, doing: tuple[str, int | None], seconds: float, limit: float) -> None:
        try:
            _surely_end(_END_SECONDS)
            faulthandler.cancel_dump_traceback_later()
            # The lock of the machine's first file: one rank speaks for all, which see it at about the same time.
            first = self._open(min([self.rank, *self.siblings]))
            try:
                fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(first, fcntl.LOCK_EX)  # until all is said
                return
            except OSError:
                pass  # a file system without locks: better said twice than never
            self._speak(doing, seconds, limit)
            fcntl.flock(first, fcntl.LOCK_UN)
            # Not all launchers end the ranks of a run that one rank has left.
            siblings = [process for who in self.siblings.values() if (process := _process(*who))]
            for process in psutil.wait_procs(siblings, timeout=2)[1]:
                _send(process, signal.SIGKILL)
        finally:
            os._exit(EXIT_HUNG)

    def _speak(self, doing: tuple[str, int | None], seconds: float, limit: float) -> None:
        what = doing[0] if doing[1] is None else f"{doing[0]} {doing[1]}"
        title = f"rank {self.rank} has been at {what} for {seconds:.0f} s"
        processes = {rank: _process(*who) for rank, who in self.siblings.items()}
        siblings = {rank: process for rank, process in processes.items() if process is not None}
        asleep: list[int] = []  # stopped from outside (SIGSTOP): it is these that the others wait for
        for rank, process in siblings.items():
            file = self._open(rank)
            _headline(file, title)
            os.close(file)
            if stopped := _is_stopped(process):
                asleep.append(rank)
            _ask_for_stacks(process)
            if stopped:  # it wakes to write where it was stopped, and no longer: the run is over
                _send(process, signal.SIGCONT)
                time.sleep(0.2)
                _send(process, signal.SIGSTOP)
        _headline(self.stacks, title)
        faulthandler.dump_traceback(self.stacks, all_threads=True)
        # Ranks on other machines look as seldom as this one, and want to be heard before a launcher ends them.
        time.sleep(self.poll_seconds + 1)
        places = {rank: _last_place(self._path(rank)) for rank in sorted([self.rank, *siblings])}
        where = {rank: place.text for rank, place in places.items()}
        where |= {rank: f"stopped (SIGSTOP) in {where[rank]}" for rank in asleep}
        hung = asleep or _guilty(places, self.world_size, self.on_gpu)
        told = "; ".join(f"rank {rank} hangs: {where[rank]}" for rank in hung) or "a rank hangs"
        field = "watchdog.step_seconds" if doing[0] == STEP else "watchdog.slow_seconds"
        reason = (
            f"{told}. {title[0].upper()}{title[1:]}, longer than {field} ({limit:g}). Every rank's stack is in "
            f"{self.run_dir}/logs/rank-N.stacks"
        )
        fields = {"doing": doing[0], "step": doing[1], "seconds": round(seconds, 1), "hung": hung}
        _attempt(lambda: write_exit(self.run_dir, EXIT_HUNG, reason, **fields))
        event = {"rank": self.rank, **fields, "where": where}
        if node := next((_node(processes.get(rank)) for rank in hung), ""):
            event["suspect_node"] = node
        _attempt(lambda: append_event(self.run_dir, "hang", **event))
        # The rank may hang in writing to its terminal, with the lock that the next line wants.
        faulthandler.dump_traceback_later(10, exit=True, file=self.stacks)
        lines = "\n".join(f"  rank {rank}: {place}" for rank, place in where.items())
        log.error("%s. Where they are:\n%s\nThe same command goes on from the last checkpoint", reason, lines)

    def _path(self, rank: int) -> Path:
        return _stacks(self.run_dir, rank)

    def _open(self, rank: int) -> int:
        try:
            self._path(rank).parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._path(rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            log.warning("%s cannot be written (%s): stacks would go to the screen", self._path(rank), error)
            return os.dup(2)


def _surely_end(seconds: int) -> None:
    """The kernel ends this process then, by SIGALRM: what hangs may be the disk that we are about to write to. Through C, as
    Python sets no signal's action in a thread."""
    ctypes.CDLL(None).signal(signal.SIGALRM, None)  # the default action, whoever else uses it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.alarm(seconds)


def _began(pid: int) -> str:
    try:  # psutil's seconds change when the clock is set
        return str(process_start_ticks(pid))
    except OSError:
        return str(psutil.Process(pid).create_time())


def _process(pid: int, began: str) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if _began(pid) == began else None
    except psutil.Error:
        return None


def is_gone(process: Process) -> bool:
    """Whether a process that once said `myself` is known to have ended: of one on another machine nothing is known."""
    machine, pid, began = process
    if machine != myself()[0]:
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return not psutil.pid_exists(pid)
    return fields[0] in "ZX" or fields[19] != began  # a zombie, for whose end its parent has not asked yet


def name_the_gone(everyone: list[Process]) -> str:
    """Which ranks of this machine have ended, in words; empty if none has. A process whose connections are closed is given a
    moment to be gone."""
    deadline = time.monotonic() + _GONE_SECONDS
    while not (gone := [rank for rank, process in enumerate(everyone) if is_gone(process)]):
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.05)
    return f"rank {gone[0]}" if len(gone) == 1 else f"one of the ranks {', '.join(map(str, gone))}"


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _node(process: psutil.Process | None) -> str:
    """As SLURM calls the node that it is on, empty without SLURM. None: this process."""
    if process is None:
        return os.environ.get("SLURMD_NODENAME", "")
    try:
        return process.environ().get("SLURMD_NODENAME", "")
    except psutil.Error:
        return ""


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        pass  # gone


def _ask_for_stacks(process: psutil.Process) -> None:
    """SIGUSR2 to the main thread itself (tgkill(2)): a process that is woken for it would else go on in that thread, while
    another takes the signal."""
    try:
        if ctypes.CDLL(None).tgkill(process.pid, process.pid, signal.SIGUSR2) == 0:
            return
    except (OSError, AttributeError):  # not Linux, or a C library from before 2019
        pass
    _send(process, signal.SIGUSR2)


def _attempt(write: Any) -> None:
    try:
        write()
    except OSError as error:  # a full disk does not keep a hung run alive
        log.warning("%s", error)


def _headline(file: int, title: str) -> None:
    os.write(file, f"\n=== {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {title}\n".encode())


# A Python frame in which a rank waits for others: a collective call, or autograd's engine, in whose threads ZeRO makes its own.
_WAITS = re.compile(r"/torch/distributed/distributed_c10d\.py$|/deepspeed/comm/|/torch/autograd/graph\.py$")
# Here it waits, too, where this is the innermost frame: NCCL's calls return at once, and reading their result blocks.
_READS_RESULT = re.compile(r"/slm/parallel\.py$")
# Innermost of our files where a rank waits for nothing but its own disk and memory, and there the functions that do use the GPU.
_OWN_WORK = re.compile(r"/slm/(?:data/\w+|distill/cache|checkpoint|saving)\.py$")
_USE_GPU = frozenset({"to", "tensors_on", "is_one_piece_B", "part", "fill", "_allocate"})
_LOADER = re.compile(r"/torch/utils/data/")


@dataclass(frozen=True)
class _Place:
    """Where the main thread of a rank was at the last time."""

    text: str  # its innermost line, and the innermost of ours above it
    waits: bool = False  # in a collective call or a backward pass
    own_work: bool = False  # in reading data, or writing a checkpoint: for no other rank, and for no GPU


def _guilty(places: dict[int, _Place], world_size: int, on_gpu: bool) -> list[int]:
    """Which of this machine's ranks hang, by where they are, none of them stopped.

    With gloo whoever waits for others shows it. On a GPU a healthy rank may wait for another in any line that reads a result or
    finds the queue of kernels full, and a rank that is alone on its machine has no other beside it to compare with: there only
    those at work of their own are named.
    """
    if on_gpu or len(places) == 1 < world_size:
        return [rank for rank, place in places.items() if place.own_work and not place.waits]
    hung = [rank for rank, place in places.items() if not place.waits]
    return [] if len(hung) == len(places) > 1 else hung  # nobody was seen to wait for another


def _last_place(path: Path) -> _Place:
    try:
        return _place_in(path.read_text(errors="replace").rpartition("\n=== ")[2])
    except OSError as error:
        return _Place(str(error))


def _place_in(stacks: str) -> _Place:
    """Of what faulthandler has written of one process."""
    main = re.split(r"^(?:Current thread|Thread) .*\n", stacks, flags=re.MULTILINE)[-1]  # threads go newest first
    frames = [
        (f"{name} ({file}:{line})", file, name)
        for file, line, name in re.findall(r'File "(.*)", line (\d+) in (.*)', main)
    ]
    if not frames:
        return _Place("it did not answer (no interpreter, or no such process)")
    root = str(Path(__file__).parent) + os.sep
    shown, file, _ = frames[0]
    ours, our_file, our_name = next((frame for frame in frames if frame[1].startswith(root)), ("", "", ""))
    return _Place(
        f"{shown}, called by {ours}" if ours not in ("", shown) else shown,
        waits=any(_WAITS.search(file) for _, file, _ in frames) or bool(_READS_RESULT.search(file)),
        own_work=any(_LOADER.search(file) for _, file, _ in frames)
        or (bool(_OWN_WORK.search(our_file)) and our_name not in _USE_GPU),
    )
