"""What is seldom wanted: a trace of some steps, what a run was made on, and what to say when memory runs out.

profiler = start_profiler(run_dir, rank, range(5, 9), device_type="cpu")
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from slm import parallel
from slm.errors import EnvironmentProblem, SLMError
from slm.installed import facts
from slm.metrics import memory_stats
from slm.recipe import Phase
from slm.runtime import atomic_write
from slm.strategy import zero_stage

log = logging.getLogger("slm")

_TILE_TOKENS = 8192  # large enough for full-speed matrix products


class OutOfMemory(SLMError):
    exit_code = 77
    title = "Out of memory"


def surroundings(device: torch.device) -> dict[str, Any]:
    """What an attempt runs on and with, for who looks at the run later. Collective: hosts is {name: its ranks}."""
    found = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
    found |= {**facts(), "system": platform.platform(), "cpus": str(os.cpu_count())}
    return {"hosts": Counter(parallel.gather_objects(socket.gethostname())), **found}


def start_profiler(run_dir: Path, rank: int, steps: range, device_type: str) -> Any:
    """A torch profiler over the asked steps of this attempt, writing RUN/profile/rank-N.json; None if not asked."""
    if not steps:
        return None
    folder = run_dir / "profile"
    folder.mkdir(exist_ok=True)
    path = folder / f"rank-{rank}.json"

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(path))
        log.info("wrote the trace %s (open it in chrome://tracing or ui.perfetto.dev)", path)

    first, count = steps.start, len(steps)
    # Steps count from 1; the one before the first is for warming up, where there is one.
    schedule = torch.profiler.schedule(wait=max(0, first - 2), warmup=min(1, first - 1), active=count, repeat=1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device_type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write)
    profiler.start()
    return profiler


def explained(error: RuntimeError, run_dir: Path, rank: int, device_type: str, phase: Phase) -> Exception:
    """The error in the user's terms, if it is one of memory or of the compiler; else itself."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return _out_of_memory(run_dir, rank, device_type, phase, error)
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return EnvironmentProblem(
            f"torch.compile failed: {str(error).strip().splitlines()[0][:300]}",
            fix="install a C++ compiler (apt-get install g++), or set compile: false",
        )
    return error


def _out_of_memory(run_dir: Path, rank: int, device_type: str, phase: Phase, error: BaseException) -> OutOfMemory:
    """Says which setting to turn, and leaves what is known of the memory in RUN/memory."""
    folder = run_dir / "memory"
    folder.mkdir(exist_ok=True)
    snapshot = folder / f"rank-{rank}.txt"
    summary = ""
    if device_type == "cuda":
        summary = torch.cuda.memory_summary()
        torch.cuda.memory._dump_snapshot(str(folder / f"rank-{rank}.pickle"))  # for pytorch.org/memory_viz
    lines = [f"{name}: {value:,}" for name, value in memory_stats().items()]
    atomic_write(snapshot, "\n".join([str(error).splitlines()[0], *lines, summary]) + "\n")
    turns = []
    if phase.micro_batch > 1:
        turns.append(f"phases.{phase.name}.micro_batch {phase.micro_batch} -> {phase.micro_batch // 2} (same maths)")
    if phase.activation_checkpointing == "none":
        turns.append(
            f"phases.{phase.name}.activation_checkpointing: selective, or full (up to a third more time, the same maths)"
        )
    elif not phase.offload_activations and device_type == "cuda":
        turns.append(f"phases.{phase.name}.offload_activations: true")
    if phase.mlp_tile_tokens is None and phase.seq_len * phase.micro_batch > 2 * _TILE_TOKENS:
        turns.append(f"phases.{phase.name}.mlp_tile_tokens: {_TILE_TOKENS}")
    stage = zero_stage(phase.deepspeed)
    if stage < 3:
        turns.append(f"phases.{phase.name}.deepspeed: ds_configs/zero{stage + 1}.json, or one with offload")
    turns.append(f"a shorter seq_len than {phase.seq_len}, or more ranks")
    return OutOfMemory(
        f"rank {rank} ran out of memory: {str(error).splitlines()[0][:300]} (snapshot: {snapshot})",
        fix="turn one of: " + "; ".join(turns),
    )
