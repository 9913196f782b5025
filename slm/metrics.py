"""What a run measures and where it is written: metrics.jsonl, TensorBoard, Weights & Biases.

Owns the three sinks and their continuation after a restart without repeated steps, the time per part of a
step, memory, and peak speeds. It does not count FLOPs (plan.py does) and decides nothing about training.

    metrics = MetricsLogger(run_dir, tensorboard=True, wandb={"project": "slm", "mode": "offline"},
                            run_name="quickstart", config=recipe, start_step=100, rank=0)
    with timer.part("forward"):
        ...
    speed = mfu({"full": 1e15, "causal": 8e14}, seconds=1.0, num_devices=8, peak=peak_flops("cuda:0"))
    metrics.log(110, {"loss": 2.31, **timer.snapshot(), **memory_stats(), **speed})
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from slm.errors import EnvironmentProblem, UserError
from slm.redact import redacted_in
from slm.runtime import atomic_write

_log = logging.getLogger("slm.metrics")


# ------------------------------------------------------------------------------------------- sinks
class MetricsLogger:
    """Writes on rank 0; on other ranks every call does nothing.

    `start_step` is the step of the checkpoint that training goes on from (0: from the beginning). What was
    recorded after it will be computed again, so it is removed from metrics.jsonl, marked as superseded in
    TensorBoard (purge_step), and not sent to W&B a second time; what a kill kept from W&B is sent to it from
    metrics.jsonl. A sink that fails while training, as on a full disk, is reported once and never stops the
    run; one that cannot be opened is an error at the start.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool,
        wandb: dict[str, Any] | None,
        run_name: str,
        config: dict[str, Any],
        start_step: int,
        rank: int,
    ) -> None:
        self._active = rank == 0
        if not self._active:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._again = dict(
            run_dir=run_dir, tensorboard=tensorboard, wandb=wandb, run_name=run_name, config=config, rank=rank
        )
        self._start_step = start_step
        self._failed: set[str] = set()
        kept = _lines_until(run_dir / "metrics.jsonl", start_step)
        # A log call for the starting step itself, such as an evaluation, must not repeat what is there.
        self._known_at_start = {key for line in kept if line["step"] == start_step for key in line}
        atomic_write(run_dir / "metrics.jsonl", "".join(_json_line(line) for line in kept))
        self._metrics = _open_lines(run_dir / "metrics.jsonl")
        self._events = _open_lines(run_dir / "events.jsonl")
        self._tensorboard: Any = _open_tensorboard(run_dir, start_step) if tensorboard else None
        self._wandb: Any = None
        self._wandb_last_step = -1
        if wandb is not None:
            self._wandb, self._wandb_last_step = _open_wandb(run_dir, wandb, run_name, config)
            for line in kept:
                values = {key: value for key, value in line.items() if key not in ("step", "time")}
                self._to_wandb(line["step"], _numbers(values))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record numbers (or strings, in metrics.jsonl only) of this step. Steps must not go down.

        A step may be logged in several calls, with different names. A number that is not finite is null in
        metrics.jsonl, because JSON has no such number.
        """
        if not self._active:
            return
        if step == self._start_step:
            values = {key: value for key, value in values.items() if key not in self._known_at_start}
        if step < self._start_step or not values:
            return
        values = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
        numbers = _numbers(values)
        line = {"step": step, "time": time.time(), **values}
        self._try("metrics.jsonl", lambda: _append(self._metrics, line))
        if self._tensorboard is not None:
            self._try("TensorBoard", lambda: self._to_tensorboard(step, numbers))
        self._to_wandb(step, numbers)

    def event(self, kind: str, **fields: Any) -> None:
        """Append what happened, once and with its time, to events.jsonl: start, save, skip, stop ..."""
        if self._active:
            self._try("events.jsonl", lambda: _append(self._events, _event(kind, fields)))

    def go_back(self, step: int) -> None:
        """Training goes on from this earlier step: what was recorded after it is treated as at a restart."""
        if self._active:
            self.close()
            self.__init__(**self._again, start_step=step)  # type: ignore[misc]

    def close(self) -> None:
        """Flush and close every sink. W&B uploads what it still has."""
        if not self._active:
            return
        self._active = False
        if self._wandb is not None:
            self._try("W&B", lambda: self._wandb.finish())
        if self._tensorboard is not None:
            self._try("TensorBoard", lambda: self._tensorboard.close())
        self._try("metrics.jsonl", self._metrics.close)
        self._try("events.jsonl", self._events.close)

    def _to_tensorboard(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self._tensorboard.add_scalar(key, value, step)
        self._tensorboard.flush()  # so that a kill costs nothing that metrics.jsonl has

    def _to_wandb(self, step: int, numbers: dict[str, float]) -> None:
        if self._wandb is not None and step > self._wandb_last_step:
            self._try("W&B", lambda: self._wandb.log(numbers, step=step))

    def _try(self, sink: str, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # a run of days must outlive a full disk and a client library's bug
            if sink not in self._failed:
                self._failed.add(sink)
                _log.warning("%s could not be written, training goes on without: %s", sink, error)


def append_event(run_dir: Path, kind: str, **fields: Any) -> None:
    """A line in events.jsonl, for who has no MetricsLogger. Raises OSError."""
    with _open_lines(run_dir / "events.jsonl") as file:
        _append(file, _event(kind, fields))


def append_row(run_dir: Path, step: int, values: dict[str, float]) -> None:
    """A line in metrics.jsonl of what was measured after a run, of one of its checkpoints. Raises OSError."""
    with _open_lines(run_dir / "metrics.jsonl") as file:
        _append(file, {"step": step, "time": time.time(), **values})


def to_tensorboard(run_dir: Path, step: int, values: dict[str, float]) -> None:
    """The same beside the curves of a run that has a TensorBoard folder. Raises OSError, EnvironmentProblem."""
    if (run_dir / "tensorboard").is_dir():
        writer = _open_tensorboard(run_dir, None)
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.close()


def to_wandb_summary(run_dir: Path, options: dict[str, Any], run_name: str, values: dict[str, float]) -> None:
    """The same into the summary of a run's W&B page, its columns in the table of runs: a row of its history has to be newer than
    the newest, and would take the place of the next step's. Raises UserError, EnvironmentProblem."""
    run, _ = _open_wandb(run_dir, options, run_name, {})
    run.summary.update(values)
    run.finish()


def _event(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"time": time.time(), "kind": kind, **redacted_in(fields)}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _lines_until(path: Path, start_step: int) -> list[dict[str, Any]]:
    """Lines of steps up to start_step, without broken ones."""
    kept = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, TypeError, KeyError):  # the line that a kill cut short
            continue
        if step <= start_step:
            kept.append(line)
    return kept


def _json_line(fields: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
    return json.dumps(finite, default=str) + "\n"


def _open_lines(path: Path) -> IO[bytes]:
    """Open for appending whole lines, unbuffered: a line is in the kernel's hands when log() returns."""
    file = open(path, "a+b", buffering=0)
    if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":  # cut short by a kill
        file.write(b"\n")
    return file


def _append(file: IO[bytes], fields: dict[str, Any]) -> None:
    line = _json_line(fields).encode()
    if file.write(line) != len(line):
        raise OSError("only part of a line was written (disk full?)")


def _open_tensorboard(run_dir: Path, start_step: int | None) -> Any:
    """start_step: what stands there after it no longer counts; None: all counts."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EnvironmentProblem(
            f"TensorBoard was asked for and cannot be imported: {error}",
            fix="pip install tensorboard, or turn it off in the recipe's log section",
        ) from None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=None if start_step is None else start_step + 1)


def _open_wandb(run_dir: Path, options: dict[str, Any], run_name: str, config: dict[str, Any]) -> tuple[Any, int]:
    """The W&B run of this run directory, new or continued, and the last step that it already has (-1: none).

    Online the server knows that step. Offline each attempt writes a folder of its own with the same id, which
    `wandb sync` joins, and the files there know it: less than was logged, as W&B holds back some 20 seconds.
    """
    try:
        import wandb
        from wandb.errors import AuthenticationError, CommError, UsageError
    except ImportError as error:
        raise EnvironmentProblem(
            f"Weights & Biases was asked for and cannot be imported: {error}",
            fix="pip install wandb, or turn it off in the recipe's log section",
        ) from None
    identity = run_dir / "wandb_id.json"
    if not identity.exists():
        atomic_write(identity, json.dumps({"id": secrets.token_hex(4)}) + "\n")
    run_id = json.loads(identity.read_text())["id"]
    offline = (options.get("mode") or os.environ.get("WANDB_MODE")) == "offline"
    arguments: dict[str, Any] = {"name": run_name, **options, "config": config, "dir": str(run_dir)}
    # The address of the git remote would be recorded, and may hold a token.
    arguments |= {"id": run_id, "resume": None if offline else "allow", "settings": {"disable_git": True}}
    try:
        run = wandb.init(**arguments)
    except (UsageError, AuthenticationError) as error:
        raise UserError(
            f"Weights & Biases refused to start: {error}",
            fix="run `wandb login`, correct the recipe's log.wandb, or set its mode to offline",
        ) from None
    except CommError as error:
        _log.warning("W&B cannot be reached, so this run is kept offline for `wandb sync`: %s", error)
        wandb.teardown()  # its service would say that the id is in use, by the attempt that has failed
        offline, run = True, wandb.init(**arguments | {"mode": "offline", "resume": None})
    if not offline:
        return run, run.starting_step - 1
    return run, max((step for step, _ in offline_rows(run_dir, run_id)), default=-1)


def offline_rows(run_dir: Path, run_id: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, values) of each row in W&B's local files of a run, oldest file first."""
    for path in sorted(run_dir.glob(f"wandb/*run-*/run-{run_id}.wandb"), key=lambda path: path.stat().st_mtime):
        for record in offline_records(path):
            if record.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item for item in record.history.item}
                yield record.history.step.num, {key: json.loads(items[key].value_json) for key in items}


def offline_records(path: Path) -> Iterator[Any]:
    """The records of one of W&B's local files.

    After seven bytes it is LevelDB's log: blocks of 32 KiB with records of checksum, length, type (1 whole, 2 first, 3 middle,
    4 last part) and payload (google/leveldb, doc/log_format.md).
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    block, header = 32768, 7
    data, position, payload = path.read_bytes(), header, b""
    while position + header <= len(data):
        if block - position % block < header:  # too little room for a header: filled up with zeros
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += header + length
        if position > len(data):
            return  # cut short by a kill
        payload += data[position - length : position]
        if kind in (1, 4):
            try:
                record, payload = Record.FromString(payload), b""
            except DecodeError:
                return  # damaged: what follows cannot be trusted
            yield record


# -------------------------------------------------------------------------------------------- time
class StepTimer:
    """Seconds spent in each part of a step. Parts must not be nested.

    On a GPU, work is only queued by the code inside a part, so CUDA events are put into the queue around it
    (about a microsecond each) and read in `snapshot`: the device is waited for there and nowhere else. The
    time of "data" is then how long the device was kept waiting, which is what matters.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._pairs: list[tuple[str, Any, Any]] = []
        self._cuda: Any = None
        if device_type == "cuda":
            import torch

            self._cuda = torch.cuda

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._mark()
        try:
            yield
        finally:
            end = self._mark()
            if self._cuda is None:
                self._seconds[name] += end - start
            else:
                self._pairs.append((name, start, end))

    def snapshot(self) -> dict[str, float]:
        """Seconds per part, by name, since the last snapshot."""
        if self._pairs:
            self._pairs[-1][2].synchronize()
        for name, start, end in self._pairs:
            self._seconds[name] += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._pairs = dict(self._seconds), defaultdict(float), []
        return seconds

    def _mark(self) -> Any:
        if self._cuda is None:
            return time.perf_counter()
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event


# ------------------------------------------------------------------------------------------ memory
def memory_stats() -> dict[str, int]:
    """Bytes of this process: resident now and at most, and the CUDA allocator's peaks where there is one."""
    import psutil

    now = psutil.Process().memory_info().rss
    stats = {"rss_bytes": now, "peak_rss_bytes": max(now, _peak_rss_bytes())}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        stats["cuda_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        stats["cuda_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return stats


def _peak_rss_bytes() -> int:
    try:  # getrusage's ru_maxrss is inherited from the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, where there is no /proc (macOS)


# ------------------------------------------------------------------------------------------- speed
# Dense bfloat16 FLOP/s on the makers' data sheets (V100: float16). First match decides.
_PEAK_FLOPS = [
    (r"\bB200\b", 2250e12),
    (r"\bH200\b|\bGH200\b|\bH800\b", 989e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA100\b|\bA800\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bA40\b", 150e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090\b", 165e12),
    (r"\bRTX 3090\b", 71e12),
    (r"\bV100\b", 125e12),
    (r"\bMI300X\b", 1307e12),
]


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 FLOP/s of "cuda:0", a torch.device or a GPU's name; None on a CPU and when unknown."""
    name = str(device)
    if name.split(":")[0] == "cpu":
        return None
    if name.split(":")[0] == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in _PEAK_FLOPS if re.search(pattern, name, re.IGNORECASE)), None)


def mfu(flops: dict[str, float], *, seconds: float, num_devices: int, peak: float | None) -> dict[str, float]:
    """FLOP/s per device and, where the peak is known, the fraction of it, for each convention of counting.

    `flops` holds the FLOPs of the whole global step by convention: "full" counts a whole square of attention for each
    packed document (for each sequence where nothing is packed: PaLM, arXiv 2204.02311, appendix B), "causal" only the
    pairs that a causal kernel attends to. Returns flops_per_second/NAME and mfu/NAME.
    """
    rates = {name: count / seconds / num_devices for name, count in flops.items()}
    result = {f"flops_per_second/{name}": rate for name, rate in rates.items()}
    if peak is not None:
        result |= {f"mfu/{name}": rate / peak for name, rate in rates.items()}
    return result
