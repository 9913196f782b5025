"""Angles that follow a piece's length, where ranks share the sequence: a piece may end on another rank."""

import json

import pytest
import yaml

from tests.distributed.ranks import ROOT, train_many
from tests.shards import make_dataset
from tests.unit.test_rope import scaling


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_two_ranks_that_share_sequences_are_the_same_run(tmp_path, kind):
    """The losses of one process, with pieces below and beyond the original context, packed."""
    make_dataset(tmp_path / "tokens", lengths=[100, 20, 70, 37, 128, 90, 30, 64, 17, 128, 45, 80])
    tree = {
        "name": "t",
        "model": "cpu-tiny",
        "data": {"sources": {"a": str(tmp_path / "tokens")}},
        "optim": {"lr": 1e-2},
        "phases": [
            {"name": "main", "tokens": 1024, "seq_len": 128, "batch_tokens": 256, "micro_batch": 2,
             "deepspeed": str(ROOT / "ds_configs/zero1.json"), "rope_scaling": scaling(kind).model_dump(mode="json")}
        ],
    }  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree))
    losses = []
    for world in (1, 2):
        run = tmp_path / f"run{world}"
        train_many([(path, [f"output={run}", f"phases.main.sequence_parallel={world}"])], world)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
