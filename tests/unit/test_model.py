"""The model against transformers' LlamaForCausalLM, packed documents against each alone, cache against none."""

import json

import pytest
import torch

from slm import ModelConfig, SLMForCausalLM
from slm.errors import UserError
from slm.losses import IGNORE
from slm.model.attention import cached_attention, packed_attention
from slm.model.config import PRESETS, RopeScaling
from slm.model.hf import config_from_hf, config_to_hf, read_config
from slm.model.llama import KVCache, initial_value
from slm.model.rope import inverse_frequencies


def shifted(tokens):
    labels = torch.full_like(tokens, IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    return labels


def test_parameter_counts_of_the_presets():
    """Counts by formula equal the published ones and, for small shapes, the built model's."""
    assert ModelConfig.preset("llama3.2-1b").num_parameters() == 1_235_814_400
    assert ModelConfig.preset("llama3.2-3b").num_parameters() == 3_212_749_824
    assert ModelConfig.preset("llama3.1-8b").num_parameters() == 8_030_261_248
    for name in PRESETS:
        config = ModelConfig.preset(name)
        with torch.device("meta"):
            model = SLMForCausalLM(config, seed=None)
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters(), name


def test_logits_loss_and_every_gradient_equal_transformers(hf_twin):
    """float32, 1e-5: the whole maths of the model against an independent implementation."""
    ours, theirs = hf_twin
    tokens = torch.randint(0, ours.config.vocab_size, (3, 100), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    loss_sum, count = ours(tokens, labels_BT=shifted(tokens))
    expected = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(loss_sum / count, expected, rtol=1e-5, atol=1e-5)
    (loss_sum / count).backward()
    expected.backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-5, atol=1e-5, msg=name)


def test_packed_documents_equal_each_document_alone(hf_twin):
    """Pieces of unequal and equal length packed in rows: losses and gradients of transformers run on each alone."""
    ours, theirs = hf_twin
    generator = torch.Generator().manual_seed(1)
    rows = [[37, 20, 20, 23], [100], [1, 2, 97]]
    documents = [[torch.randint(0, 512, (n,), generator=generator) for n in row] for row in rows]
    tokens = torch.stack([torch.cat(row) for row in documents])
    labels = torch.stack([torch.cat([shifted(d[None])[0] for d in row]) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in documents])
    starts = torch.tensor([0] + [n for row in rows for n in row]).cumsum(0)
    bounds = torch.cat([starts, torch.full((5,), 300)]).int()  # a fixed-size tensor ends in pieces of no length
    loss_sum, count = ours(tokens, positions, bounds, labels)
    loss_sum.backward()
    expected = torch.zeros(())
    for document in (d for row in documents for d in row if len(d) > 1):
        logits = theirs(document[None]).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum")
    expected.backward()
    assert count == sum(n - 1 for row in rows for n in row)
    torch.testing.assert_close(loss_sum, expected, rtol=1e-5, atol=1e-5)
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        grad, want = parameter.grad, reference[name].grad
        assert (grad - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_packed_attention_against_float64(kv_heads):
    """Output and gradients of the kernel calls equal masked attention written out in float64."""
    generator = torch.Generator().manual_seed(2)
    B, T, H, D = 2, 48, 6, 16
    q, k, v = (torch.randn(B, T, n, D, generator=generator) for n in (H, kv_heads, kv_heads))
    bounds = torch.tensor([0, 7, 14, 21, 48, 60, 96, 96], dtype=torch.int32)
    weight = torch.randn(B, T, H, D, generator=generator)
    piece = torch.searchsorted(bounds, torch.arange(B * T), right=True).view(B, T)
    mask = (piece[:, :, None] == piece[:, None, :]) & torch.ones(T, T, dtype=torch.bool).tril()
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    doubles = [x.double().clone().requires_grad_() for x in (q, k, v)]
    out = packed_attention(*inputs, bounds)
    qd, kd, vd = (x.repeat_interleave(H // x.shape[2], 2).transpose(1, 2) for x in doubles)
    scores = (qd @ kd.mT / D**0.5).masked_fill(~mask[:, None], -torch.inf)
    want = (scores.softmax(-1) @ vd).transpose(1, 2)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    (out * weight).sum().backward()
    (want * weight.double()).sum().backward()
    for x, xd in zip(inputs, doubles, strict=True):
        torch.testing.assert_close(x.grad.double(), xd.grad, rtol=1e-5, atol=1e-5)


def test_the_fallback_of_other_devices_equals_the_cpu_kernel():
    """One SDPA call a piece (float32 on a GPU, GPUs before Ampere): output and gradients of the CPU operator."""
    from slm.model.attention import _piece_by_piece

    generator = torch.Generator().manual_seed(2)
    bounds = torch.tensor([0, 7, 14, 48, 60, 96, 96], dtype=torch.int32)
    grads = []
    for attention in (packed_attention, _piece_by_piece):
        generator.manual_seed(2)
        inputs = [torch.randn(2, 48, n, 16, generator=generator).requires_grad_() for n in (6, 2, 2)]
        out = attention(*inputs, bounds)
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        grads.append([out, *(x.grad for x in inputs)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_attention_custom_operator_is_well_formed():
    """torch's own checker: schema, fake tensors, autograd registration and compilation of the CPU operator."""
    from slm.model.attention import _packed_attention_cpu

    q = torch.randn(1, 16, 4, 8, requires_grad=True)
    k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(2))
    bounds = torch.tensor([0, 5, 16], dtype=torch.int32)
    torch.library.opcheck(_packed_attention_cpu, (q, k, v, bounds))


def test_compiled_blocks_give_the_same_and_do_not_recompile(tiny_config):
    """Two layers share one graph; other boundaries of the same tensor size do not compile again."""
    import torch._dynamo as dynamo

    dynamo.reset()
    plain = SLMForCausalLM(tiny_config).init_weights(seed=0)
    compiled = SLMForCausalLM(tiny_config).init_weights(seed=0)
    compiled.compile_blocks()
    tokens = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    splits = [[0, 32, 64, 64, 64], [0, 5, 32, 40, 64]]
    losses = []
    for model in (plain, compiled):
        for step, split in enumerate(splits):
            bounds = torch.tensor(split, dtype=torch.int32)
            loss, _ = model(tokens, None, bounds, shifted(tokens))
            loss.backward()
            losses.append(loss)
            if model is compiled and step == 0:
                frames = dynamo.utils.counters["frames"]["ok"]
    torch.testing.assert_close(torch.stack(losses[:2]), torch.stack(losses[2:]), rtol=1e-6, atol=1e-5)
    assert dynamo.utils.counters["frames"]["ok"] == frames
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * a.grad.norm(), name


def test_cached_forward_equals_full_forward(tiny_config):
    """Prefill of 10 tokens, then single tokens, gives the logits of one full forward, past the original context."""
    model = SLMForCausalLM(tiny_config).init_weights(seed=5)
    tokens = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(tokens)
        cache = KVCache.empty(tiny_config, 2, 64, torch.float32, "cpu")
        parts = [model(tokens[:, :10], cache=cache)]
        parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(10, 64)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)


def test_cached_attention_sees_only_its_past():
    """Garbage in later slots changes nothing."""
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    length = torch.tensor([3, 8])
    out = cached_attention(q, k, v, length)
    k[0, 4:], v[0, 4:] = 1e4, 1e4
    assert torch.equal(out, cached_attention(q, k, v, length))


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling(rope_type="llama3", factor=32.0), RopeScaling(rope_type="llama3", factor=8.0)]
)
def test_inverse_frequencies_equal_transformers(scaling):
    """Plain and llama3 frequencies of the 1B shape, to 1e-6, through the exported config."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = ModelConfig(rope_scaling=scaling)
    reference = LlamaRotaryEmbedding(LlamaConfig(**config_to_hf(config)))
    torch.testing.assert_close(inverse_frequencies(config), reference.inv_freq, rtol=1e-6, atol=0)


def test_config_round_trip_in_both_spellings(tiny_config, tmp_path):
    """rope_scaling + rope_theta (transformers 4) and rope_parameters (5) both read back to the same config."""
    hf = config_to_hf(tiny_config)
    assert config_from_hf(hf) == tiny_config
    old = {k: v for k, v in hf.items() if k != "rope_parameters"}
    new = {k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}
    assert config_from_hf(old) == config_from_hf(new) == tiny_config
    (tmp_path / "config.json").write_text(json.dumps(hf | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="the architecture that runs here is 'llama'"):
        read_config(tmp_path)


def test_saved_model_loads_in_ours_too(tiny_config, tmp_path):
    """save_pretrained / from_pretrained keep every weight, bfloat16 included."""
    model = SLMForCausalLM(tiny_config).init_weights(seed=9).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = SLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.config == tiny_config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_initial_weights_depend_on_seed_and_name_only(tiny_config):
    """Standard deviations as documented; another name or seed gives other numbers."""
    name, shape = "model.layers.0.mlp.down_proj.weight", (400, 400)
    value = initial_value(tiny_config, name, shape, seed=1)
    assert torch.equal(value, initial_value(tiny_config, name, shape, seed=1))
    assert not torch.equal(value, initial_value(tiny_config, name, shape, seed=2))
    assert value.std().item() == pytest.approx(0.02 / (2 * tiny_config.num_hidden_layers) ** 0.5, rel=0.02)
    assert initial_value(tiny_config, "model.embed_tokens.weight", shape, 1).std().item() == pytest.approx(
        0.02, rel=0.02
    )
    assert torch.equal(initial_value(tiny_config, "model.norm.weight", (7,), 1), torch.ones(7))


def test_resized_embeddings_start_at_the_mean(tiny_config):
    """New vocabulary rows are the mean of the old; old rows and the tie stay."""
    model = SLMForCausalLM(tiny_config).init_weights(seed=0)
    old = model.model.embed_tokens.weight.detach().clone()
    model.resize_token_embeddings(520)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight[:512], old)
    torch.testing.assert_close(model.lm_head.weight[515], old.mean(0))
    assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 520)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_attention_heads=6, num_key_value_heads=4, hidden_size=96), "not divisible by num_key_value_heads 4"),
        (dict(hidden_size=100, num_attention_heads=3, num_key_value_heads=3), "head_dim is undefined"),
        (dict(hidden_size=36, num_attention_heads=4, num_key_value_heads=4), "is odd"),
    ],
)
def test_impossible_shapes_say_what_to_change(fields, message):
    """Heads that do not divide are refused with the numbers."""
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)
