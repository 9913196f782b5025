"""The plan's memory against that of real engines in real steps, on ranks of gloo: benchmarks/training_memory.py's cases."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
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


def test_a_bucket_of_the_models_size_changes_no_bit():
    """Weights of two ranks after three steps on sequences of their own, against the bucket that DeepSpeed would allocate for any
    model."""
    strategies = ["zero1", "zero2", "zero3", "zero2_offload"]
    done = run_ranks(Path(__file__).with_name("buckets.py"), strategies, world_size=2)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("DIFFER ")]
    assert json.loads(line.removeprefix("DIFFER ")) == dict.fromkeys(strategies, [])
