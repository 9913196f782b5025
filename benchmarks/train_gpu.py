"""The Llama 3.2 1B shape at 8K tokens in bfloat16 on one GPU: here and with the peers that are installed.

    python benchmarks/train_gpu.py --json results.json

Needs a CUDA device; without one it says so and exits with code 3. The arms, each in a process of its own, in
interleaved rounds, from one frozen init and the same batches (random tokens: speed does not depend on them):

    slm, slm_compiled   this project: its engine and model over DeepSpeed ZeRO-1, bfloat16
    hf                  transformers' LlamaForCausalLM, SDPA attention, float32 weights under autocast to
                        bfloat16 (what Trainer's bf16=True does), fused AdamW, a bare loop
    hf_checkpointing    the same with gradient checkpointing
    hf_liger            the same with Liger's fused kernels and loss, if liger-kernel is installed

A step is `--batch` sequences on every side. Each arm starts with all of them as one micro-batch; one that
runs out of memory is run again with half of that, accumulated, and the table says so. All arms keep float32
master weights, clip at 1.0 and use AdamW with the same decay groups. Transformers shifts the labels itself,
so every sequence has S-1 targets there, and here its last position is given no label.

Reported: tokens/s from the median step (CUDA events, after the warm-up); MFU against the device's dense
bfloat16 peak in two conventions, `full` (6 x matrix weights + 12 x layers x heads x head_dim x S per token)
and `causal` (half of the attention term); peak allocated and reserved memory of the timed steps; the
attention kernels that the profiler saw in one further step; and an 8192^3 bfloat16 product before and
after, which shows a slow or shared card.
Ratios are refused (exit code 1) if the losses differ from the reference's by more than bfloat16 explains.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from side_by_side import (
    REPOSITORY,
    ArmFailed,
    Results,
    Spread,
    loss_problems,
    machine,
    ratio,
    run_arm,
    slm_batches,
    slm_engine,
    slm_step,
)

PRESET = "llama3.2-1b"
LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
OPTIM: dict[str, Any] = dict(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, grad_clip=CLIP)
OURS, PEERS = ["slm", "slm_compiled"], ["hf", "hf_checkpointing", "hf_liger"]
AIM_TOKENS_PER_SECOND = 45_000  # on one H200
LOSS_TOLERANCE = 1e-2  # relative: what bfloat16 products summed in another order explain over a few steps
OUT_OF_MEMORY = 77
# Parts of the names of flash-attention 2 and 3, cuDNN's, the memory-efficient and flex attention's kernels.
ATTENTION = re.compile(r"flash|fmha|sdpa|attention|flex", re.IGNORECASE)

Step = Callable[[Any], Any]  # numpy tokens [batch, S] -> mean loss of the step, a tensor on the device


# --- what the arms are given ------------------------------------------------------------------------------


def attention_kernels(kernel_seconds: dict[str, float]) -> dict[str, float]:
    """Those of the profiled kernels that compute attention, longest first."""
    found = {name: seconds for name, seconds in kernel_seconds.items() if ATTENTION.search(name)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def make_tokens(steps: int, batch: int, seq_len: int, vocab: int) -> Any:
    """int32 [steps, batch, seq_len], frequencies after Zipf."""
    import numpy as np

    rng = np.random.default_rng(0)
    frequency = 1.0 / np.arange(1, vocab + 1)
    return rng.choice(vocab, size=(steps, batch, seq_len), p=frequency / frequency.sum()).astype(np.int32)


def prepare(job: argparse.Namespace) -> dict[str, Any]:
    """Write init/ (bfloat16 safetensors, Hugging Face names) and tokens.npy."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from slm.model.config import ModelConfig
    from slm.model.hf import config_to_hf

    config = ModelConfig.preset(PRESET)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(LlamaConfig(**config_to_hf(config)))
    model.to(torch.bfloat16)
    model.save_pretrained(job.work / "init")
    np.save(job.work / "tokens.npy", make_tokens(job.steps, job.batch, job.seq_len, config.vocab_size))
    return {"num_parameters": sum(p.numel() for p in model.parameters())}


def gemm() -> dict[str, Any]:
    """TFLOP/s of a bfloat16 product of two 8192 x 8192 matrices."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    start, repeats = time.perf_counter(), 50
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return {"tflops": repeats * 2 * 8192**3 / (time.perf_counter() - start) / 1e12}


# --- the arms ---------------------------------------------------------------------------------------------


def build_hf(job: argparse.Namespace, checkpointing: bool = False, liger: bool = False) -> Step:
    import torch
    from transformers import LlamaForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model: Any = LlamaForCausalLM.from_pretrained(
        job.work / "init", dtype=torch.float32, attn_implementation="sdpa", use_cache=False
    )
    model = model.cuda().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)

    def step(tokens_BS: Any) -> Any:
        pinned = torch.from_numpy(tokens_BS.astype("int64")).pin_memory()
        micro_batches = pinned.to("cuda", non_blocking=True).split(job.micro_batch)
        total = torch.zeros((), device="cuda")
        for tokens in micro_batches:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss / len(micro_batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def build_slm(job: argparse.Namespace, compiled: bool) -> Step:
    from slm.recipe import Optim

    engine = slm_engine(
        job.work / "init", optim=Optim(**OPTIM), zero_json=REPOSITORY / "ds_configs" / "zero1.json",
        batch=job.batch, micro_batch=job.micro_batch, seq_len=job.seq_len,
        precision="bfloat16", compiled=compiled,
    )  # fmt: skip

    return lambda tokens_BS: slm_step(engine, slm_batches(tokens_BS, None, job.micro_batch), LR)


# --- one arm's process ------------------------------------------------------------------------------------


def build(job: argparse.Namespace) -> Step:
    if job.arm.startswith("slm"):
        return build_slm(job, compiled=job.arm == "slm_compiled")
    return build_hf(job, checkpointing=job.arm == "hf_checkpointing", liger=job.arm == "hf_liger")


def measure(job: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch

    from slm.metrics import peak_flops
    from slm.model.config import ModelConfig
    from slm.plan import flops_per_token

    step = build(job)
    tokens = np.load(job.work / "tokens.npy")
    losses, events = [], []
    for i in range(job.steps):
        if i == job.warmup_steps:
            torch.cuda.reset_peak_memory_stats()
        losses.append(step(tokens[i]))
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
    torch.cuda.synchronize()
    pairs = zip(events[job.warmup_steps - 1 : -1], events[job.warmup_steps :], strict=True)
    seconds = [before.elapsed_time(after) / 1000 for before, after in pairs]
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    kernels = profile(lambda: step(tokens[-1]))  # after the figures: the profiler is not free
    median, device = statistics.median(seconds), torch.cuda.get_device_name()
    tokens_per_second = job.batch * job.seq_len / median
    config, peak = ModelConfig.preset(PRESET), peak_flops(device)
    full, causal = (flops_per_token(config, job.seq_len, causal=causal) for causal in (False, True))
    return {
        "losses": [float(x) for x in losses], "step_seconds": seconds, "median_seconds": median,
        "p95_seconds": sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1],
        "tokens_per_second": tokens_per_second,
        "tflops_full": tokens_per_second * full / 1e12, "tflops_causal": tokens_per_second * causal / 1e12,
        "mfu_full": tokens_per_second * full / peak if peak else None,
        "mfu_causal": tokens_per_second * causal / peak if peak else None,
        "peak_allocated_bytes": allocated, "peak_reserved_bytes": reserved,
        "attention_kernels": attention_kernels(kernels), "micro_batch": job.micro_batch,
        "device": device, "torch": torch.__version__, "cuda": torch.version.cuda,
    }  # fmt: skip


def profile(step: Callable[[], Any], device_type: str = "cuda") -> dict[str, float]:
    """Seconds on the device of every kernel of one step (on a CPU: of every operator), by name."""
    import torch
    from torch.profiler import ProfilerActivity

    cuda = device_type == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    ) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [e for e in profiler.key_averages() if e.device_type == kind]
    return {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6 for e in events}


def run_as_arm(job: argparse.Namespace) -> int:
    import torch

    try:
        result = {"prepare": lambda: prepare(job), "gemm": gemm}.get(job.arm, lambda: measure(job))()
    except torch.cuda.OutOfMemoryError as error:
        print(error)
        return OUT_OF_MEMORY
    job.out.write_text(json.dumps(result))
    return 0


# --- the comparison ---------------------------------------------------------------------------------------


def run_fitting(job: argparse.Namespace, arm: str, name: str, work: Path, micro_batch: int) -> dict[str, Any]:
    """The arm with the largest micro-batch that fits: `micro_batch`, or its halves."""
    while True:
        arguments = ["--steps", job.steps, "--warmup-steps", job.warmup_steps, "--batch", job.batch,
                     "--seq-len", job.seq_len, "--micro-batch", micro_batch]  # fmt: skip
        try:
            return run_arm(Path(__file__), arm, work, name, [str(x) for x in arguments], arm_environment())
        except ArmFailed as error:
            if error.returncode != OUT_OF_MEMORY or micro_batch == 1:
                raise
            micro_batch //= 2


def arm_environment() -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
            "HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # fmt: skip


def run_all(job: argparse.Namespace, work: Path, console: Console) -> tuple[Results, dict[str, str]]:
    """Every arm in every round; those that cannot run are left out, with the reason."""
    results: Results = {arm: [] for arm in job.arms}
    failures: dict[str, str] = {}
    fitting = dict.fromkeys(job.arms, job.micro_batch or job.batch)
    for turn in range(job.rounds):
        for arm in job.arms if turn % 2 == 0 else reversed(job.arms):
            if arm in failures:
                continue
            with console.status(f"round {turn + 1} of {job.rounds}: {arm}"):
                try:
                    results[arm].append(run_fitting(job, arm, f"{arm}-{turn}", work, fitting[arm]))
                    fitting[arm] = results[arm][-1]["micro_batch"]
                except ArmFailed as error:
                    no_room = error.returncode == OUT_OF_MEMORY
                    failures[arm] = "out of memory with one sequence" if no_room else str(error)
    return {arm: rounds for arm, rounds in results.items() if arm not in failures}, failures


def show(results: Results, console: Console) -> None:
    table = Table(title="Each arm (median over the rounds, least–most)", title_justify="left")
    for column in (
        "arm",
        "micro-batch",
        "tokens/s",
        "step p50 / p95, s",
        "MFU full",
        "MFU causal",
        "peak GiB allocated / reserved",
        "loss first",
        "last",
    ):
        table.add_column(column)
    for arm, rounds in results.items():
        r = rounds[0]
        mfu = ["-", "-"]
        if r["mfu_full"]:
            mfu = [f"{Spread.of([x[k] for x in rounds]).median:.1%}" for k in ("mfu_full", "mfu_causal")]
        table.add_row(
            arm, str(r["micro_batch"]), Spread.of([x["tokens_per_second"] for x in rounds]).show(0),
            f"{r['median_seconds']:.3f} / {r['p95_seconds']:.3f}", *mfu,
            f"{r['peak_allocated_bytes'] / 2**30:.1f} / {r['peak_reserved_bytes'] / 2**30:.1f}",
            f"{r['losses'][0]:.4f}", f"{r['losses'][-1]:.4f}",
        )  # fmt: skip
    console.print(table)
    for arm, rounds in results.items():
        kernels = list(rounds[0]["attention_kernels"].items())[:4]
        lines = [f"  {seconds * 1000:8.1f} ms a step  {name[:120]}" for name, seconds in kernels]
        listing = "\n".join(lines) or "  no kernel that this script knows by name"
        console.print(f"{arm}: attention ran in\n{listing}", markup=False, highlight=False)


def show_ratios(results: Results, console: Console) -> list[dict[str, Any]]:
    table = Table(title="Ours / peer (ratio in each round: median, least–most)", title_justify="left")
    for column in ("ours / peer", "tokens/s", "peak memory allocated"):
        table.add_column(column)
    rows = []
    for ours in (arm for arm in OURS if arm in results):
        for peer in (arm for arm in PEERS if arm in results):
            speed = ratio(results, "tokens_per_second", ours, peer)
            memory = ratio(results, "peak_allocated_bytes", ours, peer)
            table.add_row(f"{ours} / {peer}", speed.show(), memory.show())
            spreads = {"tokens_per_second": vars(speed), "peak_memory": vars(memory)}
            rows.append({"ours": ours, "peer": peer, **spreads})
    if rows:
        console.print(table)
    return rows


def compare(job: argparse.Namespace, work: Path, console: Console) -> int:
    import torch

    device, host = torch.cuda.get_device_name(), machine()
    console.print(
        f"[bold]{device}[/bold], torch {torch.__version__}; {host}\n"
        f"{PRESET}, {job.batch} x {job.seq_len} tokens, bfloat16; {job.warmup_steps} warm-up + "
        f"{job.steps - job.warmup_steps} timed steps, {job.rounds} rounds",
        highlight=False,
    )
    try:
        run_fitting(job, "prepare", "prepare", work, 1)
        before = run_fitting(job, "gemm", "gemm-before", work, 1)["tflops"]
        results, failures = run_all(job, work, console)
        after = run_fitting(job, "gemm", "gemm-after", work, 1)["tflops"]
    except ArmFailed as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    for arm, reason in failures.items():
        console.print(f"{arm} did not run: {reason}", style="red", markup=False, highlight=False)
    console.print(f"8192^3 bfloat16 product: {before:.0f} TFLOP/s before, {after:.0f} after", highlight=False)
    if not results:
        return 1
    reference = next(arm for arm in PEERS + OURS if arm in results)
    problems = loss_problems(results, reference, {1: LOSS_TOLERANCE, job.steps: LOSS_TOLERANCE})
    show(results, console)
    ratios = []
    if problems:
        listing = "\n  ".join(["No ratios: the arms did not do the same work.", *problems])
        console.print(listing, style="red", markup=False, highlight=False)
    else:
        ratios = show_ratios(results, console)
    rates = {arm: [r["tokens_per_second"] for r in rounds] for arm, rounds in results.items()}
    ours = [Spread.of(rates[arm]).median for arm in OURS if arm in rates]
    if ours and "H200" in device:
        word = "met" if max(ours) >= AIM_TOKENS_PER_SECOND else "not met"
        console.print(f"Aim of {AIM_TOKENS_PER_SECOND:,} tokens/s on one H200: {max(ours):,.0f}, {word}.")
    if job.json:
        job.json.write_text(json.dumps(
            {"device": device, "machine": host, "gemm_tflops": [before, after], "problems": problems,
             "failures": failures, "ratios": ratios, "runs": results}, indent=1))  # fmt: skip
    return 1 if problems or failures else 0


def installed_arms() -> list[str]:
    present = {"hf": "transformers", "hf_checkpointing": "transformers", "hf_liger": "liger_kernel"}
    return [a for a in OURS + PEERS if a not in present or importlib.util.find_spec(present[a])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="times that every arm runs, order alternating")
    parser.add_argument("--steps", type=int, default=13, help="optimiser steps of each run, warm-up included")
    parser.add_argument("--warmup-steps", type=int, default=3, help="steps before the timing starts")
    parser.add_argument("--batch", type=int, default=4, help="sequences of one step")
    parser.add_argument("--micro-batch", type=int, default=0, help="most sequences at once; 0: all")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a sequence")
    parser.add_argument("--arms", type=lambda x: x.split(","), help="of " + ",".join(OURS + PEERS))
    parser.add_argument("--json", type=Path, help="also write every run and ratio to this file")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # the rest: how this file calls itself
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    job = parser.parse_args()
    if job.arm:
        return run_as_arm(job)
    import torch

    console = Console(width=None if sys.stdout.isatty() else 160)
    if not torch.cuda.is_available():
        console.print("This benchmark needs a CUDA device, and torch sees none here. "
                      "benchmarks/train_peers.py compares on a CPU.")  # fmt: skip
        return 3
    job.arms = job.arms or installed_arms()
    if unknown := set(job.arms) - set(installed_arms()):
        parser.error(f"arms {sorted(unknown)} are unknown or not installed; there are {installed_arms()}")
    if not 0 < job.warmup_steps < job.steps:
        parser.error("--steps must be greater than --warmup-steps, and that at least 1")
    if job.batch & (job.batch - 1):
        parser.error("--batch must be a power of two, so that halving it for memory stays whole")
    with tempfile.TemporaryDirectory(prefix="train_gpu-") as work:
        return compare(job, Path(work), console)


if __name__ == "__main__":
    sys.exit(main())
