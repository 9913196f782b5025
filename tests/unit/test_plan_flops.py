"""The plan's FLOPs against torch's own counter on the real model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slm import ModelConfig, SLMForCausalLM
from slm.model import attention
from slm.plan import flops_per_token, training_flops


def in_place_product(self_shape, a_shape, b_shape, *_, out_shape=None, **__):
    """torch counts addmm and not addmm_, in which the head's weight gradient is added up."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


UNPACKED = [0, 64, 128]
PACKED = [0, 5, 32, 64, 64 + 40, 128]
COUNTED = {torch.ops.aten.addmm_: in_place_product}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bounds", [UNPACKED, PACKED])
def test_flops_equal_a_counter(bounds, tied, monkeypatch):
    """Forward, loss and backward of our own model, within 1 %. Attention as torch's math backend, whose matrix products the
    counter sees: it computes whole squares, which is the convention `full`."""
    monkeypatch.setattr("slm.model.llama.packed_attention", attention._piece_by_piece)
    config = ModelConfig.preset("cpu-tiny", tie_word_embeddings=tied)
    model = SLMForCausalLM(config)
    tokens = torch.randint(0, config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, None, torch.tensor(bounds, dtype=torch.int32), tokens)[0].backward()
    pairs = sum((end - start) ** 2 for start, end in zip(bounds, bounds[1:], strict=False))
    assert counter.get_total_flops() == pytest.approx(training_flops(config, 128, pairs), rel=0.01)
    if bounds == UNPACKED:
        assert training_flops(config, 128, pairs) == 128 * flops_per_token(config, 64, causal=False)


def test_causal_flops_are_those_of_half_the_square():
    """The convention `causal` counts the pairs on and below the diagonal: counted here one by one."""
    config = ModelConfig.preset("cpu-tiny")
    pairs = sum(1 for query in range(64) for key in range(64) if key <= query)
    assert 64 * flops_per_token(config, 64, causal=True) == training_flops(config, 64, pairs)
