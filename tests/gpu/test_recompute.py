"""Recomputation on a GPU: its own attention kernels, pinned host memory and the stream of its copies. The bodies are those of
tests/unit/test_recompute.py; the cases without the mark keep this file itself honest."""

import re
import sys
from pathlib import Path

import pytest
import torch

from slm import ModelConfig, SLMForCausalLM
from slm.model.recompute import BlockStore
from tests.unit.test_recompute import BOUNDS, TOKENS, check_kept_tensors, gradients

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import activation_memory  # noqa: E402

GPU = pytest.mark.gpu

# Relative L2 of a gradient. On a GPU attention's backward kernels add up in no fixed order, so that bits may differ.
DEVICES = [
    ("cpu", torch.float32, 1e-6),
    pytest.param("cuda", torch.float32, 1e-4, marks=GPU),  # piece by piece
    pytest.param("cuda", torch.bfloat16, 1e-2, marks=GPU),  # the variable-length kernel
]


def model_of(config, device, dtype):
    return SLMForCausalLM(config).to(device, dtype)


def kernel_calls(config, device, dtype):
    """Of attention in one forward pass: one a layer, or one a layer and piece (of 4)."""
    return config.num_hidden_layers * (4 if (device, dtype) == ("cuda", torch.float32) else 1)


def assert_near(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm()


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputation_changes_no_gradient_and_selective_runs_attention_once(
    tiny_config, device, dtype, tolerance, policy, offload, compiled, monkeypatch
):
    monkeypatch.setattr("slm.model.recompute._SMALLEST_BYTES", 0)
    torch._dynamo.reset()
    model = model_of(tiny_config, device, dtype)
    if compiled:
        model.compile_blocks()
    once = kernel_calls(tiny_config, device, dtype)
    plain, calls = gradients(model, device)
    assert calls == (once, 0)
    model.recompute, model.offload_activations = policy, offload
    for _ in range(2):
        found, calls = gradients(model, device)
        assert_near(found, plain, tolerance)
        assert calls == (once, once if policy == "full" else 0)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_tiles_change_no_gradient(tiny_config, device, dtype, tolerance, policy):
    """Tiles of 10 of the 64 tokens, which do not divide them; in bfloat16 products of other shapes round otherwise."""
    model = model_of(tiny_config, device, dtype)
    plain, _ = gradients(model, device)
    for block in model.model.layers:
        block.mlp_tile_tokens = 10
    model.recompute = policy
    found, _ = gradients(model, device)
    assert_near(found, plain, max(1e-5, 3 * tolerance))


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_starts_no_forward_kernel_again(tiny_config, dtype):
    """By the profiler, which sees the kernels themselves: as many as without recomputation, half of those of `full`."""
    model = model_of(tiny_config, "cuda", dtype)
    tokens, bounds = TOKENS.cuda(), BOUNDS.cuda()

    def count(policy):
        model.recompute = policy
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            model(tokens, None, bounds, tokens)[0].backward()
            torch.cuda.synchronize()
        names = [e.name for e in profiler.events() if re.search("flash|fmha|attention", e.name, re.IGNORECASE)]
        return sum(bool(re.search("fwd|fprop|forward|fmha_cutlassF", name)) for name in names)

    count("none")  # what is loaded once
    once = count("none")
    assert once >= tiny_config.num_hidden_layers
    assert count("selective") == once
    assert count("full") == 2 * once


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_kept_tensors_are_copies_in_host_memory(device):
    """Pinned on a GPU."""
    check_kept_tensors(device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_what_comes_back_was_not_written_over(device):
    """On a GPU copies run beside the computation: what is freed after packing is at once another tensor's memory, and what
    has come back is used at once. 64 tensors of 4 MiB in 8 blocks, twice, so that pinned memory is used again too."""
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(2):
        stores, slots, sums = [], [], []
        for _ in range(8):
            stores.append(BlockStore(before=stores[-1] if stores else None))
            for _ in range(8):
                x = torch.randn(1 << 20, device=device, generator=generator)
                sums.append(x.double().sum().item())
                slots.append((stores[-1], stores[-1].pack(x)))
                del x
                torch.full((1 << 20,), torch.nan, device=device)  # takes the freed memory
        for wanted, (store, slot) in zip(reversed(sums), reversed(slots), strict=True):
            back = store.unpack(slot)
            found = back.double().sum()
            del back
            torch.full((1 << 20,), torch.nan, device=device)
            assert found.item() == pytest.approx(wanted, rel=1e-12)


@GPU
def test_memory_is_what_the_formula_says():
    """Kept to 5 %, the peak to 20 % (the kernels' own memory is read from their source), with and without tiles; offloaded no
    more than the formula, and less than without. A shape whose growing parts rule."""
    config = ModelConfig.preset("cpu-small", num_hidden_layers=8, vocab_size=512, max_position_embeddings=32768)
    tables = [activation_memory.compare(config, 32768, 2048, "cuda", offload=offload) for offload in (False, True)]
    here, away = ({(r["policy"], r["tile_tokens"]): r for r in rows} for rows in tables)
    for row in here.values():
        assert row["kept"] == pytest.approx(row["kept_formula"], rel=0.05), row
        assert row["peak"] == pytest.approx(row["peak_formula"], rel=0.20), row
    for (policy, tile), row in away.items():
        if policy != "none":  # the formula counts two blocks on the device; copies that are done leave none
            assert row["kept"] <= 1.05 * row["kept_formula"], row
            assert row["peak"] <= 1.2 * row["peak_formula"], row
            assert row["peak"] < here[policy, tile]["peak"], row
    for tile in (None, 2048):
        assert here["none", tile]["peak"] > here["selective", tile]["peak"] > here["full", tile]["peak"]
    assert all(here[policy, 2048]["peak"] < here[policy, None]["peak"] for policy in ("none", "selective", "full"))
