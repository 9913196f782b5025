"""The Llama 3.2 1B shape at 32K and 128K tokens and at the longest that fits, on one GPU, by recomputation policy.

    python benchmarks/long_context_gpu.py --json long.json              # everything
    python benchmarks/long_context_gpu.py --lengths 128Ki --policies selective --no-search
    python benchmarks/long_context_gpu.py --trial                       # a tiny shape on any machine: tries the script

Needs a CUDA device; without one it says so and exits with code 3. Each row is a process of its own, so that running out of
memory spoils nothing. It takes the project's own path: a recipe, token shards of random tokens, packing, Engine and train_step
over ZeRO-1 in bfloat16, blocks compiled as `slm train` compiles them. A step is one sequence, the update included: of

    one       one document as long as the sequence
    packed    documents of log-normal lengths (median 2K, cut at the sequence's), attention within each
    short     documents of 8Ki tokens: one step of them compiles the blocks for a single step of `one`

Reported: tokens/s of the median step (padding not counted); MFU in two conventions, `full` and `causal` (slm/plan.py; of packed
documents both count each document's own square); the peak of allocated memory, and of it what the forward and backward passes
added to what stood before the step, without DeepSpeed's gradient buckets, over the formula of slm/activations.py (it is for
eager blocks; compiled ones may keep less with `none`); the longest of the attention kernels that the profiler saw in one further
step. A policy that does not fit is run again with the MLP in tiles. At one length all policies must agree on the first loss, or
the exit code is 1.

The longest: lengths are doubled from --search-from, then bisected down to --search-unit. These tries have documents of 8Ki
tokens: the memory is that of one document as long (workspaces go by the tokens), the time a small part. The length found is
then confirmed by one step of a single document, and is reported as confirmed or not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from side_by_side import REPOSITORY, ArmFailed, machine, run_arm
from train_gpu import LOSS_TOLERANCE, OUT_OF_MEMORY, arm_environment, attention_kernels, make_tokens, profile

# name: what the phase says of it
POLICIES: dict[str, dict[str, Any]] = {
    "none": dict(activation_checkpointing="none"),
    "selective": dict(activation_checkpointing="selective"),
    "full": dict(activation_checkpointing="full"),
    "selective+offload": dict(activation_checkpointing="selective", offload_activations=True),
    "full+offload": dict(activation_checkpointing="full", offload_activations=True),
}
AIMS = {32 << 10: 22_000, 128 << 10: 8_000}  # tokens/s of one document on one H200
AIM_LONGEST = 600_000  # tokens on one H200, nothing offloaded
SHORT_DOCUMENT = 8192  # of the search
# A shape for --trial, whose block binds the memory, not the loss.
TRIAL = dict(preset="cpu-tiny", hidden_size=64, num_hidden_layers=3)


@dataclass(frozen=True)
class Try:
    """One process: a length and a policy, with one kind of documents after the other."""

    seq_len: int
    policy: str
    tile_tokens: int | None
    documents: tuple[str, ...]  # of one, packed, short
    warmup_steps: int
    steps: int
    profiled: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.seq_len}-{self.tile_tokens or 'whole'}-{'-'.join(self.documents)}"


# --- one try, in its process ------------------------------------------------------------------------------


def write_documents(folder: Path, lengths: list[int], vocab_size: int) -> None:
    from slm.data.tokens import ShardWriter, write_manifest

    with ShardWriter(folder, "random", vocab_size=vocab_size) as writer:
        writer.add_many(make_tokens(1, 1, sum(lengths), vocab_size).ravel(), lengths)
    tokenizer = {"fingerprint": "benchmark", "vocab_size": vocab_size, "bos_id": 0, "eos_id": 1}
    write_manifest(folder, shards=[writer.entry], tokenizer=tokenizer)


def document_lengths(kind: str, seq_len: int, num_sequences: int) -> list[int]:
    """Documents that fill at least num_sequences sequences."""
    import numpy as np

    if kind == "one":
        return [seq_len] * num_sequences
    if kind == "short":
        return [min(SHORT_DOCUMENT, seq_len)] * (num_sequences * max(1, seq_len // SHORT_DOCUMENT))
    rng, lengths, wanted = np.random.default_rng(0), [], (num_sequences + 1) * seq_len
    while sum(lengths) < wanted:
        lengths.append(int(np.clip(rng.lognormal(math.log(min(2048, seq_len / 16)), 1.2), 16, seq_len)))
    return lengths


def write_recipe(work: Path, wanted: Try, trial: bool) -> Path:
    """The recipe of a try, a phase for each kind of documents, and its token shards."""
    from slm.model.config import ModelConfig

    model: dict[str, Any] = {"max_position_embeddings": max(131_072, wanted.seq_len)}
    if trial:
        model |= TRIAL
    else:  # beyond the shape's own 256Ki, a factor that reaches
        rope = {"rope_type": "llama3", "original_max_position_embeddings": 8192}
        model |= {"preset": "llama3.2-1b", "rope_scaling": {**rope, "factor": max(32, -(-wanted.seq_len // 8192))}}
    vocab_size = ModelConfig.preset(**{"name" if k == "preset" else k: v for k, v in model.items()}).vocab_size
    num_steps = wanted.warmup_steps + wanted.steps + wanted.profiled
    for kind in wanted.documents:
        write_documents(work / kind, document_lengths(kind, wanted.seq_len, num_steps), vocab_size)
    strategy = json.loads((REPOSITORY / "ds_configs" / "zero1.json").read_text())
    if trial:
        strategy["zero_optimization"]["reduce_bucket_size"] = 1_000_000  # else most of the time goes into 2 GB of zeros
    (work / "zero1.json").write_text(json.dumps(strategy))
    phase = {
        "tokens": num_steps * wanted.seq_len,
        "seq_len": wanted.seq_len,
        "batch_tokens": wanted.seq_len,
        "mlp_tile_tokens": wanted.tile_tokens,
        "schedule": {"type": "constant"},
        "deepspeed": str(work / "zero1.json"),
        **POLICIES[wanted.policy],
    }
    recipe = {
        "name": "long-context",
        "output": str(work / "run"),
        "model": model,
        "data": {"sources": {kind: str(work / kind) for kind in wanted.documents}},
        "phases": [{"name": kind, "mixture": {kind: 1.0}, **phase} for kind in wanted.documents],
    }
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Meter:
    """Peaks of one device's memory: of a step, and of its forward and backward passes alone."""

    def __init__(self, engine: Any, limit_bytes: int) -> None:
        self.engine, self.limit_bytes, self.cuda = engine, limit_bytes, engine.device.type == "cuda"
        self.passes_bytes = self.allocated_bytes = self.reserved_bytes = 0
        self._before = 0
        self._update = engine.step
        engine.step = self._step

    def _step(self, lr: float) -> Any:
        """The engine's update, before which the passes' peak is read."""
        import torch

        if self.cuda:
            self.passes_bytes = max(self.passes_bytes, torch.cuda.max_memory_allocated() - self._before)
        return self._update(lr)

    def begin(self) -> None:
        """Before a step."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def end(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            self.allocated_bytes = max(self.allocated_bytes, torch.cuda.max_memory_allocated())
            self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved())

    def watch_cpu(self, step: Callable[[], Any]) -> None:
        """One step on a CPU, where torch's profiler notes every allocation; there the update is counted too."""
        import torch
        from activation_memory import _allocated

        _, self.passes_bytes = _allocated(step)
        if self.limit_bytes and self.passes_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(f"{self.passes_bytes:,} bytes, and --memory-gib allows {self.limit_bytes:,}")


def bucket_bytes(engine: Any) -> int:
    """In which DeepSpeed 0.19.8 gathers gradients, there from the start of the backward pass to its end."""
    zero = engine._optimizer
    count = len(zero.ipg_buckets) * (2 if zero.overlap_comm else 1)
    return count * zero.reduce_bucket_size * zero._gradient_reduction_buffer_dtype().itemsize


def run_try(wanted: Try, work: Path, trial: bool, limit_bytes: int) -> list[dict[str, Any]]:
    """One row for each kind of documents."""
    import torch

    from slm import parallel
    from slm.activations import activation_memory
    from slm.engine import DTYPES, Engine, resolve_precision
    from slm.inputs import open_phase_data
    from slm.metrics import StepTimer, mfu, peak_flops
    from slm.plan import training_flops
    from slm.recipe import load_recipe
    from slm.runtime import discover_ranks
    from slm.step import train_step

    recipe = load_recipe(write_recipe(work, wanted, trial))
    device = parallel.local_device(discover_ranks().local_rank)
    parallel.start(device)
    cuda = device.type == "cuda"
    if cuda and limit_bytes:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / torch.cuda.mem_get_info()[1]))
    first = recipe.phases[0]
    config, precision = recipe.model_of(first), resolve_precision(recipe.precision, device)[0]
    engine = Engine(config, first, recipe.optim, precision=precision, device=device, compile_blocks=cuda)
    torch.manual_seed(0)  # the project's own initial values take a minute of one core for this shape
    engine.write_weights(
        lambda name, shape: (
            torch.ones(shape, device=device)
            if len(shape) == 1
            else torch.randn(shape, device=device) * config.initializer_range
        )
    )
    data = [open_phase_data(recipe, phase) for phase in recipe.phases]
    formula = activation_memory(
        config,
        wanted.seq_len,
        first.activation_checkpointing,
        tile_tokens=first.mlp_tile_tokens,
        offload=engine.module.offload_activations,
        value_bytes=DTYPES[precision].itemsize,
        device=device.type,
    )
    bounds = max(d.step_batches(0, global_batch=1, micro_batch=1)[0].piece_bounds.numel() for d in data)
    peak_flops_per_second = peak_flops(device)
    rows = []
    for kind, phase_data in zip(wanted.documents, data, strict=True):
        meter, timer = Meter(engine, limit_bytes), StepTimer(device.type)
        seconds, losses, rates = [], [], []

        def step(number: int, phase_data: Any = phase_data, timer: Any = timer) -> Any:
            batches = phase_data.step_batches(number, global_batch=1, micro_batch=1)
            batches = [same_bounds(b, bounds).to(device) for b in batches]
            return train_step(engine, batches, recipe.optim.lr, timer)

        for number in range(wanted.warmup_steps + wanted.steps):
            meter.begin()
            began = time.perf_counter()
            done = step(number)
            meter.end()
            losses.append(done.loss)
            if number >= wanted.warmup_steps:
                seconds.append(time.perf_counter() - began)
                flops = {
                    "full": training_flops(config, done.num_tokens, done.pairs_full),
                    "causal": training_flops(config, done.num_tokens, done.pairs_causal),
                }
                rate = mfu(flops, seconds=seconds[-1], num_devices=1, peak=peak_flops_per_second)
                rates.append({"tokens_per_second": done.num_tokens / seconds[-1], **rate})
        number = wanted.warmup_steps + wanted.steps
        kernels = attention_kernels(profile(lambda n=number, s=step: s(n), device.type)) if wanted.profiled else {}
        if not cuda:
            meter.watch_cpu(lambda n=number, s=step: s(n))
        engine.step = meter._update
        rows.append({
            **asdict(wanted), "documents": kind, "losses": losses, "step_seconds": seconds,
            **{name: statistics.median(rate[name] for rate in rates) for name in rates[0]},
            "peak_allocated_bytes": meter.allocated_bytes, "peak_reserved_bytes": meter.reserved_bytes,
            "activation_bytes": meter.passes_bytes - bucket_bytes(engine), "bucket_bytes": bucket_bytes(engine),
            "formula_bytes": formula.peak_bytes,
            "formula_host_bytes": formula.host_bytes, "attention_kernels": kernels, "precision": precision,
            "device": torch.cuda.get_device_name() if cuda else "CPU", "torch": torch.__version__,
        })  # fmt: skip
    return rows


def same_bounds(batch: Any, size: int) -> Any:
    """The batch with `size` piece_bounds, so that compiled blocks see one shape for every kind of documents."""
    import torch

    more = size - batch.piece_bounds.numel()
    if more <= 0:
        return batch
    return replace(
        batch, piece_bounds=torch.nn.functional.pad(batch.piece_bounds, (0, more), value=batch.tokens_BT.numel())
    )


def run_as_arm(job: argparse.Namespace) -> int:
    import torch

    wanted = Try(**{**json.loads(job.arm), "documents": tuple(json.loads(job.arm)["documents"])})
    try:
        rows = run_try(wanted, job.work, job.trial, int(job.memory_gib * 2**30))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # cuBLAS and pinned host memory say it in words of their own.
        if not (isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|ALLOC_FAILED", str(error))):
            raise
        print(error)
        return OUT_OF_MEMORY
    job.out.write_text(json.dumps(rows))
    return 0


# --- the tries --------------------------------------------------------------------------------------------


def attempt(job: argparse.Namespace, work: Path, wanted: Try) -> list[dict[str, Any]] | None:
    """The rows of a try in its own process; None if it does not fit. Raises ArmFailed for anything else."""
    folder = work / wanted.name
    folder.mkdir()
    arguments = ["--memory-gib", str(job.memory_gib), *(["--trial"] if job.trial else [])]
    environment = {**arm_environment(), **({"DS_ACCELERATOR": "cpu"} if job.trial else {})}
    try:
        rows: Any = run_arm(Path(__file__), json.dumps(asdict(wanted)), folder, "try", arguments, environment)
        return rows
    except ArmFailed as error:
        if error.returncode != OUT_OF_MEMORY:
            raise
        return None
    finally:
        shutil.rmtree(folder)


def longest(fits: Callable[[int], bool], start: int, unit: int, most: int) -> int:
    """The largest multiple of `unit` up to `most` that fits, if whatever is shorter than a length that fits, fits too;
    0 for none. Doubles from `start`, then bisects."""
    good, bad, length = 0, most + unit, start
    while length < bad:
        if fits(length):
            good, length = length, min(2 * length, most) if length < most else bad
        else:
            bad = length
    while bad - good > unit:
        middle = (good + bad) // 2 // unit * unit
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def loss_differences(rows: list[dict[str, Any]]) -> list[str]:
    """Policies whose first loss is not that of the first row with the same length and documents."""
    expected: dict[tuple[int, str], float] = {}
    problems = []
    for row in rows:
        loss = row["losses"][0]
        wanted = expected.setdefault((row["seq_len"], row["documents"]), loss)
        if not abs(loss - wanted) <= LOSS_TOLERANCE * wanted:  # so that nan is a problem too
            problems.append(
                f"{row['seq_len']:,} tokens, {row['documents']}, {row['policy']}: {loss:.5f}, not {wanted:.5f}"
            )
    return problems


def measure_length(job: argparse.Namespace, work: Path, seq_len: int, policy: str, report: dict[str, Any]) -> None:
    for tile_tokens in (job.tile_tokens,) if job.tiled else (None, job.tile_tokens):
        wanted = Try(seq_len, policy, tile_tokens, tuple(job.documents), job.warmup_steps, job.steps, job.profile)
        rows = attempt(job, work, wanted)
        if rows is not None:
            report["rows"] += rows
            return
    report["does_not_fit"].append({"seq_len": seq_len, "policy": policy})


def search(job: argparse.Namespace, work: Path, policy: str, report: dict[str, Any], console: Console) -> None:
    entry: dict[str, Any] = {
        "policy": policy,
        "tile_tokens": job.tile_tokens,
        "longest": None,
        "confirmed": None,
        "tries": [],
    }
    report["longest"].append(entry)

    def fits(seq_len: int) -> bool:
        began = time.perf_counter()
        rows = attempt(job, work, Try(seq_len, policy, job.tile_tokens, ("short",), 0, 1, profiled=False))
        tried = {"seq_len": seq_len, "fits": rows is not None, "seconds": time.perf_counter() - began}
        if rows is not None:
            tried |= {k: rows[0][k] for k in ("peak_allocated_bytes", "activation_bytes", "formula_bytes")}
        entry["tries"].append(tried)
        save(job, report)
        verdict = "fits" if rows is not None else "does not fit"
        console.print(f"  {policy}, tiles, {seq_len:,} tokens: {verdict}", highlight=False)
        return rows is not None

    entry["longest"] = found = longest(fits, job.search_from, job.search_unit, job.search_most)
    save(job, report)
    if found and job.confirm:
        # Short documents first: blocks are compiled in that step, and the other's time is its own.
        rows = attempt(job, work, Try(found, policy, job.tile_tokens, ("short", "one"), 0, 1, profiled=False))
        entry["confirmed"] = rows is not None
        report["rows"] += rows[1:] if rows else []


def run_all(job: argparse.Namespace, work: Path, report: dict[str, Any], console: Console) -> None:
    """A try that fails by a defect is told, and the others go on."""
    jobs: list[tuple[str, Callable[[], None]]] = [
        (f"{seq_len:,} tokens, {policy}", partial(measure_length, job, work, seq_len, policy, report))
        for seq_len in job.lengths
        for policy in job.policies
    ]
    jobs += [(f"longest with {policy}", partial(search, job, work, policy, report, console)) for policy in job.search]
    for name, do in jobs:
        try:
            with console.status(name):
                do()
        except ArmFailed as error:
            report["failures"].append(f"{name}: {error.log_tail}")
            console.print(report["failures"][-1], style="red", markup=False, highlight=False)
        save(job, report)


def save(job: argparse.Namespace, report: dict[str, Any]) -> None:
    """After every try: what was measured is not lost when time runs out."""
    if job.json:
        job.json.write_text(json.dumps(report, indent=1) + "\n")


# --- what is shown ----------------------------------------------------------------------------------------


def show(report: dict[str, Any], console: Console) -> None:
    table = Table(title="Each step is one sequence; medians", title_justify="left")
    for column in ("tokens", "documents", "policy", "MLP tiles", "tokens/s", "step, s", "MFU full", "causal",
                   "peak GiB allocated / reserved", "activations GiB", "/ formula", "loss first"):  # fmt: skip
        table.add_column(column)
    for r in report["rows"]:
        rates = [f"{r[k]:.1%}" if k in r else "-" for k in ("mfu/full", "mfu/causal")]
        table.add_row(
            f"{r['seq_len']:,}", r["documents"], r["policy"], f"{r['tile_tokens'] or '-'}",
            f"{r['tokens_per_second']:,.0f}", f"{statistics.median(r['step_seconds']):.3f}", *rates,
            f"{r['peak_allocated_bytes'] / 2**30:.1f} / {r['peak_reserved_bytes'] / 2**30:.1f}",
            f"{r['activation_bytes'] / 2**30:.2f}", f"{r['activation_bytes'] / r['formula_bytes']:.3f}",
            f"{r['losses'][0]:.4f}",
        )  # fmt: skip
    console.print(table)
    kernels = {name: None for r in report["rows"] for name in list(r["attention_kernels"])[:2]}
    for name in kernels:
        console.print(f"attention ran in {name[:150]}", markup=False, highlight=False)
    for missing in report["does_not_fit"]:
        console.print(
            f"{missing['policy']} does not fit at {missing['seq_len']:,} tokens, tiles or not", highlight=False
        )
    for entry in report["longest"]:
        word = {
            True: "confirmed by one document",
            False: "NOT confirmed: one document did not fit",
            None: "not confirmed",
        }
        if entry["longest"] is None:
            continue
        console.print(
            f"longest with {entry['policy']}, tiles of {entry['tile_tokens']:,}: {entry['longest']:,} tokens "
            f"({word[entry['confirmed']]})",
            highlight=False,
        )


def show_aims(report: dict[str, Any], console: Console) -> None:
    """Met or not, of what was measured; on another device the aims say nothing."""
    if "H200" not in report["device"]:
        return
    for seq_len, aim in AIMS.items():
        rates = {r["policy"]: r["tokens_per_second"] for r in report["rows"]
                 if (r["seq_len"], r["documents"]) == (seq_len, "one")}  # fmt: skip
        if rates:
            best = max(rates, key=lambda policy: rates[policy])
            word = "met" if rates[best] >= aim else "not met"
            console.print(
                f"aim {aim:,} tokens/s at {seq_len:,}: {rates[best]:,.0f} with {best}, {word}", highlight=False
            )
    lengths = [r["seq_len"] for r in report["rows"] if r["documents"] == "one" and "offload" not in r["policy"]]
    if longer := [n for n in lengths if n > max(AIMS)]:
        word = "met" if max(longer) >= AIM_LONGEST else "not met"
        console.print(f"aim {AIM_LONGEST:,} tokens, nothing offloaded: {max(longer):,}, {word}", highlight=False)


def device_name() -> str:
    """By another process: this one would hold some of the device's memory ever after."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return subprocess.run(
        command, env={**os.environ, **arm_environment()}, capture_output=True, text=True
    ).stdout.strip()


def number(text: str) -> int:
    """32Ki, 600K or digits."""
    from slm.fields import parse_count

    return int(parse_count(text))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ",".join(POLICIES)
    parser.add_argument("--lengths", help="tokens of a sequence, such as 32Ki,128Ki (the default); none for none")
    parser.add_argument("--policies", default="none,selective,full,selective+offload", help=f"of {names}")
    parser.add_argument("--documents", default="one,packed", help="of one,packed,short")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each kind of documents")
    parser.add_argument("--warmup-steps", type=int, default=1)
    parser.add_argument("--tile-tokens", help="of the MLP, where a policy does not fit without, and in the search")
    parser.add_argument("--tiled", action="store_true", help="tiles at once, without a try to do without")
    parser.add_argument("--search", default="full", help=f"policies to search the longest sequence for, of {names}")
    parser.add_argument("--no-search", dest="search", action="store_const", const="")
    parser.add_argument("--search-from", help="the first length that is tried; 128Ki")
    parser.add_argument("--search-unit", help="how finely it is bisected; 32Ki")
    parser.add_argument("--search-most", help="no longer than this; 4Mi")
    parser.add_argument(
        "--no-profile", dest="profile", action="store_false", help="leave out the step that names kernels"
    )
    parser.add_argument("--no-confirm", dest="confirm", action="store_false", help="leave out the one long document")
    parser.add_argument(
        "--memory-gib", type=float, default=0.0, help="pretend that the device has no more; 0: all of it"
    )
    parser.add_argument("--trial", action="store_true", help="a tiny shape and short lengths on the CPU: no result")
    parser.add_argument("--json", type=Path, help="write everything here too, after every try")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # the rest: how this file calls itself
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    job = parser.parse_args()
    if job.arm:
        return run_as_arm(job)
    import torch

    console = Console(width=None if sys.stdout.isatty() else 200)
    if not job.trial and not torch.cuda.is_available():
        console.print(
            "This benchmark needs a CUDA device, and torch sees none here. --trial tries the script on a CPU."
        )
        return 3
    defaults = ("256,512", "64", "128", "64", "2Ki") if job.trial else ("32Ki,128Ki", "8Ki", "128Ki", "32Ki", "4Mi")
    lengths = job.lengths or defaults[0]
    job.lengths = [] if lengths == "none" else [number(x) for x in lengths.split(",")]
    fields = ("tile_tokens", "search_from", "search_unit", "search_most")
    for field, default in zip(fields, defaults[1:], strict=True):
        setattr(job, field, number(getattr(job, field) or default))
    for name, known in (("policies", POLICIES), ("documents", ("one", "packed", "short")), ("search", POLICIES)):
        setattr(job, name, [x for x in getattr(job, name).split(",") if x])
        if unknown := set(getattr(job, name)) - set(known):
            parser.error(f"--{name} {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    device = "CPU" if job.trial else device_name()
    report: dict[str, Any] = {"device": device, "machine": machine(), "torch": torch.__version__, "trial": job.trial}
    report |= {"rows": [], "does_not_fit": [], "longest": [], "failures": []}
    console.print(f"[bold]{device}[/bold], torch {torch.__version__}; {report['machine']}", highlight=False)
    with tempfile.TemporaryDirectory(prefix="long-context-") as work:
        run_all(job, Path(work), report, console)
    report["problems"] = loss_differences(report["rows"])
    save(job, report)
    if report["rows"] or report["longest"]:
        show(report, console)
        show_aims(report, console)
    for problem in report["problems"]:
        console.print(f"not the same work: {problem}", style="red", highlight=False)
    return 1 if report["problems"] or report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
