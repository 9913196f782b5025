"""The plan's memory against that of real engines in real steps, on ranks of gloo: benchmarks/training_memory.py's cases."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from slm.engine import Engine
from slm.metrics import StepTimer
from slm.model.config import ModelConfig
from slm.recipe import Optim
from slm.step import train_step

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
training_memory = importlib.import_module("training_memory")


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="a process's largest resident set is set back through Linux's /proc",
)


def check(cases):
    """The largest resident set of a step, within 10 % of the prediction."""
    rows = training_memory.run([{**training_memory.DEFAULTS, **case} for case in cases])
    assert len(rows) == len(cases)
    for row in rows:
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.1), row


@needs_proc
def test_memory_is_within_10_percent_of_the_measured():
    """Where each of three moments binds: reduction (float32 sum of bfloat16 gradients), activations, stage 3's bucket."""
    check(
        [
            dict(zero="zero2", precision="bfloat16", world_size=2),
            dict(zero="zero1", tokens=768, world_size=2),
            dict(zero="zero3", world_size=2),
        ]
    )


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_grid():
    """Stages 0 to 3, offloading, both precisions, policies, tiles, accumulation, small buckets, shared sequences."""
    check(training_memory.grid())


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero2_offload"])
def test_a_bucket_of_the_models_size_changes_no_bit(zero, one_rank, tmp_path, monkeypatch):
    """Weights after three steps, against the bucket that DeepSpeed would allocate for any model."""
    case = {
        **training_memory.DEFAULTS,
        "zero": zero,
        "model": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    }
    config = ModelConfig.preset("cpu-small", **case["model"])
    found = []
    for bucket in (None, 500_000_000):
        if bucket is not None:
            monkeypatch.setattr("slm.engine.reduce_bucket_elements", lambda *_, size=bucket: size)
        phase = training_memory._phase(case, tmp_path)
        engine = Engine(config, phase, Optim(), precision="float32", device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        engine.write_weights(lambda _, shape, g=generator: torch.randn(shape, generator=g) * 0.02)
        for _ in range(3):
            train_step(engine, [training_memory._batch(config, case)], 1e-3, StepTimer())
        found.append({(f.name, f.start): f.values["master"].clone() for f in engine.fragments()})
        engine.close()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
