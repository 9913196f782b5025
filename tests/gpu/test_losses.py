"""The chunked losses on a GPU against their definition in float64 on the CPU: cross-entropy, and each kind of target.
The definition is that of tests/unit/test_distill_loss.py; the cases without the mark keep this file itself honest."""

import sys
from pathlib import Path

import pytest
import torch

import slm.losses as losses_module
from slm.distill.codec import RawTargets
from slm.losses import DenseTarget, Distillation, SparseTarget, linear_cross_entropy, linear_distillation, token_losses
from tests.unit.test_distill_loss import KINDS, case, dense, reference, sparse
from tests.unit.test_losses import reference as cross_entropy

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from distill_speed import cached_rows  # noqa: E402

GPU = pytest.mark.gpu
# Relative L2 of the gradients, and relative error of the loss, from float64 over the same rounded inputs.
DEVICES = [
    ("cpu", torch.float32, 1e-5, 1e-5),
    ("cpu", torch.bfloat16, 2e-2, 1e-2),
    pytest.param("cuda", torch.float32, 1e-4, 1e-5, marks=GPU),
    pytest.param("cuda", torch.bfloat16, 2e-2, 1e-2, marks=GPU),  # logits are rounded to bfloat16
]


def moved(target, device):
    """In float32, as caches are decoded; a live teacher's states in it too."""
    if isinstance(target, DenseTarget):
        return DenseTarget(target.hidden_NE.float().to(device), target.weight_VE.float().to(device), target.weight)
    tail = None if target.log_tail_N is None else target.log_tail_N.float().to(device)
    return SparseTarget(target.index_NK.to(device), target.log_p_NK.float().to(device), tail, target.weight)


def on(device, dtype, **sizes):
    """A case in dtype on the device, the same numbers in float64 on the CPU, labels and the teacher."""
    hidden, weight, labels, teacher = case(**sizes)
    ours = [x.detach().to(device, dtype).requires_grad_() for x in (0.3 * hidden, weight)]
    exact = [x.detach().cpu().double().requires_grad_() for x in ours]
    return ours, exact, labels, teacher


def assert_near(loss, ours, wanted, exact, grad_tolerance, loss_tolerance):
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=loss_tolerance)
    found = torch.autograd.grad(3 * loss, ours)
    for a, b in zip(found, torch.autograd.grad(3 * wanted, exact), strict=True):
        assert (a.cpu().double() - b).norm() <= grad_tolerance * b.norm()


@pytest.mark.parametrize(("device", "dtype", "grad_tolerance", "loss_tolerance"), DEVICES)
@pytest.mark.parametrize("vocab", [300, pytest.param(128_256, marks=GPU)])
def test_cross_entropy(device, dtype, grad_tolerance, loss_tolerance, vocab, monkeypatch):
    """With z-loss, in chunks that do not divide the tokens; token by token too."""
    monkeypatch.setattr(losses_module, "chunk_tokens", lambda vocab, device: 64)
    ours, exact, labels, _ = on(device, dtype, n=230, width=48, vocab=vocab)
    loss, count = linear_cross_entropy(*ours, labels.to(device), z_loss=1e-2)
    assert count == 228
    assert_near(loss, ours, cross_entropy(*exact, labels, 1e-2), exact, grad_tolerance, loss_tolerance)
    each = token_losses(*ours, labels.to(device)).double().sum()
    assert each.item() == pytest.approx(cross_entropy(*exact, labels, 0.0).item(), rel=loss_tolerance)


@pytest.mark.parametrize(("device", "dtype", "grad_tolerance", "loss_tolerance"), DEVICES)
@pytest.mark.parametrize(("form", "divergence"), [*KINDS, ("dense", "forward")])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_distillation(device, dtype, grad_tolerance, loss_tolerance, form, divergence, T, monkeypatch):
    """Every form, with labels of a tenth; a live teacher; one and two softmaxes a chunk; rows that no cache knows."""
    monkeypatch.setattr(losses_module, "chunk_tokens", lambda vocab, device: 64)
    ours, exact, labels, teacher = on(device, dtype, n=230, width=8, vocab=300)
    target = dense(teacher) if form == "dense" else sparse(teacher, T, k=12, form=form)
    form = "bucket" if form == "dense" else form
    present = torch.arange(230) % 5 > 0
    d = Distillation((moved(target, device),), 0.1, T, form, divergence, present.to(device))
    loss, _ = linear_distillation(*ours, labels.to(device), d)
    wanted = reference(*exact, labels, [target], Distillation((target,), 0.1, T, form, divergence, present))
    assert_near(loss, ours, wanted, exact, grad_tolerance, loss_tolerance)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(("kind", "k"), [("top_k", 64), ("sampled", 12)])
def test_cached_rows_are_decoded_alike(device, kind, k):
    """The bytes of a cache, moved and decoded there: the same entries, values to float32's rounding."""
    raw = cached_rows(kind, k, 2000, 128_256)
    assert isinstance(raw, RawTargets)
    for found, wanted in zip(raw.to(device).decode(1.0), raw.decode(1.0), strict=True):
        if wanted is None:
            assert found is None
        else:
            torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)
