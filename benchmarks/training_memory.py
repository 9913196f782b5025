"""Memory of one rank in training against the prediction of `slm plan`: real engines, real steps.

    python benchmarks/training_memory.py                    # the whole grid, on 1 and on 2 ranks: some ten minutes
    python benchmarks/training_memory.py --device cuda      # Llama 3.2 1B's shape on one GPU, by the allocator's own peak
    python benchmarks/training_memory.py --case '{"zero": "zero2", "precision": "bfloat16", "world_size": 2}'

Each case builds slm's engine on DeepSpeed and takes steps of slm's train_step on gloo. Measured is the largest resident set
of the process in a step (VmHWM of /proc, set back before it) less what was resident before the engine was built; the smaller
of two steps, as gloo's threads let go of what they have sent sooner or later. torch's profiler would name tensors, but it
notes only what its own thread allocates and frees, and gloo's threads free too; a resident set misses nothing, DeepSpeed's
C++ included. So that it equals what is allocated, as on a GPU, malloc gives each larger block pages of its own
(MALLOC_MMAP_THRESHOLD_) and fills them at once (MALLOC_PERTURB_): the end of a bucket may never be written. A first case, not
counted, has loaded libraries.

On a CPU offloaded state is in the same memory: measured is device and host together.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from slm import parallel
from slm.data.batches import Batch
from slm.engine import Engine
from slm.memory import Layout, RankMemory, Zero, rank_memory
from slm.metrics import StepTimer
from slm.model.config import ModelConfig
from slm.recipe import Optim, Phase
from slm.runtime import discover_ranks
from slm.step import train_step
from slm.strategy import read_deepspeed

ROOT = Path(__file__).parents[1]
# 11 million parameters, of which the embedding is 14 %: its peak is 0.1 to 0.4 GB a rank.
SHAPE = dict(hidden_size=384, intermediate_size=1056, num_hidden_layers=6, num_attention_heads=6)
DEFAULTS: dict[str, Any] = dict(
    zero="zero1",
    precision="float32",
    world_size=1,
    policy="none",
    tokens=64,
    micro_batch=1,
    accumulation=1,
    sequence_parallel=1,
    tile_tokens=None,
    options={},  # of the JSON's "zero_optimization", instead of the file's
    preset="cpu-small",
    model=SHAPE,
    device="cpu",
)
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_PERTURB_": "165"}


def grid() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []
    for world_size in (1, 2):
        for precision in ("float32", "bfloat16"):
            for zero in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"):
                if (zero, precision) != ("zero0", "bfloat16"):  # the engine refuses it
                    cases.append(dict(zero=zero, precision=precision, world_size=world_size))
    half = dict(precision="bfloat16", world_size=2)
    # Activations bind, with each policy; then several micro-batches, several buckets, and ranks that share sequences.
    for zero in ("zero1", "zero2", "zero3"):
        for policy in ("none", "selective", "full"):
            cases.append(dict(zero=zero, policy=policy, tokens=768, world_size=2))
        cases.append(dict(zero=zero, accumulation=2, world_size=2))
        cases.append(dict(zero=zero, options={"reduce_bucket_size": 4_000_000}, world_size=2))
        cases.append(dict(zero=zero, options={"reduce_bucket_size": 4_000_000}, **half))
        cases.append(dict(zero=zero, sequence_parallel=2, **half))
    cases.append(dict(zero="zero0", tokens=768, world_size=2))
    cases.append(dict(zero="zero2", policy="selective", tokens=768, tile_tokens=128, world_size=2))
    cases.append(dict(zero="zero2", accumulation=2, **half))
    cases.append(dict(zero="zero2", tokens=768, world_size=2, sequence_parallel=2))
    cases.append(dict(zero="zero3", tokens=768, world_size=2, options={"stage3_max_reuse_distance": 0}))
    return cases


def gpu_grid() -> list[dict[str, Any]]:
    """Not run yet: no GPU was at hand."""
    shape = dict(preset="llama3.2-1b", model={}, device="cuda", precision="bfloat16", tokens=8192)
    cases = [dict(zero=zero, policy=policy, **shape) for zero in ("zero1", "zero2") for policy in ("none", "selective")]
    return [*cases, dict(zero="zero2", accumulation=2, **shape), dict(zero="zero2_offload", policy="full", **shape)]


# --- in a rank ------------------------------------------------------------------------------------------------


def _status(key: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _now(device: torch.device) -> int:
    """Bytes that are held; the peak begins again."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _phase(case: dict[str, Any], folder: Path) -> Phase:
    strategy = read_deepspeed(str(ROOT / "ds_configs" / f"{case['zero']}.json"))
    strategy["zero_optimization"] |= case["options"]
    path = folder / f"rank{parallel.rank()}.json"
    path.write_text(json.dumps(strategy))
    sequences = case["micro_batch"] * case["accumulation"] * case["world_size"] // case["sequence_parallel"]
    return Phase(
        name="memory",
        tokens=sequences * case["tokens"],
        seq_len=case["tokens"],
        batch_tokens=sequences * case["tokens"],
        micro_batch=case["micro_batch"],
        sequence_parallel=case["sequence_parallel"],
        activation_checkpointing=case["policy"],
        mlp_tile_tokens=case["tile_tokens"],
        deepspeed=str(path),
    )


def _batch(config: ModelConfig, case: dict[str, Any]) -> Batch:
    B, S = case["micro_batch"], case["tokens"]
    tokens_BT = torch.randint(0, config.vocab_size, (B, S), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.arange(S).expand(B, S).contiguous()
    bounds = torch.arange(0, B * S + 1, S, dtype=torch.int32)
    whole = Batch(tokens_BT, tokens_BT.roll(-1, 1), positions_BT, bounds, B * S, B * S, B * S * (S + 1) // 2, B * S * S)
    return whole.part(parallel.rank() % case["sequence_parallel"], case["sequence_parallel"])


def measure(case: dict[str, Any], folder: Path) -> dict[str, int]:
    """The most that a step holds, and what is held between steps, over what was there before the engine, in bytes."""
    config, phase = ModelConfig.preset(case["preset"], **case["model"]), _phase(case, folder)
    device = parallel.local_device(discover_ranks().local_rank)
    before = _now(device)
    engine = Engine(config, phase, Optim(), precision=case["precision"], device=device)
    engine.write_weights(lambda _, shape: torch.zeros(shape))
    timer = StepTimer(device.type)
    peaks = []
    for _ in range(3):  # the first is not counted: stage 3 fetches ahead from the second on
        resting = _now(device) - before
        train_step(engine, [_batch(config, case).to(device) for _ in range(case["accumulation"])], 1e-4, timer)
        peaks.append(_peak(device) - before)
    engine.close()
    return {"rest": resting, "peak": min(peaks[1:])}


def predict(case: dict[str, Any]) -> RankMemory:
    config = ModelConfig.preset(case["preset"], **case["model"])
    strategy = read_deepspeed(str(ROOT / "ds_configs" / f"{case['zero']}.json"))["zero_optimization"]
    return rank_memory(
        config,
        Zero.of(strategy | case["options"]),
        Layout(case["world_size"], case["sequence_parallel"], case["accumulation"]),
        case["micro_batch"] * case["tokens"] // case["sequence_parallel"],
        case["policy"],
        tile_tokens=case["tile_tokens"],
        value_bytes=4 if case["precision"] == "float32" else 2,
        device=case["device"],
    )


def run_rank(cases: list[dict[str, Any]]) -> None:
    """Writes a line of JSON for each case."""
    parallel.start(parallel.local_device(discover_ranks().local_rank))
    with tempfile.TemporaryDirectory() as folder:
        # Once without measuring, to load libraries: the same on all ranks, in the same order.
        for precision in sorted({case["precision"] for case in cases}):
            first = {"precision": precision, "world_size": cases[0]["world_size"]}
            measure({**DEFAULTS, **first}, Path(folder))
        for case in cases:
            found = measure(case, Path(folder))
            if parallel.rank() == 0:
                print("MEASURED " + json.dumps(found), flush=True)
    parallel.stop()


# --- outside --------------------------------------------------------------------------------------------------


def run(cases: list[dict[str, Any]], timeout_seconds: int = 3600) -> list[dict[str, Any]]:
    """Each case with "measured", "predicted" and "rest", the bytes between steps. Starts the ranks."""
    rows: list[dict[str, Any]] = []
    for world_size in sorted({case["world_size"] for case in cases}):
        here = [case for case in cases if case["world_size"] == world_size]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        command += [__file__, "--in-rank"]
        environment = {
            **os.environ,
            **ALLOCATOR,
            "SLM_MEMORY_CASES": json.dumps(here),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": here[0]["device"],
            "PYTHONPATH": str(ROOT),
        }
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_seconds)
        if result.returncode:
            raise RuntimeError(result.stdout[-2000:] + result.stderr[-4000:])
        lines = [line for line in result.stdout.splitlines() if line.startswith("MEASURED ")]
        for case, line in zip(here, lines, strict=True):
            found, plan = json.loads(line.removeprefix("MEASURED ")), predict(case)
            rows.append({
                "case": case, "measured": found["peak"], "rest": found["rest"], "moment": plan.peak.moment,
                "predicted": plan.peak.total_bytes + (plan.host_bytes if case["device"] == "cpu" else 0),
            })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", action="append", type=json.loads, help="JSON of one case, fields as in DEFAULTS; repeatable"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="which grid, without --case")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--in-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_rank:
        run_rank(json.loads(os.environ["SLM_MEMORY_CASES"]))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured", file=sys.stderr)
        return 3
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        print("needs Linux's /proc: nothing is measured", file=sys.stderr)
        return 3
    rows = run([{**DEFAULTS, **case} for case in args.case or (grid() if args.device == "cpu" else gpu_grid())])
    table = Table("case", "at rest", "peak", "measured / predicted", "fullest at (predicted)")
    table.title = f"bytes a parameter on one rank; torch {torch.__version__}"
    for row in rows:
        told = " ".join(
            f"{k}={v}" if k != "zero" else v
            for k, v in row["case"].items()
            if v != DEFAULTS[k] or k in ("zero", "precision", "world_size")
        )
        P = ModelConfig.preset(row["case"]["preset"], **row["case"]["model"]).num_parameters()
        ratio = row["measured"] / row["predicted"]
        table.add_row(told, f"{row['rest'] / P:.2f}", f"{row['measured'] / P:.2f}", f"{ratio:.3f}", row["moment"])
    Console(width=150).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    worst = max(abs(row["measured"] / row["predicted"] - 1) for row in rows)
    print(f"largest difference: {worst:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
