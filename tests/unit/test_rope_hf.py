"""The rotary settings to and from Hugging Face, in both forms, against transformers' own reading and its logits."""

import json

import pytest
import torch

from slm import SLMForCausalLM
from slm.errors import UserError
from slm.model.config import ModelConfig, RopeScaling, effective_theta
from slm.model.hf import config_from_hf, config_to_hf
from slm.model.rope import attention_factor, inverse_frequencies
from tests.unit.test_rope import KINDS, ORIGINAL, divisors, scaling
from tests.unit.test_rope_cache import model_of, some_tokens


def in_both_forms(hf):
    """config.json as transformers 4 writes it, and as 5 does."""
    old = {k: v for k, v in hf.items() if k != "rope_parameters"}
    new = {k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}
    return old, new


@pytest.mark.parametrize("form", ["both", "rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_the_exported_folder_equal_transformers(kind, form, tmp_path, caplog):
    """Below, at and beyond the original context, and each form alone; transformers has nothing to warn of."""
    import transformers

    transformers.logging.enable_propagation()
    ours = model_of(kind)
    ours.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    old, new = in_both_forms(json.loads(path.read_text()))
    path.write_text(
        json.dumps({"both": json.loads(path.read_text()), "rope_scaling": old, "rope_parameters": new}[form])
    )
    again = SLMForCausalLM.from_pretrained(tmp_path)
    for length in (20, ORIGINAL, ORIGINAL + 1, 4 * ORIGINAL):
        # Anew for each length: transformers' dynamic forgets a longer one only below the original context.
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        tokens = some_tokens(2, length)
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
            torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(again(tokens), expected, rtol=1e-5, atol=1e-5)
    assert "rope" not in caplog.text.lower()


@pytest.mark.parametrize("kind", KINDS)
def test_config_reads_back_in_both_forms(kind):
    """The same config again; of ntk and theta the plain one of their base."""
    config = ModelConfig.preset("cpu-tiny", max_position_embeddings=4 * ORIGINAL, rope_scaling=scaling(kind))
    expected = config.rope_scaling if kind not in ("default", "ntk", "theta") else None
    if kind in ("yarn", "longrope"):
        expected = expected.model_copy(update={"attention_factor": attention_factor(config)})
    expected = config.model_copy(update={"rope_scaling": expected, "rope_theta": effective_theta(config)})
    hf = json.loads(json.dumps(config_to_hf(config)))
    for form in (hf, *in_both_forms(hf)):
        assert config_from_hf(form) == expected


SHAPE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def test_what_published_configs_leave_out_is_read_as_transformers_reads_it():
    """Each config by transformers 5 and by us: the frequencies and the attention factor at a short and a long length."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    lists = {"short_factor": divisors(8, 1.2), "long_factor": divisors(8, 9.0)}
    cases = [
        {"rope_theta": 7e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 7}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},  # its original is max_position_embeddings
        {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "mscale": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": None, "beta_slow": 2}, "rope_theta": 1e6},
        {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 64, **lists}},
        {"rope_scaling": {"rope_type": "longrope", **lists}, "original_max_position_embeddings": 64},
        {"rope_scaling": {"rope_type": "longrope", "factor": 9.0, "original_max_position_embeddings": 32, **lists}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}, "rope_theta": 5e4},
    ]
    shape = SHAPE | {"max_position_embeddings": 256}
    for case in cases:
        fields = json.dumps(shape | case)
        ours, theirs = config_from_hf(json.loads(fields)), LlamaConfig(**json.loads(fields))
        for length in (60, 300):
            function = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]]
            expected, factor = function(theirs, seq_len=length)
            found = inverse_frequencies(ours, torch.tensor(length))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, msg=f"{case} at {length}")
            assert attention_factor(ours) == pytest.approx(factor, rel=1e-12), case


def test_published_llama_3_1():
    """Its context is twice factor * original, as Meta published it."""
    config = ModelConfig.preset("llama3.1-8b")
    assert config_from_hf(config_to_hf(config)) == config
    assert config.rope_scaling.reach_tokens == config.max_position_embeddings == 131072
    assert RopeScaling(rope_type="llama3", factor=4.0).reach_tokens == 32768


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "proportional", "factor": 2.0}, "rope_type: Input should be 'default'"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]}, "32 pairs|8 pairs"),
        ({"rope_type": "linear"}, "factor is missing"),
    ],
)
def test_rotary_settings_that_are_not_understood_are_refused(rope, message):
    """Rather than read as something else."""
    shape = SHAPE | {"max_position_embeddings": 256}
    with pytest.raises(UserError, match=message):
        config_from_hf(shape | {"rope_parameters": rope})
