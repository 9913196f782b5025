"""`slm teacher` on real ranks: without communication they leave the bytes of one process, with ZeRO-3 the same targets."""

import json
from pathlib import Path

import numpy as np
import yaml

from slm import SLMForCausalLM
from slm.distill.build import build, open_cache
from slm.distill.examine import verify
from slm.distill.wanted import wanted_caches
from slm.model.config import ModelConfig
from slm.recipe import load_recipe
from tests.distributed.ranks import ROOT, run_ranks, train_many
from tests.shards import make_dataset


def recipe(folder, name, zero3):
    tree = {
        "name": name,
        "output": str(folder / name),
        "model": "cpu-tiny",
        "data": {"sources": {"a": str(folder / "a")}},
        "teacher": {
            "model": str(folder / "teacher"), "batch_tokens": 512, "zero3": zero3,
            "cache": {"k": 16, "block_tokens": 800, "folder": str(folder / f"cache-{name}")},
        },
        "phases": [{"name": "main", "tokens": 256, "seq_len": 64, "batch_tokens": 256, "loss": {"type": "distill"}}],
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_ranks_leave_what_one_process_leaves(tmp_path, monkeypatch):
    """Two ranks that share by locks: the same bytes. Two that hold half of the teacher each (an odd number of blocks, so one
    rank takes part without a block of its own): the same entries, values within a unit of the codec."""
    monkeypatch.chdir(ROOT)
    make_dataset(tmp_path / "a", lengths=[90, 40, 130, 64, 65, 7, 2, 200, 33, 71, 150, 28] * 4, num_shards=1)
    SLMForCausalLM(ModelConfig.preset("cpu-tiny", initializer_range=0.15), seed=7).save_pretrained(tmp_path / "teacher")
    alone, two, split = (recipe(tmp_path, name, name == "split") for name in ("alone", "two", "split"))
    assert build(load_recipe(alone)) == 0
    script = Path(__file__).with_name("teach.py")
    run_ranks(script, [two], 2, timeout_seconds=120)
    run_ranks(script, [split], 2, timeout_seconds=120)
    assert verify(load_recipe(split)) == []
    (one,), (other,), (parts,) = (list(wanted_caches(load_recipe(p))) for p in (alone, two, split))
    assert one.path.read_bytes() == other.path.read_bytes()
    a, b = open_cache(one), open_cache(parts)
    assert len(a.bounds) % 2 == 0
    assert np.array_equal(a.plane("tag"), b.plane("tag"))
    assert np.abs(a.plane("val").astype(int) - b.plane("val").astype(int)).max() <= 1
    np.testing.assert_allclose(a.plane("log_tail"), b.plane("log_tail"), rtol=1e-4)
    same = (a.plane("idx_lo") == b.plane("idx_lo")).mean()
    assert same > 0.99  # neighbours of nearly equal probability may change places


def test_distillation_is_the_same_run_on_two_ranks(tmp_path, monkeypatch):
    """From one cache, with a tied head: one process at stage 0 against two ranks at stages 1, 2 and 3, and against ranks that
    share each sequence; and so with a live teacher, over the whole vocabulary and on its likeliest entries."""
    monkeypatch.chdir(ROOT)
    make_dataset(tmp_path / "a", num_shards=1)
    SLMForCausalLM(ModelConfig.preset("cpu-tiny", initializer_range=0.15), seed=7).save_pretrained(tmp_path / "teacher")
    path = recipe(tmp_path, "student", False)
    assert build(load_recipe(path)) == 0

    def options(name, stage):
        return [f"name={name}", f"output={tmp_path}/{name}", "phases.main.tokens=2560", "phases.main.micro_batch=1",
                "phases.main.loss.alpha=0.2", f"phases.main.deepspeed=ds_configs/zero{stage}.json"]  # fmt: skip

    def losses(name):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return np.array([[r["loss"], r["loss/ce"], r["loss/distill"], r["grad_norm"]] for r in rows if "loss" in r])

    live = {name: ["teacher.cache=null", *more] for name, more in
            (("full", []), ("bucket", ["phases.main.loss.targets=bucket", "phases.main.loss.k=8"]))}  # fmt: skip
    shared = ["phases.main.sequence_parallel=2"]
    train_many(
        [(path, options("one", 0))] + [(path, options(n, 1) + o) for n, o in live.items()], 1, timeout_seconds=200
    )
    jobs = [(path, options(f"two{stage}", stage)) for stage in (1, 2, 3)]
    jobs += [(path, options(f"shared{stage}", stage) + shared) for stage in (1, 3)]
    jobs += [(path, options(f"shared-{n}", 1) + o + shared) for n, o in live.items()]
    train_many(jobs, 2, timeout_seconds=200)
    for name in ("two1", "two2", "two3", "shared1", "shared3"):
        np.testing.assert_allclose(losses(name), losses("one"), rtol=2e-5, err_msg=name)
    for name in live:
        np.testing.assert_allclose(losses(f"shared-{name}"), losses(name), rtol=2e-5, err_msg=name)
