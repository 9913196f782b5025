"""`slm plan` on named GPUs: what fits, the choice, time, cost, saves; and what is said when nothing fits."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slm.activations import POLICIES
from slm.cli import app
from slm.errors import UserError
from slm.forecast import (
    GPUs,
    Work,
    exchange_bytes,
    lost_fraction,
    mtbf_seconds,
    save_interval_seconds,
    step_time,
)
from slm.hardware import GPUS, find_gpu
from slm.memory import Layout, Zero, inference_memory, rank_memory, reduce_bucket_elements
from slm.metrics import peak_flops
from slm.model.config import ModelConfig

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/llama3.2-1b.yaml"
ONE_B = ModelConfig.preset("llama3.2-1b")


def slm(*arguments):
    """The command in a process of its own that has no torch: as on a laptop where only the plan is made."""
    code = "import sys; sys.modules['torch'] = None; from slm.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def planned(*arguments):
    result = slm("plan", RECIPE, "--json", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def on_64_h200():
    return planned("--gpus", 64, "--gpu", "H200", "--price-per-gpu-hour", 3)


def test_the_plan_holds_all_that_is_asked_of_it_and_imports_no_torch(on_64_h200):
    """Every phase x ZeRO stage x sequence degree that 8 GPUs of a node allow x recomputation policy, with memory by part."""
    found = on_64_h200["budget"]
    assert [p["name"] for p in found["phases"]] == ["pretrain", "distill", "extend_32k", "extend_128k"]
    assert found["checkpoint_bytes"] == 12 * ONE_B.num_parameters()
    for phase in found["phases"]:
        listed = {(r["zero_stage"], r["sequence_parallel"], r["activation_checkpointing"]) for r in phase["candidates"]}
        degrees = {2, 4, 8} if phase["name"] == "extend_128k" else {1, 2, 4, 8}  # 32 sequences are too few for 64 GPUs
        assert listed == {(stage, degree, policy) for stage in (1, 2, 3) for degree in degrees for policy in POLICIES}
        for row in [phase["own"], phase["chosen"], *phase["candidates"]]:
            parts = dict(row["memory_bytes"])
            assert parts.pop("total") == sum(parts.values()) == max(row["memory_bytes_at"].values())
            assert {"weights", "gradients", "optimizer", "checkpoints", "logits", "buffers"} <= parts.keys()
            assert row["fits"] == (row["memory_bytes"]["total"] <= found["gpu"]["usable_bytes"])
            assert row["mfu_causal"] < row["mfu_full"] < 0.6


def test_time_and_cost_add_up(on_64_h200):
    recipe = {p["name"]: p for p in on_64_h200["phases"]}
    for phase in on_64_h200["budget"]["phases"]:
        own, steps = phase["own"], recipe[phase["name"]]["steps"]
        tokens = recipe[phase["name"]]["tokens"]
        assert own["days"] * 86400 == pytest.approx(steps * own["step_seconds"])
        assert own["tokens_per_second"] * own["step_seconds"] * steps == pytest.approx(tokens)
        assert own["gpu_hours"] == pytest.approx(own["days"] * 24 * 64)
        assert own["cost"] == pytest.approx(3 * own["gpu_hours"])
        assert own["tokens_per_second_per_gpu"] * 64 == pytest.approx(own["tokens_per_second"])


def test_without_a_price_there_is_no_cost():
    assert planned("--gpus", 8, "--gpu", "h100")["budget"]["phases"][0]["own"]["cost"] is None


@pytest.mark.parametrize(("gpu", "gpus"), [("h100", 8), ("a100-40", 16), ("h200", 64)])
def test_the_choice_follows_its_rule(gpu, gpus, monkeypatch):
    """Held against the list by hand: it fits, none that fits is 2 % faster, and what is as fast recomputes no less."""
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["plan", RECIPE, "--gpus", str(gpus), "--gpu", gpu, "--json"])
    found = json.loads(result.stdout[: result.stdout.rindex("}") + 1])["budget"]
    for phase in found["phases"]:
        chosen = phase["chosen"]
        assert chosen["fits"]
        assert chosen["offload_bytes_per_step"] == {"host_link": 0, "host_memory": 0}
        assert chosen["zero_stage"] > 1 or chosen["gradient_accumulation"] == 1  # which would add up in bfloat16
        for row in phase["candidates"]:
            if row["offload_bytes_per_step"]["host_link"]:
                continue  # the last resort, however fast
            if not row["fits"] or (row["zero_stage"] == 1 and row["gradient_accumulation"] > 1):
                continue
            assert chosen["tokens_per_second"] >= 0.98 * row["tokens_per_second"]
            if row["tokens_per_second"] >= chosen["tokens_per_second"]:
                assert POLICIES.index(chosen["activation_checkpointing"]) <= POLICIES.index(
                    row["activation_checkpointing"]
                )


def test_what_does_not_fit_is_refused_with_what_does():
    """Code 2: what is too large, by how much, and overrides with which the same command succeeds."""
    command = ["plan", RECIPE, "--gpus", 8, "--gpu", "a100-40"]
    refused = slm(*command)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "phases.pretrain needs" in refused.stderr
    assert "GiB too much" in refused.stderr
    assert "checkpoints" in refused.stderr
    fixes = refused.stderr.split("Fix: ")[1].split()
    mended = slm(*command, *fixes)
    assert mended.returncode == 0, mended.stderr


def test_where_nothing_fits_it_says_so():
    wide = "model={preset: llama3.1-8b, hidden_size: 16384, num_attention_heads: 128, intermediate_size: 53248}"
    refused = slm("plan", RECIPE, wide, "--gpus", 1, "--gpu", "rtx4090", "phases.extend_128k.sequence_parallel=1")
    assert refused.returncode == 2
    assert "fits with none of the settings looked at" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "8", "--gpu", "h999"], "of which nothing is known"),
        (["--gpus", "8", "--all"], "--all has no effect without --gpu"),
        (["--gpus", "8", "--price-per-gpu-hour", "3"], "--price-per-gpu-hour has no effect without --gpu"),
        (["--gpus", "7", "--gpu", "h100"], "do not divide"),
    ],
)
def test_bad_input_is_one_clear_message(arguments, said):
    result = slm("plan", RECIPE, *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_ranks_is_the_same_option_as_gpus():
    assert planned("--ranks", 8)["ranks"] == planned("--gpus", 8)["ranks"] == 8


def test_a_printed_plan_marks_the_recipe_and_the_choice():
    printed = slm("plan", RECIPE, "--gpus", 8, "--gpu", "h100").stdout
    assert printed.count("│ recipe") == 4
    for words in (
        "GPU hours",
        "save every",
        "chosen: ",
        "9.025e+09 and 1.064e+10",
        "host memory",
        "checkpoints: 14.83 GB each",
    ):
        assert words in printed


# --- the arithmetic behind it --------------------------------------------------------------------------------------


def test_states_of_the_1b_shape_by_hand():
    """bfloat16 weights 2 bytes, master 4 and moments 8 over the ranks; stage 3 splits weights and float32 gradients too."""
    P = ONE_B.num_parameters()
    for stage, W, weights, optimizer, gradients in [
        (1, 1, 2 * P, 12 * P, 0),
        (2, 8, 2 * P, 12 * P // 8, 0),
        (3, 8, 2 * P // 8, 12 * P // 8, 4 * P // 8),
    ]:
        held = rank_memory(ONE_B, Zero(stage), Layout(W), 8192).moments[-1]
        assert held.optimizer == pytest.approx(optimizer)
        assert held.gradients == pytest.approx(gradients)
        extra = 2 * 50_000_000 + 2 * 33 * 2048 if stage == 3 else 0  # fetched ahead for the next step; norms stay whole
        assert held.weights == pytest.approx(weights + extra)


def test_each_stage_holds_no_more_than_the_one_before():
    """At 8 ranks, every policy: the peak falls, or stays, with the stage; it falls with the recomputation."""
    for policy in POLICIES:
        peaks = [rank_memory(ONE_B, Zero(s), Layout(8, 1, 4), 16384, policy).peak.total_bytes for s in (1, 2, 3)]
        assert peaks[0] >= 0.98 * peaks[1]  # stage 2's float32 sum
        assert peaks[0] > peaks[2]
    peaks = [rank_memory(ONE_B, Zero(2), Layout(8), 65536, policy).peak.total_bytes for policy in POLICIES]
    assert peaks[0] > peaks[1] > peaks[2]


def test_the_bucket_is_no_larger_than_the_model():
    assert reduce_bucket_elements({}, 1000) == 1000
    assert reduce_bucket_elements({}, 10**9) == 500_000_000
    assert reduce_bucket_elements({"reduce_bucket_size": 10}, 1000) == 10


def test_the_save_interval_is_where_the_loss_is_least():
    """Young's square root against a search of the sum that it minimises; and Llama 3's figures come back."""
    for stall, mtbf in [(2.0, 6 * 3600.0), (10.0, 6 * 3600.0), (0.3, 1e6)]:
        best = save_interval_seconds(stall, mtbf)
        searched = min((best * 1.001**k for k in range(-800, 800)), key=lambda x: lost_fraction(x, stall, mtbf))
        assert best == pytest.approx(searched, rel=1e-3)
    assert save_interval_seconds(2, 6 * 3600) == pytest.approx(294, abs=0.5)
    assert mtbf_seconds(16384) == pytest.approx(54 * 86400 / 419)


def test_exchange_of_the_1b_shape_by_hand():
    """10 KiB a token and layer for q, k, v and the output (2,048 + 2 x 512 + 2,048 values of 2 bytes), there and back."""
    work = Work(Zero(2), tokens=1000, micro_batches=3, seq_len=4000, sequence_parallel=4)
    assert exchange_bytes(ONE_B, work) == 2 * 3 * 1000 * 16 * 10240 * 3 / 4


def test_more_of_anything_takes_longer():
    """Recomputation, tiles, sharing sequences and slower links never make a step shorter."""
    gpu, gpus = find_gpu("h100"), GPUs(16)

    def seconds(**fields):
        options = dict(zero=Zero(2), tokens=8192, micro_batches=4, seq_len=32768) | fields
        return step_time(ONE_B, Work(**options), gpu, gpus).seconds

    assert seconds() < seconds(policy="selective") < seconds(policy="full") < seconds(policy="full", tiled=True)
    assert seconds() < seconds(sequence_parallel=4) < seconds(sequence_parallel=16)
    assert seconds(zero=Zero(3, overlap=True)) <= seconds(zero=Zero(3))


def test_the_speed_rule_against_published_runs():
    """Rows that it was fitted to within 3.5 %; others at other lengths, GPUs and models, within 8 %; eager code and tensor
    parallelism, which it does not know, 21 % (benchmarks/README.md says so)."""
    sys.path.append(str(ROOT / "benchmarks"))
    published = importlib.import_module("published_speeds")
    for found in published.compare():
        row, error = found["row"], abs(found["ratio"] - 1)
        unlike = "eager" in row.source or "tensor parallel" in row.source
        assert error <= (0.035 if row.is_fit else 0.21 if unlike else 0.08), (row.source, row.seq_len, found["ratio"])


def test_peaks_are_those_of_the_metrics():
    """One GPU has one peak in a plan and in a run's MFU."""
    names = {"a100-40": "NVIDIA A100-SXM4-40GB", "a100-80": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3"}
    names |= {"h200": "NVIDIA H200", "b200": "NVIDIA B200", "l40s": "NVIDIA L40S", "rtx4090": "NVIDIA GeForce RTX 4090"}
    assert names.keys() == GPUS.keys()
    for short, name in names.items():
        assert peak_flops(name) == GPUS[short].peak_flops


def test_the_cache_is_the_one_that_generate_makes(tiny_config):
    """Keys and values of `KVCache.empty`, byte for byte; and the weights are the model's."""
    import torch

    from slm import SLMForCausalLM
    from slm.model.llama import KVCache

    cache = KVCache.empty(tiny_config, 1, 100, torch.bfloat16, "cpu")
    model = SLMForCausalLM(tiny_config, seed=None).to(torch.bfloat16)
    found = inference_memory(tiny_config, 100)
    assert found.cache == sum(x.nbytes for x in (*cache.keys, *cache.values))
    assert found.weights == sum(p.nbytes for p in model.parameters())


def test_the_page_holds_the_table_that_the_formulas_give():
    sys.path.append(str(ROOT / "benchmarks"))
    table = importlib.import_module("memory_table").table()
    assert table in (ROOT / "docs/memory.md").read_text(), (
        "run `python benchmarks/memory_table.py` and put it into the page"
    )


def test_find_gpu_names_what_is_known():
    with pytest.raises(UserError, match="h200"):
        find_gpu("tpu")
