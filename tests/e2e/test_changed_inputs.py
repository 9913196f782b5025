"""Rows 19 to 21 of the fault matrix where no other test stands: rows of a cache in another order or too many, tokenizers that
changed in each of their parts, shards that are lost or changed under a run, a loader that dies."""

import json
import logging
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

from slm import SLMForCausalLM
from slm.data.batches import PhaseData
from slm.data.tokens import TokenDataset
from slm.distill.build import build, open_cache
from slm.distill.wanted import wanted_caches
from slm.errors import CorruptArtefact, UserError
from slm.model.config import ModelConfig
from slm.parallel import Share
from slm.recipe import load_recipe
from slm.tokenizer import SLMTokenizer, load_tokenizer
from slm.train import train
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]
HOW = {"global_batch": 8, "micro_batch": 2, "share": Share()}


@pytest.fixture
def write(tmp_path, monkeypatch, one_rank):
    """A function: changes of the tree -> the recipe's path, of 12 steps of 256 tokens from tmp_path/a."""
    monkeypatch.chdir(ROOT)
    make_dataset(tmp_path / "a", lengths=[90, 40, 130, 64, 65, 7, 2, 200, 33, 71, 150, 28] * 3)

    def recipe(loss=None, **changes):
        phase = {"name": "main", "tokens": 12 * 256, "seq_len": 64, "batch_tokens": 256, "micro_batch": 4}
        tree = {
            "name": "t",
            "output": str(tmp_path / "run"),
            "model": "cpu-tiny",
            "data": {"sources": {"a": str(tmp_path / "a")}},
            "phases": [{**phase, "loss": loss or {"type": "ce"}}],
            **changes,
        }
        path = tmp_path / "t.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return recipe


def test_rows_of_a_teachers_cache_in_another_order_or_too_many_never_train(write, tmp_path, caplog):
    """Row 19. Each whole row moved with its tag; only a row's entries moved (the tag no longer fits); bytes too many."""
    SLMForCausalLM(ModelConfig.preset("cpu-tiny", initializer_range=0.15), seed=7).save_pretrained(tmp_path / "teacher")
    teacher = {"model": str(tmp_path / "teacher"), "batch_tokens": 512, "cache": {"kind": "top_k", "k": 8}}
    path = write({"type": "distill", "alpha": 0.1}, teacher=teacher)
    assert build(load_recipe(path)) == 0
    w = next(wanted_caches(load_recipe(path)))
    whole, cache = w.path.read_bytes(), open_cache(w)
    order = np.random.default_rng(0).permutation(cache.spec.num_tokens)
    shuffled = bytearray(whole)
    for name in cache.spec.planes():
        at, rows = cache._layout.offsets[name], np.ascontiguousarray(cache.plane(name)[order])
        shuffled[at : at + rows.nbytes] = rows.tobytes()
    swapped = bytearray(whole)  # two neighbours only, somewhere: checks of a few rows may miss them, the run may not
    for name in cache.spec.planes():
        rows = np.array(cache.plane(name))
        rows[[300, 301]] = rows[[301, 300]]
        swapped[cache._layout.offsets[name] : cache._layout.offsets[name] + rows.nbytes] = rows.tobytes()
    for damaged, told in (
        (bytes(shuffled), "belong to other tokens"),
        (bytes(swapped), "belong to other tokens"),
        (whole + whole[-64:], "bytes, and should have"),
    ):
        w.path.write_bytes(damaged)
        caplog.clear()
        assert train(load_recipe(path)) == 4
        assert told in caplog.text
        assert not list((tmp_path / "run").glob("checkpoints/main-*"))
    w.path.write_bytes(whole)
    assert train(load_recipe(path)) == 0


TEXTS = [
    "the quick brown fox jumps over the lazy dog " * 3,
    "pack my box with five dozen liquor jugs",
    "naïve café 123 ",
] * 20


def changed_vocabulary(content):
    """Two tokens that no merge is made of change places."""
    vocab = content["model"]["vocab"]
    one, two = sorted(vocab, key=vocab.get)[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]


def changed_merges(content):
    content["model"]["merges"].pop()


def changed_special(content):
    content["added_tokens"][0]["id"], content["added_tokens"][1]["id"] = (
        t["id"] for t in content["added_tokens"][1::-1]
    )


def added_token(content):
    last = max(token["id"] for token in content["added_tokens"])
    content["added_tokens"].append(
        {**content["added_tokens"][-1], "id": last + 1, "content": "<extra>", "special": False}
    )


@pytest.mark.parametrize("change", [changed_vocabulary, changed_merges, changed_special, added_token])
def test_a_tokenizer_that_changed_in_any_part_is_another_one(write, tmp_path, caplog, change):
    """Row 20: the data were made with what it was, and training says so before the first step."""
    tokenizer = SLMTokenizer().train(TEXTS, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "tok")
    path = write(tokenizer=str(tmp_path / "tok"))
    shutil.rmtree(tmp_path / "a")
    make_dataset(tmp_path / "a", vocab_size=len(tokenizer), fingerprint=tokenizer.fingerprint)
    file = tmp_path / "tok" / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    changed = load_tokenizer(tmp_path / "tok")
    assert changed.fingerprint != tokenizer.fingerprint
    assert train(load_recipe(path)) == 2
    assert "were made with another" in caplog.text
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_a_lost_shard_is_named_before_the_first_step(write, tmp_path, caplog):
    """Row 21."""
    path = write()
    (tmp_path / "a" / "t-00001.bin").unlink()
    assert train(load_recipe(path)) == 4
    assert "t-00001.bin has no bytes, but the manifest says" in caplog.text


@pytest.fixture
def phase(tmp_path, monkeypatch):
    monkeypatch.setattr("slm.data.batches._SECONDS_BETWEEN_LOOKS", 0.0)
    return PhaseData({"a": make_dataset(tmp_path / "a")}, {"a": 1.0}, seq_len=64, seed=0, phase_name="a")


def steps(phase, count=4):
    for step in range(count):
        phase.step_batches(step, **HOW)


@pytest.mark.parametrize("change", ["a token", "the length"])
def test_a_shard_that_changes_under_a_run_ends_it(phase, tmp_path, change):
    """Row 21: the maps show the new bytes, which are not those of the manifest that the checkpoints name."""
    steps(phase)
    file = tmp_path / "a" / "t-00001.bin"
    with open(file, "r+b") as stream:
        if change == "a token":
            stream.write(b"\x05\x00")
        else:
            stream.seek(0, os.SEEK_END)
            stream.write(b"\x01\x00")
    os.utime(file)
    with pytest.raises(CorruptArtefact, match="t-00001.bin was changed while it is in use"):
        steps(phase)


def test_a_shard_that_is_touched_or_replaced_ends_nothing(phase, tmp_path):
    """The same bytes again, and a file by another name: what is mapped stays as it was."""
    file = tmp_path / "a" / "t-00001.bin"
    os.utime(file, (1, 1))
    steps(phase)
    (tmp_path / "new").write_bytes(bytes(100))
    (tmp_path / "new").replace(file)
    steps(phase)
    file.unlink()
    steps(phase)


def test_a_changed_shard_ends_a_run_with_code_4_and_the_same_command_goes_on(write, tmp_path, caplog, monkeypatch):
    """Row 21, whole: the run ends, the file is put back, the steps after it are those of a run that was never disturbed."""
    monkeypatch.setattr("slm.data.batches._SECONDS_BETWEEN_LOOKS", 0.0)
    path = write(checkpoint={"every_steps": 2})
    assert train(load_recipe(path, [f"output={tmp_path}/whole"])) == 0
    file = tmp_path / "a" / "t-00000.bin"
    whole, real = file.read_bytes(), PhaseData._make

    def make(self, step, *rest):
        if step == 6:
            with open(file, "r+b") as stream:
                stream.write(b"\x05\x00")
            os.utime(file)
        return real(self, step, *rest)

    monkeypatch.setattr(PhaseData, "_make", make)
    assert train(load_recipe(path)) == 4
    assert "was changed while it is in use" in caplog.text
    monkeypatch.setattr(PhaseData, "_make", real)
    file.write_bytes(whole)
    assert train(load_recipe(path)) == 0
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
            if '"loss"' in line
        ]
        for run in ("whole", "run")
    ]
    assert losses[0][-5:] == losses[1][-5:]
    assert len(losses[0]) == 12


def test_a_loader_that_dies_ends_the_run_and_leaves_no_gap(write, tmp_path, caplog, monkeypatch):
    """Row 21: an error of the thread that prepares batches is the run's, and the next attempt draws each sequence once."""
    path = write(checkpoint={"every_steps": 2})
    seen, real = [], PhaseData._make

    def make(self, step, *rest):
        if step == 5 and not seen and threading.current_thread() is not threading.main_thread():
            seen.append(step)
            raise OSError(5, "Input/output error", "t-00000.bin")
        return real(self, step, *rest)

    monkeypatch.setattr(PhaseData, "_make", make)
    assert train(load_recipe(path)) == 5
    assert "Input/output error" in caplog.text
    with caplog.at_level(logging.INFO):
        assert train(load_recipe(path)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    data = PhaseData({"a": TokenDataset(tmp_path / "a")}, {"a": 1.0}, seq_len=64, seed=1234, phase_name="main")
    drawn = [sample for step in range(12) for sample in data.sample_ids(step, 4)]
    assert len(set(drawn)) == len(drawn) == 48


def test_no_tokenizer_file_is_a_message(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "gone")
