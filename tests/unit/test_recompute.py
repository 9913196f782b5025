"""Recomputation, its host memory and tiles: the same gradients, no second attention, less memory."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slm import SLMForCausalLM
from slm.model import attention
from slm.model.attention import KERNELS
from slm.model.lean import norm_mlp, tiled
from slm.model.recompute import BlockStore
from tests.watch import LargestTensor

TOKENS = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
BOUNDS = torch.tensor([0, 5, 32, 40, 64, 64], dtype=torch.int32)


class Calls(TorchDispatchMode):
    """Counts the calls of the attention kernels, in compiled code too."""

    def __init__(self):
        super().__init__()
        self.num_kernels = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_kernels += func in KERNELS
        return func(*args, **(kwargs or {}))


def gradients(model, device="cpu"):
    """Every gradient, and how often attention's forward ran in the forward and in the backward pass."""
    model.zero_grad()
    tokens, bounds = TOKENS.to(device), BOUNDS.to(device)
    forward, backward = Calls(), Calls()
    with forward:
        loss, _ = model(tokens, None, bounds, tokens)
    with backward:
        loss.backward()
    return [p.grad.clone() for p in model.parameters()], (forward.num_kernels, backward.num_kernels)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputation_changes_no_bit_and_selective_runs_attention_once(
    tiny_config, policy, offload, compiled, monkeypatch
):
    """Against no recomputation, eager and compiled, with what is kept copied to host buffers and back, or not."""
    monkeypatch.setattr("slm.model.recompute._SMALLEST_BYTES", 0)
    torch._dynamo.reset()
    model = SLMForCausalLM(tiny_config)
    if compiled:
        model.compile_blocks()
    plain, calls = gradients(model)
    layers = tiny_config.num_hidden_layers
    assert calls == (layers, 0)
    model.recompute, model.offload_activations = policy, offload
    for _ in range(2):
        found, calls = gradients(model)
        assert same_bits(found, plain)
        assert calls == (layers, layers if policy == "full" else 0)


def test_selective_keeps_every_piece_of_the_fallback(tiny_config, monkeypatch):
    """Where attention is one SDPA call a piece (float32 on a GPU), each call is kept: 4 pieces, none run again."""
    monkeypatch.setattr("slm.model.llama.packed_attention", attention._piece_by_piece)
    model = SLMForCausalLM(tiny_config)
    plain, calls = gradients(model)
    assert calls == (4 * tiny_config.num_hidden_layers, 0)
    model.recompute = "selective"
    found, calls = gradients(model)
    assert same_bits(found, plain)
    assert calls == (4 * tiny_config.num_hidden_layers, 0)


def test_a_second_backward_says_so(tiny_config):
    """What was kept is given up as it is used; computing with other numbers in silence would be worse."""
    model = SLMForCausalLM(tiny_config)
    model.recompute = "selective"
    hidden = model.hidden_states(TOKENS).sum()
    hidden.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        hidden.backward()


def test_kept_tensors_leave_their_memory():
    """The store holds copies: what was packed is freed, and is given up as it is fetched, one block ahead."""
    check_kept_tensors("cpu")


def check_kept_tensors(device):
    first = BlockStore(before=None)
    second = BlockStore(before=first)
    x, y = torch.randn(64, 64, device=device), torch.randn(64, 64, device=device)
    slot_x, slot_y = first.pack(x), second.pack(y)
    assert slot_x.host.device.type == "cpu"
    assert slot_x.host.is_pinned() == (device == "cuda")
    assert slot_x.host.data_ptr() != x.data_ptr()
    assert slot_x.back is None
    assert torch.equal(second.unpack(slot_y), y)
    assert slot_x.back is not None  # on its way already
    assert (slot_x.host, slot_y.host, slot_y.back) == (None, None, None)
    assert torch.equal(first.unpack(slot_x), x)
    assert first.pack(torch.ones(3)) is not None
    with pytest.raises(RuntimeError, match="a second time"):
        first.unpack(slot_x)


# --- tiles ----------------------------------------------------------------------------------------------------


def mlp_inputs(dtype, tokens=(3, 23), hidden=12, width=20):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*tokens, hidden), (hidden,), (width, hidden), (width, hidden), (hidden, width)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def plain_norm_mlp(eps, x, norm, gate, up, down):
    normed = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm
    return F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


@pytest.mark.parametrize("tile_tokens", [1, 16, 69, 1000])
def test_tiles_equal_the_whole_in_float64(tile_tokens):
    """Output and every gradient to 1e-12 (reductions in another order), whether or not tiles divide the 69 tokens."""
    ours, whole = mlp_inputs(torch.float64), mlp_inputs(torch.float64)
    out, want = tiled(functools.partial(norm_mlp, 1e-5), tile_tokens, *ours), plain_norm_mlp(1e-5, *whole)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn(want.shape, dtype=torch.float64)
    out.backward(grad)
    want.backward(grad)
    for x, y in zip(ours, whole, strict=True):
        assert (x.grad - y.grad).norm() <= 1e-12 * y.grad.norm()


def test_gradcheck_of_tiles():
    """Numerical derivatives of every input."""
    assert torch.autograd.gradcheck(
        functools.partial(tiled, functools.partial(norm_mlp, 1e-5), 3), mlp_inputs(torch.float64, (2, 4), 4, 6)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_tiles_add_up_weight_gradients_in_float32(dtype, tolerance):
    """512 tiles: relative L2 from float64; in bfloat16 no worse than the whole, where adding in bfloat16 would drift."""
    ours, whole, exact = (mlp_inputs(dtype, (1, 512)) for _ in range(3))
    exact = [x.detach().double().requires_grad_() for x in exact]
    tiled(functools.partial(norm_mlp, 1e-5), 1, *ours).sum().backward()
    norm_mlp(1e-5, *whole).sum().backward()
    plain_norm_mlp(1e-5, *exact).sum().backward()
    for x, w, e in zip(ours, whole, exact, strict=True):
        assert x.grad.dtype == dtype
        error, whole_error = ((t.grad.double() - e.grad).norm() / e.grad.norm() for t in (x, w))
        assert error <= tolerance
        assert error <= 2 * whole_error + 1e-6


def test_frozen_weights_get_no_gradient():
    x, norm, gate, up, down = mlp_inputs(torch.float64)
    up.requires_grad_(False)
    tiled(functools.partial(norm_mlp, 1e-5), 10, x, norm, gate, up, down).sum().backward()
    assert up.grad is None
    assert down.grad is not None


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_tiled_model_has_the_same_gradients(tiny_config, policy, compiled):
    """Tiles of 10 of the 64 tokens in every policy: relative L2 1e-5 in float32; attention still runs once."""
    torch._dynamo.reset()
    model = SLMForCausalLM(tiny_config)
    plain, _ = gradients(model)
    if compiled:
        model.compile_blocks()
    for block in model.model.layers:
        block.mlp_tile_tokens = 10
    model.recompute = policy
    found, (_, again) = gradients(model)
    for a, b in zip(found, plain, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    assert again == (tiny_config.num_hidden_layers if policy == "full" else 0)


def test_no_tensor_of_tiles_is_as_wide_as_the_mlp_and_as_long_as_the_sequence():
    """The largest tensor of both passes is the output; untiled it is the MLP's width for all tokens."""
    tokens, hidden, width = 2048, 8, 64
    for tile_tokens, expected in ((64, tokens * hidden), (tokens, tokens * width)):
        inputs = mlp_inputs(torch.float32, (1, tokens), hidden, width)
        with LargestTensor() as largest:
            tiled(functools.partial(norm_mlp, 1e-5), tile_tokens, *inputs).sum().backward()
        assert largest.numel == expected
