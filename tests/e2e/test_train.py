"""`slm train` as a user meets it: resume, signals, kills, phases, init_from, logs, and every mistake in plain words."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from slm import checkpoint
from slm.errors import UserError
from slm.recipe import load_recipe
from slm.resume import Resume
from slm.train import train
from tests.faults.runs import environment
from tests.shards import make_dataset, recipe_tree
from tests.unit.test_rope import KINDS, scaling

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two training sources and a held-out one."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder / "a")
    make_dataset(folder / "b", seed=3)
    make_dataset(folder / "val", lengths=[90, 40, 130, 64, 65], seed=5)
    return folder


@pytest.fixture
def recipe(data, tmp_path, monkeypatch, one_rank):
    """A function: tree changes -> path of a recipe for 12 steps of 256 tokens in tmp_path/run."""
    monkeypatch.chdir(ROOT)

    def write(**changes):
        tree = recipe_tree(data, tmp_path / "run", checkpoint={"every_steps": 5})
        tree["phases"][0]["micro_batch"] = 4
        tree |= changes
        path = tmp_path / f"{tree['name']}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def rows(run_dir):
    return {line["step"]: line["loss"] for line in metrics_of(run_dir)}


def metrics_of(run_dir):
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def refused(path, caplog, *overrides):
    """Trains, expects a user's mistake, returns the message."""
    caplog.clear()
    code = train(load_recipe(path, list(overrides)))
    assert code == 2, caplog.text
    assert "Traceback" not in caplog.text
    return caplog.records[-1].getMessage()


def command(recipe_path, *overrides):
    return [sys.executable, "-m", "slm", "train", str(recipe_path), *overrides]


def test_run_directory(recipe, tmp_path):
    """A finished run leaves what the README says; asking again does nothing and says so with code 0."""
    assert train(load_recipe(recipe())) == 0
    run = tmp_path / "run"
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert sorted(rows(run)) == list(range(1, 13))
    assert [p.name for p in checkpoint.newest_first(run / "checkpoints")] == [
        "main-00000012",
        "main-00000010",
        "main-00000005",
    ]
    assert (run / "latest").resolve().name == "main-00000012"
    for folder in (run / "checkpoints").iterdir():
        checkpoint.verify(folder)
        assert not any(p.suffix in (".pt", ".pkl", ".done") for p in folder.iterdir())
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    for key in ("lr", "grad_norm", "tokens_per_second", "flops_per_second/full", "flops_per_second/causal",
                "peak_rss_bytes", "seconds/forward", "seconds/step"):  # fmt: skip
        assert line[key] > 0, key
    assert load_recipe(run / "recipe.yaml") == load_recipe(recipe())
    before = sorted((run / "checkpoints").iterdir())
    assert train(load_recipe(recipe())) == 0
    assert sorted((run / "checkpoints").iterdir()) == before
    assert sorted(rows(run)) == list(range(1, 13))


def test_sigkill_at_any_moment_then_the_same_command(recipe, tmp_path):
    """Killed three times at random; the final losses and weights are the uninterrupted run's, bit for bit."""
    path = recipe(checkpoint={"every_steps": 2})
    assert subprocess.run(command(path, f"output={tmp_path}/straight"), env=environment()).returncode == 0
    seed = random.Random(7)
    for _ in range(3):
        process = subprocess.Popen(command(path), env=environment())
        reached = seed.randint(1, 9)
        deadline = time.monotonic() + 60
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= reached:
                break
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert subprocess.run(command(path), env=environment()).returncode == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    a, b = (checkpoint.Reader(tmp_path / run / "latest") for run in ("run", "straight"))
    for name, shape in a.shapes.items():
        assert torch.equal(a.weight(name, shape), b.weight(name, shape)), name


def test_a_torn_checkpoint_is_passed_over_and_none_whole_is_an_error(recipe, tmp_path, caplog):
    """A flipped byte in the newest: the one before is used. In all: no silent start from step 0."""
    assert train(load_recipe(recipe())) == 0
    reference = rows(tmp_path / "run")
    folders = checkpoint.newest_first(tmp_path / "run" / "checkpoints")

    def flip(folder):
        file = folder / "rank-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-7] ^= 1
        file.write_bytes(content)

    flip(folders[0])
    assert train(load_recipe(recipe())) == 0
    assert "passing over a checkpoint" in caplog.text
    assert rows(tmp_path / "run") == reference
    checkpoint.verify(folders[0])  # made again
    for folder in folders:
        flip(folder)
    assert train(load_recipe(recipe())) == 4
    assert "nothing to go on from" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_saves_and_goes_on(recipe, tmp_path, name):
    """Exit code 75, a checkpoint at that very step, and the same command ends as the uninterrupted run."""
    path = recipe(phases=[{"name": "main", "tokens": 400 * 256, "seq_len": 64, "batch_tokens": 256, "micro_batch": 4}],
                  checkpoint={"every_steps": 1000})  # fmt: skip
    process = subprocess.Popen(command(path), stderr=subprocess.PIPE, text=True, env=environment())
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert f"stopped by {name}" in printed
    assert "Traceback" not in printed
    stopped_at = max(rows(tmp_path / "run"))
    assert (tmp_path / "run" / "latest").resolve().name == f"main-{stopped_at:08d}"
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 75


@pytest.mark.parametrize("last", ["dynamic", "longrope"])
def test_a_phase_of_each_scaling(recipe, tmp_path, last):
    """All eight in one run, each a phase; what the last one leaves is the same function in transformers."""
    import transformers

    from slm.loading import export_model, load_model

    names = [*(kind for kind in KINDS if kind != last), last]
    scalings = {name: scaling(name).model_dump(mode="json") for name in names}
    one_step = {"tokens": 256, "seq_len": 128, "batch_tokens": 256}
    path = recipe(phases=[{"name": name, **one_step, "rope_scaling": scalings[name]} for name in names])
    assert train(load_recipe(path)) == 0
    assert len(rows(tmp_path / "run")) == len(names)
    export_model(str(tmp_path / "run" / "latest"), tmp_path / "hf")
    ours, _ = load_model(str(tmp_path / "run" / "latest"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.arange(128)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_phases_and_mixture(recipe, data, tmp_path, caplog):
    """The second phase goes on from the first's weights and moments at another length, mixture and stage."""
    phases = [
        {"name": "short", "tokens": 6 * 256, "seq_len": 32, "batch_tokens": 256, "micro_batch": 4, "mixture": {"a": 1}},
        {"name": "long", "tokens": 5 * 256, "seq_len": 128, "batch_tokens": 256, "mixture": {"a": 1, "b": 3}, "lr": 1e-3,
         "rope_scaling": {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": 64},
         "deepspeed": "ds_configs/zero2.json"},
    ]  # fmt: skip
    path = recipe(phases=phases, data={"sources": {"a": str(data / "a"), "b": str(data / "b")}})
    assert train(load_recipe(path)) == 0
    run = tmp_path / "run"
    assert sorted(rows(run)) == list(range(1, 12))
    reader = checkpoint.Reader(run / "latest")
    assert reader.state["optimizer_steps"] == 11
    assert reader.state["model"]["rope_scaling"]["rope_type"] == "llama3"
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"short-00000006", "long-00000005"}  # phase ends stay
    straight = rows(run)
    shutil.rmtree(run / "checkpoints" / "long-00000005")
    assert train(load_recipe(path)) == 0  # from the boundary
    assert rows(run) == straight
    phases[0]["tokens"] *= 2
    path = recipe(phases=phases, data={"sources": {"a": str(data / "a"), "b": str(data / "b")}})
    assert train(load_recipe(path)) == 0
    assert "phases that are over stay as they were, so this has no effect: phases.short.tokens was" in caplog.text
    assert rows(run) == straight


def test_a_later_phase_leaves_out_what_an_earlier_one_planned(recipe, data, tmp_path):
    """Half of a source by share, then the rest by exclude_seen under another name of the same folder: every document once."""
    from slm.inputs import open_phase_data

    phases = [
        {"name": "one", "tokens": 4 * 256, "seq_len": 32, "batch_tokens": 256, "micro_batch": 4, "mixture": {"a": 1},
         "filters": {"a": {"share": 0.5}}},
        {"name": "two", "tokens": 4 * 256, "seq_len": 64, "batch_tokens": 256, "micro_batch": 2,
         "repeats": {"b": 3}, "filters": {"again": {"exclude_seen": ["one"], "min_doc_tokens": 3}}},
    ]  # fmt: skip
    sources = {"a": str(data / "a"), "b": str(data / "b"), "again": str(data / "a")}
    path = recipe(phases=phases, data={"sources": sources})
    assert train(load_recipe(path)) == 0
    loaded = load_recipe(path)
    one, two = (open_phase_data(loaded, phase) for phase in loaded.phases)
    (plan_one,) = (s.plan for s in one._sources)
    plan_two = dict(zip(two.sources, (s.plan for s in two._sources), strict=True))["again"]
    starts = [{*zip(p.piece_shard.tolist(), p.piece_start.tolist(), strict=True)} for p in (plan_one, plan_two)]
    assert starts[0]
    assert starts[1]
    assert not starts[0] & starts[1]
    ends = plan_one.num_tokens + plan_one.num_dropped + plan_two.num_tokens + plan_two.num_dropped
    tiny = sum(int((s.doc_offsets[1:] - s.doc_offsets[:-1]).tolist().count(2)) for s in two.sources["again"].shards)
    assert one.sources["a"].num_tokens - 2 * tiny <= ends <= one.sources["a"].num_tokens
    counts = {name: row["sequences"] for name, row in two.report().items()}
    drawn = [source for source, _, _ in two.sample_ids(0, 1024)]  # a block, over which a mixture is exact
    assert drawn.count("b") / drawn.count("a") == pytest.approx(3 * counts["b"] / counts["a"], rel=0.02)
    assert (tmp_path / "run" / "packing" / "two" / "again.npz").exists()
    refuse = [{**phases[0], "filters": {"a": {"exclude_seen": ["two"]}}}, {**phases[1], "mixture": {"a": 1}}]
    with pytest.raises(UserError) as caught:
        load_recipe(recipe(phases=refuse, data={"sources": sources}))
    assert "names 'two', which is no earlier phase (there is none)" in str(caught.value)
    assert "has a mixture and repeats" in str(caught.value)


def test_a_compiled_run_is_the_eager_run_and_compiles_once_per_phase(recipe, tmp_path, monkeypatch):
    """Two phases of different length with evaluations: one graph to train and one to evaluate each, none later."""
    from torch._dynamo.utils import counters

    import slm.loop

    phases = [
        {"name": n, "tokens": 6 * 256, "seq_len": s, "batch_tokens": 256, "micro_batch": 4}
        for n, s in (("a", 64), ("b", 32))
    ]
    path = recipe(phases=phases, eval={"every_steps": 2, "seq_lens": [32, 16]})  # at other lengths it is eager
    assert train(load_recipe(path, [f"output={tmp_path}/eager"])) == 0
    graphs, step_itself = [], slm.loop.train_step

    def counted(*args, **kwargs):
        graphs.append(counters["stats"]["unique_graphs"] - before)
        return step_itself(*args, **kwargs)

    monkeypatch.setattr(slm.loop, "train_step", counted)
    before = counters["stats"]["unique_graphs"]
    assert train(load_recipe(path, ["compile=true"])) == 0
    assert graphs == [0, 1, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4]  # before each step
    assert counters["stats"]["unique_graphs"] - before == 4
    assert rows(tmp_path / "run") == pytest.approx(rows(tmp_path / "eager"), abs=1e-5)


def test_init_from_and_extension(recipe, tmp_path):
    """Weights only, with the optimiser, from a Hugging Face folder, and a finished run made longer."""
    assert train(load_recipe(recipe())) == 0
    first = checkpoint.Reader(tmp_path / "run" / "latest")
    from slm.loading import export_model, load_model

    export_model(str(tmp_path / "run" / "latest"), tmp_path / "hf")
    losses = {}
    for name, init in {
        "weights": {"path": str(tmp_path / "run")},
        "optimizer": {"path": str(tmp_path / "run/latest"), "optimizer": True},
        "hf": {"path": str(tmp_path / "hf")},
    }.items():
        path = recipe(name=name, output=str(tmp_path / name), init_from=init)
        assert train(load_recipe(path, ["seed=77"])) == 0
        losses[name] = rows(tmp_path / name)
    assert losses["weights"] == losses["hf"]
    assert losses["weights"][1] == losses["optimizer"][1]  # the same weights at the first step
    assert losses["weights"][3] != losses["optimizer"][3]
    assert losses["weights"][1] < rows(tmp_path / "run")[1] - 0.2
    assert checkpoint.Reader(tmp_path / "optimizer" / "latest").state["optimizer_steps"] == 24
    # Once a run has a checkpoint of its own, what it began from may be gone.
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    path = recipe(name="weights", output=str(tmp_path / "weights"), init_from={"path": str(tmp_path / "run")})
    assert train(load_recipe(path, ["seed=77", f"phases.main.tokens={14 * 256}"])) == 0
    assert sorted(rows(tmp_path / "weights")) == list(range(1, 15))
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    assert train(load_recipe(recipe(), [f"phases.main.tokens={16 * 256}"])) == 0
    assert sorted(rows(tmp_path / "run")) == list(range(1, 17))
    model, _ = load_model(tmp_path / "hf")
    assert torch.equal(model.lm_head.weight, first.weight("model.embed_tokens.weight", (512, 64)))


def test_init_from_refusals(recipe, tmp_path, caplog):
    """Nothing there, another shape, or an optimiser that does not exist."""
    assert train(load_recipe(recipe())) == 0
    for path, words in (("/nowhere", "does not exist"), (str(ROOT), "neither a run with a checkpoint")):
        assert words in refused(recipe(name="x", output=str(tmp_path / "x"), init_from={"path": path}), caplog)
    other = {"preset": "cpu-tiny", "hidden_size": 32}
    message = refused(
        recipe(name="y", output=str(tmp_path / "y"), init_from={"path": str(tmp_path / "run")}, model=other), caplog
    )
    assert "has shape (512, 64), but the recipe's model has (512, 32)" in message
    from slm.loading import export_model

    export_model(str(tmp_path / "run"), tmp_path / "hf")
    init = {"path": str(tmp_path / "hf"), "optimizer": True}
    assert "which holds none" in refused(recipe(name="z", output=str(tmp_path / "z"), init_from=init), caplog)
    from slm import SLMForCausalLM
    from slm.model.config import ModelConfig

    SLMForCausalLM(ModelConfig.preset("cpu-tiny", tie_word_embeddings=False)).save_pretrained(tmp_path / "untied")
    init = {"path": str(tmp_path / "untied")}
    message = refused(recipe(name="u", output=str(tmp_path / "u"), init_from=init), caplog)
    assert "has an output head of its own" in message
    untied = {"preset": "cpu-tiny", "tie_word_embeddings": False, "rope_theta": 5e5}
    path = recipe(name="w", output=str(tmp_path / "w"), init_from=init, model=untied)
    assert train(load_recipe(path)) == 0
    assert "rope_theta 10000.0, this run 500000.0" in caplog.text  # said, but not refused: contexts are extended so


def test_best_checkpoint_is_kept(recipe, tmp_path):
    """`best` is the evaluation with the lowest held-out loss and survives pruning: here an early one, because the
    held-out text follows another rule than the one that is learned."""
    make_dataset(tmp_path / "other-rule", rule=4)
    path = recipe(eval={"every_steps": 2}, checkpoint={"every_steps": 2, "keep_last": 1}, optim={"lr": 0.03})
    assert train(load_recipe(path, [f"data.validation.val={tmp_path}/other-rule"])) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = {x["step"]: x["eval/all/loss"] for x in lines if "eval/all/loss" in x}
    best = min(evaluations, key=evaluations.get)
    assert best < 12
    assert (tmp_path / "run" / "best").resolve().name == f"main-{best:08d}"
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == len({best, 10, 12})


def test_logs_go_on_without_repeated_steps(recipe, tmp_path, monkeypatch):
    """TensorBoard and the real W&B client (offline) over a run that went back from step 12 to step 5."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    path = recipe(log={"tensorboard": True, "wandb": {"project": "t", "mode": "offline"}})
    assert train(load_recipe(path)) == 0
    for step in ("00000010", "00000012"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"main-{step}")
    assert train(load_recipe(path)) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curve = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    curve.Reload()
    assert [e.step for e in curve.Scalars("loss")] == list(range(1, 13))
    assert [
        json.loads(x)["step"] for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"loss"' in x
    ] == list(range(1, 13))


def test_profile_writes_a_trace(recipe, tmp_path):
    """--profile 3:4 leaves a trace with our attention operator in it."""
    assert train(load_recipe(recipe()), profile_steps=range(3, 5)) == 0
    trace = (tmp_path / "run" / "profile" / "rank-0.json").read_text()
    assert "slm::packed_attention_cpu" in trace
    steps = {event["name"] for event in json.loads(trace)["traceEvents"] if "ProfilerStep" in str(event.get("name"))}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}  # torch counts from 0


def test_gradients_that_are_not_finite(recipe, tmp_path, caplog, monkeypatch):
    """One bad step is skipped with weights untouched; ten in a row end the run with code 76."""
    from slm.engine import Engine

    forward, calls = Engine.forward, []

    def poisoned(self, batch, distillation=None):
        loss, count = forward(self, batch, distillation)
        calls.append(1)
        return (loss * float("nan") if len(calls) in bad else loss), count

    monkeypatch.setattr(Engine, "forward", poisoned)
    for stage, output in (("zero0", "s0"), ("zero1", "s1"), ("zero3", "s3")):
        calls, bad = [], {4}
        overrides = [f"output={tmp_path}/{output}", f"phases.main.deepspeed=ds_configs/{stage}.json"]
        assert train(load_recipe(recipe(), overrides)) == 0
        assert checkpoint.Reader(tmp_path / output / "latest").state["optimizer_steps"] == 11
        assert [e for e in (tmp_path / output / "events.jsonl").read_text().splitlines() if '"skip"' in e]
    calls, bad = [], set(range(3, 99))
    assert train(load_recipe(recipe(), [f"output={tmp_path}/s4"])) == 76
    assert "lower optim.lr" in caplog.records[-1].getMessage()


def test_out_of_memory_says_what_to_turn(recipe, tmp_path):
    """A real failed allocation (address space limited): code 77, the settings, a snapshot, no traceback."""
    make_dataset(tmp_path / "big", lengths=[256] * 200)
    options = [f"data.sources.a={tmp_path}/big", "phases.main.batch_tokens=32Ki", "phases.main.tokens=64Ki",
               "phases.main.seq_len=256", "phases.main.micro_batch=128", "model.hidden_size=256",
               "model.intermediate_size=2048"]  # fmt: skip
    command = [sys.executable, ROOT / "tests/little_memory.py", recipe(), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert result.returncode == 77, result.stderr[-3000:]
    assert "phases.main.micro_batch 128 -> 64" in result.stderr
    assert "Traceback" not in result.stderr
    assert "rss_bytes" in (tmp_path / "run" / "memory" / "rank-0.txt").read_text()


def test_mistakes_in_data_and_world(recipe, data, tmp_path, caplog):
    """Missing data, a vocabulary that is too small, too little text, another tokenizer, float16 on a CPU, stage 0 in
    bfloat16: each refused in words, with the fix."""
    assert "slm-data shards" in refused(recipe(), caplog, "data.sources.a=/nowhere")
    assert "set model.vocab_size to 512 or more" in refused(recipe(), caplog, "model.vocab_size=500")
    message = refused(recipe(), caplog, "phases.main.batch_tokens=64Ki", "phases.main.tokens=64Ki")
    assert "fewer than the 1024 of one step" in message
    make_dataset(tmp_path / "other", fingerprint="another")
    assert "different tokenizers" in refused(recipe(), caplog, f"data.validation.val={tmp_path}/other")
    assert "does not train on a CPU" in refused(recipe(), caplog, "precision=float16")
    message = refused(recipe(), caplog, "precision=bfloat16", "phases.main.deepspeed=ds_configs/zero0.json")
    assert "use ds_configs/zero1.json" in message
    assert "NVMe" in refused(recipe(), caplog, "phases.main.deepspeed=ds_configs/zero3_nvme.json")
    assert "for GPUs only" in refused(recipe(), caplog, "phases.main.deepspeed=ds_configs/zeropp.json")
    (tmp_path / "odd.json").write_text(json.dumps({"zero_optimization": {"stage": 1, "no_such_key": 1}}))
    assert "no_such_key" in refused(recipe(), caplog, f"phases.main.deepspeed={tmp_path}/odd.json")
    from slm import SLMTokenizer

    SLMTokenizer().save_pretrained(tmp_path / "bytes")
    assert "were made with another" in refused(recipe(), caplog, f"tokenizer={tmp_path}/bytes")
    (tmp_path / "empty").mkdir()
    assert "no manifest.json" in refused(recipe(), caplog, f"data.sources.a={tmp_path}/empty")


def test_a_refused_run_leaves_no_folder(recipe, tmp_path, caplog):
    """Where this attempt made it and nothing else is in it; what was there, and a run's own exit.json, stays."""
    refused(recipe(), caplog, "data.sources.a=/nowhere")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    refused(recipe(), caplog, "data.sources.a=/nowhere")
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2
    shutil.rmtree(tmp_path / "run")
    assert train(load_recipe(recipe(), [f"phases.main.tokens={2 * 256}"])) == 0
    refused(recipe(), caplog, "model.num_attention_heads=2")
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2
    assert (tmp_path / "run" / "checkpoints").exists()


def test_a_checkpoint_without_its_state_disturbs_nobody(recipe, tmp_path, caplog):
    """Passed over, not counted, not removed; training goes on and saves."""
    assert train(load_recipe(recipe())) == 0
    run = tmp_path / "run"
    reference = rows(run)
    (run / "checkpoints" / "main-00000012" / "state.json").unlink()
    (run / "checkpoints" / "main-00000010" / "manifest.json").write_text("{")
    assert train(load_recipe(recipe())) == 0, caplog.text
    assert rows(run) == reference
    checkpoint.verify(run / "checkpoints" / "main-00000012")


def test_changed_data_under_a_half_done_phase_is_refused(recipe, data, caplog, tmp_path):
    """Another seed, batch or dataset would make the steps before and after two different runs."""
    assert train(load_recipe(recipe(), [f"phases.main.tokens={10 * 256}"])) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "main-00000010")
    message = refused(recipe(), caplog, "seed=5", "phases.main.batch_tokens=512", f"data.sources.a={data}/b")
    assert "seed was 1234, is 5" in message
    assert "phases.main.batch_tokens was 256, is 512" in message
    assert f"data.sources.a was {data}/a, is {data}/b" in message
    assert "init_from" in message
    assert train(load_recipe(recipe(), ["seed=5"]), resume=Resume(allow_change=True)) == 2  # that is another run
    message = refused(recipe(), caplog, "optim.lr=1e-2", "phases.main.schedule.min_ratio=0", "precision=bfloat16")
    for words in ("step 5 of 12", "optim.lr was 0.003, is 0.01", "phases.main.schedule.min_ratio was 0.1, is 0.0",
                  "precision was auto, is bfloat16", "--allow-change"):  # fmt: skip
        assert words in message
    message = refused(recipe(), caplog, "model.num_attention_heads=2")  # the shapes are the same
    assert "model.num_attention_heads was 4, is 2" in message
    assert "steps cannot be taken back" in refused(recipe(), caplog, f"phases.main.tokens={4 * 256}")
    assert train(load_recipe(recipe(), ["optim.lr=1e-2"]), resume=Resume(allow_change=True)) == 0
    assert "from here on optim.lr was 0.003, is 0.01" in caplog.text


def test_another_length_of_a_half_done_phase(recipe, tmp_path, caplog):
    """Fewer tokens press what is left of the schedule together, or cut it off: refused without --allow-change. More need no word,
    and what they do to the learning rate is said with the numbers that the steps then have. A constant rate knows no end."""
    assert train(load_recipe(recipe())) == 0
    rates = {line["step"]: line["lr"] for line in metrics_of(tmp_path / "run")}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "main-00000012")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "main-00000010")
    for steps in (8, 5):  # it stands at 5: then it would be over, at once
        message = refused(recipe(), caplog, f"phases.main.tokens={steps * 256}")
        assert f"at step 5 its schedule (cosine) is pressed from 12 steps to {steps}" in message
        assert "--allow-change" in message
    longer = [f"phases.main.tokens={20 * 256}", "checkpoint.keep_last=9"]
    assert train(load_recipe(recipe(), longer)) == 0
    then = {line["step"]: line["lr"] for line in metrics_of(tmp_path / "run")}
    said = f"stretched from 12 steps to 20, and the next learning rate is {then[6]:.3g} in place of {rates[6]:.3g}"
    assert said in caplog.text
    for name in ("main-00000020", "main-00000015", "main-00000010"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    assert train(load_recipe(recipe(), [f"phases.main.tokens={8 * 256}"]), resume=Resume(allow_change=True)) == 0
    assert max(rows(tmp_path / "run")) == 8
    steady = [f"output={tmp_path}/steady", "phases.main.schedule.type=constant"]
    assert train(load_recipe(recipe(), steady)) == 0
    shutil.rmtree(tmp_path / "steady" / "checkpoints" / "main-00000012")
    assert train(load_recipe(recipe(), [*steady, f"phases.main.tokens={11 * 256}"])) == 0


def test_a_damaged_shard_is_named(recipe, tmp_path, caplog):
    """An id outside the vocabulary, in a file of the right size: code 4 and slm-data verify, not an index error."""
    make_dataset(tmp_path / "a")
    shard = next((tmp_path / "a").glob("*.bin"))
    data = bytearray(shard.read_bytes())
    data[1::2] = b"\xff" * (len(data) // 2)
    shard.write_bytes(data)
    assert train(load_recipe(recipe(), [f"data.sources.a={tmp_path}/a"])) == 4
    assert f"slm-data verify {tmp_path}/a" in caplog.records[-1].getMessage()


def test_a_changed_recipe_is_said(recipe, tmp_path, caplog):
    """In the log and among the events where the run goes on; where nothing is left to do, recipe.yaml stays what it was."""
    assert train(load_recipe(recipe())) == 0
    assert train(load_recipe(recipe(), ["optim.lr=1e-2"])) == 0
    assert load_recipe(tmp_path / "run" / "recipe.yaml").optim.lr == 3e-3
    assert train(load_recipe(recipe(), ["optim.lr=1e-2", f"phases.main.tokens={14 * 256}"])) == 0
    assert "from here on optim.lr was 0.003, is 0.01" in caplog.text
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert "optim.lr was 0.003, is 0.01" in [e for e in events if "changes" in e][-1]["changes"]
    assert load_recipe(tmp_path / "run" / "recipe.yaml").optim.lr == 1e-2


def test_a_run_that_must_go_on_does_not_begin(recipe, tmp_path, caplog):
    """--must-resume: no checkpoint, as where a path is mistyped, is an error; with one it goes on."""
    assert train(load_recipe(recipe()), resume=Resume(must=True)) == 2
    message = caplog.records[-1].getMessage()
    assert f"{tmp_path}/run/checkpoints holds no checkpoint" in message
    assert "--must-resume" in message
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert train(load_recipe(recipe())) == 0
    assert train(load_recipe(recipe(), [f"phases.main.tokens={13 * 256}"]), resume=Resume(must=True)) == 0


def test_a_checkpoint_without_moments_is_gone_on_from_on_request(recipe, tmp_path, caplog):
    """Row 29: refused by name; --fresh-optimizer begins with moments of zero, says so, and counts updates anew."""
    from safetensors.torch import load_file, save_file

    assert train(load_recipe(recipe(), [f"phases.main.tokens={10 * 256}"])) == 0
    folder = tmp_path / "run" / "latest"
    weights = {k: v for k, v in load_file(folder / "rank-00000.safetensors").items() if k.startswith("master/")}
    save_file(weights, folder / "rank-00000.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry |= checkpoint.file_digest(folder / entry["file"])
    (folder / "manifest.json").write_text(checkpoint.manifest_text(manifest))
    message = refused(recipe(), caplog)
    assert "main-00000010 (slm-checkpoint/2) lacks" in message
    assert "slm train --fresh-optimizer" in message
    assert train(load_recipe(recipe()), resume=Resume(fresh_optimizer=True)) == 0
    assert "the moments begin at zero" in caplog.text
    assert sorted(rows(tmp_path / "run")) == list(range(1, 13))
    assert checkpoint.Reader(folder).state["optimizer_steps"] == 2
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["kind"] == "fresh optimizer"] == [10]


def test_run_directory_in_use(recipe, tmp_path, caplog):
    """A second job in the same directory is refused, naming the holder, and the first loses nothing."""
    from slm.runtime import RunLock

    with RunLock(tmp_path / "run"):
        message = refused(recipe(), caplog)
    assert f"held by process {os.getpid()}" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_tokenizer_is_refused_when_evaluating(recipe, tmp_path):
    """Shards and tokenizers of the right size but another meaning: no number and no text comes of them."""
    from slm import SLMTokenizer
    from slm.loading import evaluate_model, export_model, load_for_text

    assert train(load_recipe(recipe())) == 0
    make_dataset(tmp_path / "other", fingerprint="another")
    with pytest.raises(UserError, match="is of another tokenizer"):
        evaluate_model(str(tmp_path / "run"), [str(tmp_path / "other")], 0, 4, 0)
    SLMTokenizer().save_pretrained(tmp_path / "bytes")
    state = tmp_path / "run" / "best" / "state.json"
    content = json.loads(state.read_text())
    content["recipe"]["tokenizer"] = str(tmp_path / "bytes")  # as if its files had been made anew since
    state.write_text(json.dumps(content))
    manifest = state.with_name("manifest.json")
    entries = json.loads(manifest.read_text())
    for entry in entries["files"]:
        if entry["file"] == "state.json":
            entry |= checkpoint.file_digest(state)
    manifest.write_text(checkpoint.manifest_text(entries))
    with pytest.raises(UserError, match="is of another tokenizer"):
        load_for_text(str(tmp_path / "run"))
    with pytest.raises(UserError, match="is of another tokenizer"):
        export_model(str(tmp_path / "run"), tmp_path / "hf")
    load_for_text(str(tmp_path / "run"), str(tmp_path / "bytes"))  # asked for by name


def test_command_line_mistakes_have_no_traceback(tmp_path, recipe):
    """What a user types wrong is one message on stderr and a code that is not 0."""
    for arguments, message in [
        (["train", "absent.yaml"], "does not exist"),
        (["train", str(recipe()), "optim.rl=3"], "optim.rl is not a field"),
        (["train", str(recipe()), "--profile", "x"], "no range of steps"),
        (["plan", str(recipe()), "--ranks", "3"], "use 1 rank, another micro_batch"),
        (["plan", str(recipe()), "--ranks", "0"], "--ranks"),
        (["plan", str(recipe()), "optim.lr=[1"], "not valid YAML"),
        (["plan", str(recipe()), "optim.lr=.inf"], "finite"),
        (["plan", str(recipe()), "optim.betas=[1.5,0.9]"], "optim.betas.0 is 1.5, and has to be below 1"),
        (["plan", str(recipe()), "phases.main.mixture={a: 1, b: 1}"], "not among data.sources"),
        (["eval", str(tmp_path), "--micro-batch", "0"], "--micro-batch"),
        (["eval", str(tmp_path / "nothing")], "does not exist"),
        (["generate", str(ROOT), "hello"], "neither a run with a checkpoint"),
        (["train", str(recipe()), f"data.sources.a={ROOT / 'README.md'}"], "is a file, and a dataset is a folder"),
    ]:
        result = subprocess.run(
            [sys.executable, "-m", "slm", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment()
        )
        assert result.returncode == 2, (arguments, result.stderr)
        assert message in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.stderr


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(recipe, tmp_path, caplog):
    """Without its manifest a folder is no checkpoint, and is named; where none is left, or the folder is empty though the run
    had saved, the run ends with code 4 and touches nothing."""
    path = recipe(checkpoint={"every_steps": 5, "keep_last": 9})
    assert train(load_recipe(path)) == 0
    folders = sorted((tmp_path / "run" / "checkpoints").glob("main-*"))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (folders[-1] / "manifest.json").unlink()
    caplog.clear()
    assert train(load_recipe(path)) == 0  # goes on from step 10
    assert f"passing over {folders[-1]}" in caplog.text
    for folder in folders:
        (folder / "manifest.json").unlink(missing_ok=True)
    for _ in range(2):
        caplog.clear()
        assert train(load_recipe(path)) == 4
        assert "would begin at step 0" in caplog.records[-1].getMessage()
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(before.splitlines())
