"""Text generation against transformers' `generate`: the same weights, prompts and greedy tokens, turn by turn in one process.

    python benchmarks/generate.py --json generate.json       # a small shape on a CPU; the 1B shape in bfloat16 on a GPU
    python benchmarks/generate.py --rounds 1 --new 16         # a trial

Random weights, drawn wide so that the greedy text varies, written once as a Hugging Face folder that every arm loads. Before
anything is timed all arms write their tokens, which must be equal: every one in float32; in bfloat16, where two sums in another
order can change the likeliest token, up to a row's first such place, and how many tokens that is gets printed. A time is of a
whole call, the prompt included. Rounds go through the arms in turn, and back; ratios are taken round by round.

int8 and int4 are other weights (`slm quantize`), so other tokens: their speed alone is compared.

On a GPU the bound is what a token must read, all weights of the matrix products once and the cache, at the bandwidth of a large
copy measured beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from side_by_side import Spread, machine

from slm.model.hf import read_config

OURS, PEER = "this project", "transformers"
ARMS = (PEER, OURS, f"{OURS}, compiled", f"{OURS}, int8", f"{OURS}, int4")


def folders(shape: str, work: Path, arms: list[str]) -> dict[str, Path]:
    """The folder of each arm's weights."""
    from slm import SLMForCausalLM
    from slm.model.config import ModelConfig

    model = SLMForCausalLM(ModelConfig.preset(shape, initializer_range=0.1), seed=0)
    model.save_pretrained(work / "float")
    found = dict.fromkeys(arms, work / "float")
    del model
    for arm in arms:
        if arm.endswith(("int8", "int4")):
            from slm.model.quantized_files import Quantization
            from slm.quantize import quantize

            quantize(
                str(work / "float"), work / arm[-4:], Quantization(int(arm[-1]), None, embeddings=True), measure=False
            )
            found[arm] = work / arm[-4:]
    return found


def arm_of(name: str, folder: Path, new: int, device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Prompts [B, T] -> [B, T + new]."""
    if name == PEER:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        theirs.to(device).eval()
        return lambda ids: theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=0,
            eos_token_id=None,
        )
    from slm.loading import load_model
    from slm.model.decode import join_projections

    model = join_projections(load_model(folder, device)[0])
    compiled = name.endswith("compiled")
    return lambda ids: model.generate(ids, do_sample=False, max_new_tokens=new, compiled=compiled)


def agreement(ours: torch.Tensor, theirs: torch.Tensor, prompt: int) -> tuple[int, int]:
    """(new tokens that agree up to each row's first other one, new tokens)."""
    same = (ours == theirs)[:, prompt:]
    return int(same.int().cumprod(1).sum()), same.numel()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s read by a copy of 2 GiB; the least of five."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(seconds[1:])  # it reads and writes


def bytes_of_a_token(folder: Path, batch: int, length: int, weight_bytes: float) -> float:
    """Weights of the matrix products, once for all rows, and keys and values of `length` tokens for each, in bfloat16."""
    config = read_config(folder)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * batch
    return config.matmul_parameters() * weight_bytes + cache * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="a preset; cpu-small, or llama3.2-1b on a GPU")
    parser.add_argument("--batch", default="1,16", help="rows, comma-separated (1,16)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--new", type=int, default=128, help="tokens to add (128)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="of torch on a CPU (0: its own choice)")
    parser.add_argument("--arms", default=",".join(ARMS).replace(f"{OURS}, ", f"{OURS}/"), help="of %(default)s")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    arms = [name.replace("/", ", ") for name in given.arms.split(",")]
    if unknown := [name for name in arms if name not in ARMS]:
        parser.error(f"unknown arm {unknown[0]}")
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    shape = given.shape or ("llama3.2-1b" if cuda else "cpu-small")
    if given.threads:
        torch.set_num_threads(given.threads)
    where = f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {shape}, {dtype}"
    where += f", {torch.cuda.get_device_name()}" if cuda else ""
    console = Console()
    console.print(where)
    report: dict[str, Any] = {"where": where, "batches": {}}
    with tempfile.TemporaryDirectory() as work:
        places = folders(shape, Path(work), arms)
        run = {name: arm_of(name, places[name], given.new, device, dtype) for name in arms}
        bandwidth = copy_bandwidth(device) if cuda else 0.0
        vocabulary = read_config(places[arms[0]]).vocab_size
        failed = False
        for batch in map(int, given.batch.split(",")):
            ids = torch.randint(
                10, vocabulary, (batch, given.prompt), generator=torch.Generator().manual_seed(batch)
            ).to(device)
            seconds: dict[str, list[float]] = {name: [] for name in arms}
            with Progress(transient=True, console=Console(stderr=True)) as progress:
                bar = progress.add_task(f"batch {batch}", total=(given.rounds + 1) * len(arms))
                written = {}
                for name in arms:  # compiled and warmed up by this
                    written[name] = run[name](ids)
                    progress.advance(bar)
                for turn in range(given.rounds):
                    for name in arms if turn % 2 == 0 else reversed(arms):
                        began = time.perf_counter()
                        run[name](ids)[0, -1].item()
                        seconds[name].append(time.perf_counter() - began)
                        progress.advance(bar)
            exact = [name for name in arms if "int" not in name]
            for name in exact[1:]:
                same, of = agreement(written[name], written[exact[0]], given.prompt)
                console.print(f"batch {batch}: {same} of {of} tokens of {name} equal those of {exact[0]}")
                failed |= same < of if dtype == torch.float32 else same < of / 2
            table = Table("arm", "tokens/s (least–most)", f"/ {arms[0]}", "of the bandwidth bound" if cuda else "")
            entry: dict[str, Any] = {}
            for name in arms:
                rate = Spread.of([batch * given.new / s for s in seconds[name]])
                ratio = Spread.of([a / b for a, b in zip(seconds[arms[0]], seconds[name], strict=True)])
                bound = ""
                if cuda:
                    # 4 bits: a scale and a zero for every 64 weights; 8 bits: a scale a row is nothing beside it.
                    weight_bytes = {"int8": 1.0, "int4": 0.5 + 4 / 64}.get(name[-4:], 2.0)
                    length = given.prompt + given.new // 2
                    floor = bytes_of_a_token(places[arms[0]], batch, length, weight_bytes) / bandwidth
                    bound = f"{floor * given.new / statistics.median(seconds[name]):.0%}"
                table.add_row(name, rate.show(0), ratio.show(), bound)
                entry[name] = {"seconds": seconds[name], "ratio": ratio.median, "bound": bound}
            table.title = f"batch {batch}, {given.prompt} + {given.new} tokens"
            console.print(table)
            report["batches"][batch] = entry
    if given.json:
        given.json.write_text(json.dumps(report, indent=2))
    if failed:
        sys.exit("the arms did not write the same tokens: the ratios above mean nothing")


if __name__ == "__main__":
    main()
