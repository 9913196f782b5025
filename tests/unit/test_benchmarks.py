"""The benchmarks' judgement: what makes a comparison void, and how ratios are formed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import side_by_side  # noqa: E402
import train_gpu  # noqa: E402


def runs(*losses: list[float]) -> list[dict[str, object]]:
    return [{"losses": list(x)} for x in losses]


def test_equal_losses_pass_and_different_ones_are_named():
    """A difference beyond its step's tolerance, in any round, voids it; the floor has no loss."""
    plain = [10.0, 9.0, 8.0]
    tolerances = {1: 1e-5, 3: 1e-3}
    close = {"plain": runs(plain), "ours": runs([10.00005, 9.5, 8.007]), "floor": runs([])}
    assert side_by_side.loss_problems(close, "plain", tolerances) == []
    far = {"plain": runs(plain, plain), "ours": runs(plain, [10.0002, 9.0, 8.009])}
    problems = side_by_side.loss_problems(far, "plain", tolerances)
    assert len(problems) == 2
    assert all("ours, round 2" in p for p in problems)


@pytest.mark.parametrize("losses", [[float("nan"), 9.0], [10.0, float("nan")], [9.0, 10.0]])
def test_a_reference_that_does_not_learn_voids_the_comparison(losses):
    """Not finite or not falling: then equal losses prove nothing."""
    assert side_by_side.loss_problems({"plain": runs(losses)}, "plain", {1: 1e-5})


def test_a_loss_that_is_not_a_number_is_a_difference():
    """nan compares false with everything; it must not pass as small."""
    results = {"plain": runs([10.0, 9.0]), "ours": runs([float("nan"), 9.0])}
    assert len(side_by_side.loss_problems(results, "plain", {1: 1e-5})) == 1


def test_ratios_are_taken_within_each_round():
    """A machine twice as slow in one round changes no ratio."""
    results = {"a": [{"s": 1.0}, {"s": 2.0}, {"s": 1.1}], "b": [{"s": 2.0}, {"s": 4.0}, {"s": 2.0}]}
    spread = side_by_side.ratio(results, "s", "a", "b")
    assert spread == side_by_side.Spread(0.5, 0.5, 0.55)


def test_attention_kernels_are_recognised():
    """By the names of torch's flash, cuDNN and memory-efficient kernels; a product is none of them."""
    seconds = {
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": 0.3,
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3": 0.1,
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::...)": 0.2,
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN": 0.9,
    }
    assert list(train_gpu.attention_kernels(seconds).values()) == [0.3, 0.2, 0.1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_gpu_benchmark_says_that_it_needs_a_gpu():
    """Exit code 3 and a sentence, no traceback."""
    command = [sys.executable, BENCHMARKS / "train_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "needs a CUDA device" in done.stdout
    assert not done.stderr
