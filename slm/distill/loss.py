"""Distillation with the teacher's logits in memory: alpha * CE + (1 - alpha) * T^2 * KL(teacher || student).

Owns the loss over whole logits, meant for small vocabularies and notebooks, and made to be subclassed.

    loss = DistillationLoss(alpha=0.5, temperature=3.0)(student_logits, teacher_logits, labels)

`B` sequences, `T` tokens, `V` vocabulary. Source: Hinton et al., arXiv 1503.02531; T^2 keeps the gradient's size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from slm.errors import UserError
from slm.losses import IGNORE


class DistillationLoss(nn.Module):
    """`alpha` weighs the hard labels, 1 - alpha the teacher. A subclass may replace `forward` altogether."""

    def __init__(self, alpha: float = 0.5, temperature: float = 3.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(
                f"distillation alpha is {alpha}: it weighs the labels against the teacher", fix="give 0 to 1"
            )
        if temperature <= 0:
            raise UserError(
                f"distillation temperature is {temperature}: logits are divided by it", fix="give more than 0"
            )
        self.alpha, self.temperature = alpha, temperature

    def forward(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over the positions that have a label. Logits [B, T, V]; labels [B, T]: the NEXT token, -100 for none.

        Tokens that only the student has (a larger vocabulary) have probability 0 for the teacher.
        """
        valid = labels != IGNORE
        student_NV, teacher_NV, labels_N = student_logits[valid].float(), teacher_logits[valid].float(), labels[valid]
        if labels_N.numel() == 0:
            return student_logits.sum() * 0.0
        hard = F.cross_entropy(student_NV, labels_N)
        extra = student_NV.shape[1] - teacher_NV.shape[1]
        if extra < 0:
            raise UserError(
                f"the teacher has {teacher_NV.shape[1]} tokens, the student {student_NV.shape[1]}: they do not share a "
                "tokenizer, so their probabilities cannot be compared",
                fix="use a student with the teacher's tokenizer and vocabulary",
            )
        teacher_NV = F.pad(teacher_NV, (0, extra), value=-torch.inf)
        log_q_NV = F.log_softmax(student_NV / self.temperature, dim=-1)
        log_p_NV = F.log_softmax(teacher_NV / self.temperature, dim=-1)
        p_NV = log_p_NV.exp()
        terms_NV = torch.where(p_NV > 0, p_NV * (log_p_NV - log_q_NV), 0.0)
        soft = terms_NV.sum(-1).mean() * self.temperature**2
        return self.alpha * hard + (1 - self.alpha) * soft
