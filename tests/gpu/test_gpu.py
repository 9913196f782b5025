"""The paths that only a GPU takes, against the CPU's float32. The cases without the mark keep this file itself honest.

On a machine with a GPU `bash tests/run.sh` runs them all; elsewhere those marked `gpu` are left out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from slm.model.attention import packed_attention
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]
GPU = pytest.mark.gpu
STEPS = 12


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float32, 1e-6),
        pytest.param("cuda", torch.float32, 1e-4, marks=GPU),  # piece by piece through the memory-efficient kernel
        pytest.param("cuda", torch.float16, 4e-3, marks=GPU),  # the variable-length kernel
        pytest.param("cuda", torch.bfloat16, 3e-2, marks=GPU),
    ],
)
def test_attention_equals_the_cpu_in_float32(device, dtype, tolerance):
    """Output and gradients of packed pieces with grouped heads, padding and pieces of no length among them."""
    bounds = torch.tensor([0, 5, 40, 96, 96 + 64, 192, 192, 192], dtype=torch.int32)
    assert_equals_the_cpu(2, 96, (8, 2), bounds, device, dtype, tolerance)


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "tolerance"),
    [
        ("cpu", torch.float32, 1024, 1e-6),
        pytest.param("cuda", torch.float32, 32768, 1e-4, marks=GPU),
        pytest.param("cuda", torch.bfloat16, 32768, 3e-2, marks=GPU),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_attention_over_long_sequences_equals_the_cpu(device, dtype, tokens, tolerance, packed):
    """One document, and packed ones of a token to half of all."""
    ends = [1, 700, tokens // 3, tokens // 2, tokens] if packed else [tokens]
    bounds = torch.tensor([0, *ends], dtype=torch.int32)
    assert_equals_the_cpu(1, tokens, (2, 1), bounds, device, dtype, tolerance)


def assert_equals_the_cpu(rows, tokens, heads, bounds, device, dtype, tolerance):
    """packed_attention's output and gradients, relative L2 from float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    num_heads, kv_heads = heads
    counts = (num_heads, kv_heads, kv_heads, num_heads)
    q, k, v, grad = (torch.randn(rows, tokens, count, 64, generator=generator) for count in counts)

    def run(device, dtype):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = packed_attention(*inputs, bounds.to(device))
        out.backward(grad.to(device, dtype))
        return [x.detach().cpu().float() for x in (out, *(x.grad for x in inputs))]

    for got, want in zip(run(device, dtype), run("cpu", torch.float32), strict=True):
        assert (got - want).norm() <= tolerance * want.norm()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A text, a held-out one, evaluations on the way; two micro-batches a step."""
    folder = tmp_path_factory.mktemp("gpu")
    make_dataset(folder / "tokens")
    make_dataset(folder / "val", lengths=[90, 40, 130, 64, 65], seed=5)
    tree = {
        "name": "t",
        "model": {"preset": "cpu-tiny", "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
        "data": {"sources": {"a": str(folder / "tokens")}, "validation": {"val": str(folder / "val")}},
        "optim": {"lr": 3e-3},
        "phases": [{"name": "main", "tokens": STEPS * 512, "seq_len": 64, "batch_tokens": 512, "micro_batch": 4}],
        "checkpoint": {"every_steps": 5, "keep_last": 9},
        "eval": {"every_steps": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(recipe, run_dir, device, *overrides):
    """`slm train` in a process of its own; {step: loss} and the held-out losses."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    env = {name: value for name, value in os.environ.items() if name not in ranks}
    env |= {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    command = [sys.executable, "-m", "slm", "train", str(recipe), f"output={run_dir}", *overrides]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["loss"] for x in lines if "loss" in x}, [
        x["eval/all/loss"] for x in lines if "eval/all/loss" in x
    ]


@pytest.fixture(scope="module")
def reference(recipe, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("reference") / "run", "cpu")


@pytest.mark.parametrize(
    ("device", "precision", "stage", "tolerance"),
    [
        ("cpu", "float32", 2, 1e-5),
        pytest.param("cuda", "float32", 1, 1e-3, marks=GPU),
        pytest.param("cuda", "bfloat16", 1, 5e-2, marks=GPU),
        pytest.param("cuda", "bfloat16", 2, 5e-2, marks=GPU),
        pytest.param("cuda", "bfloat16", 3, 5e-2, marks=GPU),
        pytest.param("cuda", "float16", 2, 5e-2, marks=GPU),
    ],
)
def test_a_run_and_its_second_half_again(recipe, reference, tmp_path, device, precision, stage, tolerance):
    """Losses and held-out losses follow the CPU's float32, with accumulation and (on a GPU) compiled blocks; resumed from
    step 5 the loss scale and the rest of the run come back."""
    overrides = [f"precision={precision}", f"phases.main.deepspeed=ds_configs/zero{stage}.json"]
    losses, held_out = train(recipe, tmp_path / "run", device, *overrides)
    assert losses == pytest.approx(reference[0], abs=tolerance)
    assert held_out == pytest.approx(reference[1], abs=tolerance)
    checkpoints = tmp_path / "again" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "main-00000005").symlink_to(tmp_path / "run" / "checkpoints" / "main-00000005")
    state = json.loads((checkpoints / "main-00000005" / "state.json").read_text())
    assert (state["loss_scale"] is not None) == (precision == "float16")
    resumed, _ = train(recipe, tmp_path / "again", device, *overrides)
    assert sorted(resumed) == list(range(6, STEPS + 1))
    for step, loss in resumed.items():  # the GPU's attention gradients add up in no fixed order
        assert loss == pytest.approx(losses[step], abs=0 if device == "cpu" else tolerance)


@pytest.mark.parametrize(
    ("device", "precision", "stage", "tolerance"),
    [
        ("cpu", "float32", 1, 1e-4),
        pytest.param("cuda", "bfloat16", 1, 5e-2, marks=GPU),
        pytest.param("cuda", "bfloat16", 3, 5e-2, marks=GPU),
    ],
)
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_run_with_recomputation(recipe, reference, tmp_path, device, precision, stage, tolerance, policy):
    """With what is kept in host memory and the MLP in tiles, (on a GPU, but for ZeRO-3) in compiled blocks: the same losses."""
    phase = {"activation_checkpointing": policy, "offload_activations": "true", "mlp_tile_tokens": 100}
    overrides = [f"phases.main.{name}={value}" for name, value in phase.items()]
    overrides += [f"precision={precision}", f"phases.main.deepspeed=ds_configs/zero{stage}.json"]
    losses, held_out = train(recipe, tmp_path / "run", device, *overrides)
    assert losses == pytest.approx(reference[0], abs=tolerance)
    assert held_out == pytest.approx(reference[1], abs=tolerance)


@pytest.mark.gpu
def test_more_ranks_than_gpus_is_a_users_mistake(recipe, tmp_path):
    env = {**os.environ, "LOCAL_RANK": "63", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "64"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    env.pop("DS_ACCELERATOR")
    command = [sys.executable, "-m", "slm", "train", str(recipe), f"output={tmp_path}/run"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "visible GPUs" in result.stderr
    assert "Traceback" not in result.stderr
