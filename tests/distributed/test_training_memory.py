"""The plan's memory against that of real engines in real steps, on ranks of gloo: benchmarks/training_memory.py's cases."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
training_memory = importlib.import_module("training_memory")


def check(cases):
    """The largest resident set of a step, within 10 % of the prediction."""
    rows = training_memory.run([{**training_memory.DEFAULTS, **case} for case in cases])
    assert len(rows) == len(cases)
    for row in rows:
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.1), row


def test_memory_is_within_10_percent_of_the_measured():
    """Where each of three moments binds: reduction (float32 sum of bfloat16 gradients), activations, stage 3's bucket."""
    check(
        [
            dict(zero="zero2", precision="bfloat16", world_size=2),
            dict(zero="zero1", tokens=768, world_size=2),
            dict(zero="zero3", world_size=2),
        ]
    )


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_grid():
    """Stages 0 to 3, offloading, both precisions, policies, tiles, accumulation, small buckets, shared sequences."""
    check(training_memory.grid())
