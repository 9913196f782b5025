"""What distillation from a cache adds to a training step, in time and memory; and how fast rows are decoded.

    python benchmarks/distill_speed.py --json speed.json          # the 1B shape at 8K tokens on a GPU, else a small one
    python benchmarks/distill_speed.py --rounds 1 --tokens 256    # a trial

A step is forward and backward of one batch, with the same weights and tokens in every arm: cross-entropy; distillation from
cached rows, k = 64 (top_k) and k = 12 (sampled), the bytes on the host as PhaseData gives them, moved and decoded inside;
and, for memory, two-model distillation as it is usually written: a teacher of the same shape beside the student, whole logits of
both, torch's kl_div. (The optimiser is the same in all and left out.) Arms run in turn, in rounds, each in a process of its own;
before any ratio is printed their cross-entropies, which every arm's loss contains or reports, must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from side_by_side import Spread, machine, run_rounds  # noqa: E402

ARMS = ("cross-entropy", "cache, top_k 64", "cache, sampled 12", "two models, whole logits")
CPU_SHAPE = dict(vocab_size=32_000, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
                 intermediate_size=1024, max_position_embeddings=2048, rope_scaling=None)  # fmt: skip


def cached_rows(kind: str, k: int, num_tokens: int, vocab_size: int) -> Any:
    """Rows of random entries: what is in them does not change the work."""
    from slm.distill.codec import RawTargets, pack_index

    rng = np.random.default_rng(0)
    index = np.stack([rng.choice(vocab_size, k, replace=False) for _ in range(512)])[rng.integers(0, 512, num_tokens)]
    low, high = pack_index(index[:, None], vocab_size)
    planes = {
        "idx_lo": low,
        "idx_hi": high,
        "val": np.sort(rng.integers(0, 200, (num_tokens, 1, k)).astype(np.uint8), axis=2),
        "log_tail": np.full((num_tokens, 1), -1.5, np.float32),
        "heads": np.full((num_tokens, 1), 4, np.uint8),
    }
    return RawTargets.of(kind, (1.0,), planes)


def run_arm(arm: str, tokens: int, steps: int) -> dict[str, Any]:
    import resource

    import torch

    from slm import SLMForCausalLM
    from slm.losses import Distillation, SparseTarget
    from slm.model.config import ModelConfig

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(1)
    config = ModelConfig.preset("llama3.2-1b") if cuda else ModelConfig(**CPU_SHAPE)
    dtype = torch.bfloat16 if cuda else torch.float32
    seq_len = min(8192 if cuda else 512, tokens)
    rows = tokens // seq_len
    model = SLMForCausalLM(config, seed=0).to(device, dtype)
    ids = torch.randint(0, config.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.roll(-1, 1)
    kinds = {"cache, top_k 64": ("top_k", 64, "bucket"), "cache, sampled 12": ("sampled", 12, "sampled")}
    raw = cached_rows(*kinds[arm][:2], rows * seq_len, config.vocab_size) if arm in kinds else None
    teacher = SLMForCausalLM(config, seed=1).to(device, dtype).requires_grad_(False) if arm.startswith("two") else None

    def step() -> float:
        model.zero_grad(set_to_none=True)
        if raw is not None:
            target = SparseTarget(*raw.to(device).decode(1.0))
            loss, parts = model(ids, labels_BT=labels, distillation=Distillation((target,), 0.1, form=kinds[arm][2]))
            ce = parts[0]
        elif teacher is not None:
            student_NV = model(ids).flatten(0, 1).float()
            with torch.no_grad():
                log_p_NV = teacher(ids).flatten(0, 1).float().log_softmax(-1)
            ce = torch.nn.functional.cross_entropy(student_NV, labels.flatten(), reduction="sum")
            kl = torch.nn.functional.kl_div(student_NV.log_softmax(-1), log_p_NV, log_target=True, reduction="sum")
            loss = 0.1 * ce + 0.9 * kl
        else:
            loss, _ = model(ids, labels_BT=labels)
            ce = loss.detach()
        (loss / labels.numel()).backward()
        return float(ce) / labels.numel()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ce = step()
    times = []
    for _ in range(steps):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    )
    return {"seconds": float(np.median(times)), "ce": ce, "peak_bytes": int(peak), "device": str(device)}


def decoding(console: Console) -> dict[str, float]:
    """Tokens decoded a second of one core's time, best of 8."""
    import torch

    torch.set_num_threads(1)
    found = {}
    for kind, k in (("top_k", 64), ("sampled", 12)):
        raw, n = cached_rows(kind, k, 16_384, 128_256), 16_384
        best = min(_cpu_seconds(lambda raw=raw: raw.decode(1.0)) for _ in range(8))
        found[f"{kind} {k}"] = n / best
        aim = f" (aim 1: {'met' if n / best >= 1e6 else 'not met'})"
        console.print(f"decoding {kind} k = {k} on a CPU: {n / best / 1e6:.2f} M tokens/s a core{aim}", highlight=False)
    return found


def _cpu_seconds(run: Any) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of an arm in a round")
    parser.add_argument("--tokens", type=int, default=0, help="of a step; 0: 8,192 on a GPU, 2,048 on a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    job = parser.parse_args()
    if job.arm:
        import torch

        tokens = job.tokens or (8192 if torch.cuda.is_available() else 2048)
        job.out.write_text(json.dumps(run_arm(job.arm, tokens, job.steps)))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"[bold]{machine()}[/bold]", highlight=False)
    with tempfile.TemporaryDirectory(prefix="distill-speed-") as folder:
        arguments = ["--tokens", str(job.tokens), "--steps", str(job.steps)]
        results = run_rounds(Path(__file__), list(ARMS), job.rounds, Path(folder), arguments)
    base = results["cross-entropy"]
    tolerance = 1e-5 if base[0]["device"] == "cpu" else 1e-2
    for arm, rounds in results.items():
        if any(abs(r["ce"] - base[0]["ce"]) > tolerance * base[0]["ce"] for r in rounds):
            console.print(
                f"No ratios: {arm} computed another cross-entropy ({rounds[0]['ce']}, {base[0]['ce']}).", style="red"
            )
            return 1
    table = Table(
        title=f"a step on {base[0]['device']}, cross-entropy {base[0]['ce']:.5f} in every arm", title_justify="left"
    )
    for column in ("arm", "seconds (least–most)", "/ cross-entropy", "aim", "peak MiB", "/ two models"):
        table.add_column(column)
    limit = 1.10 if base[0]["device"] == "cpu" else 1.05
    dense = max(r["peak_bytes"] for r in results[ARMS[-1]])
    for arm, rounds in results.items():
        seconds = Spread.of([r["seconds"] for r in rounds])
        ratio = Spread.of([r["seconds"] / b["seconds"] for r, b in zip(rounds, base, strict=True)])
        aim = f"<= {limit:.2f}: {'met' if ratio.median <= limit else 'not met'}" if arm.startswith("cache") else ""
        peak = max(r["peak_bytes"] for r in rounds)
        table.add_row(arm, seconds.show(3), ratio.show(), aim, f"{peak / 2**20:,.0f}", f"{peak / dense:.2f}")
    console.print(table)
    found = {"arms": results, "decoded_tokens_per_second": decoding(console)}
    if job.json:
        job.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
