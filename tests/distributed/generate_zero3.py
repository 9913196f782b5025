"""Run on every rank by test_generate_zero3.py: uneven generation from partitioned weights, then a training step.

generate_zero3.py DEEPSPEED_JSON OUTPUT_FOLDER

Leaves what it found in OUTPUT_FOLDER/rank-N.json: torchrun's ranks share one unbuffered output, where lines mix.
"""

import json
import sys
from pathlib import Path

import torch

from slm import SLMForCausalLM, parallel
from slm.data.batches import assemble
from slm.engine import Engine
from slm.errors import UserError
from slm.generate import generate
from slm.model.config import ModelConfig
from slm.recipe import Optim, Phase
from slm.runtime import discover_ranks

VARIED = {"initializer_range": 0.2, "tie_word_embeddings": False}


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), padded on the right."""
    width = max(map(len, rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def main(deepspeed: str, output: str) -> None:
    device = parallel.local_device(discover_ranks().local_rank)
    parallel.start(device, timeout_minutes=1.0)
    rank = parallel.rank()
    config = ModelConfig.preset("cpu-tiny", **VARIED)
    phase = Phase(name="main", tokens=64, seq_len=16, batch_tokens=32, deepspeed=deepspeed)
    engine = Engine(config, phase, Optim(), precision="float32", device=device)
    whole = SLMForCausalLM(config, seed=2)
    weights = dict(whole.named_parameters())
    engine.write_weights(lambda name, shape: weights[name].detach())
    partitioned = [p for p in engine.module.parameters() if p.numel() == 0]
    assert len(partitioned) == len(weights), "nothing is left whole on a rank"

    long, short = list(range(3, 40)), [7]
    # What each rank generates in one call: (prompts, options).
    calls = [
        # Different numbers of prompts, lengths and tokens; one rank ends long before the other.
        ([([long, short, [9, 8]], {"max_new_tokens": 25}), ([short], {"max_new_tokens": 2})], "greedy"),
        ([([short], {"max_length": 4}), ([long, [4, 5]], {"max_length": 60})], "the other way round"),
        # One rank has nothing at all to generate.
        ([([], {}), ([long, short], {"max_new_tokens": 6})], "no prompts"),
        ([([long], {"max_new_tokens": 9, "use_cache": False}), ([short], {"max_new_tokens": 3})], "uncached"),
        # A stop id of its own on each rank, and draws.
        (
            [
                ([short], {"do_sample": True, "seed": 1, "top_k": 20, "max_new_tokens": 12, "eos_token_id": 99}),
                ([long], {"do_sample": True, "seed": 2, "top_p": 0.9, "max_new_tokens": 30}),
            ],
            "sampled",
        ),
    ]
    for by_rank, name in calls:
        prompts, options = by_rank[rank]
        options = {"do_sample": False, **options}
        ids, mask = padded(prompts)
        got = generate(engine.module, ids, attention_mask=mask, **options)
        want = generate(whole, ids, attention_mask=mask, **options)
        assert torch.equal(got, want), (name, got, want)
    assert engine.module.training

    # What the last rank refuses ends the call on all; none waits for another.
    last = rank == parallel.world_size() - 1
    try:
        generate(engine.module, torch.tensor([short]), max_new_tokens=0 if last else 5)
        raise AssertionError("not refused")
    except UserError as error:
        refused = error.problem

    # The weights and DeepSpeed's bookkeeping are as before: a step of training gives the same as a fresh engine.
    used = step(engine)
    fresh = Engine(config, phase, Optim(), precision="float32", device=device)
    fresh.write_weights(lambda name, shape: weights[name].detach())
    found = {"refused": refused, "used": used, "fresh": step(fresh)}
    Path(output, f"rank-{rank}.json").write_text(json.dumps(found))
    parallel.barrier()
    parallel.stop()


def step(engine: Engine) -> tuple[float, float]:
    """(loss sum, gradient norm) of one step on this rank's own sequence."""
    generator = torch.Generator().manual_seed(parallel.rank())
    row = torch.randint(0, 500, (16,), generator=generator).numpy()
    batch = assemble([[(row, 3)]], 16, 0, 1)
    loss, count = engine.forward(batch)
    engine.backward(loss, 32.0)
    return float(loss), engine.step(1e-3).grad_norm


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
