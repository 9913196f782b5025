"""One process, 2 ranks, accumulation and every ZeRO stage are the same run; and each resumes what another saved."""

import json
import re

import pytest
import torch
import yaml

from slm.checkpoint import Reader
from slm.parallel import Share
from slm.recipe import load_recipe
from tests.distributed.ranks import ROOT, train_many
from tests.shards import make_dataset

STEPS = 10
CONFIGS = ROOT / "ds_configs"

# name: (world size, overrides). The reference is one process at stage 0, whose optimiser is torch's own AdamW.
LAYOUTS = {
    "one-zero0": (1, ["micro_batch=8", "deepspeed=zero0"]),
    "one-zero1-accumulate4": (1, ["micro_batch=2", "deepspeed=zero1"]),
    "two-zero0-accumulate2": (2, ["micro_batch=2", "deepspeed=zero0"]),
    "two-zero1": (2, ["micro_batch=4", "deepspeed=zero1"]),
    "two-zero2-accumulate2": (2, ["micro_batch=2", "deepspeed=zero2"]),
    "two-zero3-accumulate4": (2, ["micro_batch=1", "deepspeed=zero3"]),
    "two-zero3-recompute": (2, ["micro_batch=4", "deepspeed=zero3", "activation_checkpointing=full"]),
    "two-gathered-selective": (2, ["micro_batch=4", "deepspeed=gathered", "activation_checkpointing=selective"]),
    "two-gathered-tiles": (2, ["micro_batch=4", "deepspeed=gathered", "mlp_tile_tokens=100"]),
    "two-gathered-selective-tiles-accumulate2": (
        2,
        ["micro_batch=2", "deepspeed=gathered", "activation_checkpointing=selective", "mlp_tile_tokens=50"],
    ),
    "two-gathered-recompute-tiles": (
        2,
        ["micro_batch=4", "deepspeed=gathered", "activation_checkpointing=full", "mlp_tile_tokens=50"],
    ),
    "two-zero2-offload": (2, ["micro_batch=4", "deepspeed=zero2_offload"]),
    "two-zero3-offload": (2, ["micro_batch=4", "deepspeed=zero3_offload"]),
    # Ranks that share sequences (Ulysses). The model has 2 key/value heads: four ranks each get a copy of one.
    "sequence2-zero0": (2, ["sequence_parallel=2", "micro_batch=8", "deepspeed=zero0"]),
    "sequence2-zero1-accumulate2": (2, ["sequence_parallel=2", "micro_batch=4", "deepspeed=zero1"]),
    "sequence2-zero2-recompute": (
        2,
        ["sequence_parallel=2", "micro_batch=8", "deepspeed=zero2", "activation_checkpointing=full"],
    ),
    "sequence2-zero3-accumulate4": (2, ["sequence_parallel=2", "micro_batch=2", "deepspeed=zero3"]),
    "sequence2-gathered-selective-tiles": (
        2,
        [
            "sequence_parallel=2",
            "micro_batch=8",
            "deepspeed=gathered",
            "activation_checkpointing=selective",
            "mlp_tile_tokens=50",
        ],
    ),
    "sequence2-zero3-whole-buckets": (2, ["sequence_parallel=2", "micro_batch=8", "deepspeed=zero3_whole_buckets"]),
    "sequence2-zero2-offload": (2, ["sequence_parallel=2", "micro_batch=8", "deepspeed=zero2_offload"]),
    "sequence2-zero3-offload-activations": (
        2,
        [
            "sequence_parallel=2",
            "micro_batch=8",
            "deepspeed=zero3_offload",
            "activation_checkpointing=full",
            "offload_activations=true",
        ],
    ),
    "sequence4-zero1": (4, ["sequence_parallel=4", "micro_batch=8", "deepspeed=zero1"]),
    "sequence4-zero3-accumulate2": (4, ["sequence_parallel=4", "micro_batch=4", "deepspeed=zero3"]),
    "sequence2-data2-zero0": (4, ["sequence_parallel=2", "micro_batch=4", "deepspeed=zero0"]),
    "sequence2-data2-zero2-accumulate2": (4, ["sequence_parallel=2", "micro_batch=2", "deepspeed=zero2"]),
    "sequence2-data2-zero3-accumulate4": (
        4,
        ["sequence_parallel=2", "micro_batch=1", "deepspeed=zero3", "activation_checkpointing=full"],
    ),
}


def overrides_of(layout, output):
    return overrides(LAYOUTS[layout][1], output)


def overrides(options, output):
    found = [f"output={output}"]
    for option in options:
        field, value = option.split("=")
        if field == "deepspeed":
            beside = output.parent / f"{value}.json"
            value = beside if beside.exists() else CONFIGS / f"{value}.json"
        found.append(f"phases.main.{field}={value}")
    return found


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def write_recipe(folder):
    """10 steps of 512 tokens, on data of its own; a save at step 6 and at the end."""
    make_dataset(folder / "tokens")
    # 12 sequences, twice a run: of 8 at a time, and of 1 at a time on four ranks.
    make_dataset(folder / "held-out", lengths=[90, 40, 130, 64, 65, 7, 2, 200, 33, 71], seed=5)
    tree = {
        "name": "t",
        "model": "cpu-tiny",
        "data": {"sources": {"a": str(folder / "tokens")}, "validation": {"a": str(folder / "held-out")}},
        "optim": {"lr": 1e-3, "grad_clip": 0.5},
        "phases": [
            {
                "name": "main",
                "tokens": STEPS * 512,
                "seq_len": 64,
                "batch_tokens": 512,
                "schedule": {"warmup_steps": 3},
                "loss": {"z_loss": 1e-3},
            }
        ],
        "checkpoint": {"every_steps": 6, "keep_last": 9},
        "eval": {"every_steps": 5},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every layout trained for 10 steps on the same data, and the recipe."""
    folder = tmp_path_factory.mktemp("same-run")
    recipe = write_recipe(folder)
    # ZeRO-3 leaves weights this small whole on every rank; here it must split and gather them.
    gathered = json.loads((CONFIGS / "zero3.json").read_text())
    gathered["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "gathered.json").write_text(json.dumps(gathered))
    # What users may set themselves, and where DeepSpeed divides gradients by something else.
    strategy = json.loads((CONFIGS / "zero3.json").read_text())
    strategy["zero_optimization"]["reduce_scatter"] = False
    (folder / "zero3_whole_buckets.json").write_text(json.dumps(strategy))
    for world in (1, 2, 4):
        names = [name for name, (size, _) in LAYOUTS.items() if size == world]
        train_many([(recipe, overrides_of(name, folder / name)) for name in names], world)
    return folder, recipe


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one-zero0"])
def test_every_layout_is_the_same_run(runs, layout):
    """Losses to 1e-5, gradient norms to 1e-5 relative, held-out loss to 1e-5, weights to a relative L2 of 1e-5."""
    folder, _ = runs
    reference, found = metrics(folder / "one-zero0"), metrics(folder / layout)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert reference[STEPS]["loss"] < reference[1]["loss"] - 0.02  # it does learn
    for step in found:
        assert found[step]["loss"] == pytest.approx(reference[step]["loss"], abs=1e-5), step
        assert found[step]["grad_norm"] == pytest.approx(reference[step]["grad_norm"], rel=1e-5), step
        assert found[step]["lr"] == reference[step]["lr"]
        assert found[step]["tokens"] == reference[step]["tokens"]
    a, b = (Reader(folder / name / "checkpoints" / f"main-{STEPS:08d}") for name in ("one-zero0", layout))
    largest = 0.0
    for name, shape in a.shapes.items():
        want, got = a.weight(name, shape), b.weight(name, shape)
        assert (got - want).norm() <= 1e-5 * want.norm(), name
        largest = max(largest, float((got - want).abs().max()))
    # Elementwise the difference may be larger than rounding: where a gradient is nearly 0, Adam divides rounding noise
    # by its own size, so an element can move by a fraction of the learning rate (1e-3) either way.
    print(f"{layout}: largest elementwise difference of a weight {largest:.2e}")
    assert a.state["position"]["best_loss"] == pytest.approx(b.state["position"]["best_loss"], abs=1e-5)


def same_bits(folder, one, other, step=STEPS):
    a, b = (Reader(folder / name / "checkpoints" / f"main-{step:08d}") for name in (one, other))
    return all(
        torch.equal(a.read(kind, name, 0, torch.Size(shape).numel()), b.read(kind, name, 0, torch.Size(shape).numel()))
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for name, shape in a.shapes.items()
    )


def resume_copy(folder, recipe, source, target):
    """A run directory that stands at step 6 of `source`, as if it had been killed there."""
    run = folder / target
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "main-00000006").symlink_to(folder / source / "checkpoints" / "main-00000006")
    assert load_recipe(recipe).phases[0].num_steps == STEPS
    return run


EXACT = [n for n, (size, _) in LAYOUTS.items() if size <= 2 and "accumulate" in n] + ["two-zero2-offload"]


# (layout that saved at step 6, layout that goes on): what changes is the number of ranks, the ZeRO stage, accumulation,
# offloading, and the ranks that share a sequence, each both ways.
TRANSITIONS = [
    ("two-zero3-accumulate4", "one-zero0"),
    ("two-zero2-accumulate2", "one-zero1-accumulate4"),
    ("one-zero0", "two-zero3-recompute"),
    ("two-zero1", "two-zero3-offload"),
    ("one-zero1-accumulate4", "two-zero2-offload"),
    ("two-zero3-offload", "two-zero0-accumulate2"),
    ("two-zero1", "sequence2-zero3-accumulate4"),
    ("sequence2-zero1-accumulate2", "two-zero2-accumulate2"),
    ("sequence4-zero1", "one-zero1-accumulate4"),
    ("one-zero0", "sequence2-data2-zero3-accumulate4"),
    ("two-zero2-offload", "sequence4-zero1"),
]


# The GPU's precision at stages 1, 2 (accumulating) and 3, and on shared sequences.
HALF = ["two-zero1", "two-zero2-accumulate2", "two-zero3-recompute", "sequence2-zero1-accumulate2"]


@pytest.fixture(scope="module")
def resumed(runs):
    """Trained from step 6 to 10: {transition: run}, and in folder/NAME-resumed each layout of EXACT and, after it was trained in
    bfloat16 in folder/NAME-bf16, of HALF. Those of a number of ranks in one start of them."""
    folder, recipe = runs
    found = {pair: resume_copy(folder, recipe, pair[0], f"{pair[0]}-as-{pair[1]}") for pair in TRANSITIONS}
    jobs = [(pair[1], run, []) for pair, run in found.items()]
    jobs += [(name, resume_copy(folder, recipe, name, f"{name}-resumed"), []) for name in EXACT]
    half = ["precision=bfloat16"]
    jobs += [(name, folder / f"{name}-bf16", half) for name in HALF]
    jobs += [(name, resume_copy(folder, recipe, f"{name}-bf16", f"{name}-bf16-resumed"), half) for name in HALF]
    for world in (1, 2, 4):
        these = [job for job in jobs if LAYOUTS[job[0]][0] == world]
        train_many([(recipe, [*overrides_of(layout, run), *more]) for layout, run, more in these], world)
    return found


@pytest.mark.parametrize("name", EXACT)
def test_resume_is_bit_exact_at_the_same_layout(runs, resumed, name):
    """From step 6 to 10 again: losses, weights and both moments equal the uninterrupted run's bit for bit."""
    folder, _ = runs
    straight, again = metrics(folder / name), metrics(folder / f"{name}-resumed")
    assert sorted(again) == [7, 8, 9, 10]
    assert {s: (m["loss"], m["grad_norm"]) for s, m in again.items()} == {
        s: (straight[s]["loss"], straight[s]["grad_norm"]) for s in again
    }
    assert same_bits(folder, name, f"{name}-resumed")


@pytest.mark.parametrize(("source", "target"), TRANSITIONS)
def test_resume_at_another_layout(runs, resumed, source, target):
    """The layout changes at step 6; losses stay within 1e-5, and the order of the data is the same tokens."""
    folder, _ = runs
    straight, found = metrics(folder / source), metrics(resumed[source, target])
    assert sorted(found) == [7, 8, 9, 10]
    for step, row in found.items():
        assert row["loss"] == pytest.approx(straight[step]["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(straight[step]["grad_norm"], rel=1e-5)
        assert row["tokens"] == straight[step]["tokens"]


@pytest.mark.parametrize("target", ["one-zero1-accumulate4", "two-zero3-recompute", "two-zero2-offload", "sequence4-zero1",
                                    "sequence2-data2-zero3-accumulate4"])  # fmt: skip
def test_each_rank_reads_its_part_alone(runs, resumed, target):
    """At 1, 2 and 4 ranks, ZeRO 1 to 3: beside the headers, the ranks together read each byte of the state once, and none more
    than its share (padded to equal parts by ZeRO-3, and whole small tensors)."""
    for pair in [pair for pair in TRANSITIONS if pair[1] == target]:
        folder = (resumed[pair] / "checkpoints" / "main-00000006").resolve()
        headers = Reader(folder).bytes_read
        num_bytes = 12 * sum(torch.Size(shape).numel() for shape in Reader(folder).shapes.values())
        world = LAYOUTS[target][0]
        logs = [(resumed[pair] / "logs" / f"rank-{rank}.log").read_text() for rank in range(world)]
        read = [int(re.search(r"read ([0-9,]+) of the", log)[1].replace(",", "")) - headers for log in logs]
        print(pair, "of", num_bytes, "bytes of state the ranks read", read, "and headers of", headers)
        assert sum(read) == num_bytes
        assert max(read) <= 1.02 * num_bytes / world


def test_the_reference_is_a_plain_pytorch_loop(runs):
    """`one-zero0` against transformers' model, each document alone, torch's AdamW and clipping, written out here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from slm.inputs import open_phase_data
    from slm.model.hf import config_to_hf
    from slm.model.llama import initial_value
    from slm.optim import learning_rate

    folder, path = runs
    recipe = load_recipe(path)
    phase = recipe.phases[0]
    model = LlamaForCausalLM(LlamaConfig(**config_to_hf(recipe.model)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(recipe.model, name, tuple(parameter.shape), recipe.seed))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    data = open_phase_data(recipe, phase)
    found = metrics(folder / "one-zero0")
    for step in range(STEPS):
        (batch,) = data.step_batches(step, global_batch=8, micro_batch=8, share=Share())
        tokens, labels = batch.tokens_BT.flatten(), batch.labels_BT.flatten()
        bounds = torch.unique(batch.piece_bounds).tolist()
        total = torch.zeros(())
        for start, end in zip(bounds, bounds[1:], strict=False):
            logits = model(tokens[None, start:end]).logits[0]
            valid = labels[start:end] >= 0
            total = total + torch.nn.functional.cross_entropy(logits[valid], labels[start:end][valid], reduction="sum")
            total = total + 1e-3 * (logits[valid].logsumexp(-1) ** 2).sum()
        loss = total / batch.num_targets
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = learning_rate(phase.schedule, recipe.optim.lr, step, phase.num_steps)
        adam.step()
        assert found[step + 1]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert found[step + 1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    reader = Reader(folder / "one-zero0" / "checkpoints" / f"main-{STEPS:08d}")
    for name, parameter in model.named_parameters():
        weight = reader.weight(name, tuple(parameter.shape))
        assert (weight - parameter).norm() <= 1e-5 * parameter.norm(), name


def test_bfloat16_trains_like_float32_and_resumes_bit_exact(runs, resumed):
    """Losses within bfloat16's rounding of float32's, and an exact resume from the masters. Between layouts the products are
    the same and only sums are rounded in another order: a tenth of that."""
    folder, _ = runs
    reference = metrics(folder / "one-zero0")
    for name in HALF:
        found = metrics(folder / f"{name}-bf16")
        assert sorted(found) == sorted(reference)
        for step, row in found.items():
            assert row["loss"] == pytest.approx(reference[step]["loss"], abs=2e-2)
    apart, shared = (metrics(folder / f"{name}-bf16") for name in ("two-zero1", "sequence2-zero1-accumulate2"))
    for step, found in shared.items():
        assert found["loss"] == pytest.approx(apart[step]["loss"], abs=5e-4)
        assert found["grad_norm"] == pytest.approx(apart[step]["grad_norm"], rel=2e-3)
    for name in HALF:
        assert sorted(metrics(folder / f"{name}-bf16-resumed")) == [7, 8, 9, 10]
        assert same_bits(folder, f"{name}-bf16", f"{name}-bf16-resumed"), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_on_shared_sequences(runs):
    """With the exchanges between ranks inside of them: losses and norms of one process that compiles nothing. (The C++
    compiler takes its time, once for each rank.)"""
    folder, recipe = runs
    name = "sequence2-zero1-accumulate2"
    options = [*overrides_of(name, folder / f"{name}-compiled"), "compile=true"]
    train_many([(recipe, options)], 2, timeout_seconds=600)
    reference, found = metrics(folder / "one-zero0"), metrics(folder / f"{name}-compiled")
    assert sorted(found) == sorted(reference)
    for step, row in found.items():
        assert row["loss"] == pytest.approx(reference[step]["loss"], abs=1e-5), step
        assert row["grad_norm"] == pytest.approx(reference[step]["grad_norm"], rel=1e-5), step


def test_each_phase_may_have_its_own_ranks(runs, tmp_path):
    """Length, rotary scaling, ZeRO stage, ranks, those that share a sequence, and micro-batch change at boundaries: in jobs
    of 1, 4 and 2 ranks the losses, norms, rates and held-out losses of one process that runs all phases; moments go along."""
    _, recipe = runs
    tree = yaml.safe_load(recipe.read_text())
    phase = {**tree["phases"][0], "tokens": 4 * 512, "micro_batch": 4}
    yarn = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64}
    tree["phases"] = [
        {**phase, "name": "a"},
        {**phase, "name": "b", "seq_len": 128, "rope_scaling": yarn, "micro_batch": 2},
        {**phase, "name": "c", "seq_len": 128, "micro_batch": 2},
    ]
    path = tmp_path / "phases.yaml"
    path.write_text(yaml.safe_dump(tree))

    def options(run, **phases):
        return [f"output={tmp_path / run}", *(f"phases.{p}.{o}" for p, given in phases.items() for o in given)]

    zero = {stage: f"deepspeed={CONFIGS}/zero{stage}.json" for stage in (0, 1, 2, 3)}
    everywhere = {name: [zero[0]] for name in "abc"}
    b = ["sequence_parallel=2", "micro_batch=1", zero[3], "activation_checkpointing=selective"]
    jobs = options("jobs", a=[zero[1]], b=b, c=["sequence_parallel=2", "micro_batch=4", zero[2]])
    train_many([(path, options("whole", **everywhere)), (path, jobs, "a")], 1)
    train_many([(path, jobs, "b")], 4)
    train_many([(path, jobs)], 2)
    told = [json.loads(line) for line in (tmp_path / "jobs" / "events.jsonl").read_text().splitlines()]
    assert [event["phases_left"] for event in told if event["kind"] == "done"] == [["b", "c"], ["c"], []]
    whole, found = metrics(tmp_path / "whole"), metrics(tmp_path / "jobs")
    assert sorted(found) == sorted(whole) == list(range(1, 13))
    for step, row in whole.items():
        assert found[step]["loss"] == pytest.approx(row["loss"], abs=1e-5), step
        assert found[step]["grad_norm"] == pytest.approx(row["grad_norm"], rel=2e-5), step
        assert (found[step]["lr"], found[step]["tokens"]) == (row["lr"], row["tokens"])
    ends = [Reader(tmp_path / run / "checkpoints" / "c-00000004").state["position"] for run in ("whole", "jobs")]
    assert ends[1]["best_loss"] == pytest.approx(ends[0]["best_loss"], abs=1e-5)
