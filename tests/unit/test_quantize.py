"""`slm quantize`: bits on disk against numpy, the product against float64, a trained model before and after, bad folders."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slm import SLMConfig, SLMForCausalLM, SLMTokenizer, SLMTrainer, TextDataset
from slm.chat import find_template
from slm.errors import CorruptArtefact, UserError
from slm.loading import export_model, load_for_text, load_model, stop_ids
from slm.model import quantized
from slm.model.config import ModelConfig
from slm.model.quantized import QuantizedLinear
from slm.model.quantized_files import Quantization, stored_tensors
from slm.quantize import default_group, quantize, quantize_matrix

TEXTS = ["The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "] * 40
Q = "model.layers.0.self_attn.q_proj"


def shape(**fields) -> ModelConfig:
    """64 wide: groups of 16, 32 and 64; a vocabulary of 300 rows, which is no multiple of the kernel's tile."""
    given = dict(
        vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=128, rope_scaling=None,
    )  # fmt: skip
    return ModelConfig(**(given | fields))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_rank):
    """A folder of a model that has learned TEXTS, with its tokenizer."""
    tokenizer = SLMTokenizer(vocab_size=300).train(TEXTS)
    config = SLMConfig(
        **shape(vocab_size=len(tokenizer)).model_dump(include=set(SLMConfig.model_fields)),
        sequence_length=64, batch_size=8, warmup_steps=5, learning_rate=1e-2,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("trained")
    data = TextDataset(TEXTS, tokenizer, max_length=64)
    model = SLMForCausalLM(config)
    SLMTrainer(config=config, model=model, tokenizer=tokenizer, train_dataset=data, output_dir=out).train(num_epochs=10)
    return out / "best_model"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(TEXTS[:8]) + "The lazy fox does not mind the quick dog.")
    return str(path)


def random_model(folder, seed=1, dtype=torch.float32, **fields):
    model = SLMForCausalLM(shape(**fields), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(7))
    model.to(dtype).save_pretrained(folder)
    return model


def stored(folder) -> dict[str, np.ndarray]:
    """The tensors of a folder's file by numpy alone, bfloat16 as float64."""
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        part = raw[8 + size + entry["data_offsets"][0] : 8 + size + entry["data_offsets"][1]]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(part, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        else:
            values = np.frombuffer(part, {"U8": "u1", "I8": "i1", "F32": "<f4", "F16": "<f2"}[entry["dtype"]])
        found[name] = values.reshape(entry["shape"])
    return found


def weight_by_docs(tensors: dict[str, np.ndarray], stem: str) -> np.ndarray:
    """A matrix in float64, as docs/formats.md says."""
    codes, scales = tensors[f"{stem}.codes"], tensors[f"{stem}.scales"]
    if f"{stem}.zeros" in tensors:
        pairs, codes = codes, np.empty((codes.shape[0], 2 * codes.shape[1]))
        codes[:, 0::2], codes[:, 1::2] = pairs % 16, pairs // 16
        group = codes.shape[1] // scales.shape[1]
        return (codes - 8) * scales.repeat(group, 1) + tensors[f"{stem}.zeros"].repeat(group, 1)
    return codes.astype(np.float64) * scales.repeat(codes.shape[1] // scales.shape[1], 1)


def plain_twin(folder) -> SLMForCausalLM:
    """A model of ordinary float32 layers whose weights are those that the folder's codes stand for."""
    tensors = stored(folder)
    fields = json.loads((folder / "config.json").read_text())
    given = ("vocab_size", "tie_word_embeddings", "hidden_size", "intermediate_size")
    config = shape(**{name: fields[name] for name in given})
    model = SLMForCausalLM(config, seed=None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem = name.removesuffix(".weight")
            value = tensors[name] if name in tensors else weight_by_docs(tensors, stem)
            parameter.copy_(torch.from_numpy(value.astype(np.float64)))
    return model.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("embeddings", [True, False], ids=["embeddings", "no-embeddings"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 16), (8, 0), (8, 32)])
def test_a_folder_alone_gives_the_model_that_its_bits_say(bits, group, embeddings, tied, tmp_path):
    """Written, the original gone, read again: every weight by numpy alone, logits, losses of each token, visits and greedy
    text of a model of ordinary layers with these weights. Many rows are exact in float32, so text without a cache is equal."""
    random_model(tmp_path / "model", tie_word_embeddings=tied)
    report = quantize(str(tmp_path / "model"), tmp_path / "q", Quantization(bits, group, embeddings), measure=False)
    (tmp_path / "model").rename(tmp_path / "gone")
    original = {n: t.numpy() for n, t in load_file(tmp_path / "gone" / "model.safetensors").items()}
    tensors = stored(tmp_path / "q")
    for name in (n for n in original if f"{n.removesuffix('.weight')}.codes" in tensors):
        error = weight_by_docs(tensors, name.removesuffix(".weight")) - original[name]
        assert np.linalg.norm(error) < (0.011 if bits == 8 else 0.11) * np.linalg.norm(original[name]), name
    assert report.bytes_after == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert ("lm_head.codes" in tensors) == (embeddings and not tied)

    model, _ = load_model(tmp_path / "q", exact=True)
    twin = plain_twin(tmp_path / "q")
    tokens = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(5))  # 120 rows: no kernel
    assert tokens.numel() > quantized.KERNEL_ROWS
    with torch.no_grad():
        assert torch.allclose(model(tokens), twin(tokens), atol=2e-5)
        found, wanted = (m(tokens, labels_BT=tokens)[0].item() for m in (model, twin))
        assert found == pytest.approx(wanted, rel=1e-6)
        each = [m(tokens, labels_BT=tokens, each=True) for m in (model, twin)]
        assert torch.allclose(*each, atol=2e-5)
        seen: list[torch.Tensor] = []
        model(tokens, visit=lambda start, logits: seen.append(logits.clone()))
        assert torch.allclose(torch.cat(seen), twin(tokens).flatten(0, 1), atol=2e-5)
    wide = tokens[:, :30]  # 3 x 30 rows from the first forward on
    kwargs = dict(max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(wide, **kwargs), twin.generate(wide, **kwargs))
    # By the kernels, in bfloat16: the choice of every token is the best of the exact logits, but for their rounding.
    out = model.generate(tokens[:1], max_new_tokens=20, do_sample=False)
    with torch.no_grad():
        logits = twin(out[:, :-1])[0, 39:]
    chosen = logits.gather(1, out[0, 40:, None])[:, 0]
    assert (logits.max(1).values - chosen).max() < 0.02 * logits.std()


@pytest.mark.parametrize("rows", [1, 3, 64, 65])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 16), (8, 0), (8, 64)])
@pytest.mark.parametrize("num_outputs", [64, 100])
def test_a_product_is_that_of_float64(rows, bits, group, num_outputs):
    """The kernels round to bfloat16 (2^-8 and less of a number); without them the error is float32's."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_outputs, 192, generator=generator)
    codes, scales, zeros, *_ = quantize_matrix(weight, bits, group or 192)
    layer = QuantizedLinear(codes, scales, zeros)
    s = scales.double().repeat_interleave(192 // scales.shape[1], 1)
    if zeros is None:
        exact = codes.double() * s
    else:
        exact = (codes.double() - 8) * s + zeros.double().repeat_interleave(192 // scales.shape[1], 1)
    x = torch.randn(rows, 192, generator=generator)
    by_kernel = layer._kernel_numbers >= x.numel()
    assert by_kernel == (rows <= 64 and quantized._fast_cpu() and (group in (32, 64) if bits == 4 else group == 0))
    turned = x.T.contiguous().T  # the kernels want rows that lie one behind the other
    for given, tolerance in ((x, 4e-3 if by_kernel else 1e-6), (turned, 4e-3), (x.bfloat16(), 6e-3)):
        found = layer(given[None])
        assert found.dtype == given.dtype
        assert found.shape == (1, rows, num_outputs)
        wanted = given.double() @ exact.T
        assert (found[0].double() - wanted).norm() < tolerance * wanted.norm()
    some = torch.tensor([[0, num_outputs - 1], [33, 1]])
    assert torch.allclose(layer.rows(some, torch.float64), exact[some], rtol=1e-6, atol=1e-7)
    assert torch.allclose(layer.transposed(torch.float64), exact.T, rtol=1e-6, atol=1e-7)


def test_the_layers_compile_whole():
    """torch.compile(fullgraph=True) under inference_mode, a row and many."""
    codes, scales, zeros, *_ = quantize_matrix(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), 4, 32)
    layer = QuantizedLinear(codes, scales, zeros)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.inference_mode():
        for rows in (1, 100):
            x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
            assert torch.allclose(compiled(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_are_hard(bits):
    """All zero, all the same, one huge weight, tiny ones: finite, and no further off than a step of the group's range."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 64, generator=generator) * 0.02
    weight[0] = 0
    weight[1] = 0.37
    weight[2, 5] = 1000.0
    weight[3] *= 1e-30
    codes, scales, zeros, error, squares = quantize_matrix(weight, bits, 64)
    layer = QuantizedLinear(codes, scales, zeros)
    found = layer.transposed(torch.float32).T
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], weight[0])
    assert (found[1] - 0.37).abs().max() < 0.37 / 250
    # Never worse in squared error than the full range of each group in equal steps, but for the rounding of scales to bfloat16.
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if bits == 8:
        high = weight.abs().amax(1, keepdim=True)
        low = -high
    steps = ((high - low) / (15 if bits == 4 else 254)).clamp(min=1e-38)
    plain = ((weight - low) / steps).round() * steps + low
    limit = (plain - weight).norm(dim=1) + 4e-3 * weight.norm(dim=1)
    assert ((found - weight).norm(dim=1) <= limit).all()
    assert error == pytest.approx((found - weight).double().square().sum().item(), rel=1e-3)
    assert squares == pytest.approx(weight.double().square().sum().item(), rel=1e-6)


def test_the_search_for_a_scale_is_never_worse_than_the_full_range():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x = weight.view(64, 4, 64)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = ((x - low) / step).round() * step + low
    error = quantize_matrix(weight, 4, 64)[3]
    assert error < 0.95 * (plain - x).double().square().sum().item()


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.001), (4, 0.05)])
def test_perplexity_of_a_trained_model(bits, limit, trained, held_out, tmp_path):
    """8 bits are nearly free; the report's figures are those of evaluating both folders; it writes on as it has learned."""
    from slm.completion import generate_text
    from slm.text_loss import evaluate_text

    q = Quantization(bits, 32 if bits == 4 else 0, embeddings=True)
    report = quantize(str(trained), tmp_path / "q", q, data=[held_out], text=True)
    [measured] = report.measured
    assert 1.0 < math.exp(measured.loss_before) < 3.0, "it has learned"
    assert abs(measured.change) < limit
    assert measured.loss_before == evaluate_text(str(trained), [held_out])[0].loss
    assert measured.loss_after == evaluate_text(str(tmp_path / "q"), [held_out])[0].loss
    model, tokenizer = load_for_text(str(tmp_path / "q"))
    [text] = generate_text(model, tokenizer, ["The quick"], max_new_tokens=12, do_sample=False)
    assert text.startswith(" brown fox jumps")
    assert f"{100 * measured.change:+.3f} %" in (tmp_path / "q" / "README.md").read_text()


def test_the_1b_shape_takes_at_most_1_1_gb():
    """The writer's own layout (bytes of its tensors), at 4 bits; and that this is the size of the file, at a small shape in
    test_bytes_are_those_of_the_layout."""
    norms, embedding, all_of_it = 33 * 2048, 128256 * 2048, 1_235_814_400
    matrices = all_of_it - norms
    for embeddings, expected in (
        (True, matrices * 9 // 16 + 2 * norms),  # half a byte, and 4 bytes for every 64
        (False, (matrices - embedding) * 9 // 16 + 2 * embedding + 2 * norms),
    ):
        size = layout_bytes(ModelConfig.preset("llama3.2-1b"), Quantization(4, 64, embeddings), norm_bytes=2)
        assert size == expected
        assert size < 1.1e9


def layout_bytes(config: ModelConfig, q: Quantization, norm_bytes: int) -> int:
    sizes = {torch.int8: 1, torch.uint8: 1, torch.bfloat16: 2}
    total = 0
    for dtype, dims in stored_tensors(config, q).values():
        total += math.prod(dims) * (sizes[dtype] if dtype else 2 if len(dims) == 2 else norm_bytes)
    return total


@pytest.mark.parametrize("embeddings", [True, False])
def test_bytes_are_those_of_the_layout(embeddings, tmp_path):
    random_model(tmp_path / "model", dtype=torch.bfloat16)
    q = Quantization(4, 64, embeddings)
    report = quantize(str(tmp_path / "model"), tmp_path / "q", q, measure=False)
    header = 8 + int.from_bytes((tmp_path / "q" / "model.safetensors").read_bytes()[:8], "little")
    assert report.bytes_after == header + layout_bytes(shape(), q, norm_bytes=2)
    assert report.bytes_before == 2 * shape().num_parameters()


def test_to_another_dtype_and_back_it_stays_what_it_is(tmp_path):
    """Codes and scales keep their dtypes; the head that the embedding shares is still one."""
    random_model(tmp_path / "model")
    quantize(str(tmp_path / "model"), tmp_path / "q", Quantization(4, 32, True), measure=False)
    model, _ = load_model(tmp_path / "q", exact=True)
    tokens = torch.arange(20)[None]
    codes = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert {buffer.dtype for buffer in codes.values()} == {torch.uint8, torch.bfloat16}
    with torch.no_grad():
        assert model.half()(tokens).dtype == torch.float16
        assert model.float()(tokens).dtype == torch.float32
    for name, buffer in model.named_buffers():
        assert buffer.dtype == codes[name].dtype
        assert torch.equal(buffer, codes[name])
    assert sum(buffer.numel() for buffer in model.lm_head.buffers()) > 0
    assert not list(model.model.embed_tokens.buffers())


def test_a_tokenizer_from_elsewhere_takes_nothing_else_away(tmp_path):
    """What ends a text and the template of a chat are the model's; both came along only with the folder's own tokenizer."""
    random_model(tmp_path / "model", vocab_size=512)
    tokenizer = SLMTokenizer(vocab_size=512)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    q = Quantization(4, 32, True)
    quantize(str(tmp_path / "model"), tmp_path / "q", q, measure=False, tokenizer=str(tmp_path / "tokenizer"))
    assert stop_ids(tmp_path / "q") == [1, 5]
    assert find_template(tmp_path / "q") == "{{ messages }}"
    assert load_for_text(str(tmp_path / "q"))[1].fingerprint == tokenizer.fingerprint


# --- the command, and what is refused -----------------------------------------------------------------------------


def slm(*arguments, code=0):
    command = [sys.executable, "-m", "slm", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def test_the_command(trained, held_out, tmp_path):
    found = json.loads(slm("quantize", trained, tmp_path / "q", held_out, "--text", "--group-size", 32, "--json"))
    assert found["measured"][0]["name"] == held_out
    assert found["bytes_after"] * 5 < found["bytes_before"]
    assert " brown fox" in slm("generate", tmp_path / "q", "The quick", "--max-new-tokens", 8, "--temperature", 0)
    assert "is not empty" in slm("quantize", trained, tmp_path / "q", code=2)
    told = slm("quantize", tmp_path / "q", tmp_path / "again", code=2)
    assert "is of a quantised model" in told


def test_what_it_does_not_do_is_refused(tmp_path):
    """Bad settings, and every place where codes would be taken for weights; nothing is written."""
    from slm.distill.models import describe_teacher
    from slm.importing import import_folder

    random_model(tmp_path / "model")
    model = str(tmp_path / "model")
    for q, words in (
        (Quantization(4, 48, True), ["--group-size: 48 does not divide the 64 columns", "16, 32, 64"]),
        (Quantization(8, 128, True), ["128 does not divide the 64 columns"]),
    ):
        with pytest.raises(UserError) as error:
            quantize(model, tmp_path / "q", q, measure=False)
        assert all(word in str(error.value) for word in words)
    with pytest.raises(UserError, match="no_such"):
        quantize(model, tmp_path / "q", Quantization(4, 32, True), data=[str(tmp_path / "no_such")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]

    assert default_group(shape(), 4) == 64
    assert default_group(ModelConfig.preset("cpu-tiny"), 4) == 16  # its MLP is 176 wide
    report = quantize(model, tmp_path / "q", Quantization(4, None, True))
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]["group_size"] == 64
    assert "names no held-out data" in report.not_measured
    folder = str(tmp_path / "q")
    loaded = SLMForCausalLM.from_pretrained(folder)
    for act in (
        lambda: export_model(folder, tmp_path / "out"),
        lambda: import_folder(folder, tmp_path / "out"),
        lambda: describe_teacher(folder),
        lambda: quantize(folder, tmp_path / "out", Quantization(8, 0, True)),
        lambda: loaded.save_pretrained(tmp_path / "out"),
        lambda: loaded.resize_token_embeddings(400),
    ):
        with pytest.raises(UserError, match="is (of )?a quantised model: its weights are rounded"):
            act()
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(tmp_path):
    random_model(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.weight"][3, 3] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CorruptArtefact, match="q_proj.weight holds numbers that are not finite"):
        quantize(str(tmp_path / "model"), tmp_path / "q", Quantization(4, 32, True), measure=False)
    assert not (tmp_path / "q").exists()


def _config(**changes):
    return lambda tensors, fields: fields["quantization"].update(changes)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t, c: t.pop(f"{Q}.scales"), ["lacks 1 tensors", f"{Q}.scales"]),
        (lambda t, c: t.update(extra=torch.zeros(1)), ["has 1 that its config.json knows nothing of", "extra"]),
        (lambda t, c: t.update({f"{Q}.codes": t[f"{Q}.codes"][:5].clone()}), [f"{Q}.codes is U8 [5, 32]", "U8 [64, 32]"]),
        (lambda t, c: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}), [f"{Q}.scales is F32", "BF16"]),
        (lambda t, c: t[f"{Q}.zeros"].fill_(torch.inf), [f"{Q}.zeros holds numbers that are not finite"]),
        (_config(format="slm-quantized/9"), ["'slm-quantized/9'", "this version reads"]),
        (_config(bits=3), ["bits 3"]),
        (_config(bits=8), ["knows nothing of"]),
        (_config(group_size=64), ["instead of BF16"]),
        (_config(group_size=-1), ["group_size -1"]),
        (_config(embeddings=False), ["lacks 1 tensors (model.embed_tokens.weight)"]),
        (lambda t, c: c.pop("quantization"), ["quantization is None"]),
        (lambda t, c: c.update(hidden_size=96), ["instead of"]),
    ],
    ids=["missing", "extra", "shape", "dtype", "infinite", "version", "bits", "other-bits", "group", "negative", "embeddings",
        "none", "width"],
)  # fmt: skip
def test_a_folder_that_is_not_whole(damage, words, tmp_path):
    random_model(tmp_path / "model")
    quantize(str(tmp_path / "model"), tmp_path / "q", Quantization(4, 32, True), measure=False)
    file, config = tmp_path / "q" / "model.safetensors", tmp_path / "q" / "config.json"
    tensors, fields = load_file(file), json.loads(config.read_text())
    damage(tensors, fields)
    save_file(tensors, file)
    config.write_text(json.dumps(fields))
    with pytest.raises((UserError, CorruptArtefact)) as error:
        load_model(tmp_path / "q")
    assert all(word in str(error.value) for word in words), error.value


def test_a_torn_file(tmp_path):
    random_model(tmp_path / "model")
    quantize(str(tmp_path / "model"), tmp_path / "q", Quantization(4, 32, True), measure=False)
    file = tmp_path / "q" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CorruptArtefact, match="not a whole safetensors file"):
        load_model(tmp_path / "q")


def test_transformers_refuses_the_folder(tmp_path):
    """It would make up every weight that it does not find, with a warning."""
    import transformers

    random_model(tmp_path / "model")
    quantize(str(tmp_path / "model"), tmp_path / "q", Quantization(4, 32, True), measure=False)
    with pytest.raises(ValueError, match="slm_quantized_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_a_folder_that_is_stopped_half_way_leaves_nothing(tmp_path):
    """SIGTERM, as a scheduler sends it, while one is written: code 143, and no hidden folder of gigabytes."""
    script = (
        "import os, pathlib, signal, time; from slm.loading import fresh_folder\n"
        "with fresh_folder(pathlib.Path('out')) as partial:\n"
        "    (partial / 'a').write_text('a'); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, timeout=50)
    assert done.returncode == 143
    assert list(tmp_path.iterdir()) == []
