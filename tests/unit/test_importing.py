"""`slm import` and `slm export`: what transformers writes comes in, what we write comes back bit for bit; mistakes are named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from slm import SLMForCausalLM, SLMTokenizer, importing
from slm.errors import CorruptArtefact, UserError
from slm.importing import describe, import_folder
from slm.loading import export_model, load_for_text
from slm.model import hf
from slm.model.config import ModelConfig
from slm.model.hf import config_to_hf
from tests.unit.test_rope import KINDS, ORIGINAL
from tests.unit.test_rope_cache import model_of, some_tokens
from tests.unit.test_rope_hf import in_both_forms


def theirs(folder, config, *, shard="1GB", dtype=torch.float32, seed=0, **changes):
    """A folder that transformers itself writes, of the same shape; not through our writer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    fields = config_to_hf(config) | changes
    drop = ("architectures", "model_type", "rope_theta", "rope_scaling")
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in fields.items() if k not in drop})).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("form", ["4", "5"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rotary_type_that_transformers_writes(kind, form, tmp_path):
    """Sharded, untied, in the config forms of transformers 4 and 5: logits below and beyond the original context."""
    config = model_of(kind).config.model_copy(update={"tie_word_embeddings": False})
    theirs(tmp_path / "hf", config, shard="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    path = tmp_path / "hf/config.json"
    written = json.loads(path.read_text())
    rope = written["rope_parameters"]
    both = written | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
    }
    path.write_text(json.dumps(in_both_forms(both)[int(form) - 4]))
    found = import_folder(tmp_path / "hf", tmp_path / "in")
    assert not found.config.tie_word_embeddings
    from transformers import AutoModelForCausalLM

    ours = SLMForCausalLM.from_pretrained(tmp_path / "in")
    for length in (20, 3 * ORIGINAL):
        tokens = some_tokens(2, length)
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens, use_cache=False).logits
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "in")(tokens, use_cache=False).logits
            torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(again, expected, rtol=0, atol=0)


def mistral(folder, seed=0, **changes):
    """A folder of transformers' own Mistral, written by transformers: heads of another width than hidden_size / heads."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    shape = dict(vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32, max_position_embeddings=128, initializer_range=0.2)  # fmt: skip
    config = MistralConfig(**shape | {"sliding_window": None} | changes)
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_mistral_that_sees_all_of_its_context_is_a_llama(tmp_path):
    """The same logits as transformers' MistralForCausalLM, without a window and with one that no token reaches beyond; one that
    is shorter than the context is refused, and what is said to do about it is right."""
    from transformers import AutoModelForCausalLM

    for name, window in (("none", None), ("whole", 128)):
        model = mistral(tmp_path / name, sliding_window=window)
        import_folder(tmp_path / name, tmp_path / f"in-{name}")
        assert json.loads((tmp_path / f"in-{name}/config.json").read_text())["model_type"] == "llama"
        tokens = some_tokens(2, 128)
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits
            for folder in (tmp_path / name, tmp_path / f"in-{name}"):
                torch.testing.assert_close(
                    SLMForCausalLM.from_pretrained(folder)(tokens), expected, rtol=1e-5, atol=1e-5
                )
            again = AutoModelForCausalLM.from_pretrained(tmp_path / f"in-{name}")
            torch.testing.assert_close(again(tokens, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    model = mistral(tmp_path / "short", sliding_window=32)
    with pytest.raises(UserError, match="set max_position_embeddings to 32"):
        import_folder(tmp_path / "short", tmp_path / "in")
    path = tmp_path / "short/config.json"
    fields = json.loads(path.read_text())
    unsaid = {k: x for k, x in fields.items() if k != "sliding_window"} | {"max_position_embeddings": 8192}
    path.write_text(json.dumps(unsaid))
    with pytest.raises(UserError, match="sliding_window is 4096 of a context of 8192"):  # transformers' default
        import_folder(tmp_path / "short", tmp_path / "in")
    path.write_text(json.dumps(fields | {"max_position_embeddings": 32}))
    found = import_folder(tmp_path / "short", tmp_path / "in")
    assert found.config.max_position_embeddings == 32
    with torch.no_grad():
        tokens, longer = some_tokens(2, 32), some_tokens(2, 100)
        ours = SLMForCausalLM.from_pretrained(tmp_path / "in")
        torch.testing.assert_close(ours(tokens), model(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-5)
        beyond = (ours(longer) - model(longer, use_cache=False).logits).abs().amax((0, 2))
        assert beyond[:32].max() < 1e-4 < beyond[32:].max()  # the window is what differs


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path):
    """Of both families: epsilon, key/value heads, head, context and base where nothing is said."""
    from transformers import LlamaConfig, MistralConfig

    sizes = dict(vocab_size=512, hidden_size=256, intermediate_size=176, num_hidden_layers=2, num_attention_heads=16)
    for kind, their_config in (("llama", LlamaConfig), ("mistral", MistralConfig)):
        fields = {"model_type": kind, **sizes} | ({"sliding_window": None} if kind == "mistral" else {})
        ours, expected = hf.config_from_hf(fields), their_config(**fields)
        for name in ("rms_norm_eps", "num_key_value_heads", "tie_word_embeddings", "max_position_embeddings", "head_dim",
                     "initializer_range"):  # fmt: skip
            assert getattr(ours, name) == getattr(expected, name), (kind, name)
        assert ours.rope_theta == expected.rope_parameters["rope_theta"]
        assert ours.rope_scaling is None


def test_loading_without_import_is_as_strict(tiny_config, tmp_path):
    """`slm eval FOLDER`, init_from and teachers: biases, codes of a quantised model and a head that is not there are no
    weights to pass over. Of two formats in one folder transformers' own is read."""
    theirs(tmp_path / "hf", tiny_config)
    for number, (make, message) in enumerate([
        (broken(lambda t: t.update({Q.replace("weight", "bias"): torch.ones(64)})), "biases are no part"),
        (broken(lambda t: t.update({Q: (t[Q] * 100).to(torch.int8)})), "is int8, and weights are float32"),
        (broken(lambda t: None, lambda c: c | {"quantization_config": {"bits": 8}}), "quantization_config"),
        (broken(lambda t: None, lambda c: c | {"tie_word_embeddings": False}), "set tie_word_embeddings to true"),
    ]):  # fmt: skip
        shutil.copytree(tmp_path / "hf", tmp_path / str(number))
        make(tmp_path / str(number))
        with pytest.raises(UserError, match=message):
            SLMForCausalLM.from_pretrained(tmp_path / str(number))
    before = SLMForCausalLM.from_pretrained(tmp_path / "hf")
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 4)}, tmp_path / "hf/consolidated.safetensors")
    after = SLMForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    import_folder(tmp_path / "hf", tmp_path / "in")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_then_import_is_bit_identical(dtype, tiny_config, tmp_path, monkeypatch):
    """In one file and in several; weights, config, tokenizer; the head stays tied."""
    tokenizer = SLMTokenizer()
    model = SLMForCausalLM(tiny_config).init_weights(seed=3).to(dtype)
    model.save_pretrained(tmp_path / "out", tokenizer)
    for name, limit in (("one", 1 << 30), ("many", 100_000)):
        monkeypatch.setattr(importing, "SHARD_BYTES", limit)
        found = import_folder(tmp_path / "out", tmp_path / name)
        assert (found.num_files > 1) == (name == "many")
        assert found.dtype == dtype
        assert json.loads((tmp_path / name / "config.json").read_text()) == json.loads(
            (tmp_path / "out/config.json").read_text()
        )
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
        again = SLMForCausalLM.from_pretrained(tmp_path / name, dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    stored = {k: v for f in sorted((tmp_path / "many").glob("*.safetensors")) for k, v in load_file(f).items()}
    original = load_file(tmp_path / "out/model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[k], original[k]) for k in original)
    load_for_text(str(tmp_path / "many"))


def test_a_tied_head_and_old_buffers_are_left_out(tiny_config, tmp_path):
    """As transformers 4 wrote them; what is said names the start and the teacher of a recipe."""
    theirs(tmp_path / "hf", tiny_config)
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "hf/model.safetensors")
    found = import_folder(tmp_path / "hf", tmp_path / "in")
    assert found.dropped == ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert "lm_head.weight" not in load_file(tmp_path / "in/model.safetensors")
    told = describe(found, tmp_path / "in")
    for part in (f"path: {tmp_path}/in", "rope_type: llama3", "head tied", "float32", "no tokenizer", "inv_freq"):
        assert part in told
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        import_folder(tmp_path / "hf", tmp_path / "in2")
    assert not (tmp_path / "in2").exists()


def broken(change, config=lambda fields: fields):
    def make(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        path = folder / "config.json"
        path.write_text(json.dumps(config(json.loads(path.read_text()))))

    return make


def without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (broken(lambda t: t.pop(Q)), ["lacks 1 tensors", Q, "copy the whole folder again"]),
        (broken(lambda t: t.update({Q.replace("weight", "bias"): torch.ones(64)})), ["q_proj.bias", "biases are no part"]),
        (broken(lambda t: t.update(odd=torch.ones(1))), ["has 1 that the model of its config.json does not (odd)"]),
        (broken(lambda t: t.update({Q: t[Q][:32]})), [f"{Q} is [32, 64] instead of [64, 64]", "different models"]),
        (broken(lambda t: t[Q].__setitem__((0, 0), float("nan"))), [Q, "not finite"]),
        (broken(lambda t: t.update({Q: t[Q].to(torch.int8)})), [f"{Q} is int8", "before quantisation"]),
        (broken(lambda t: None, lambda c: c | {"model_type": "mamba"}), ["model_type is 'mamba'", "Llama-family"]),
        (broken(lambda t: None, lambda c: c | {"tie_word_embeddings": False}), ["lm_head.weight", "tie_word_embeddings to true"]),
        (broken(lambda t: None, lambda c: c | {"quantization_config": {"bits": 4}}), ["quantization_config"]),
        (broken(lambda t: None, lambda c: c | {"eos_token_id": 600}), ["eos_token_id is 600", "rows are 0 to 511"]),
        (broken(lambda t: None, lambda c: c | {"hidden_act": "gelu"}), ["hidden_act is 'gelu'", "compute something else"]),
        (broken(lambda t: None, lambda c: c | {"attention_bias": True}), ["attention_bias is True", "compute something else"]),
        (broken(lambda t: None, lambda c: c | {"mlp_bias": True}), ["mlp_bias is True", "compute something else"]),
        (broken(lambda t: None, lambda c: {k: x for k, x in c.items() if k != "hidden_size"}), ["there is no hidden_size"]),
        (broken(without_prefix), ["lack the head 'model.'", "embed_tokens.weight"]),
    ],
    ids=["missing", "bias", "extra", "shape", "nan", "int8", "architecture", "head", "quantised", "eos", "activation",
         "attention_bias", "mlp_bias", "size", "prefix"],
)  # fmt: skip
def test_what_is_wrong_is_named_and_nothing_is_written(make, messages, tiny_config, tmp_path):
    theirs(tmp_path / "hf", tiny_config)
    make(tmp_path / "hf")
    with pytest.raises((UserError, CorruptArtefact)) as caught:
        import_folder(tmp_path / "hf", tmp_path / "in")
    for message in messages:
        assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_files_and_tokenizers_that_do_not_belong(tiny_config, tmp_path):
    """A pickle, a shard that is not there, a tokenizer of another model, an output that holds something."""
    theirs(tmp_path / "hf", tiny_config, shard="100KB")
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    held = shard.read_bytes()
    shard.unlink()
    with pytest.raises((UserError, CorruptArtefact), match=shard.name):
        import_folder(tmp_path / "hf", tmp_path / "in")
    shard.write_bytes(held)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/notes.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        import_folder(tmp_path / "hf", tmp_path / "in")
    SLMTokenizer(vocab_size=700).train(["".join(map(chr, range(300, 1500))) * 2]).save_pretrained(tmp_path / "big")
    with pytest.raises(UserError, match=r"(?s)embedding \(model.embed_tokens.weight\) 512 rows.*--tokenizer"):
        import_folder(tmp_path / "hf", tmp_path / "in2", str(tmp_path / "big"))
    SLMTokenizer().save_pretrained(tmp_path / "small")
    found = import_folder(tmp_path / "hf", tmp_path / "in3", str(tmp_path / "small"))
    assert found.tokenizer_tokens == 259
    assert (tmp_path / "in3/tokenizer.json").is_file()
    pickle = tmp_path / "pickle"
    shutil.copytree(tmp_path / "hf", pickle, ignore=shutil.ignore_patterns("*.safetensors", "*index*"))
    (pickle / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="pytorch_model.bin, a pickle"):
        import_folder(pickle, tmp_path / "in4")


def test_export_of_a_folder_is_what_transformers_loads_without_our_code(tiny_config, tmp_path):
    """Model, tokenizer and generation config by the Auto classes; the text comes back; the card leaves the license open."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = SLMTokenizer()
    model = SLMForCausalLM(tiny_config).init_weights(seed=3)
    model.save_pretrained(tmp_path / "run", tokenizer)
    export_model(str(tmp_path / "run"), tmp_path / "out", str(tmp_path / "run"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    text = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eos_token_id
    ids = text("héllo wörld", return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode("héllo wörld", add_bos=True)
    assert text.decode(ids[0], skip_special_tokens=True) == "héllo wörld"
    with torch.no_grad():
        torch.testing.assert_close(model(ids), loaded(ids).logits, rtol=1e-5, atol=1e-5)
    card = (tmp_path / "out/README.md").read_text()
    assert "# license: to be said by who publishes" in card
    assert "AutoTokenizer.from_pretrained" in card


def test_export_of_a_folder_keeps_what_text_needs_without_being_told_where_it_is(tiny_config, tmp_path):
    """Tokenizer, chat template, special ids and generation config of a Hugging Face folder are copied byte for byte, so that the
    export writes text as the folder does; of a folder without a tokenizer the card promises none."""
    source, out = tmp_path / "in", tmp_path / "out"
    SLMForCausalLM(tiny_config).init_weights(seed=3).save_pretrained(source, SLMTokenizer())
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    export_model(str(source), out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert [configs[0][name] for name in special] == [configs[1][name] for name in special] != [None] * 3
    assert "AutoTokenizer.from_pretrained" in (out / "README.md").read_text()
    (source / "tokenizer.json").unlink()
    export_model(str(source), tmp_path / "bare")
    assert "AutoTokenizer" not in (tmp_path / "bare/README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_1b_with_random_weights_of_that_shape(tmp_path):
    """The published config of Llama 3.2 1B in the form of transformers 4, its 146 names and shapes in float32 (4.9 GB), one
    tensor at a time: imported, the same numbers, and transformers' logits. Needs about 11 GB of disk and 6 of memory."""
    from transformers import AutoModelForCausalLM

    config = ModelConfig.preset("llama3.2-1b")
    published = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
        "use_cache": True, "vocab_size": 128256,
    }  # fmt: skip
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published))
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in SLMForCausalLM(config, seed=None).named_parameters()}
    assert len(shapes) == 146
    save_file(
        {name: torch.empty(shape).normal_(0, 0.02, generator=generator) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    imported = import_folder(folder, tmp_path / "in")
    assert imported.config == config
    assert imported.num_bytes == 4 * 1_235_814_400
    stored = hf.weight_files(folder)
    copied = hf.weight_files(tmp_path / "in")
    assert copied.keys() == stored.keys() == shapes.keys()
    for name in shapes:
        assert torch.equal(hf.read_tensor(stored, name), hf.read_tensor(copied, name)), name
    tokens = torch.tensor([[128000, 9906, 1917, *range(1000, 1029)]])
    found = []
    for load in (SLMForCausalLM, AutoModelForCausalLM):  # one after the other, in the memory of one
        model = load.from_pretrained(tmp_path / "in" if load is SLMForCausalLM else folder, dtype=torch.float32)
        with torch.no_grad():
            logits = model(tokens)
        found.append(getattr(logits, "logits", logits))
        del model
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
