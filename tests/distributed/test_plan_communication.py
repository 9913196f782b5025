"""The plan's communication against what real engines hand to torch's collectives."""

import json
from pathlib import Path

import pytest

from slm.forecast import Work, exchange_bytes, state_bytes
from slm.memory import Zero
from slm.model.config import ModelConfig
from tests.distributed.ranks import ROOT, run_ranks

SHAPE = dict(hidden_size=384, intermediate_size=1056, num_hidden_layers=2, num_attention_heads=6)
CASES = [
    dict(zero="zero0"),
    dict(zero="zero1", accumulation=2),
    dict(zero="zero2", accumulation=2),
    dict(zero="zero2", precision="bfloat16"),
    dict(zero="zero3", accumulation=2, options={"stage3_param_persistence_threshold": 0}),
    dict(zero="zero1", sequence_parallel=2, precision="bfloat16"),
    dict(zero="zero3", sequence_parallel=2, precision="bfloat16", options={"stage3_param_persistence_threshold": 0}),
    dict(zero="zero2", sequence_parallel=2, policy="full"),
    dict(zero="zero1", sequence_parallel=2, policy="selective"),
]


def test_bytes_of_a_step_are_those_of_real_collectives():
    """Two ranks of gloo: gradients and weights at each ZeRO stage, and what ranks exchange that share sequences, within 2 %."""
    cases = [dict(world_size=2, model=SHAPE, tokens=64, **case) for case in CASES]
    output = run_ranks(Path(__file__).with_name("count_traffic.py"), [json.dumps(cases)], 2).stdout
    found = [json.loads(line.removeprefix("SENT ")) for line in output.splitlines() if line.startswith("SENT ")]
    config = ModelConfig.preset("cpu-small", **SHAPE)
    for case, sent in zip(cases, found, strict=True):
        degree = case.get("sequence_parallel", 1)
        work = Work(
            Zero.read(str(ROOT / "ds_configs" / f"{case['zero']}.json")),
            case["tokens"] // degree,
            case.get("accumulation", 1),
            case["tokens"],
            degree,
            case.get("policy", "none"),
            value_bytes=2 if case.get("precision") == "bfloat16" else 4,
        )
        assert sent["state"] == pytest.approx(state_bytes(config, work, 2), rel=0.02), case
        assert sent["exchange"] == pytest.approx(exchange_bytes(config, work), rel=0.02), case
