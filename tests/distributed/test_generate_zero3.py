"""Generation from weights that are split over two real ranks, each with work of its own length, or kept by one."""

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT, run_ranks


@pytest.mark.parametrize("world_size", [1, 2])
def test_uneven_generation_under_zero3_neither_hangs_nor_differs(world_size, tmp_path):
    """Prompts, lengths and limits differ by rank; the tokens are those of one process, and training goes on."""
    strategy = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    strategy["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # so that small weights are split too
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(strategy))
    run_ranks(Path(__file__).with_name("generate_zero3.py"), [path, tmp_path], world_size, timeout_seconds=120)
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    assert all("another rank refused" in rank["refused"] for rank in found[:-1])
    assert "max_new_tokens is 0" in found[-1]["refused"]
    for rank in found:  # [loss sum, gradient norm] of the engine that generated and of one that never did
        assert rank["used"] == rank["fresh"]
