"""Cross-entropy from hidden states and the head's weight, in chunks: the logits of a whole batch never exist.

Owns the language-model loss and its gradient; the caller divides by the number of targets (design 4.6).

    loss_sum, count = linear_cross_entropy(hidden_NE, weight_VE, labels_N, z_loss=1e-4)

The gradient is computed in the forward pass, chunk by chunk (logits once, not twice), and scaled in the
backward by whatever the caller did to the sum. Extra memory: one chunk of logits, one copy of the weight's
gradient, one of the hidden states': it does not grow with tokens x vocabulary.
`N` tokens, `C` tokens of a chunk, `E` hidden, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

IGNORE = -100  # label of a position that has no target

# Elements of one chunk of logits. Large enough for full-speed matrix products, small beside the activations: 80 MiB in
# float32 on a CPU, 768 MiB of bfloat16 and float32 together on a GPU.
_CHUNK_ELEMENTS = {"cpu": 5 << 22, "cuda": 1 << 27}


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens per chunk: a multiple of 64, at least 64."""
    return max(64, _CHUNK_ELEMENTS[device_type] // vocab_size // 64 * 64)


def linear_cross_entropy(
    hidden_NE: torch.Tensor, weight_VE: torch.Tensor, labels_N: torch.Tensor, *, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over targets of -log p(label) + z_loss * log(Z)^2, and the number of targets.

    Returns (float32 scalar, int64 scalar). Labels of -100 have no target. z-loss: PaLM, arXiv 2204.02311, section 5.
    """
    count = (labels_N != IGNORE).sum()
    return _LinearCrossEntropy.apply(hidden_NE, weight_VE, labels_N, z_loss), count


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


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NE: torch.Tensor, weight_VE: torch.Tensor, labels_N: torch.Tensor, z_loss: float
    ) -> torch.Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden_NE = torch.empty_like(hidden_NE) if need_hidden else None
        # Chunks add up in float32 also when the weight is bfloat16, as one big product would inside the kernel.
        grad_weight_VE = torch.zeros_like(weight_VE, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_NE.device)
        chunk = chunk_tokens(weight_VE.shape[0], hidden_NE.device.type)
        # One buffer for all chunks: on a CPU, fresh memory costs as much as the passes over it.
        buffer_CV = hidden_NE.new_empty(min(chunk, labels_N.numel()), weight_VE.shape[0])
        for start in range(0, labels_N.numel(), chunk):
            rows = slice(start, start + chunk)
            hidden_CE, labels_C = hidden_NE[rows], labels_N[rows]
            valid_C = labels_C != IGNORE
            target_C1 = labels_C.clamp(min=0)[:, None]
            logits_CV = torch.mm(hidden_CE, weight_VE.T, out=buffer_CV[: labels_C.numel()])
            float_CV = logits_CV.float()  # float32: logits_CV itself
            target_C = float_CV.gather(1, target_C1)[:, 0]
            max_C = float_CV.amax(-1)
            exp_CV = float_CV.sub_(max_C[:, None]).exp_()
            sum_C = exp_CV.sum(-1)
            log_z_C = sum_C.log() + max_C
            losses_C = log_z_C - target_C + z_loss * log_z_C**2
            total += torch.where(valid_C, losses_C, 0.0).sum()
            if not (need_hidden or need_weight):
                continue
            # d loss / d logits = softmax * (1 + 2 z log Z) - onehot, and 0 where there is no target.
            grad_CV = exp_CV.mul_(torch.where(valid_C, (1 + 2 * z_loss * log_z_C) / sum_C, 0.0)[:, None])
            grad_CV.scatter_add_(1, target_C1, -valid_C.float()[:, None])
            if grad_CV is not logits_CV:
                grad_CV = logits_CV.copy_(grad_CV)  # in half precision: rounded into the buffer
            if grad_hidden_NE is not None:
                torch.mm(grad_CV, weight_VE, out=grad_hidden_NE[rows])
            if grad_weight_VE is not None:
                if weight_VE.dtype == torch.float32:
                    grad_weight_VE.addmm_(grad_CV.T, hidden_CE)
                else:
                    grad_weight_VE += grad_CV.T @ hidden_CE
        # Not by save_for_backward: what that keeps, autograd copies before it becomes a parameter's gradient.
        ctx.gradients = grad_hidden_NE, grad_weight_VE
        ctx.weight_dtype = weight_VE.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("backward a second time through linear_cross_entropy, whose gradients are used up")
        grad_hidden_NE, grad_weight_VE = ctx.gradients
        ctx.gradients = None
        if grad_hidden_NE is not None:
            # In float32 also when they are bfloat16: the factor, 1 / targets, would itself be rounded.
            grad_hidden_NE = grad_hidden_NE.float().mul_(grad).to(grad_hidden_NE.dtype)
        if grad_weight_VE is not None:
            grad_weight_VE = grad_weight_VE.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden_NE, grad_weight_VE, None, None
