"""What the side-by-side benchmarks share: arms in turn, each in a process of its own, and honest ratios.

Owns the interleaved rounds (A B C, then C B A), the check that every arm did the same work, the statistics
over rounds, the meter of a CPU arm, and how this project's own arm is driven. Does not know the peers or
the tables.

    results = run_rounds(Path(__file__), ["slm", "plain"], rounds=3, work=work, arguments=["--steps", "35"])
    problems = loss_problems(results, reference="plain", tolerances={1: 1e-5, 30: 1e-3})
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the benchmarks also run from a checkout that is not installed

Results = dict[str, list[dict[str, Any]]]  # arm -> what its process wrote, one entry a round


def call(*command: str | Path, log: Path) -> None:
    """Runs a command of the project's on one CPU thread, its output at the end of a log. Raises SystemExit if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    with open(log, "a") as stream:
        done = subprocess.run(
            list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY
        )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{log.read_text()[-3000:]}")


class ArmFailed(Exception):
    """An arm's process did not end well; the message holds the end of its log."""

    def __init__(self, arm: str, returncode: int, log_tail: str) -> None:
        super().__init__(f"arm {arm} ended with exit code {returncode}:\n{log_tail}")
        self.returncode, self.log_tail = returncode, log_tail


def run_arm(
    script: Path,
    arm: str,
    work: Path,
    name: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `script --arm ARM` in its own process and return the JSON that it wrote."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, so that the arm ends too
    out, log = work / f"{name}.json", work / f"{name}.log"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(script), "--arm", arm, "--work", str(work), "--out", str(out), *arguments]
    with log.open("w") as stream:
        done = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    if done.returncode != 0 or not out.is_file():
        raise ArmFailed(arm, done.returncode, "\n".join(log.read_text(errors="replace").splitlines()[-15:]))
    return json.loads(out.read_text())


def run_rounds(
    script: Path,
    arms: Sequence[str],
    rounds: int,
    work: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> Results:
    """All arms, `rounds` times, the order turned round each time: drift of the machine hits all alike."""
    results: Results = {arm: [] for arm in arms}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=rounds * len(arms))
        for turn in range(rounds):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                progress.update(bar, description=f"round {turn + 1}: {arm}")
                results[arm].append(run_arm(script, arm, work, f"{arm}-{turn}", arguments, environment))
                progress.advance(bar)
    return results


def loss_problems(results: Results, reference: str, tolerances: Mapping[int, float]) -> list[str]:
    """Why the arms' losses are not those of the same training; empty when they are.

    `tolerances` maps a step (from 1) to the largest relative difference from the same step of the
    reference arm's first round. Arms without losses (a floor, say) are passed over.
    """
    problems = []
    expected = results[reference][0]["losses"]
    if not all(map(math.isfinite, expected)):
        problems.append(f"{reference}: a loss is not finite")
    if not expected[-1] < expected[0]:
        problems.append(f"{reference}: the loss did not fall ({expected[0]:.6f} to {expected[-1]:.6f})")
    for arm, rounds in results.items():
        for turn, result in enumerate(rounds):
            if not result.get("losses"):
                continue
            for step, tolerance in tolerances.items():
                loss, wanted = result["losses"][step - 1], expected[step - 1]
                difference = abs(loss - wanted) / abs(wanted)
                if not difference <= tolerance:  # so that nan is a problem too
                    problems.append(
                        f"{arm}, round {turn + 1}: loss {loss:.7f} at step {step} against {wanted:.7f} "
                        f"of {reference}: {difference:.1e} relative, allowed {tolerance:.0e}"
                    )
    return problems


@dataclass(frozen=True)
class Spread:
    """A quantity over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def show(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def ratio(results: Results, key: str, ours: str, peer: str) -> Spread:
    """ours / peer of one key, taken round by round, so that a slow minute of the machine cancels."""
    return Spread.of([a[key] / b[key] for a, b in zip(results[ours], results[peer], strict=True)])


def machine() -> str:
    """Name and load of this machine, to stand beside every figure."""
    model = platform.processor() or platform.machine()
    try:
        names = [x.split(":", 1)[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")]
        model = names[0] if names else model
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"{model}, {cores} cores, Python {platform.python_version()}, load average before {load}"


# --- time and memory of an arm on a CPU, inside its process -----------------------------------------------


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


class Meter:
    """Made right after the imports; `step(loss)` at the end of every step; `result()` at the end."""

    def __init__(self, warmup_steps: int, tokens_per_step: int) -> None:
        gc.collect()
        self.warmup_steps, self.tokens_per_step = warmup_steps, tokens_per_step
        self.ends = [time.perf_counter()]
        self.losses: list[float] = []
        self.peak_bytes = self.warmup_graphs = 0
        self.can_reset = self._reset_peak()
        self.baseline_bytes = status_bytes("VmRSS")

    def _reset_peak(self) -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return True
        except OSError:  # forbidden in some containers: then the peak includes that of the imports
            return False

    def _peak(self) -> int:
        if self.can_reset:
            return status_bytes("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def step(self, loss: float | None) -> None:
        self.ends.append(time.perf_counter())
        if loss is not None:
            self.losses.append(loss)
        if len(self.ends) - 1 == self.warmup_steps:
            self.peak_bytes, self.warmup_graphs = self._peak(), compiled_graphs()
            self._reset_peak()
            self.ends[-1] = time.perf_counter()  # the bookkeeping above is in no step

    def result(self, groups: dict[str, int] | None, **more: Any) -> dict[str, Any]:
        seconds = [b - a for a, b in zip(self.ends[:-1], self.ends[1:], strict=True)]
        timed = seconds[self.warmup_steps :]
        peak_timed = self._peak()
        median = statistics.median(timed)
        return {
            "losses": self.losses, "step_seconds": seconds, "median_seconds": median,
            "tokens_per_second": self.tokens_per_step / median,
            "baseline_bytes": self.baseline_bytes,
            "peak_bytes": max(self.peak_bytes, peak_timed) - self.baseline_bytes,
            "peak_timed_bytes": peak_timed - self.baseline_bytes,
            "peak_was_reset": self.can_reset,
            "graphs_compiled": compiled_graphs(),
            "graphs_compiled_while_timed": compiled_graphs() - self.warmup_graphs,
            "decay_groups": groups, **more,
        }  # fmt: skip


def compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


# --- our own arm, as slm/train.py drives it ---------------------------------------------------------------


def slm_engine(
    init: Path,
    *,
    optim: Any,
    zero_json: Path,
    batch: int,
    micro_batch: int,
    seq_len: int,
    precision: str,
    compiled: bool,
) -> Any:
    """An Engine with the weights of the folder `init`, alone in its process group."""
    from slm import parallel
    from slm.engine import Engine
    from slm.model.hf import read_config, weight_reader
    from slm.recipe import Phase, Schedule
    from slm.runtime import discover_ranks

    device = parallel.local_device(discover_ranks().local_rank)
    parallel.start(device)
    phase = Phase(
        name="benchmark", tokens=batch * seq_len, seq_len=seq_len, batch_tokens=batch * seq_len,
        micro_batch=micro_batch, schedule=Schedule(type="constant"), deepspeed=str(zero_json),
    )  # fmt: skip
    engine = Engine(read_config(init), phase, optim, precision=precision, device=device, compile_blocks=compiled)
    engine.write_weights(weight_reader(init))
    return engine


def slm_batches(tokens: Any, following: Any | None, micro_batch: int) -> list[Any]:
    """Micro-batches of whole rows, one document each, put together by the project's own code.

    tokens: integers [batch, S]; following: the token after each row; None: a row's last token has no label.
    """
    from slm.data.batches import assemble

    seq_len = tokens.shape[1]
    ends = [None] * len(tokens) if following is None else [int(x) for x in following]
    rows = [[(row, end)] for row, end in zip(tokens, ends, strict=True)]
    parts = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
    return [assemble(part, seq_len, pad_id=0, max_pieces=1) for part in parts]


def slm_step(engine: Any, batches: Sequence[Any], lr: float) -> Any:
    """One optimiser step by the training loop's own function; the mean loss."""
    from slm.metrics import StepTimer
    from slm.step import train_step

    on_device = [batch.to(engine.device) for batch in batches]
    done = train_step(engine, on_device, lr, StepTimer(engine.device.type))
    return done.loss
