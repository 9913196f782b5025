"""The chunked loss against float64 and against the plain loss."""

import pytest
import torch

from slm import activations, losses
from slm.losses import IGNORE, linear_cross_entropy, token_losses
from tests.watch import LargestTensor


def reference(hidden, weight, labels, z_loss):
    """The definition, with all the logits, in float64."""
    logits = hidden @ weight.T
    log_z = logits.logsumexp(-1)
    each = log_z - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0] + z_loss * log_z**2
    return each[labels != IGNORE].sum()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_elements", [1 << 22, 64 * 300])
def test_loss_and_gradients_equal_float64(monkeypatch, z_loss, chunk_elements):
    """One chunk or four, with ignored labels, scaled afterwards as train_step does: 1e-5 of the float64 value."""
    monkeypatch.setitem(activations.LOGITS_CHUNK_ELEMENTS, "cpu", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(230, 48, generator=generator)
    weight = torch.randn(300, 48, generator=generator) * 0.3
    labels = torch.randint(0, 300, (230,), generator=generator)
    labels[::7] = IGNORE
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss, count = linear_cross_entropy(h, w, labels, z_loss=z_loss)
    want = reference(h64, w64, labels, z_loss)
    assert count == (labels != IGNORE).sum()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    (loss / count * 0.5).backward()
    (want / count * 0.5).backward()
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-5, atol=1e-8)
    each = token_losses(hidden, weight, labels)
    torch.testing.assert_close(each.double().sum(), reference(h64, w64, labels, 0.0), rtol=1e-6, atol=0)


def test_gradcheck_small_chunks(monkeypatch):
    """A bfloat16 weight keeps its dtype in the gradient and sums chunks in float32."""
    monkeypatch.setitem(activations.LOGITS_CHUNK_ELEMENTS, "cpu", 64 * 100)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 32, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(100, 32, generator=generator) * 0.3).bfloat16().requires_grad_()
    labels = torch.randint(0, 100, (256,), generator=generator)
    loss, count = linear_cross_entropy(hidden, weight, labels)
    (loss / count).backward()
    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    (reference(h64, w64, labels, 0.0) / count).backward()
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad.double() - w64.grad).norm() < 1e-2 * w64.grad.norm()
    assert (hidden.grad.double() - h64.grad).norm() < 1e-2 * h64.grad.norm()


def test_no_target_at_all_is_zero_not_nan():
    """A batch in which every label is ignored has loss 0, count 0 and zero gradients."""
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(16, 8, requires_grad=True)
    loss, count = linear_cross_entropy(hidden, weight, torch.full((5,), IGNORE))
    loss.backward()
    assert loss == 0
    assert count == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    """The largest tensor that the loss makes is a chunk of logits, never [tokens, vocabulary]."""
    vocab = 16384
    weight = torch.randn(vocab, 8, requires_grad=True)
    for tokens in (4096, 16384):
        hidden = torch.randn(tokens, 8, requires_grad=True)
        with LargestTensor() as largest:
            linear_cross_entropy(hidden, weight, torch.randint(0, vocab, (tokens,)))[0].backward()
        assert largest.numel == losses.chunk_tokens(vocab, "cpu") * vocab
    assert largest.numel * 8 <= tokens * vocab
