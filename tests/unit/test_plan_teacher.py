"""A teacher that runs beside the student, in `slm plan --gpu`: its memory, FLOPs and time; and what is said if it is not here."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from slm import SLMForCausalLM
from slm.choose import candidates
from slm.data.batches import Batch
from slm.distill.beside import Teachers, forward_flops, teacher_memory, teachers_of
from slm.distill.student import Targets
from slm.forecast import GPUs, Work, exchange_bytes, step_time
from slm.hardware import find_gpu
from slm.losses import linear_cross_entropy, linear_distillation
from slm.memory import Zero
from slm.model import attention
from slm.model.config import ModelConfig
from slm.model.shape import shape_of
from slm.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/llama3.2-1b.yaml"
EIGHT_B = ModelConfig.preset("llama3.1-8b")
# A vocabulary and a width at which the head binds, or a block.
SHAPE = dict(vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=2)


def hf_config(shape: ModelConfig, **fields) -> str:
    """As Hugging Face has it for Llama 3.1 8B, whose rotary settings the plan need not read."""
    return json.dumps({"model_type": "llama", **shape.model_dump(mode="json", exclude={"rope_scaling"}), **fields})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big/config.json").write_text(hf_config(EIGHT_B))
    return tmp_path / "big"


def distilling(*overrides):
    recipe = load_recipe(RECIPE, list(overrides))
    return recipe, next(phase for phase in recipe.phases if phase.name == "distill")


def own(*overrides, gpu="h100"):
    recipe, phase = distilling(*overrides)
    return candidates(recipe, phase, find_gpu(gpu), GPUs(8)).own


def test_a_teacher_that_is_here_is_counted(folder):
    """Llama 3.1 8B beside the 1B student on 8 H100: 8,030,261,248 weights of 2 bytes on each, at every moment; 2 FLOPs a
    weight but the embedding's, and attention; by hand. What the plan gives for a cache does not have them."""
    cached, beside = own(), own(f"teacher.model={folder}", "teacher.cache=null")
    assert cached.time.teacher_seconds == 0
    assert cached.not_counted == beside.not_counted == ()
    tokens = 4 * 8192
    targets = tokens * 4096 * 2  # the last hidden states, for the whole vocabulary
    for held in beside.memory.moments:
        if held.moment != "teacher's forward pass":
            assert held.teacher == 8_030_261_248 * 2 + targets
    assert beside.memory.peak.total_bytes > cached.memory.peak.total_bytes + 8_030_261_248 * 2
    linear, scores = forward_flops(EIGHT_B, 8192)
    assert linear == 2 * (8_030_261_248 - 128256 * 4096 - (2 * 32 + 1) * 4096)
    assert scores == 4 * 32 * 4096 * 8192
    gpu = find_gpu("h100")
    seconds = linear / (gpu.peak_flops * gpu.matmul_efficiency)
    seconds += 12 * 32 * 4096 * 8192 * 2 / 7 / (gpu.peak_flops * gpu.attention_efficiency)
    assert beside.time.teacher_seconds == pytest.approx(16 * tokens * seconds)
    assert beside.time.seconds == pytest.approx(cached.time.seconds + beside.time.teacher_seconds, rel=1e-6)


def test_an_8b_teacher_does_not_fit_a_small_gpu(folder):
    """16 GB of weights beside the student's: what a 24 GB card held with a cache, it no longer holds."""
    small = ["phases.distill.micro_batch=1", "phases.distill.activation_checkpointing=full"]
    assert own(*small, gpu="rtx4090").fits
    assert not own(*small, f"teacher.model={folder}", "teacher.cache=null", gpu="rtx4090").fits


def test_a_teacher_that_is_not_here_is_said_where_the_figures_stand():
    """In the lines, in the table, in --json of every setting of this phase, and of no other."""
    command = [sys.executable, "-m", "slm", "plan", str(RECIPE), "--gpus", "8", "--gpu", "h100", "teacher.cache=null"]

    def run(*more):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    phases = json.loads(run("--json"))["budget"]["phases"]
    for phase in phases:
        for row in [phase["own"], phase["chosen"], *phase["candidates"]]:
            assert len(row["not_counted"]) == (phase["name"] == "distill")
    assert "models/Llama-3.1-8B is not on this machine" in phases[1]["own"]["not_counted"][0]
    printed = run()
    assert printed.count("NOT COUNTED: the teacher runs beside the student") == 1
    assert "WITHOUT what is not counted" in printed
    assert "yes*" in printed


def test_only_the_teachers_of_the_phase_count():
    """Two cached teachers, of which the phase's loss uses one; a phase that does not distil uses none."""
    two = "teacher={a: {model: x, cache: {k: 12}}, b: {model: y, cache: {k: 64}}}"
    recipe, phase = distilling(two, "phases.distill.loss.teachers={a: 1, b: 0}")
    assert teachers_of(recipe, phase).entries == (12,)
    assert teachers_of(recipe, recipe.phases[0]) == Teachers()


def test_shapes_are_read_as_the_loader_reads_them(tmp_path):
    """Of a saved model, of a checkpoint's and a run's files; and none of a model of another kind, or of nothing."""
    tiny = ModelConfig.preset("cpu-tiny", **SHAPE)
    SLMForCausalLM(tiny).save_pretrained(tmp_path / "hf")
    assert shape_of(tmp_path / "hf").num_parameters() == tiny.num_parameters()
    (tmp_path / "state.json").write_text(json.dumps({"model": tiny.model_dump(mode="json")}))
    assert shape_of(tmp_path).num_parameters() == tiny.num_parameters()
    (tmp_path / "config.json").write_text(hf_config(EIGHT_B))
    assert shape_of(tmp_path).num_parameters() == 8_030_261_248
    for bad in (hf_config(EIGHT_B, model_type="qwen2"), "{", '"llama"', '{"model_type": "llama"}'):
        (tmp_path / "config.json").write_text(bad)
        assert shape_of(tmp_path) is None
    assert shape_of(tmp_path / "nothing") is None


# --- against the real teacher, on a CPU in float32 ----------------------------------------------------------------


def allocated(work):
    """(what remains, the most) of bytes that torch allocates in work()."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return now, peak


def random_batch(num_tokens, vocab_size):
    tokens = torch.randint(0, vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    positions, bounds = torch.arange(num_tokens)[None], torch.tensor([0, num_tokens], dtype=torch.int32)
    return Batch(tokens, tokens, positions, bounds, num_tokens, num_tokens, 0, 0)


@pytest.mark.parametrize(
    "loss",
    ["targets: full", "targets: full, temperature: 2", "targets: bucket, k: 16", "targets: bucket, temperature: 2"],
)
@pytest.mark.parametrize("shape", [SHAPE, SHAPE | {"vocab_size": 128}])
def test_memory_is_that_of_the_real_teacher(loss, shape, tmp_path):
    """Weights and targets to 1 %, the peaks of its forward pass and of the loss's buffers to 15 % and 0.5 MiB;
    what a chunk holds of each entry (32 bytes at most) is not counted."""
    config = ModelConfig.preset("cpu-tiny", **shape)
    SLMForCausalLM(config).init_weights(0).save_pretrained(tmp_path / "hf")
    recipe, phase = distilling(
        f"teacher.model={tmp_path / 'hf'}", "teacher.cache=null", f"phases.distill.loss={{type: distill, {loss}}}"
    )
    num_tokens = 2048
    found = teacher_memory(teachers_of(recipe, phase), config, num_tokens, value_bytes=4, device="cpu")
    targets, batch = Targets(recipe, phase, torch.device("cpu"), config.vocab_size), random_batch(num_tokens, 128)
    weights = sum(p.nbytes for p in targets.online[0].llama.parameters())
    assert found.weights == pytest.approx(weights, rel=0.01)
    targets.of(batch, 0.0)
    kept, peak = allocated(lambda: targets.of(batch, 0.0))
    assert found.targets == pytest.approx(kept, rel=0.01)
    assert found.working + found.targets == pytest.approx(peak, rel=0.15, abs=2**19)
    distillation = targets.of(batch, 0.0)
    hidden = torch.randn(num_tokens, config.hidden_size, requires_grad=True)
    head = torch.randn(config.vocab_size, config.hidden_size, requires_grad=True)
    labels = batch.labels_BT.flatten()
    _, plain = allocated(lambda: linear_cross_entropy(hidden, head, labels))
    _, taught = allocated(lambda: linear_distillation(hidden, head, labels, distillation))
    entries = 32 * num_tokens * sum(teachers_of(recipe, phase).entries)
    assert found.chunk == pytest.approx(taught - plain, rel=0.15, abs=2**19 + entries)


def test_flops_are_a_counters(monkeypatch):
    """The forward pass with its head, by torch's counter, math attention: whole squares."""
    monkeypatch.setattr("slm.model.llama.packed_attention", attention._piece_by_piece)
    config = ModelConfig.preset("cpu-tiny", **SHAPE)
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        SLMForCausalLM(config)(tokens)
    assert counter.get_total_flops() == pytest.approx(64 * sum(forward_flops(config, 64)), rel=0.01)


def test_shared_sequences_are_exchanged_for_the_teacher_too():
    """Its forward pass alone: 32 layers x (2 x 4096 + 2 x 1024) values of 2 bytes a token; and it takes time."""
    alone = Work(Zero(2), tokens=1000, micro_batches=3, seq_len=4000, sequence_parallel=4)
    taught = Work(Zero(2), tokens=1000, micro_batches=3, seq_len=4000, sequence_parallel=4, teachers=(EIGHT_B,))
    student = ModelConfig.preset("llama3.2-1b")
    more = exchange_bytes(student, taught) - exchange_bytes(student, alone)
    assert more == 3 * 1000 * 32 * (2 * 4096 + 2 * 1024) * 2 * 3 / 4
    gpu, gpus = find_gpu("h100"), GPUs(8)
    assert step_time(student, taught, gpu, gpus).seconds > step_time(student, alone, gpu, gpus).seconds
