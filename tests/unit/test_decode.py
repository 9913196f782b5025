"""The lean step of generation: the full forward's logits, by every way that it is taken here."""

import pytest
import torch

from slm import SLMForCausalLM
from slm.generate import generate
from slm.model.config import RopeScaling
from slm.model.decode import DecodeStep, _matrix, join_projections
from slm.model.llama import KVCache

SLOTS = 64
LENGTHS = {"one row": [1], "all as long": [9, 9, 9], "of different lengths": [9, 1, 30]}


def tokens(*shape, seed=0):
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed))


def filled_cache(model, rows):
    """A cache with all but the newest token of each row, as prefill leaves it."""
    cache = KVCache.empty(model.config, len(rows), SLOTS, model.model.norm.weight.dtype, "cpu")
    width = max(map(len, rows)) - 1
    if width:
        model(torch.stack([torch.cat([row[:-1], row.new_zeros(width + 1 - len(row))]) for row in rows]), cache=cache)
    return cache


@pytest.fixture(scope="module")
def model(tiny_config):
    """yarn: cos and sin are scaled too. A head of its own."""
    yarn = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    update = {"initializer_range": 0.2, "tie_word_embeddings": False, "rope_scaling": yarn}
    return SLMForCausalLM(tiny_config.model_copy(update=update), seed=1).eval()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("fixed", [False, True], ids=["slots in use", "all slots, as on a GPU"])
@torch.no_grad()
def test_every_step_is_the_full_forward(model, lengths, fixed):
    """Five tokens more on each row; against the forward without cache, row by row, in float32."""
    rows = [tokens(length + 5, seed=i) for i, length in enumerate(lengths)]
    cache = filled_cache(model, [row[:length] for row, length in zip(rows, lengths, strict=True)])
    step = DecodeStep(model, cache)
    step._fixed = fixed
    for more in range(5):
        ids_B = torch.stack([row[length - 1 + more] for row, length in zip(rows, lengths, strict=True)])
        logits_BV = step(ids_B, [length - 1 + more for length in lengths])
        want_BV = torch.stack(
            [model(row[None, : length + more])[0, -1] for row, length in zip(rows, lengths, strict=True)]
        )
        torch.testing.assert_close(logits_BV, want_BV, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_bfloat16_turns_heads_in_float32(model):
    """As far from the float32 logits as the full forward in bfloat16 is, not farther."""
    half = SLMForCausalLM(model.config, seed=1).eval().to(torch.bfloat16)
    row = tokens(40)
    step = DecodeStep(half, filled_cache(half, [row]))
    got, full, exact = step(row[-1:], [39])[0], half(row[None])[0, -1], model(row[None])[0, -1]
    assert (got.float() - exact).abs().max() < 2 * (full.float() - exact).abs().max()


@torch.no_grad()
def test_joined_projections_are_one_product_and_the_same_weights(model):
    """In memory one behind the other; names, values and logits unchanged; moved elsewhere, they are multiplied one by one."""
    joined = join_projections(SLMForCausalLM(model.config, seed=1).eval())
    for (name, ours), (other, theirs) in zip(joined.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    attention = joined.model.layers[0].self_attn
    qkv = _matrix(attention.q_proj, attention.k_proj, attention.v_proj)
    assert isinstance(qkv, torch.Tensor)
    assert torch.equal(qkv, torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]))
    row = tokens(12)
    want = DecodeStep(model, filled_cache(model, [row]))(row[-1:], [11])
    torch.testing.assert_close(
        DecodeStep(joined, filled_cache(joined, [row]))(row[-1:], [11]), want, rtol=2e-5, atol=2e-5
    )
    attention.k_proj.weight = torch.nn.Parameter(attention.k_proj.weight.clone())
    assert isinstance(_matrix(attention.q_proj, attention.k_proj, attention.v_proj), tuple)
    apart = DecodeStep(joined, filled_cache(joined, [row]))(row[-1:], [11])
    torch.testing.assert_close(apart, want, rtol=2e-5, atol=2e-5)


def test_compiled_text_is_the_same(tiny_config):
    """torch.compile of the step, in one graph; the same greedy tokens, in rows of different lengths."""
    shape = {"initializer_range": 0.2, "num_hidden_layers": 1, "tie_word_embeddings": False}
    model = SLMForCausalLM(tiny_config.model_copy(update=shape), seed=1)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    ids = torch.cat([tokens(1, 5), torch.tensor([[7, 8, 0, 0, 0]])])
    assert torch.equal(generate(model, ids, compiled=True, **options), generate(model, ids, use_cache=False, **options))
