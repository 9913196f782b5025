"""Every rotary scaling against transformers: frequencies, logits, both forms of the config; the cache against none."""

import pytest
import torch

from slm import ModelConfig
from slm.model.config import RopeScaling, effective_theta
from slm.model.rope import attention_factor, inverse_frequencies, piece_lengths

ORIGINAL = 32  # of the tiny models here


def divisors(num_pairs, most):
    return [1.0 + (most - 1.0) * pair / num_pairs for pair in range(num_pairs)]


def scaling(kind, *, factor=4.0, original=ORIGINAL, pairs=8):
    """A scaling of each type whose every field matters."""
    span = {"factor": factor, "original_max_position_embeddings": original}
    fields = {
        "default": {},
        "linear": span,
        "dynamic": span,
        "ntk": span,
        "theta": {"rope_theta": 2e6},
        "yarn": span | {"beta_fast": 24.0, "beta_slow": 1.5},
        "llama3": span | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": span | {"short_factor": divisors(pairs, 1.25), "long_factor": divisors(pairs, 7.0)},
    }
    return RopeScaling(rope_type=kind, **fields[kind])


KINDS = ("default", "linear", "dynamic", "ntk", "theta", "yarn", "llama3", "longrope")


def transformers_frequencies(theta, rope, max_position_embeddings, length):
    """transformers' own function of the type for the 1B shape, given its config by hand, not through ours."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=2048,
        num_attention_heads=32,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_theta": theta, **rope},
    )
    plain = rope["rope_type"] == "default"
    function = LlamaRotaryEmbedding.compute_default_rope_parameters if plain else ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    return function(config, **({} if plain else {"seq_len": length}))


@pytest.mark.parametrize("length", [8192, 8193, 32768, 131072])
@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "llama3", "longrope"])
def test_frequencies_of_the_1b_shape_equal_transformers(kind, length):
    """All that transformers has, to 1e-6, with the attention factor, below and above the original context."""
    ours = scaling(kind, factor=12.0, original=8192, pairs=32)
    config = ModelConfig(rope_scaling=ours)
    context = 8192 if kind == "dynamic" else 131072  # what transformers takes for dynamic's original
    rope = ours.model_dump(mode="json", exclude_none=True)
    expected, factor = transformers_frequencies(5e5, rope, context, length)
    found = inverse_frequencies(config, torch.tensor(length))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found.dtype == torch.float32
    assert attention_factor(config) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        {"truncate": False},
        {"mscale": 1.0, "mscale_all_dim": 0.707},
        {"attention_factor": 1.3},
        {"factor": 1.0},
        {"original_max_position_embeddings": 64},
    ],
)
def test_yarn_variants_equal_transformers(fields):
    """Each option that transformers reads, and an original context shorter than most wavelengths."""
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, **fields}
    config = ModelConfig(rope_scaling=RopeScaling(**rope))
    expected, factor = transformers_frequencies(5e5, rope, 131072, None)
    torch.testing.assert_close(inverse_frequencies(config), expected, rtol=1e-6, atol=0)
    assert attention_factor(config) == pytest.approx(factor, rel=1e-12)


def test_ntk_and_theta_are_a_new_base():
    """ntk's lowest frequency is the plain one divided by the factor; both are plain frequencies of another base."""
    plain, ntk = ModelConfig(rope_scaling=None), ModelConfig(rope_scaling=scaling("ntk", factor=8.0, original=8192))
    ratio = inverse_frequencies(plain) / inverse_frequencies(ntk)
    assert ratio[0] == 1.0
    assert ratio[-1].item() == pytest.approx(8.0, rel=1e-5)
    for config in (ntk, ModelConfig(rope_scaling=scaling("theta"))):
        expected, _ = transformers_frequencies(effective_theta(config), {"rope_type": "default"}, 131072, None)
        torch.testing.assert_close(inverse_frequencies(config), expected, rtol=1e-6, atol=0)
    assert effective_theta(ModelConfig(rope_scaling=scaling("theta"))) == 2e6


def test_dynamic_of_factor_1_is_ntk_of_the_length():
    """At one length, dynamic equals ntk with factor length / original; below the original it is plain."""
    lengths = torch.tensor([100, 512, 1024, 4096])
    config = ModelConfig(rope_scaling=RopeScaling(rope_type="dynamic", original_max_position_embeddings=512))
    for length, found in zip(lengths.tolist(), inverse_frequencies(config, lengths), strict=True):
        ntk = RopeScaling(rope_type="ntk", factor=max(1.0, length / 512), original_max_position_embeddings=512)
        expected = inverse_frequencies(ModelConfig(rope_scaling=ntk))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_piece_lengths_are_those_of_each_piece():
    """Whatever a piece is packed with; pieces of no length count for nothing; skipped positions count (PoSE)."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 90, 91, 0, 1]])
    bounds = torch.tensor([0, 3, 5, 6, 6, 10, 12, 12, 12], dtype=torch.int32)
    assert piece_lengths(positions, bounds).tolist() == [[3, 3, 3, 2, 2, 1], [92, 92, 92, 92, 2, 2]]
    positions[1] = torch.tensor([0, 1, 2, 3, 0, 1])
    parts = [piece_lengths(positions[:, 2 * i : 2 * i + 2], bounds, i, 3) for i in range(3)]  # of 3 ranks
    assert torch.equal(torch.cat(parts, dim=1), piece_lengths(positions, bounds))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, "factor is missing"),
        ({"rope_type": "theta"}, "rope_theta is missing"),
        (
            {"rope_type": "theta", "rope_theta": 1e6, "factor": 2},
            "factor is 2.0, which has no effect on rope_type theta",
        ),
        ({"rope_type": "default", "beta_fast": 16}, "beta_fast is 16.0, which has no effect"),
        ({"rope_type": "linear", "factor": 2, "attention_factor": 1.1}, "attention_factor is 1.1, which has no effect"),
        ({"rope_type": "longrope"}, "factor is missing, so nothing says how far the lists of rope_type longrope reach"),
        ({"rope_type": "longrope", "factor": 4}, "short_factor is None.*long_factor is None"),
        ({"rope_type": "longrope", "factor": 4, "short_factor": [1], "long_factor": [0.0]}, "above 0"),
        ({"rope_type": "yarn", "factor": 4, "beta_fast": 1}, "must be above beta_slow"),
        ({"rope_type": "yarn", "factor": 4, "mscale": 1}, "no effect alone"),
        ({"rope_type": "llama3", "factor": 4, "low_freq_factor": 4}, "must be above low_freq_factor"),
        ({"rope_type": "linear", "factor": 0.5}, "greater than or equal to 1"),
        ({"rope_type": "su", "factor": 2}, "Input should be 'default'"),
    ],
)
def test_fields_that_do_not_fit_the_type_are_refused(fields, message):
    """Missing ones and those without effect, with the value and what to do."""
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)


def test_scaling_that_does_not_fit_the_shape_is_refused():
    """longrope's lists need one number a pair; an original context longer than the whole one extends nothing."""
    with pytest.raises(
        ValueError, match=r"short_factor has 8 numbers, but head_dim 64 has 32 pairs.*long_factor has 8"
    ):
        ModelConfig(rope_scaling=scaling("longrope"))
    with pytest.raises(ValueError, match=r"is 8192, longer than the model's max_position_embeddings 256"):
        ModelConfig.preset("cpu-tiny", rope_scaling=RopeScaling(rope_type="yarn", factor=4))


def test_what_is_written_of_a_scaling_reads_back():
    """Only the fields of its type are written; files of before the other types, which hold llama3's fields, still read."""
    for kind in KINDS:
        written = scaling(kind).model_dump(mode="json")
        assert RopeScaling(**written) == scaling(kind), kind
    old = {"factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert RopeScaling(rope_type="default", **old) == RopeScaling()
    assert scaling("linear").model_dump().keys() == {"rope_type", "factor", "original_max_position_embeddings"}
