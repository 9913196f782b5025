"""Peak activation memory of a training step against the formula of `slm plan`, for each policy of recomputation.

    python benchmarks/activation_memory.py                     # on a CPU: a small shape, float32, exact
    python benchmarks/activation_memory.py --device cuda       # Llama 3.2 1B's shape at 8K tokens in bfloat16

Each policy, with and without tiles, runs one forward and backward pass of the same model on the same tokens. Measured
are the bytes that stay allocated when the forward pass is over (`kept`, with what the loss keeps besides) and the peak
of both passes, above what was allocated before: weights and their gradients exist already. On a CPU from torch's profiler,
which notes every allocation and release of tensors; on a GPU from the allocator's own peak. Formula: slm/activations.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from slm import ModelConfig, SLMForCausalLM
from slm.activations import POLICIES, activation_memory

SHAPES: dict[str, dict[str, Any]] = {
    "cpu": dict(preset="cpu-small", tokens=1024, tile_tokens=128),
    "cuda": dict(preset="llama3.2-1b", tokens=8192, tile_tokens=1024),
}


def measure(model: SLMForCausalLM, tokens_BT: torch.Tensor) -> tuple[int, int]:
    """(bytes kept after the forward pass, peak of both passes), over what is there before. Weights have gradients."""

    def step() -> None:
        model(tokens_BT, labels_BT=tokens_BT)[0].backward()

    step()  # makes what is made once: gradients, workspaces, compiled graphs
    if tokens_BT.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(tokens_BT, labels_BT=tokens_BT)[0]
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        torch.cuda.synchronize()
        return kept, torch.cuda.max_memory_allocated() - before
    losses = []
    kept, _ = _allocated(lambda: losses.append(model(tokens_BT, labels_BT=tokens_BT)[0]))
    losses.clear()
    _, peak = _allocated(step)
    return kept, peak


def _allocated(work: Any) -> tuple[int, int]:
    """(allocated less released, the most of it at any time) by the profiler's record of the CPU's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return now, peak


def compare(config: ModelConfig, num_tokens: int, tile_tokens: int, device: str, offload: bool) -> list[dict[str, Any]]:
    """One row for each policy, with and without tiles: measured and formula, in bytes."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = SLMForCausalLM(config, seed=None).to(dtype)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, config.vocab_size, (1, num_tokens), generator=generator).to(device)
    rows = []
    for policy in POLICIES:
        for tile in (None, tile_tokens):
            model.recompute = policy
            model.offload_activations = offload and policy != "none"
            for block in model.model.layers:
                block.mlp_tile_tokens = tile
            kept, peak = measure(model, tokens_BT)
            formula = activation_memory(
                config,
                num_tokens,
                policy,
                tile_tokens=tile,
                offload=model.offload_activations,
                value_bytes=dtype.itemsize,
                device=device,
            )
            rows.append({
                "policy": policy,
                "tile_tokens": tile,
                "kept": kept,
                "kept_formula": formula.between_bytes,
                "peak": peak,
                "peak_formula": formula.peak_bytes,
            })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--preset", help="shape of the model")
    parser.add_argument("--tokens", type=int, help="one sequence of so many")
    parser.add_argument("--tile-tokens", type=int)
    parser.add_argument("--offload", action="store_true", help="checkpoints in host memory (cuda)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured", file=sys.stderr)
        return 3
    if args.offload and args.device == "cpu":
        parser.error("--offload moves what is kept from a GPU to the host: use --device cuda")
    shape = SHAPES[args.device]
    preset, tokens = args.preset or shape["preset"], args.tokens or shape["tokens"]
    rows = compare(
        ModelConfig.preset(preset), tokens, args.tile_tokens or shape["tile_tokens"], args.device, args.offload
    )
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    table = Table("policy", "tiles", "kept MiB", "measured / formula", "peak MiB", "measured / formula")
    table.title = f"{preset}, {tokens:,} tokens, {where}, torch {torch.__version__}"
    for row in rows:
        table.add_row(
            row["policy"],
            str(row["tile_tokens"] or "-"),
            f"{row['kept'] / 2**20:,.1f}",
            f"{row['kept'] / row['kept_formula']:.3f}",
            f"{row['peak'] / 2**20:,.1f}",
            f"{row['peak'] / row['peak_formula']:.3f}",
        )
    Console(width=110).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
