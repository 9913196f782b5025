"""`slm teacher` and distillation as a user meets them: caches from any kind of teacher and any number of processes, every
refusal, and training that learns from them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from slm import SLMForCausalLM
from slm.data.packing import pieces_of
from slm.data.tokens import TokenDataset
from slm.distill import examine
from slm.distill.build import build, open_cache
from slm.distill.codec import RawTargets
from slm.distill.models import check_teacher, describe_teacher, load_teacher
from slm.distill.student import Targets, check_online
from slm.distill.wanted import wanted_caches
from slm.errors import CorruptArtefact, UserError
from slm.inputs import open_phase_data
from slm.losses import IGNORE
from slm.model.config import ModelConfig
from slm.parallel import Share
from slm.recipe import load_recipe
from slm.train import train
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]
TOP = {"kind": "top_k", "k": 16, "block_tokens": 900}
DRAWN = {"kind": "sampled", "k": 8, "block_tokens": 900}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Token shards, and a teacher that knows something: random weights large enough for uneven distributions."""
    folder = tmp_path_factory.mktemp("distill")
    make_dataset(folder / "a", lengths=[90, 40, 130, 64, 65, 7, 2, 200, 33, 71, 150, 28] * 3)
    make_dataset(folder / "val", lengths=[90, 40, 130, 64, 65], seed=5)
    config = ModelConfig.preset("cpu-tiny", initializer_range=0.15, tie_word_embeddings=False)
    SLMForCausalLM(config, seed=7).save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def recipe(world, tmp_path, monkeypatch, one_rank):
    """A function: the teachers, and changes of the tree -> the recipe's path. Caches go to tmp_path/cache."""
    monkeypatch.chdir(ROOT)

    def write(teacher=None, loss=None, name="r", **changes):
        cache = {**TOP, "folder": str(tmp_path / "cache")}
        tree = {
            "name": name,
            "output": str(tmp_path / name),
            "model": "cpu-tiny",
            "data": {"sources": {"a": str(world / "a")}, "validation": {"val": str(world / "val")}},
            "teacher": teacher or {"model": str(world / "teacher"), "cache": cache, "batch_tokens": 512},
            "optim": {"lr": 3e-3},
            "phases": [
                {
                    "name": "main", "tokens": 12 * 256, "seq_len": 64, "batch_tokens": 256, "micro_batch": 4,
                    "loss": {"type": "distill", "alpha": 0.1, **(loss or {})},
                }
            ],
            "checkpoint": {"every_steps": 5},
            **changes,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def cached(world, tmp_path, **cache):
    return {"model": str(world / "teacher"), "cache": {"folder": str(tmp_path / "cache"), **cache}, "batch_tokens": 512}


def files(path):
    return {w.path.name: w.path.read_bytes() for w in wanted_caches(load_recipe(path))}


def environment(**more):
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {**{k: v for k, v in os.environ.items() if k not in ranks}, "OMP_NUM_THREADS": "1", **more}


def slm(*words):
    command = [sys.executable, "-m", "slm", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


# --- the cache -----------------------------------------------------------------------------------------------


def test_a_cache_holds_what_the_teacher_says_of_each_piece(recipe, world):
    """Every row, decoded, against the teacher run on that piece alone, through an independent implementation
    (transformers), at T = 1 and 2; and the commands verify, stats and diff."""
    path = recipe({"model": str(world / "teacher"), "cache": {**TOP, "temperatures": [1.0, 2.0]}, "batch_tokens": 512})
    tree = yaml.safe_load(path.read_text())
    tree["teacher"]["cache"]["folder"] = str(path.parent / "cache")
    path.write_text(yaml.safe_dump(tree))
    assert build(load_recipe(path)) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(world / "teacher", dtype=torch.float32).eval()
    for w in wanted_caches(load_recipe(path)):
        cache, shard = open_cache(w), w.dataset.shards[w.shard]
        starts, lengths, _ = pieces_of(shard.doc_offsets, 64)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            ids = torch.from_numpy(shard.tokens[start : start + length].astype(np.int64))
            with torch.no_grad():
                log_p = theirs(ids[None]).logits[0].log_softmax(1)
            rows = RawTargets.of("top_k", (1.0, 2.0), cache.rows(slice(start, start + length)))
            for T in (1.0, 2.0):
                index, head, tail = rows.decode(T)
                exact = (log_p / T).log_softmax(1)
                assert torch.equal(index.sort(1).values, exact.topk(16).indices.sort(1).values)
                torch.testing.assert_close(head, exact.gather(1, index), rtol=0, atol=0.12)
                exact_tail = exact.scatter(1, index, -torch.inf).logsumexp(1)
                torch.testing.assert_close(tail, exact_tail, rtol=1e-4, atol=1e-4)
    assert examine.verify(load_recipe(path)) == []
    done = slm("teacher", "verify", path)
    assert (done.returncode, done.stdout) == (0, "every cache is whole and of its tokens\n"), done.stderr
    picture = path.parent / "head.png"
    done = slm("teacher", "stats", path, "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert "mass of the likeliest k" in done.stdout
    assert "less than half" in done.stdout  # random weights: 16 of 512 tokens hold little
    assert picture.read_bytes()[:4] == b"\x89PNG"
    done = slm("teacher", "stats", path, "--plot", picture.with_suffix(".foo"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = slm("teacher", "diff", path, "--tokens", 600, "--json")
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout):
        assert abs(row["codec T=1"]) < 1e-3
        assert row["truncation T=1"] > 0.01
        assert abs(row["control"]) < 1e-5
        assert row["label"] < 0.01


def num_done(path):
    """Blocks of a cache that are done, of this moment."""
    if path.exists():
        return 1000
    partial = path.with_name(path.name + ".partial")
    if not partial.exists():
        return 0
    data = partial.read_bytes()
    header = json.loads(data[20 : 20 + int.from_bytes(data[8:16], "little")])
    blocks = header["blocks"]
    return sum(data[blocks["offset"] + 40 * b] == 1 for b in range(blocks["count"]))


def test_the_bytes_do_not_depend_on_who_made_them(recipe, world, tmp_path):
    """A killed process that goes on, two at once, and one alone leave the same files, top_k and sampled."""
    for kind in (TOP, DRAWN):
        path = recipe(cached(world, tmp_path, **kind))
        assert build(load_recipe(path)) == 0
        alone = files(path)
        shutil.rmtree(tmp_path / "cache")
        command = [sys.executable, "-m", "slm", "teacher", str(path)]
        first = next(wanted_caches(load_recipe(path))).path
        for blocks in (1, 2, 3):  # killed when so many blocks are done
            process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
            while process.poll() is None and num_done(first) < blocks:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
        two = [
            subprocess.Popen(command, cwd=ROOT, env=environment(SLURM_ARRAY_TASK_ID=str(i), SLURM_ARRAY_TASK_COUNT="2"))
            for i in (0, 1)
        ]
        assert [p.wait(180) for p in two] == [0, 0]
        assert files(path) == alone
        shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize(("method", "calls", "complete"), [("make", 1, 1), ("_run", 1, 0)])
def test_sigterm_keeps_the_complete_blocks(recipe, monkeypatch, method, calls, complete):
    """Exit code 75, after a block and within one, of which the rest is left; the same command ends the work."""
    from slm.distill.build import BlockMaker

    path = recipe()
    itself, called = getattr(BlockMaker, method), []

    def stopping(self, *arguments):
        done = itself(self, *arguments)
        called.append(method)
        if len(called) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(BlockMaker, method, stopping)
        assert build(load_recipe(path)) == 75
    assert len(called) == calls
    missing = open_cache(next(wanted_caches(load_recipe(path))), allow_partial=True).missing
    assert len(missing) - missing.sum() == complete
    assert build(load_recipe(path)) == 0
    assert examine.verify(load_recipe(path)) == []


def test_rows_of_equal_pieces_are_not_computed_again(recipe, world, tmp_path, monkeypatch):
    """At another piece length only the pieces that differ go through the teacher; the others' rows are the same bytes."""
    from slm.distill.build import BlockMaker

    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    longer = recipe(cached(world, tmp_path, **TOP))
    tree = yaml.safe_load(longer.read_text())
    tree["phases"][0] |= {"seq_len": 128, "micro_batch": 2}
    longer.write_text(yaml.safe_dump(tree))
    asked = []
    batches = BlockMaker._batches
    monkeypatch.setattr(BlockMaker, "_batches", lambda self, pieces: asked.extend(pieces) or batches(self, pieces))
    assert build(load_recipe(longer)) == 0
    assert examine.verify(load_recipe(longer)) == []
    dataset = TokenDataset(world / "a")
    num_different = sum(int((np.diff(s.doc_offsets) > 64).sum()) for s in dataset.shards)
    at_128 = [pieces_of(s.doc_offsets, 128)[1] for s in dataset.shards]
    assert num_different <= len(asked) < sum(map(len, at_128))
    for old, new in zip(wanted_caches(load_recipe(path)), wanted_caches(load_recipe(longer)), strict=True):
        offsets = old.dataset.shards[old.shard].doc_offsets
        for a, b in zip(offsets, offsets[1:], strict=False):
            if b - a <= 64:
                assert np.array_equal(open_cache(old).plane("val")[a:b], open_cache(new).plane("val")[a:b])


def test_other_families_run_through_transformers(recipe, world, tmp_path):
    """A GPT-2 of random weights, against its own logits; beyond its context it is refused."""
    config = transformers.GPT2Config(
        vocab_size=512, n_positions=64, n_embd=32, n_layer=1, n_head=2, initializer_range=0.3
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    teacher = {**cached(world, tmp_path, **TOP), "model": str(tmp_path / "gpt2")}
    path = recipe(teacher)
    assert build(load_recipe(path)) == 0
    w = next(wanted_caches(load_recipe(path)))
    cache, shard = open_cache(w), w.dataset.shards[w.shard]
    start, end = (int(x) for x in shard.doc_offsets[:2])
    ids = torch.from_numpy(shard.tokens[start : min(end, start + 64)].astype(np.int64))
    with torch.no_grad():
        log_p = theirs(ids[None]).logits[0].log_softmax(1)
    index, head, _ = RawTargets.of("top_k", (1.0,), cache.rows(slice(start, start + len(ids)))).decode(1.0)
    torch.testing.assert_close(head, log_p.gather(1, index), rtol=0, atol=0.12)
    tree = yaml.safe_load(path.read_text())
    tree["phases"][0] |= {"seq_len": 128, "micro_batch": 2}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="pieces of 128 tokens at seq_len 128, beyond the teacher's context of 64"):
        build(load_recipe(path))


# --- training from it ----------------------------------------------------------------------------------------


def rows_of(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", [TOP, DRAWN])
def test_a_student_learns_from_a_cache_and_goes_on_where_it_was(recipe, world, tmp_path, kind):
    """The loss falls, its parts and the teacher's own are in the log; stopped at step 5 and resumed, every loss is the same
    to the last bit."""
    path = recipe(cached(world, tmp_path, **kind))
    assert build(load_recipe(path)) == 0
    assert train(load_recipe(path)) == 0
    whole = [r for r in rows_of(tmp_path / "r") if "loss" in r]
    assert {"loss/ce", "loss/distill", "teacher/teacher/loss"} <= whole[0].keys()
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.03
    assert abs(whole[0]["loss"] - 0.1 * whole[0]["loss/ce"] - 0.9 * whole[0]["loss/distill"]) < 1e-4
    half = recipe(cached(world, tmp_path, **kind), name="half")
    run_dir = tmp_path / "half"

    import slm.loop

    steps, step_itself = [], slm.loop.train_step

    def counted(*args, **kwargs):
        steps.append(1)
        return step_itself(*args, **{**kwargs, "stop_requested": len(steps) == 5})

    slm.loop.train_step = counted
    try:
        assert train(load_recipe(half)) == 75
        assert train(load_recipe(half)) == 0
    finally:
        slm.loop.train_step = step_itself
    assert [r["loss"] for r in rows_of(run_dir) if "loss" in r] == [r["loss"] for r in whole]


def test_cached_and_live_teachers_give_the_same_gradient(recipe, world, tmp_path):
    """Of one batch: 8-bit values cost at most 1 % of the gradient's norm; the control, a live teacher in another batch
    shape, nothing."""
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    loaded = load_recipe(path)
    phase = loaded.phases[0]
    data = open_phase_data(loaded, phase)
    (batch,) = data.step_batches(0, global_batch=4, micro_batch=4, share=Share())
    live = load_recipe(recipe({"model": str(world / "teacher")}, loss={"targets": "bucket", "k": 16}, name="live"))

    def gradient(recipe_, batches):
        model = SLMForCausalLM(loaded.model, seed=1)
        targets = Targets(recipe_, recipe_.phases[0], torch.device("cpu"), 512)
        for b in batches:
            loss, _ = model(b.tokens_BT, b.positions_BT, b.piece_bounds, b.labels_BT, distillation=targets.of(b, 0.0))
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    fine = PhaseDataCopies(data, 1)
    from_cache, online = gradient(loaded, [batch]), gradient(live, [batch])
    control = gradient(live, fine)
    assert (control - online).norm() / online.norm() < 1e-5
    assert 1e-7 < (from_cache - online).norm() / online.norm() < 1e-2


class PhaseDataCopies(list):
    """The batches of a step in smaller micro-batches, with memory of their own."""

    def __init__(self, data, micro_batch):
        from dataclasses import replace

        found = data._make(0, 4, micro_batch, Share())
        names = ("tokens_BT", "labels_BT", "positions_BT", "piece_bounds")
        super().__init__(replace(b, **{n: getattr(b, n).clone() for n in names}) for b in found)


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "sequence"),
    [(1, 1, 1), (1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 2, 2), (4, 1, 2), (4, 4, 4)],
)
def test_the_targets_of_a_token_are_the_same_in_every_layout(
    recipe, world, tmp_path, world_size, micro_batch, sequence
):
    """Over ranks that share batches and sequences, micro-batches and epochs: the rows of each place of the order, byte for
    byte; and a rank that has a part of a sequence reads the rows of that part."""
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    loaded = load_recipe(path)

    def stream(size, micro, sequence, step):
        parts = {}  # of each column of ranks: the rows of its part of every sequence
        for rank in range(size):
            data, share = open_phase_data(loaded, loaded.phases[0]), Share.of(rank, size, sequence)
            for b in data.step_batches(step, global_batch=4, micro_batch=micro, share=share):
                raw, T = b.teachers[0], 64 // sequence
                assert len(raw.val_NPK) == b.tokens_BT.numel() == micro * T
                rows = (raw.idx_lo_NPK, raw.val_NPK, raw.log_tail_NT, b.labels_BT.flatten())
                parts.setdefault(share.sequence_rank, []).append([x.unflatten(0, (micro, T)).clone() for x in rows])
        columns = [[torch.cat(x) for x in zip(*found, strict=True)] for _, found in sorted(parts.items())]
        return [torch.cat(x, 1) for x in zip(*columns, strict=True)]

    epoch = open_phase_data(loaded, loaded.phases[0]).num_sequences // 4
    for step in (0, epoch + 1):
        for a, b in zip(stream(world_size, micro_batch, sequence, step), stream(1, 2, 1, step), strict=True):
            assert torch.equal(a, b)


def test_online_teachers_and_mixtures_train(recipe, world, tmp_path):
    """Full and bucket online, two caches with weights, a schedule of alpha and temperature: each runs to its end."""
    two = {
        "big": cached(world, tmp_path / "1", **TOP, temperatures=[1.0, 2.0]),
        "small": cached(world, tmp_path / "2", kind="top_k", k=4, temperatures=[1.0, 2.0]),
    }
    path = recipe(
        two, loss={"teachers": {"big": 3, "small": 1}, "alpha": {0: 0.5, 1: 0.0}, "temperature": {0: 2.0, 0.5: 1.0}}
    )
    assert build(load_recipe(path)) == 0
    assert train(load_recipe(path)) == 0
    assert {"teacher/big/loss", "teacher/small/loss"} <= rows_of(tmp_path / "r")[0].keys()
    for i, loss in enumerate(({}, {"targets": "bucket", "k": 8, "divergence": "jsd"}, {"temperature": 2.0})):
        path = recipe({"model": str(world / "teacher")}, loss=loss, name=f"online{i}")
        assert train(load_recipe(path)) == 0
        for row in (r for r in rows_of(tmp_path / f"online{i}") if "loss/distill" in r):  # means, over all targets
            assert row["loss"] == pytest.approx(0.1 * row["loss/ce"] + 0.9 * row["loss/distill"], rel=1e-5)
            assert "teacher/known" not in row


# --- refusals ------------------------------------------------------------------------------------------------


def refusal(path):
    loaded = load_recipe(path)
    with pytest.raises((UserError, CorruptArtefact)) as caught:
        open_phase_data(loaded, loaded.phases[0])
    return str(caught.value)


def test_what_is_not_there_or_not_whole_is_refused_before_the_first_step(recipe, world, tmp_path, caplog):
    path = recipe(cached(world, tmp_path, **TOP))
    assert "does not exist" in refusal(path)
    assert train(load_recipe(path)) == 2
    assert "slm teacher RECIPE" in caplog.text
    assert build(load_recipe(path)) == 0
    file = next(wanted_caches(load_recipe(path))).path
    whole = file.read_bytes()
    for damage, told in (
        (whole[: len(whole) - 100], "bytes, and should have"),
        (whole[:100], "header is damaged"),
        (b"x" + whole[1:], "does not begin as"),
        (shifted(whole, file, load_recipe(path)), "belong to other tokens (shifted"),
        (with_nan(whole, load_recipe(path)), "not a number"),
    ):
        file.write_bytes(damage)
        assert told in refusal(path)
        if len(damage) == len(whole) and damage[0] == whole[0]:
            assert examine.verify(load_recipe(path))
            done = slm("teacher", "verify", path)
            assert (done.returncode, done.stderr.count("Fix:")) == (4, 1), done.stderr
    file.write_bytes(whole)
    assert examine.verify(load_recipe(path)) == []


def shifted(data, file, loaded):
    """Every plane's rows moved on by one token."""
    cache = open_cache(next(wanted_caches(loaded)))
    out = bytearray(data)
    for name, (dtype, shape) in cache.spec.planes().items():
        at, size = cache._layout.offsets[name], dtype.itemsize * int(np.prod(shape))
        out[at + size : at + cache.spec.num_tokens * size] = data[at : at + (cache.spec.num_tokens - 1) * size]
    return bytes(out)


def with_nan(data, loaded):
    cache = open_cache(next(wanted_caches(loaded)))
    at = cache._layout.offsets["log_tail"]
    return data[:at] + np.full(cache.spec.num_tokens, np.nan, "<f4").tobytes() + data[at + 4 * cache.spec.num_tokens :]


def test_a_cache_of_something_else_is_refused(recipe, world, tmp_path):
    """Another shard, tokenizer, vocabulary, piece length, kind, size or temperature than it was made for."""
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    other = tmp_path / "other"

    def with_data(**how):
        shutil.rmtree(other, ignore_errors=True)
        make_dataset(other, lengths=[90, 40, 130, 64, 65, 7, 2, 200, 33, 71, 150, 28] * 3, **how)
        tree = yaml.safe_load(path.read_text())
        tree["data"]["sources"]["a"] = str(other)
        changed = tmp_path / "changed.yaml"
        changed.write_text(yaml.safe_dump(tree))
        return refusal(changed)

    assert "its token shard is" in with_data(seed=4)
    assert "its tokenizer is" in with_data(fingerprint="another")
    assert "its vocabulary is 512, and the recipe's is 500" in with_data(vocab_size=500)
    assert "asks for 2, and" in told(
        lambda: load_recipe(recipe(cached(world, tmp_path, **TOP), loss={"temperature": 2.0}))
    )
    assert "cannot be worked out from it" in refusal(
        recipe(cached(world, tmp_path, **TOP, temperatures=[1.0, 2.0]), loss={"temperature": 2.0})
    )
    assert "its kind is top_k" in refusal(recipe(cached(world, tmp_path, **DRAWN)))
    assert "its k is 16, and the recipe's is 32" in refusal(recipe(cached(world, tmp_path, **{**TOP, "k": 32})))
    assert build(load_recipe(recipe(cached(world, tmp_path, **{**TOP, "k": 8})))) == 0  # 16 entries serve 8
    with pytest.raises(UserError, match="its k is 16, and the recipe's is 32"):
        build(load_recipe(recipe(cached(world, tmp_path, **{**TOP, "k": 32}))))
    sixty_four = tmp_path / "cache" / "teacher" / "a" / "64"
    shutil.copytree(sixty_four, tmp_path / "cache" / "teacher" / "a" / "128")
    tree = yaml.safe_load(path.read_text())
    tree["phases"][0] |= {"seq_len": 128, "micro_batch": 2}
    longer = tmp_path / "longer.yaml"
    longer.write_text(yaml.safe_dump(tree))
    assert "its piece length (seq_len) is 64, and the recipe's is 128" in refusal(longer)


def told(function):
    with pytest.raises(UserError) as caught:
        function()
    return str(caught.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"targets": "both_renormalised"}, "worse than without a teacher"),
        ({"targets": "sampled"}, "which a top_k cache does not hold"),
        ({"targets": "full"}, "which a top_k cache does not hold"),
        ({"divergence": "reverse", "targets": "raw"}, "not linear in the teacher"),
        ({"alpha": 1.5}, "give 0 to 1"),
        ({"alpha": {0: 0.1, 7: 0.2}}, "fractions of the phase"),
        ({"alpha": {"start": 1}}, "phases.main.loss.alpha: {'start': 1} is neither a number nor"),
        ({"alpha": {}}, "neither a number nor"),
        ({"temperature": 0}, "give more than 0"),
        ({"k": 64}, "use at most that"),
        ({"teachers": {"nobody": 1}}, "not among teacher"),
        ({"teachers": {"teacher": 0}}, "their sum must be > 0"),
        ({"type": "ce", "k": 5}, "would have no effect"),
    ],
)
def test_losses_that_contradict_themselves_are_refused(recipe, loss, message):
    assert message in told(lambda: load_recipe(recipe(loss=loss)))


def test_distilling_without_a_teacher_is_refused(recipe):
    path = recipe()
    tree = yaml.safe_load(path.read_text())
    del tree["teacher"]
    path.write_text(yaml.safe_dump(tree))
    assert "the recipe has no teacher" in told(lambda: load_recipe(path))
    tree["phases"][0]["loss"] = {"type": "ce"}
    path.write_text(yaml.safe_dump(tree))
    assert "nothing for slm teacher to do" in told(lambda: build(load_recipe(path)))
    done = slm("teacher", path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_teacher_that_does_not_fit_is_refused(recipe, world, tmp_path):
    for model, message in (
        (tmp_path / "none", "does not exist"),
        (small_vocabulary(tmp_path), "a vocabulary of 300, the token shards' tokenizer one of 512"),
    ):
        teacher = {**cached(world, tmp_path, **TOP), "model": str(model)}
        assert message in told(lambda teacher=teacher: build(load_recipe(recipe(teacher))))
    short = SLMForCausalLM(ModelConfig.preset("cpu-tiny", max_position_embeddings=32))
    short.save_pretrained(tmp_path / "short")
    loaded = load_recipe(recipe({"model": str(tmp_path / "short")}, name="short"))
    with pytest.raises(UserError, match="beyond teacher teacher's context of 32"):
        check_online(loaded, loaded.phases[0], TokenDataset(world / "a"))


def small_vocabulary(tmp_path):
    SLMForCausalLM(ModelConfig.preset("cpu-tiny", vocab_size=300)).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_missing_blocks_are_learned_from_labels_if_allowed(recipe, world, tmp_path, caplog):
    """Half of the blocks: refused; with allow_partial the loss of the others is CE, the share is said, and it trains."""
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    for w in wanted_caches(load_recipe(path)):
        cache = open_cache(w)
        data = bytearray(w.path.read_bytes())
        for block in range(0, len(cache.bounds) - 1, 2):
            at = cache._layout.table + block * 40
            data[at : at + 4] = b"\0\0\0\0"
        w.path.unlink()
        w.path.with_name(w.path.name + ".partial").write_bytes(data)
    assert "is not complete" in refusal(path)
    partial = recipe(cached(world, tmp_path, **TOP), loss={"allow_partial": True})
    assert train(load_recipe(partial)) == 0
    assert "lacks" in caplog.text
    assert "learned from their labels alone" in caplog.text
    loaded = load_recipe(partial)
    data = open_phase_data(loaded, loaded.phases[0])
    (batch,) = data.step_batches(0, global_batch=4, micro_batch=4, share=Share())
    assert 0 < int(batch.present_N.sum()) < int((batch.labels_BT != IGNORE).sum())


def test_rows_of_other_tokens_stop_the_run_at_run_time(recipe, world, tmp_path):
    """A row that changed under a run: its tag no longer fits, and the batch is refused."""
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    loaded = load_recipe(path)
    data = open_phase_data(loaded, loaded.phases[0])
    w = next(wanted_caches(loaded))
    cache = open_cache(w)
    with open(w.path, "r+b") as file:
        file.seek(cache._layout.offsets["tag"])
        file.write(bytes(2 * cache.spec.num_tokens))

    def some_steps():
        for step in range(4):
            data.step_batches(step, global_batch=4, micro_batch=4, share=Share())

    with pytest.raises(CorruptArtefact, match="rows of a batch belong to other tokens"):
        some_steps()


def test_a_teacher_of_our_own_runs_is_one(recipe, world, tmp_path):
    """A run of `slm train`, by its best checkpoint; its tokenizer's fingerprint is compared with the shards'."""
    tree = yaml.safe_load(recipe(name="own").read_text())
    tree["phases"][0]["loss"] = {"type": "ce"}
    del tree["teacher"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    assert train(load_recipe(tmp_path / "own.yaml")) == 0
    info = describe_teacher(str(tmp_path / "own"))
    assert load_teacher(str(tmp_path / "own"), torch.device("cpu")).identity["tokenizer"] == "test"
    check_teacher("own", info, 512, "test")
    with pytest.raises(UserError, match="has another tokenizer"):
        check_teacher("own", info, 512, "other")


def test_engine_steps_with_accumulation_are_those_of_one_batch(recipe, world, tmp_path):
    """Micro-batches of 1, 2 and 4: the same loss and gradient norm, also under ZeRO-3 and recomputation."""
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    found = []
    for more in ([], ["phases.main.micro_batch=1"], ["phases.main.micro_batch=2", "phases.main.deepspeed=ds_configs/zero3.json"],
                 ["phases.main.activation_checkpointing=full"]):  # fmt: skip
        name = f"n{len(found)}"
        assert train(load_recipe(recipe(cached(world, tmp_path, **TOP), name=name), more)) == 0
        found.append([(r["loss"], r["grad_norm"]) for r in rows_of(tmp_path / name) if "loss" in r])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=2e-5)


# --- what a review found -------------------------------------------------------------------------------------


def test_the_cache_of_another_teacher_is_not_taken_for_this_ones(recipe, world, tmp_path):
    """By the command, by verify and by training; also one that was trained again at the same place."""
    mine = tmp_path / "mine"
    shutil.copytree(world / "teacher", mine)
    path = recipe({**cached(world, tmp_path, **TOP), "model": str(mine)})
    assert build(load_recipe(path)) == 0
    SLMForCausalLM(ModelConfig.preset("cpu-tiny", tie_word_embeddings=False), seed=8).save_pretrained(mine)
    assert "another teacher" in told(lambda: build(load_recipe(path)))
    assert "another teacher" in examine.verify(load_recipe(path))[0].problem
    assert "was made by another teacher" in refusal(path)
    shutil.rmtree(mine)  # a cache outlives its teacher
    open_phase_data(load_recipe(path), load_recipe(path).phases[0])


@pytest.mark.parametrize(("plane", "kind"), [("val", TOP), ("idx_lo", TOP), ("log_tail", TOP), ("idx_lo", DRAWN)])
def test_destroyed_planes_do_not_reach_the_loss(recipe, world, tmp_path, plane, kind):
    """Rows whose tags are right, and nothing else: found by what does not fit together."""
    path = recipe(cached(world, tmp_path, **kind))
    assert build(load_recipe(path)) == 0
    loaded = load_recipe(path)
    for w in wanted_caches(loaded):
        cache = open_cache(w)
        rows = cache.plane(plane)
        at = cache._layout.offsets[plane]
        data = bytearray(w.path.read_bytes())
        bad = np.random.default_rng(0).permutation(rows.reshape(-1)).reshape(rows.shape)
        data[at : at + bad.nbytes] = (bad if plane != "log_tail" else np.full_like(rows, -1e-4)).tobytes()
        w.path.write_bytes(data)
    data = open_phase_data(loaded, loaded.phases[0])
    with pytest.raises(CorruptArtefact, match="hold what no teacher says"):
        data.step_batches(0, global_batch=4, micro_batch=4, share=Share())


def test_a_damaged_cache_is_not_copied_into_another(recipe, world, tmp_path, caplog):
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    w = next(wanted_caches(load_recipe(path)))
    data = bytearray(w.path.read_bytes())
    data[open_cache(w)._layout.offsets["val"] + 5] ^= 1
    w.path.write_bytes(data)
    tree = yaml.safe_load(path.read_text())
    tree["phases"][0] |= {"seq_len": 128, "micro_batch": 2}
    path.write_text(yaml.safe_dump(tree))
    assert build(load_recipe(path)) == 0
    assert "is not used again" in caplog.text
    assert examine.verify(load_recipe(path)) == []


def test_a_teacher_of_nans_is_told(recipe, world, tmp_path):
    model = SLMForCausalLM.from_pretrained(world / "teacher")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    path = recipe({**cached(world, tmp_path, **TOP), "model": str(tmp_path / "nan")})
    with pytest.raises(CorruptArtefact, match="not numbers"):
        build(load_recipe(path))


def test_an_online_teacher_is_looked_at_before_the_first_phase(recipe, world, tmp_path, caplog):
    path = recipe({"model": str(tmp_path / "nowhere")})
    tree = yaml.safe_load(path.read_text())
    tree["phases"] = [{**tree["phases"][0], "name": "first", "loss": {"type": "ce"}}, tree["phases"][0]]
    path.write_text(yaml.safe_dump(tree))
    assert train(load_recipe(path)) == 2
    assert "nowhere does not exist" in caplog.text
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_other_small_mistakes_are_messages(recipe, world, tmp_path):
    for teacher, loss, message in (
        ({"model": str(world / "teacher")}, {"targets": "sampled"}, "online does not give"),
        ({"model": str(world / "teacher")}, {"k": 4}, "has no effect on targets: full"),
        ({"model": str(world / "teacher"), "zero3": True}, {}, "zero3 is for slm teacher"),
    ):
        assert message in told(lambda t=teacher, o=loss: load_recipe(recipe(t, loss=o)))
    assert "only 512 tokens" in told(lambda: build(load_recipe(recipe(cached(world, tmp_path, kind="top_k", k=600)))))
    loaded = load_recipe(recipe({"model": str(world / "teacher")}, loss={"targets": "bucket", "k": 600}))
    assert "only 512 tokens" in told(lambda: check_online(loaded, loaded.phases[0], TokenDataset(world / "a")))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "none-such", "vocab_size": 512}')
    (tmp_path / "odd" / "model.safetensors").write_bytes((world / "teacher" / "model.safetensors").read_bytes())
    odd = {**cached(world, tmp_path, **TOP), "model": str(tmp_path / "odd")}
    assert "cannot be loaded by transformers" in told(lambda: build(load_recipe(recipe(odd))))


def test_a_cache_that_has_not_begun_may_be_missing_if_allowed(recipe, world, tmp_path, caplog):
    """One shard of two: the other's tokens are learned from their labels, and the means are of those that are known."""
    path = recipe(cached(world, tmp_path, **TOP), loss={"allow_partial": True})
    assert build(load_recipe(path)) == 0
    whole = [w.path for w in wanted_caches(load_recipe(path))]
    assert train(load_recipe(path)) == 0
    usual = [r["teacher/teacher/loss"] for r in rows_of(tmp_path / "r") if "loss" in r]
    whole[1].unlink()
    shutil.rmtree(tmp_path / "r")
    assert train(load_recipe(path)) == 0
    rows = [r for r in rows_of(tmp_path / "r") if "loss" in r]
    assert all(0.2 < r["teacher/known"] < 0.8 for r in rows)
    assert abs(np.mean([r["teacher/teacher/loss"] for r in rows]) - np.mean(usual)) < 0.3
    whole[0].unlink()
    assert "no cache of teacher" in refusal(path)


def flip(path, plane="val", block=-1):
    """One bit of a plane, in a block's first row."""
    w = next(wanted_caches(load_recipe(path)))
    cache = open_cache(w)
    dtype, shape = cache.spec.planes()[plane]
    data = bytearray(w.path.read_bytes())
    data[cache._layout.offsets[plane] + int(cache.bounds[block - 1]) * dtype.itemsize * int(np.prod(shape))] ^= 16
    w.path.write_bytes(data)
    return w


@pytest.mark.parametrize("plane", ["val", "idx_lo", "log_tail"])
def test_damage_is_named_by_every_command_and_only_the_damaged_blocks_are_made_again(recipe, world, tmp_path, plane):
    """stats and diff check the blocks that they read; verify --repair and slm teacher give the first bytes again, of which all
    but one block are the old ones."""
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    before = files(path)
    w = flip(path, plane)
    last = len(open_cache(w).bounds) - 2
    for words in (["stats", path], ["diff", path, "--tokens", 300]):
        done = slm("teacher", *words)
        assert done.returncode == 4, done.stderr
        assert f"block {last} (tokens" in done.stderr
        assert "Traceback" not in done.stderr
    done = slm("teacher", "verify", path, "--repair")
    assert done.returncode == 2  # nothing damaged is left
    assert f"block {last} (tokens" in done.stdout
    assert f"Fix: slm teacher {path}, which makes the missing and the damaged blocks" in done.stderr
    missing = open_cache(w, allow_partial=True).missing
    assert np.flatnonzero(missing).tolist() == [last]
    assert build(load_recipe(path)) == 0
    assert files(path) == before


def test_a_damaged_header_is_called_so(recipe, world, tmp_path):
    """Also in the part of it that is empty."""
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    w = next(wanted_caches(load_recipe(path)))
    whole = w.path.read_bytes()
    for at in (9, 17, 100, 60_000):
        w.path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert "its header is damaged" in refusal(path), at


def test_stats_and_diff_refuse_the_cache_of_another_recipe(recipe, world, tmp_path):
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    other = tmp_path / "other-teacher"
    SLMForCausalLM(ModelConfig.preset("cpu-tiny", tie_word_embeddings=False), seed=8).save_pretrained(other)
    changed = load_recipe(path, [f"teacher.model={other}"])
    assert "made by another teacher" in told(lambda: examine.diff(changed))
    assert "made by another teacher" in told(lambda: examine.stats(changed))
    assert "its kind is top_k" in told(lambda: examine.stats(load_recipe(path, ["teacher.cache.kind=sampled"])))


def test_a_cache_of_more_entries_is_read_as_the_recipe_says(recipe, world, tmp_path, caplog):
    """cache.k below what is stored gives the loss that loss.k gives; and a run whose teacher is gone says so."""
    mine = tmp_path / "mine"
    shutil.copytree(world / "teacher", mine)
    assert build(load_recipe(recipe({**cached(world, tmp_path, **TOP), "model": str(mine)}))) == 0
    shutil.rmtree(mine)
    losses = []
    for name, k, loss in (("sixteen", 16, {}), ("four", 4, {}), ("by_loss", 16, {"k": 4})):
        teacher = {**cached(world, tmp_path, **{**TOP, "k": k}), "model": str(mine)}
        assert train(load_recipe(recipe(teacher, loss=loss, name=name))) == 0
        losses.append([row["loss/distill"] for row in rows_of(tmp_path / name) if "loss/distill" in row])
    assert losses[1] == losses[2] != losses[0]
    assert f"{mine} is not there" in caplog.text


def test_what_is_distilled_from_is_told(recipe, world, tmp_path, caplog):
    """In slm plan, in the log and in metrics.jsonl."""
    path = recipe(cached(world, tmp_path, **TOP), loss={"alpha": {0: 0.5, 1: 0.1}})
    done = slm("plan", path)
    assert "alpha 0.5, 0.1 from 100%, temperature 1" in done.stdout
    assert f"{world / 'teacher'}, cache of kind top_k, k = 16" in done.stdout
    assert build(load_recipe(path)) == 0
    assert "next: slm train RECIPE" in caplog.text
    assert train(load_recipe(path)) == 0
    assert "cache of kind top_k, k = 16" in caplog.text
    alphas = [row["loss/alpha"] for row in rows_of(tmp_path / "r") if "loss/alpha" in row]
    np.testing.assert_allclose(alphas, 0.5 - 0.4 * np.arange(12) / 12, atol=1e-12)


def test_the_words_of_the_command_are_checked(recipe, world, tmp_path):
    path = recipe(cached(world, tmp_path, **TOP))
    for words, message in (
        (["stat", path], "'stat' is nothing that slm teacher does"),
        ([path, "--json"], "--json has no effect here"),
        (["verify", path, "--plot", "x.png"], "it is for slm teacher stats"),
        (["stats", path, "--tokens", "5"], "it is for slm teacher diff"),
        ([path, "--repair"], "it is for slm teacher verify"),
        ([path, f"teacher.model={tmp_path}"], "neither a config.json nor checkpoints"),
        ([path, "teacher.cache=null"], "teacher runs beside the student"),
        ([path, f"teacher.cache.folder={path}"], "set another teacher.cache.folder"),
        (["stats", path], "does not exist"),
    ):
        done = slm("teacher", *words)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_lone_teacher_may_be_a_path_and_its_typos_are_its_own(recipe, world):
    loaded = load_recipe(recipe(str(world / "teacher")))
    assert loaded.teacher["teacher"].model == str(world / "teacher")
    message = told(lambda: load_recipe(recipe({"modle": str(world / "teacher"), "cache": TOP})))
    assert "2 problems" in message
    assert "- teacher.modle is not a field" in message


def test_a_schedule_that_changes_on_resume_is_told_as_one_value(recipe, world, tmp_path, caplog):
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    assert train(load_recipe(path)) == 0
    assert train(load_recipe(path, ["phases.main.loss.alpha={0: 0.5, 1: 0.2}", "phases.main.tokens=4096"])) == 0
    assert "phases.main.loss.alpha was 0.1, is {'0.0': 0.5, '1.0': 0.2}" in caplog.text


def test_a_cache_that_was_begun_with_other_settings_is_named_before_the_teacher_is_loaded(
    recipe, world, tmp_path, caplog
):
    path = recipe(cached(world, tmp_path, **TOP))
    assert build(load_recipe(path)) == 0
    w = next(wanted_caches(load_recipe(path)))
    open_cache(w).forget([0])
    caplog.clear()
    message = told(lambda: build(load_recipe(path, ["teacher.cache.block_tokens=1000"])))
    assert "begun with block_tokens 900, and the recipe says 1000" in message
    assert "loading" not in caplog.text
    done = slm("teacher", "verify", path)
    assert (done.returncode, done.stderr.count("Fix:")) == (2, 1), done.stderr
    assert build(load_recipe(path)) == 0
