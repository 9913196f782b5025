"""The same evaluation by one rank, two and four, whole, under ZeRO-3 and on shared sequences: loss by position, other lengths,
recall."""

import json

import pytest
import yaml

from slm import SLMTokenizer
from tests.distributed.ranks import ROOT, train_many
from tests.shards import make_dataset


def test_any_number_of_ranks_finds_the_same(tmp_path):
    """Before the first step, where the weights are the same to the bit; recall cell by cell, with uneven shares of 2 ranks
    (15 rows of samples, 3 micro-batches of 2 and a half)."""
    tokenizer = SLMTokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, seed in (("tokens", 0), ("held-out", 5), ("other", 6)):
        lengths = None if name == "tokens" else [90, 40, 130, 64, 65, 7, 2, 200, 33, 71] * 2
        make_dataset(tmp_path / name, lengths, seed=seed, vocab_size=259, fingerprint=tokenizer.fingerprint)
    tree = {
        "name": "t",
        "model": {"preset": "cpu-tiny", "vocab_size": 264, "initializer_range": 0.3},
        "tokenizer": str(tmp_path / "tokenizer"),
        "data": {
            "sources": {"a": str(tmp_path / "tokens")},
            "validation": {"a": str(tmp_path / "held-out"), "b": str(tmp_path / "other")},
        },
        "phases": [{"name": "main", "tokens": 512, "seq_len": 64, "batch_tokens": 512, "micro_batch": 2}],
        "eval": {
            "at_start": True,
            "seq_lens": [32],
            "recall": {
                "lengths": [32, 64],
                "depths": 5,
                "samples": 2,
                "needle": "<{name}{value}>",
                "query": "<{name}",
                "names": [128, 191],
                "name_length": 1,
                "values": [192, 255],
                "value_length": 1,
            },
        },
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    found = {}
    for world, layouts in ((1, [(0, 1)]), (2, [(1, 1), (3, 1), (1, 2)]), (4, [(3, 2)])):
        jobs = [
            (
                recipe,
                [
                    f"output={tmp_path}/{world}-{stage}-{sequence}",
                    f"phases.main.deepspeed={ROOT}/ds_configs/zero{stage}.json",
                    f"phases.main.sequence_parallel={sequence}",
                ],
            )
            for stage, sequence in layouts
        ]
        train_many(jobs, world)
        for layout in layouts:
            run = tmp_path / "-".join(map(str, (world, *layout)))
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            found[(world, *layout)] = next(line for line in lines if line["step"] == 0), lines[-1]
            assert (run / "eval" / "main-00000000.png").read_bytes()[:4] == b"\x89PNG"
            written = json.loads((run / "eval" / "main-00000001.json").read_text())
            assert len(written["recall"]) == 10
            assert written["loss"]["64"]["a"]["loss"] == lines[-1]["eval/a/loss"]
    first, last = found[1, 0, 1]
    names = {name for name in first if name.startswith("start")}
    assert {"start/a/loss", "start@32/b/loss", "start/all/position/64", "start/a/position_full/64"} <= names
    assert {"start/passkey/32/80", "start/passkey/64/mean", "start/passkey/64/answer_loss"} <= names
    assert {name.replace("start", "eval") for name in names} == {name for name in last if name.startswith("eval")}
    for layout, (other_first, other_last) in found.items():
        for name in names:
            assert other_first[name] == pytest.approx(first[name], abs=1e-5), (layout, name)
            name = name.replace("start", "eval")
            assert other_last[name] == pytest.approx(last[name], abs=1e-4), (layout, name)
