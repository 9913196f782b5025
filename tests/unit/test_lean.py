"""The memory-saving functions equal the plain expressions, in value, gradient and second opinion (gradcheck)."""

import pytest
import torch
import torch.nn.functional as F

from slm.model.lean import _rotated, rms_norm, rotate, swiglu_down


def inputs(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def test_gradcheck():
    """Numerical derivatives in float64, of all inputs."""
    gate, up, down = inputs((2, 3, 5), (2, 3, 5), (4, 5))
    assert torch.autograd.gradcheck(swiglu_down, (gate, up, down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_plain_expressions(dtype):
    """Values and gradients against autograd on the plain expression, in the same dtype and in float64."""
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    cos, sin = (f(torch.rand(2, 7, 1, 4) * 100) for f in (torch.cos, torch.sin))
    cases = [
        (
            lambda x, w: rms_norm(x, w, 1e-5),
            lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w,
            ((2, 7, 48), (48,)),
        ),
        (swiglu_down, lambda g, u, w: F.linear(F.silu(g) * u, w), ((2, 7, 20), (2, 7, 20), (12, 20))),
        (lambda x: rotate(x, cos, sin), lambda x: _rotated(x.float(), cos, sin).to(x.dtype), ((2, 7, 3, 8),)),
    ]
    for lean, plain, shapes in cases:
        ours = inputs(*shapes, dtype=dtype)
        reference = [x.detach().double().requires_grad_() for x in ours]
        out, want = lean(*ours), plain(*reference)
        assert out.dtype == dtype
        assert (out.double() - want).norm() <= rtol * want.norm()
        weight = torch.randn(out.shape, dtype=torch.float64)
        (out * weight.to(dtype)).sum().backward()
        (want * weight.to(dtype).double()).sum().backward()
        for x, r in zip(ours, reference, strict=True):
            assert x.grad.dtype == dtype
            assert (x.grad.double() - r.grad).norm() <= rtol * r.grad.norm()


def test_less_is_kept_for_the_backward_pass():
    """Bytes saved by autograd: two MLP widths instead of four, no unrotated input, no normalised copy."""

    def kept(function, *tensors):
        storages = {}
        known = {t.untyped_storage().data_ptr() for t in tensors}

        def pack(t):
            if t.untyped_storage().data_ptr() not in known:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function(*tensors)
        return sum(storages.values())

    gate, up, down = inputs((1, 64, 256), (1, 64, 256), (32, 256), dtype=torch.float32)
    x, weight = inputs((1, 64, 256), (256,), dtype=torch.float32)
    assert kept(swiglu_down, gate, up, down) == 0
    assert kept(lambda g, u, w: F.linear(F.silu(g) * u, w), gate, up, down) >= 2 * 64 * 256 * 4
    assert kept(lambda x, w: rms_norm(x, w, 1e-5), x, weight) <= 64 * 4
