"""What offloading to host memory costs in `slm plan --gpu`, that it is the last resort, and what the plan does not know."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slm.budget import Assumptions, as_dict, budget
from slm.choose import candidates, choose
from slm.cli import app
from slm.errors import UserError
from slm.forecast import GPUs, Work, offload_bytes, step_time
from slm.hardware import GPUS, find_gpu
from slm.memory import Zero
from slm.model.config import ModelConfig
from slm.plan import flops_per_token
from slm.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/llama3.2-1b.yaml"
ONE_B = ModelConfig.preset("llama3.2-1b")
P = ONE_B.num_parameters()
ADAM = 8 + 28 + 4  # bytes of host memory a weight: the gradient clipped, Adam, the new weight read


def zero_of(name):
    return Zero.read(str(ROOT / f"ds_configs/{name}.json"))


def planned(*overrides, gpu="h100", gpus=8):
    return budget(load_recipe(RECIPE, list(overrides)), find_gpu(gpu), GPUs(gpus), Assumptions())


def printed(*arguments):
    """(what is wrong with the recipe, if anything; what is printed)."""
    result = CliRunner().invoke(app, ["plan", str(RECIPE), *arguments])
    return result.exception, result.stdout


@pytest.mark.parametrize(
    ("name", "value_bytes", "micro_batches", "link", "memory"),
    [
        # A gradient there in float32, a weight back.
        ("zero2_offload", 2, 1, 4 + 2, ADAM + 2),
        ("zero2_offload", 2, 16, 4 + 2, ADAM + 2),  # micro-batches add up on the GPU
        ("zero2_offload", 4, 1, 4 + 4, ADAM + 4),
        ("zero2_offload", 4, 3, 4 + 4 + 4 * (3 + 2), ADAM + 4),  # sent three times, fetched twice
        # Gradients there and back each micro-batch, and there at the end; weights here for 2 - 0.55/1.24 passes each.
        ("zero3_offload", 2, 1, 8 + 4 + 2 * (2 - 550_000_000 / P), ADAM + 2),
        ("zero3_offload", 2, 16, 16 * 8 + 4 + 16 * 2 * (2 - 550_000_000 / P), ADAM + 2),
        ("zero3", 2, 16, 0, 0),
        ("zero2", 2, 16, 0, 0),
    ],
)
def test_bytes_of_offloading_by_hand(name, value_bytes, micro_batches, link, memory):
    """As DeepSpeed's source copies them, for one of 8 GPUs' eighth of the weights."""
    work = Work(zero_of(name), 8192, micro_batches, 8192, value_bytes=value_bytes)
    assert offload_bytes(ONE_B, work, 8) == pytest.approx((link * P / 8, memory * P / 8))


def test_time_of_offloading_by_hand():
    """The link at 0.4 of its bandwidth, for the JSON leaves memory pageable, at 0.8 if pinned; and 180 GB/s for the CPUs of a
    node, which its 8 GPUs share: ever more GPUs of one node make Adam no faster, more nodes do."""
    gpu, work = find_gpu("h100"), Work(zero_of("zero2_offload"), 8192, 1, 8192)
    adam = (ADAM + 2) * P / 180e9
    assert step_time(ONE_B, work, gpu, GPUs(8)).offload_seconds == pytest.approx(6 * P / 8 / (0.4 * 50e9) + adam)
    pinned = dataclasses.replace(work, zero=dataclasses.replace(work.zero, pinned=True))
    assert step_time(ONE_B, pinned, gpu, GPUs(8)).offload_seconds == pytest.approx(6 * P / 8 / (0.8 * 50e9) + adam)
    assert step_time(ONE_B, pinned, gpu, GPUs(1)).offload_seconds == pytest.approx(6 * P / (0.8 * 50e9) + adam)
    assert step_time(ONE_B, pinned, gpu, GPUs(16)).offload_seconds == pytest.approx(
        6 * P / 16 / (0.8 * 50e9) + adam / 2
    )


@pytest.mark.parametrize("gpu", GPUS)
def test_offloading_is_never_faster(gpu):
    """Than the same stage without it, at one micro-batch or many."""
    for stage in (2, 3):
        for micro_batches in (1, 16):
            times = [
                step_time(ONE_B, Work(zero_of(name), 8192, micro_batches, 8192), GPUS[gpu], GPUs(8)).seconds
                for name in (f"zero{stage}", f"zero{stage}_offload")
            ]
            assert times[1] > times[0]


@pytest.mark.parametrize(("gpu", "gpus"), [("rtx4090", 8), ("rtx4090", 16), ("l40s", 8), ("a100-40", 8)])
def test_offloading_is_chosen_only_where_nothing_fits_without(gpu, gpus):
    """In every phase, whatever is fast: the choice does not offload if any row of the list fits without, and is still found."""
    for part in planned(gpu=gpu, gpus=gpus).phases:
        without = any(row.fits and not row.zero.offloads for row in part.rows)
        assert part.best is not None
        assert part.best.zero.offloads == (not without)


def test_where_only_offloading_fits_it_is_chosen_and_says_so():
    """8B on one H100 80GB: 128 GB of states. Offloading is chosen, with figures, assumptions and the memory of the host."""
    one = [
        "--gpus",
        "1",
        "--gpu",
        "h100",
        "model={preset: llama3.1-8b, rope_scaling: null}",
        "phases.extend_128k.sequence_parallel=1",
    ]
    recipe = load_recipe(RECIPE, one[4:])
    rows = candidates(recipe, recipe.phases[0], find_gpu("h100"), GPUs(1)).rows
    assert not any(row.fits for row in rows if not row.zero.offloads)
    best = choose(rows)
    assert best is not None
    assert best.zero.offload_optimizer
    assert best.memory.host_bytes > 12 * recipe.model.num_parameters()
    refused, out = printed(*one)
    assert isinstance(refused, UserError)  # the recipe as it stands does not fit
    assert "nothing that was looked at fits with its optimiser and weights on the GPUs" in out
    assert "warning (chosen): each node needs" in out
    assert "at 40% of 50 GB/s for it is not page-locked (pin_memory false)" in out
    assert "assumed, not measured" in out


def test_host_memory_of_a_node_is_told_with_its_figure():
    """All GPUs' shares of a node, 8 x 8 x (state, gradients, weights, the save's copy); and in --json."""
    offloading = "phases.pretrain.deepspeed=ds_configs/zero2_offload.json"
    found = as_dict(planned(offloading))["phases"][0]["own"]
    assert found["host_bytes_per_node"] == 8 * (found["host_bytes"] + found["save_copy_bytes"])
    assert found["offload_seconds"] > 0
    assert found["step_seconds"] > found["offload_seconds"]
    refused, out = printed("--gpus", "8", "--gpu", "h100", offloading)
    assert refused is None
    assert f"warning (recipe): each node needs {found['host_bytes_per_node'] / 2**30:.1f} GiB of host memory" in out


def test_mfu_of_float32_is_of_the_float32_peak():
    """tokens/s x FLOPs a token / 67 TFLOP/s, which torch reaches without tensor cores; half precision / 989."""
    for precision, peak in (("float32", 67e12), ("bfloat16", 989e12), ("auto", 989e12)):
        found = as_dict(planned(f"precision={precision}", "phases.pretrain.micro_batch=1"))["phases"][0]["own"]
        flops = flops_per_token(ONE_B, 8192, causal=False)
        assert found["mfu_full"] == pytest.approx(found["tokens_per_second_per_gpu"] * flops / peak)
        assert 0.3 < found["mfu_full"] < 0.5


def test_what_zero_plus_plus_adds_is_said():
    """Of the recipe's own row, the only one that uses it: it is never proposed."""
    part = as_dict(planned("phases.pretrain.deepspeed=ds_configs/zeropp.json"))["phases"][0]
    assert "zeropp.json: of ZeRO++ the second copy" in part["own"]["not_counted"][0]
    assert part["chosen"]["not_counted"] == []
    assert all(row["deepspeed"] != "zeropp" for row in [part["chosen"], *part["candidates"]])
    assert not Zero.of({"stage": 3, "zero_hpz_partition_size": 1}).plus_plus
    _, out = printed("--gpus", "8", "--gpu", "h100", "phases.pretrain.deepspeed=ds_configs/zeropp.json")
    assert "NOT COUNTED: zeropp.json: of ZeRO++" in out


def test_a_plan_does_not_depend_on_the_plan_before_it():
    """H100's after H200's in one process: the same to the last digit, and of H100's memory."""
    first = json.dumps(as_dict(planned(gpu="h100")))
    as_dict(planned(gpu="h200"))
    again = as_dict(planned(gpu="h100"))
    assert json.dumps(again) == first
    usable = again["gpu"]["usable_bytes"]
    assert usable < 80e9
    assert all(
        row["fits"] == (row["memory_bytes"]["total"] <= usable) for p in again["phases"] for row in p["candidates"]
    )
