"""Angles that follow a piece's length, where ranks share the sequence: a piece may end on another rank."""

import json

import pytest
import yaml

from tests.distributed.ranks import ROOT, train_many
from tests.shards import make_dataset
from tests.unit.test_rope import scaling

KINDS = ["dynamic", "longrope"]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Of each step, by kind of scaling and number of ranks; all kinds in one start of a number of ranks."""
    folder = tmp_path_factory.mktemp("rope")
    make_dataset(folder / "tokens", lengths=[100, 20, 70, 37, 128, 90, 30, 64, 17, 128, 45, 80])
    for kind in KINDS:
        tree = {
            "name": "t",
            "model": "cpu-tiny",
            "data": {"sources": {"a": str(folder / "tokens")}},
            "optim": {"lr": 1e-2},
            "phases": [
                {"name": "main", "tokens": 1024, "seq_len": 128, "batch_tokens": 256, "micro_batch": 2,
                 "deepspeed": str(ROOT / "ds_configs/zero1.json"), "rope_scaling": scaling(kind).model_dump(mode="json")}
            ],
        }  # fmt: skip
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(tree))
    found = {}
    for world in (1, 2):
        runs = {kind: folder / f"{kind}-{world}" for kind in KINDS}
        jobs = [
            (folder / f"{kind}.yaml", [f"output={run}", f"phases.main.sequence_parallel={world}"])
            for kind, run in runs.items()
        ]
        train_many(jobs, world)
        for kind, run in runs.items():
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            found[kind, world] = [line["loss"] for line in lines if "loss" in line]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_that_share_sequences_are_the_same_run(losses, kind):
    """The losses of one process, with pieces below and beyond the original context, packed."""
    assert len(losses[kind, 1]) == 4
    assert losses[kind, 2] == pytest.approx(losses[kind, 1], abs=1e-5)
