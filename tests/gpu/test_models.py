"""The model's parts on a GPU against the CPU's float32: every rotary scaling with and without a cache, and `slm teacher` with the
training that reads its cache. The cases without the mark keep this file itself honest."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import yaml

from slm import SLMForCausalLM
from slm.distill.codec import RawTargets
from slm.distill.wanted import open_cache, wanted_caches
from slm.model.config import ModelConfig
from slm.model.decode import DecodeStep, join_projections
from slm.model.llama import KVCache
from slm.model.quantized_files import Quantization
from slm.quantize import quantize
from slm.recipe import load_recipe
from tests.gpu.test_gpu import ROOT, train
from tests.shards import make_dataset
from tests.unit.test_quantize import plain_twin, random_model
from tests.unit.test_rope import KINDS, ORIGINAL
from tests.unit.test_rope_cache import model_of, some_tokens

GPU = pytest.mark.gpu


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float32, 1e-6),
        pytest.param("cuda", torch.float32, 1e-4, marks=GPU),
        pytest.param("cuda", torch.bfloat16, 1e-1, marks=GPU),  # weights four times the initial ones: logits are coarse
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_rotary_scalings_equal_the_cpu(kind, device, dtype, tolerance):
    """Logits, relative L2: below, at and beyond the original context; packed; and the last of each part with a cache."""
    reference, model = model_of(kind), model_of(kind).to(device, dtype)

    def near(found, wanted):
        assert (found.float().cpu() - wanted).norm() <= tolerance * wanted.norm()

    with torch.no_grad():
        for length in (20, ORIGINAL, ORIGINAL + 1, 4 * ORIGINAL):
            tokens = some_tokens(2, length)
            near(model(tokens.to(device)), reference(tokens))
        packed = torch.tensor([0, 100, 120, 128, 159, 192, 256], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in packed.diff().tolist()]).view(2, 128)
        found = model(tokens.to(device), positions.to(device), packed.to(device))
        near(found, reference(tokens, positions, packed))
        cache = KVCache.empty(model.config, 2, 4 * ORIGINAL, dtype, device)
        for start, end in ((0, 20), (20, ORIGINAL + 1), (ORIGINAL + 1, 4 * ORIGINAL)):
            logits = model(tokens[:, start:end].to(device), cache=cache)
            near(logits[:, -1], reference(tokens[:, :end])[:, -1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float32, 1e-5),
        pytest.param("cuda", torch.float32, 1e-4, marks=GPU),
        pytest.param("cuda", torch.bfloat16, 1e-1, marks=GPU),
    ],
)
def test_steps_of_generation_equal_the_cpus_full_forward(device, dtype, tolerance, compiled):
    """On a GPU the launches are recorded once and replayed: six steps, rows of different lengths. Compiled only there: the CPU's
    compiled step has a test of its own."""
    if compiled and device == "cpu":
        return
    reference, model = model_of("llama3"), join_projections(model_of("llama3").to(device, dtype))
    lengths, width = [5, 17, 11], 24
    tokens = some_tokens(3, width)
    with torch.no_grad():
        cache = KVCache.empty(model.config, 3, 64, dtype, device)
        model(tokens[:, :17].to(device), cache=cache)
        step = DecodeStep(model, cache, compiled)
        for more in range(6):
            at = [length + more for length in lengths]
            logits_BV = step(tokens[range(3), at].to(device), at).clone()
            for row, length in enumerate(at):
                wanted = reference(tokens[row, None, : length + 1])[0, -1]
                assert (logits_BV[row].float().cpu() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float32, 2e-2),  # few rows: torch's kernels, in bfloat16
        pytest.param("cuda", torch.float32, 1e-4, marks=GPU),
        pytest.param("cuda", torch.bfloat16, 1e-1, marks=GPU),
    ],
)
def test_a_quantised_model_is_its_twin_of_floats(tmp_path, device, dtype, tolerance, bits):
    """Logits of a prompt, and of steps of generation, against the float32 model of the same numbers on the CPU."""
    random_model(tmp_path / "model", hidden_size=256, intermediate_size=256)
    quantize(str(tmp_path / "model"), tmp_path / "small", Quantization(bits, None, embeddings=True), measure=False)
    twin = plain_twin(tmp_path / "small")
    model = SLMForCausalLM.from_pretrained(tmp_path / "small", dtype=dtype).to(device)
    tokens = some_tokens(2, 24) % 300
    with torch.no_grad():
        cache = KVCache.empty(model.config, 2, 64, dtype, device)
        logits_BTV = model(tokens[:, :20].to(device), cache=cache)
        wanted_BTV = twin(tokens)
        assert (logits_BTV.float().cpu() - wanted_BTV[:, :20]).norm() <= tolerance * wanted_BTV[:, :20].norm()
        step = DecodeStep(model, cache)
        for at in range(20, 24):
            logits_BV = step(tokens[:, at].to(device), [at, at])
            assert (logits_BV.float().cpu() - wanted_BTV[:, at]).norm() <= tolerance * wanted_BTV[:, at].norm()


# --- slm teacher ---------------------------------------------------------------------------------------------

CACHES = {kind: {"kind": kind, "k": 16} for kind in ("top_k", "sampled")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Token shards, and a teacher of uneven distributions; head_dim 64, as every model here on a GPU."""
    folder = tmp_path_factory.mktemp("teacher")
    make_dataset(folder / "tokens", lengths=[90, 40, 130, 64, 65, 7, 2, 200, 33, 71, 150, 28] * 3)
    make_dataset(folder / "val", lengths=[90, 40, 130, 64, 65], seed=5)
    shape = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    teacher = ModelConfig.preset("cpu-tiny", initializer_range=0.1, tie_word_embeddings=False, **shape)
    SLMForCausalLM(teacher, seed=7).save_pretrained(folder / "model")
    return folder


def distilled(world, folder, device, cache):
    """slm teacher, verify and train with its cache: (recipe, {step: loss})."""
    tree = {
        "name": "t",
        "model": {"preset": "cpu-tiny", "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
        "data": {"sources": {"a": str(world / "tokens")}, "validation": {"val": str(world / "val")}},
        "teacher": {"model": str(world / "model"), "cache": {**cache, "folder": str(folder / "cache")}},
        "optim": {"lr": 3e-3},
        "phases": [
            {
                "name": "main", "tokens": 12 * 256, "seq_len": 64, "batch_tokens": 256, "micro_batch": 4,
                "loss": {"type": "distill", "alpha": 0.1},
            }
        ],
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    env = {name: value for name, value in os.environ.items() if name not in ranks}
    env |= {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    for words in ([str(path)], ["verify", str(path)]):
        command = [sys.executable, "-m", "slm", "teacher", *words]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-4000:]
    losses, _ = train(path, folder / "run", device)
    return load_recipe(path), losses


@pytest.fixture(scope="module")
def on_the_cpu(world, tmp_path_factory):
    """The kind of cache -> what `distilled` gives there."""
    return functools.cache(lambda kind: distilled(world, tmp_path_factory.mktemp("cpu"), "cpu", CACHES[kind]))


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        pytest.param("cpu", "top_k", marks=pytest.mark.slow),
        pytest.param("cuda", "top_k", marks=GPU),
        pytest.param("cuda", "sampled", marks=GPU),
    ],
)
def test_a_teacher_and_its_student_follow_the_cpu(world, on_the_cpu, tmp_path, device, kind):
    """In bfloat16 on a GPU: of the likeliest 16 tokens nine in ten are the same, and their mass to a few hundredths; a sample's
    draws depend on the last digits, so there only the loss is compared."""
    reference, wanted_losses = on_the_cpu(kind)
    recipe, losses = distilled(world, tmp_path, device, CACHES[kind])
    assert losses == pytest.approx(wanted_losses, abs=1e-5 if device == "cpu" else 0.1)
    if kind == "sampled":
        return
    for w, r in zip(wanted_caches(recipe), wanted_caches(reference), strict=True):
        (found, log_p, tail), (index, wanted_log_p, wanted_tail) = (
            RawTargets.of("top_k", (1.0,), c.rows(slice(0, c.spec.num_tokens))).decode(1.0)
            for c in (open_cache(w), open_cache(r))
        )
        shared = (found[:, :, None] == index[:, None, :]).any(2).float().mean()
        assert shared >= (1.0 if device == "cpu" else 0.9)
        likeliest = (log_p.max(1).values - wanted_log_p.max(1).values).abs().mean()
        assert likeliest <= 0.05
        assert (tail - wanted_tail).abs().mean() <= 0.05
