"""Generation from weights that are split over two real ranks, each with work of its own length."""

import json
import re
from pathlib import Path

from tests.distributed.ranks import ROOT, run_ranks


def test_uneven_generation_under_zero3_neither_hangs_nor_differs(tmp_path):
    """Prompts, lengths and limits differ by rank; the tokens are those of one process, and training goes on."""
    strategy = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    strategy["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # so that small weights are split too
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(strategy))
    script = Path(__file__).with_name("generate_zero3.py")
    output = run_ranks(script, [path], 2, timeout_seconds=120).stdout
    assert "rank 0 refused: another rank refused" in output
    assert "rank 1 refused: max_new_tokens is 0" in output
    for rank in "01":
        after = re.search(rf"rank {rank} step (.*)", output)[1]
        assert after == re.search(rf"rank {rank} fresh (.*)", output)[1]
