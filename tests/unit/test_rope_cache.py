"""The cache against the forward without one, for every rotary scaling, far beyond the original context; generation too."""

import pytest
import torch

from slm import ModelConfig, SLMForCausalLM
from slm.model.llama import KVCache
from slm.model.rope import follows_length
from tests.unit.test_rope import KINDS, ORIGINAL, scaling

FOLLOWING = ("dynamic", "longrope")


def model_of(kind):
    """Weights four times the initial ones and a head of their own, so that angles decide which token comes next."""
    shape = {"tie_word_embeddings": False, "max_position_embeddings": 4 * ORIGINAL}
    config = ModelConfig.preset("cpu-tiny", rope_scaling=scaling(kind), **shape)
    model = SLMForCausalLM(config).init_weights(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


def some_tokens(*shape, seed=0):
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_the_full_forward_at_4_times_the_original(kind):
    """A prompt, then token by token to 4 times the original context: each call's last logits are the full forward's."""
    model, tokens = model_of(kind), some_tokens(2, 4 * ORIGINAL)
    cache = KVCache.empty(model.config, 2, 4 * ORIGINAL, torch.float32, "cpu")
    with torch.no_grad():
        ends = [20, *range(21, 4 * ORIGINAL + 1)]
        for start, end in zip([0, *ends], ends, strict=False):
            logits = model(tokens[:, start:end], cache=cache)
            torch.testing.assert_close(logits[:, -1], model(tokens[:, :end])[:, -1], rtol=1e-5, atol=1e-5)
        assert cache.length_B.tolist() == [4 * ORIGINAL] * 2
    assert (cache.tokens_BS is not None) == follows_length(model.config)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_chunks_equals_the_full_forward(kind):
    """Chunks whose ends lie below, at and beyond the original context; all logits of the last chunk."""
    model, tokens = model_of(kind), some_tokens(2, 4 * ORIGINAL)
    cache = KVCache.empty(model.config, 2, 4 * ORIGINAL, torch.float32, "cpu")
    ends = [8, ORIGINAL, ORIGINAL + 1, 3 * ORIGINAL, 4 * ORIGINAL]
    with torch.no_grad():
        for start, end in zip([0, *ends], ends, strict=False):
            logits = model(tokens[:, start:end], cache=cache)
            torch.testing.assert_close(logits, model(tokens[:, :end])[:, start:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FOLLOWING)
def test_what_was_cached_at_other_angles_cannot_be_kept(kind):
    """The reason for making it again: the second layer's values differ with the length, not only the keys' rotation."""
    model, tokens = model_of(kind), some_tokens(1, 4 * ORIGINAL)
    short, long = (KVCache.empty(model.config, 1, 4 * ORIGINAL, torch.float32, "cpu") for _ in range(2))
    with torch.no_grad():
        model(tokens[:, :ORIGINAL], cache=short)
        model(tokens, cache=long)
    first, second = (
        (a[:, :ORIGINAL] - b[:, :ORIGINAL]).abs().max() for a, b in zip(short.values, long.values, strict=True)
    )
    assert first < 1e-6
    assert second > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_packed_pieces_have_the_angles_of_each_alone(kind):
    """Logits and gradients of pieces below and beyond the original context, packed, equal those of each piece alone."""
    model = model_of(kind)
    lengths = [[100, 20, 8], [31, 33, 64]]
    tokens = some_tokens(2, 128)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    bounds = torch.tensor([0] + [n for row in lengths for n in row] + [0]).cumsum(0).int()
    packed = model(tokens, positions, bounds).flatten(0, 1)
    packed.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = torch.cat([model(piece[None])[0] for piece in tokens.flatten().split([n for row in lengths for n in row])])
    alone.square().sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        assert (ours - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


@pytest.mark.parametrize("kind", ["yarn", *FOLLOWING])
def test_a_ragged_batch_is_continued_as_each_row_alone(kind):
    """Rows that cross the original context at different steps, with and without cache, padded on either side."""
    model = model_of(kind)
    rows = [some_tokens(n, seed=n) for n in (3, ORIGINAL - 2, ORIGINAL + 9, 60)]
    prompts, mask = torch.zeros(4, 60, dtype=torch.long), torch.zeros(4, 60, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if i % 2 else slice(60 - len(row), 60)
        prompts[i, place], mask[i, place] = row, 1
    options = {"do_sample": False, "max_new_tokens": 40}
    alone = [model.generate(row[None], **options)[0, len(row) :].tolist() for row in rows]
    for use_cache in (True, False):
        out = model.generate(prompts, attention_mask=mask, use_cache=use_cache, **options)
        for i, row in enumerate(rows):
            start = len(row) if i % 2 else 60
            assert out[i, start : start + 40].tolist() == alone[i], (use_cache, i)


@pytest.mark.parametrize("kind", ["yarn", *FOLLOWING])
def test_generate_equals_transformers(kind, tmp_path):
    """Greedy ids to 4 times the original context. Without its cache: transformers keeps keys of other angles in it."""
    import transformers

    model = model_of(kind)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt, new = some_tokens(1, ORIGINAL - 8), 3 * ORIGINAL + 8
    ours = model.generate(prompt, do_sample=False, max_new_tokens=new)
    expected = theirs.generate(
        prompt, do_sample=False, max_new_tokens=new, use_cache=kind == "yarn", attention_mask=torch.ones_like(prompt)
    )
    assert ours.shape[1] == 4 * ORIGINAL
    assert torch.equal(ours, expected)
