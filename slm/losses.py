"""Cross-entropy and distillation from hidden states and the head's weight, in chunks: whole logits never exist.

Owns the language-model losses and their gradients; the caller divides by the number of targets (design 4.6).

    loss_sum, count = linear_cross_entropy(hidden_NE, weight_VE, labels_N, z_loss=1e-4)
    loss_sum, parts = linear_distillation(hidden_NE, weight_VE, labels_N, Distillation((target,), alpha=0.1))

The gradient is computed in the forward pass, chunk by chunk (logits once, not twice), and scaled in the
backward by whatever the caller did to the sum. Extra memory: one chunk of logits (two, if the loss has parts at two
temperatures or from two teachers), one copy of the weight's gradient, one of the hidden states': it does not grow with
tokens x vocabulary.
`N` tokens, `C` tokens of a chunk, `E` hidden, `V` vocabulary, `K` entries of a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from slm.activations import chunk_tokens
from slm.distill.divergence import DIVERGENCES, FORMS, Cost, cost

IGNORE = -100  # label of a position that has no target


@dataclass(frozen=True)
class SparseTarget:
    """One teacher's target of every token: mass on K of V entries and, for the form `bucket`, on all others together."""

    index_NK: torch.Tensor  # int64, distinct in a row
    log_p_NK: torch.Tensor  # float32, log of the mass, at the loss's temperature; -inf for none
    log_tail_N: torch.Tensor | None = None  # float32, log of the mass outside of the K; -inf for none
    weight: float = 1.0  # of this teacher; those of all add up to 1


@dataclass(frozen=True)
class DenseTarget:
    """A teacher at hand: its hidden states [N, its E] and head [up to V, its E]; further tokens have no mass."""

    hidden_NE: torch.Tensor
    weight_VE: torch.Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Distillation:
    """alpha * CE + (1 - alpha) * T^2 * divergence(teachers, student), design 4.5.

    form: how sparse targets are read, one of slm.distill.divergence.FORMS. A dense target is the whole KL, forward only.
    present_N: bool; False where nothing is known of the teacher: the loss is CE there. None: known everywhere.
    Raises ValueError for what would otherwise be read as something else.
    """

    targets: tuple[SparseTarget | DenseTarget, ...]
    alpha: float
    temperature: float = 1.0
    form: str = "bucket"
    divergence: str = "forward"
    present_N: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS or self.divergence not in DIVERGENCES:
            raise ValueError(f"{self.divergence} on {self.form}: expected one of {DIVERGENCES} on one of {FORMS}")
        if not self.targets or not self.temperature > 0:
            raise ValueError(f"{len(self.targets)} targets at temperature {self.temperature}: need one at more than 0")
        for target in self.targets:
            if isinstance(target, SparseTarget):
                if self.form == "bucket" and target.log_tail_N is None:
                    raise ValueError("the form bucket needs log_tail_N, the mass outside of the entries")
            elif self.divergence != "forward":
                raise ValueError(f"{self.divergence} is for buckets: a dense target is the whole forward KL")


def linear_cross_entropy(
    hidden_NE: torch.Tensor, weight_VE: torch.Tensor, labels_N: torch.Tensor, *, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over targets of -log p(label) + z_loss * log(Z)^2, and the number of targets.

    Returns (float32 scalar, int64 scalar). Labels of -100 have no target. z-loss: PaLM, arXiv 2204.02311, section 5.
    """
    count = (labels_N != IGNORE).sum()
    return _ChunkedLoss.apply(hidden_NE, weight_VE, labels_N, z_loss, None)[0], count


def linear_distillation(
    hidden_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    distillation: Distillation,
    *,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the loss over the labelled tokens, and its parts: float32 [2], the sums of CE and of T^2 * divergence.

    Labels of -100 count for nothing. z_loss: as in linear_cross_entropy, whatever alpha is. Raises ValueError for targets
    of another number of tokens, or of a teacher with tokens that the student lacks.
    """
    for target in distillation.targets:
        rows_NX = target.index_NK if isinstance(target, SparseTarget) else target.hidden_NE
        if len(rows_NX) != labels_N.numel():
            raise ValueError(f"a target has {len(rows_NX)} rows for {labels_N.numel()} tokens: it belongs to others")
        if isinstance(target, DenseTarget) and len(target.weight_VE) > len(weight_VE):
            raise ValueError(
                f"the teacher has {len(target.weight_VE)} tokens, the student {len(weight_VE)}: cut its head"
            )
    return _ChunkedLoss.apply(hidden_NE, weight_VE, labels_N, z_loss, distillation)


@torch.no_grad()
def token_losses(hidden_NE: torch.Tensor, weight_VE: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """-log p(label) of every token, float32 [N]; 0 where there is no target. For evaluation."""
    losses_N = torch.zeros(labels_N.shape, dtype=torch.float32, device=hidden_NE.device)
    chunk = chunk_tokens(weight_VE.shape[0], hidden_NE.device.type)
    for start in range(0, labels_N.numel(), chunk):
        rows = slice(start, start + chunk)
        logits_CV = (hidden_NE[rows] @ weight_VE.T).float()
        losses_N[rows] = torch.nn.functional.cross_entropy(
            logits_CV, labels_N[rows], reduction="none", ignore_index=IGNORE
        )
    return losses_N


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: torch.Tensor,
        weight_VE: torch.Tensor,
        labels_N: torch.Tensor,
        z_loss: float,
        distillation: Distillation | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        precision = torch.float64 if hidden_NE.dtype == torch.float64 else torch.float32
        grad_hidden_NE = torch.empty_like(hidden_NE) if need_hidden else None
        # Chunks add up in float32 also when the weight is bfloat16, as one big product would inside the kernel.
        grad_weight_VE = torch.zeros_like(weight_VE, dtype=precision) if need_weight else None
        parts = torch.zeros(3, dtype=precision, device=hidden_NE.device)
        chunk = chunk_tokens(weight_VE.shape[0], hidden_NE.device.type)
        # One buffer for all chunks: on a CPU, fresh memory costs as much as the passes over it.
        buffer_CV = hidden_NE.new_empty(min(chunk, labels_N.numel()), weight_VE.shape[0])
        second_CV = None
        if distillation is not None and not _in_place(distillation):
            second_CV = torch.empty_like(buffer_CV, dtype=precision)
        for start in range(0, labels_N.numel(), chunk):
            rows = slice(start, start + chunk)
            hidden_CE, labels_C = hidden_NE[rows], labels_N[rows]
            logits_CV = torch.mm(hidden_CE, weight_VE.T, out=buffer_CV[: labels_C.numel()])
            float_CV = logits_CV.to(precision)  # float32: logits_CV itself
            if distillation is None:
                grad_CV = _cross_entropy(float_CV, labels_C, z_loss, parts)
            else:
                other_CV = None if second_CV is None else second_CV[: labels_C.numel()]
                grad_CV = _distillation(float_CV, other_CV, labels_C, z_loss, distillation, rows, parts)
            if not (need_hidden or need_weight):
                continue
            if grad_CV.dtype != logits_CV.dtype:
                grad_CV = logits_CV.copy_(grad_CV)  # in half precision: rounded into the buffer
            if grad_hidden_NE is not None:
                torch.mm(grad_CV, weight_VE, out=grad_hidden_NE[rows])
            if grad_weight_VE is not None:
                if weight_VE.dtype == precision:
                    grad_weight_VE.addmm_(grad_CV.T, hidden_CE)
                else:
                    grad_weight_VE += grad_CV.T @ hidden_CE
        # Not by save_for_backward: what that keeps, autograd copies before it becomes a parameter's gradient.
        ctx.gradients = grad_hidden_NE, grad_weight_VE
        ctx.weight_dtype = weight_VE.dtype
        told = parts[1:].clone()
        ctx.mark_non_differentiable(told)
        return parts[0].clone(), told

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, _: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("backward a second time through a chunked loss, whose gradients are used up")
        grad_hidden_NE, grad_weight_VE = ctx.gradients
        ctx.gradients = None
        if grad_hidden_NE is not None:
            # In float32 also when they are bfloat16: the factor, 1 / targets, would itself be rounded.
            grad_hidden_NE = grad_hidden_NE.to(grad.dtype).mul_(grad).to(grad_hidden_NE.dtype)
        if grad_weight_VE is not None:
            grad_weight_VE = grad_weight_VE.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden_NE, grad_weight_VE, None, None, None


def _cross_entropy(float_CV: torch.Tensor, labels_C: torch.Tensor, z_loss: float, parts: torch.Tensor) -> torch.Tensor:
    """Adds the chunk's loss to parts[0] and parts[1]; the logits become their gradient."""
    valid_C = labels_C != IGNORE
    target_C1 = labels_C.clamp(min=0)[:, None]
    target_C = float_CV.gather(1, target_C1)[:, 0]
    max_C = float_CV.amax(-1)
    exp_CV = float_CV.sub_(max_C[:, None]).exp_()
    sum_C = exp_CV.sum(-1)
    log_z_C = sum_C.log() + max_C
    loss = torch.where(valid_C, log_z_C - target_C + z_loss * log_z_C**2, 0.0).sum()
    parts[0] += loss
    parts[1] += loss
    # d loss / d logits = softmax * (1 + 2 z log Z) - onehot, and 0 where there is no target.
    grad_CV = exp_CV.mul_(torch.where(valid_C, (1 + 2 * z_loss * log_z_C) / sum_C, 0.0)[:, None])
    return grad_CV.scatter_add_(1, target_C1, -valid_C.to(grad_CV.dtype)[:, None])


def _in_place(distillation: Distillation) -> bool:
    """Whether one softmax serves all parts of the loss, so that its buffer can become the gradient."""
    return len(distillation.targets) == 1 and distillation.temperature == 1


def _distillation(
    float_CV: torch.Tensor,
    other_CV: torch.Tensor | None,
    labels_C: torch.Tensor,
    z_loss: float,
    d: Distillation,
    rows: slice,
    parts: torch.Tensor,
) -> torch.Tensor:
    """Adds the chunk's loss to `parts` and returns its gradient on the logits.

    With z for the logits less their maximum, the gradient on logit j is
        labels:   (a + 2 z_loss log Z) softmax(z)_j - a [j is the label]
        teacher:  b T weight (tail_factor softmax(z / T)_j, or on an entry its head_grad)
    In place the softmax's buffer becomes that; else it gathers in other_CV, and float_CV is the softmax at T.
    """
    valid_C = labels_C != IGNORE
    known_C = valid_C if d.present_N is None else valid_C & d.present_N[rows]
    a_C = torch.where(known_C, d.alpha, valid_C.to(float_CV.dtype))
    b_C = torch.where(known_C, 1.0 - d.alpha, torch.zeros_like(a_C))
    label_C1 = labels_C.clamp(min=0)[:, None]
    max_C = float_CV.amax(-1)
    z_CV = float_CV.sub_(max_C[:, None])
    label_z_C = z_CV.gather(1, label_C1)[:, 0]
    if other_CV is not None:  # the labels' softmax, at T = 1
        grad_CV = torch.exp(z_CV, out=other_CV)
        sum_C = grad_CV.sum(-1)
        grad_CV.mul_((_labels_factor(a_C, valid_C, z_loss, sum_C, max_C) / sum_C)[:, None])
    if d.temperature != 1:
        z_CV.div_(d.temperature)
    entries = [_entries(target, z_CV, known_C, rows, d) for target in d.targets]
    exp_CV = z_CV.exp_()
    divergence_C = torch.zeros_like(max_C)
    for target, (index_CK, z_CK, constant_C, p_CV) in zip(d.targets, entries, strict=True):
        exp_CK = z_CK.exp()
        # With the entries blotted out, the rest is summed without 1 - sum, which has no digits where it is small.
        tail_C = exp_CV.scatter_(1, index_CK, 0.0).sum(-1)
        total_C = tail_C + exp_CK.sum(-1)
        if isinstance(target, SparseTarget):
            paid = _sparse_cost(target, z_CK, tail_C, total_C, rows, d)
        else:
            assert constant_C is not None
            paid = Cost(constant_C + total_C.log(), z_CK, torch.ones_like(total_C))
        divergence_C += target.weight * paid.value_C
        scale_C = b_C * (d.temperature * target.weight)
        factor_C = torch.where(known_C, scale_C * paid.tail_factor_C, 0.0)
        head_CK = torch.where(known_C[:, None], scale_C[:, None] * paid.head_grad_CK, 0.0)
        if other_CV is None:
            sum_C = total_C
            labels_factor_C = _labels_factor(a_C, valid_C, z_loss, sum_C, max_C)
            grad_CV = exp_CV.mul_(((factor_C + labels_factor_C) / sum_C)[:, None])
            grad_CV.scatter_(1, index_CK, exp_CK * (labels_factor_C / sum_C)[:, None] + head_CK)
        else:
            grad_CV.addcmul_(exp_CV, (factor_C / total_C)[:, None])
            grad_CV.scatter_add_(1, index_CK, head_CK)
            exp_CV.scatter_(1, index_CK, exp_CK)  # for the next teacher
        if p_CV is not None:
            grad_CV[:, : p_CV.shape[1]] -= p_CV.mul_(scale_C[:, None])
    grad_CV.scatter_add_(1, label_C1, -a_C[:, None])
    log_sum_C = sum_C.log()
    ce_C = torch.where(valid_C, log_sum_C - label_z_C, 0.0)
    kd_C = torch.where(known_C, d.temperature**2 * divergence_C, 0.0)
    z_C = torch.where(valid_C, z_loss * (log_sum_C + max_C) ** 2, 0.0)
    parts += torch.stack([(a_C * ce_C + b_C * kd_C + z_C).sum(), ce_C.sum(), kd_C.sum()])
    return grad_CV


def _labels_factor(
    a_C: torch.Tensor, valid_C: torch.Tensor, z_loss: float, sum_C: torch.Tensor, max_C: torch.Tensor
) -> torch.Tensor:
    """What softmax(z) is multiplied by in the gradient of the labels' part."""
    return torch.where(valid_C, a_C + 2 * z_loss * (sum_C.log() + max_C), 0.0) if z_loss else a_C


class _Entries(NamedTuple):
    """What a target needs of the logits z / T before they become a softmax."""

    index_CK: torch.Tensor
    z_CK: torch.Tensor
    constant_C: torch.Tensor | None = None  # of a dense target, which has no entries: sum of p (log p - z)
    p_CV: torch.Tensor | None = None


def _entries(
    target: SparseTarget | DenseTarget, z_CV: torch.Tensor, known_C: torch.Tensor, rows: slice, d: Distillation
) -> _Entries:
    if isinstance(target, SparseTarget):
        index_CK = target.index_NK[rows]
        if d.present_N is not None:  # rows that are not known are blank, and entries must be distinct
            anything_K = torch.arange(index_CK.shape[1], device=index_CK.device)
            index_CK = torch.where(known_C[:, None], index_CK, anything_K)
        return _Entries(index_CK, z_CV.gather(1, index_CK))
    # In two buffers: log p, which becomes the terms, and p. A mass of 0 adds 0 of itself, since its logarithm is finite.
    log_p_CV = (target.hidden_NE[rows] @ target.weight_VE.T).to(z_CV.dtype).div_(d.temperature)
    p_CV = log_p_CV.sub_(log_p_CV.amax(1, keepdim=True)).exp()
    sum_C1 = p_CV.sum(1, keepdim=True)
    p_CV.div_(sum_C1)
    terms_CV = log_p_CV.sub_(sum_C1.log()).sub_(z_CV[:, : p_CV.shape[1]]).mul_(p_CV)
    none_C0 = torch.empty(len(z_CV), 0, dtype=torch.int64, device=z_CV.device)
    return _Entries(none_C0, z_CV.gather(1, none_C0), terms_CV.sum(1), p_CV)


def _sparse_cost(
    target: SparseTarget, z_CK: torch.Tensor, tail_C: torch.Tensor, total_C: torch.Tensor, rows: slice, d: Distillation
) -> Cost:
    """tail_C: sum of the softmax's exponentials outside of the entries; total_C: over all."""
    log_q_CK = z_CK - total_C.log()[:, None]
    log_q_tail_C = (tail_C / total_C).clamp(min=torch.finfo(tail_C.dtype).tiny).log()  # it may have underflown to 0
    log_tail_C = None if target.log_tail_N is None else target.log_tail_N[rows].to(z_CK.dtype)
    return cost(d.form, d.divergence, log_q_CK, log_q_tail_C, target.log_p_NK[rows].to(z_CK.dtype), log_tail_C)
