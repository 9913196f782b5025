"""What a student pays for being unlike its teacher on k entries and one bucket for the rest: values and gradients.

Owns the closed forms (design 4.5), by row and without a vocabulary; slm/losses.py applies them to chunks of logits.

With q = softmax(logits / T) of the student, g_b = d value / d q_b over the k + 1 buckets, and the shape within the bucket free,
the gradient on logit j (over T) is q_j (g_b(j) - sum_b q_b g_b). Within the bucket that is `tail_factor` * q_j.

`C` rows, `K` entries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

FORMS = ("bucket", "sampled", "raw", "renormalised", "both_renormalised")
DIVERGENCES = ("forward", "reverse", "jsd")
# Of a bucket, where a divergence needs its logarithm: the reverse one is infinite where the teacher has no mass and the
# student has some. The forward one needs no such floor: rho log rho is 0 there, and must not be raised.
_LEAST_LOG = -80.0


class Cost(NamedTuple):
    value_C: torch.Tensor
    head_grad_CK: torch.Tensor  # on the logits of the entries, over T
    tail_factor_C: torch.Tensor  # times q_j, on each other logit, over T


def cost(
    form: str,
    divergence: str,
    log_q_CK: torch.Tensor,
    log_q_tail_C: torch.Tensor,
    log_p_CK: torch.Tensor,
    log_p_tail_C: torch.Tensor | None,
) -> Cost:
    """log_q: the student's log-probabilities on the entries and outside of them; log_p: the target's (None: no tail)."""
    if form == "bucket":
        assert log_p_tail_C is not None
        if divergence == "forward":
            return _forward(log_q_CK, log_q_tail_C, log_p_CK, log_p_tail_C)
        return _general(divergence, log_q_CK, log_q_tail_C, log_p_CK, log_p_tail_C)
    if divergence != "forward":
        raise ValueError(f"{divergence} is not linear in the teacher: it is right on buckets only, not on {form}")
    q_CK = log_q_CK.exp()
    if form == "both_renormalised":  # for comparison in benchmarks: a recipe cannot ask for it
        log_q_in_CK, log_t_CK = log_q_CK.log_softmax(1), log_p_CK.log_softmax(1)
        value_C = _weighted(log_t_CK.exp(), log_t_CK - log_q_in_CK)
        return Cost(value_C, log_q_in_CK.exp() - log_t_CK.exp(), torch.zeros_like(value_C))
    log_t_CK = log_p_CK.log_softmax(1) if form == "renormalised" else log_p_CK
    t_CK = log_t_CK.exp()
    mass_C = t_CK.sum(1)
    # A sample's own entropy is not the teacher's: only the cross-entropy is right on the average.
    value_C = _weighted(t_CK, -log_q_CK if form == "sampled" else log_t_CK - log_q_CK)
    return Cost(value_C, mass_C[:, None] * q_CK - t_CK, mass_C)


def _weighted(t_CK: torch.Tensor, terms_CK: torch.Tensor) -> torch.Tensor:
    """Sum of t * terms, where 0 * infinity is 0."""
    return torch.where(t_CK > 0, t_CK * terms_CK, 0.0).sum(1)


def _forward(
    log_q_CK: torch.Tensor, log_q_tail_C: torch.Tensor, log_p_CK: torch.Tensor, log_p_tail_C: torch.Tensor
) -> Cost:
    p_CK, rho_C = log_p_CK.exp(), log_p_tail_C.exp()
    tail_C = torch.where(rho_C > 0, rho_C * (log_p_tail_C - log_q_tail_C), 0.0)
    value_C = _weighted(p_CK, log_p_CK - log_q_CK) + tail_C
    # q_j - rho q_j / (1 - Q): the sum over the tail is (1 - Q) - rho, whatever the size of 1 - Q.
    # Clamped short of infinity, which times the 0 of an underflown tail would be no number; 1e-3 is room for T and alpha.
    ratio_C = (log_p_tail_C - log_q_tail_C).exp().clamp(max=1e-3 * torch.finfo(rho_C.dtype).max)
    factor_C = torch.where(rho_C > 0, 1 - ratio_C, 1.0)
    return Cost(value_C, log_q_CK.exp() - p_CK, factor_C)


def _general(
    divergence: str,
    log_q_CK: torch.Tensor,
    log_q_tail_C: torch.Tensor,
    log_p_CK: torch.Tensor,
    log_p_tail_C: torch.Tensor,
) -> Cost:
    log_q_CB = torch.cat([log_q_CK, log_q_tail_C[:, None]], 1)
    log_p_CB = torch.cat([log_p_CK, log_p_tail_C[:, None]], 1)
    q_CB = log_q_CB.exp()
    if divergence == "reverse":
        g_CB = log_q_CB.clamp(min=_LEAST_LOG) - log_p_CB.clamp(min=_LEAST_LOG)
        value_C = _weighted(q_CB, g_CB)
    else:  # Jensen-Shannon: half of KL(p, m) and half of KL(q, m), m the mean of both
        log_m_CB = torch.logaddexp(log_q_CB, log_p_CB) - math.log(2)
        g_CB = 0.5 * (log_q_CB - log_m_CB).clamp(min=_LEAST_LOG)
        value_C = _weighted(q_CB, g_CB) + 0.5 * _weighted(log_p_CB.exp(), log_p_CB - log_m_CB)
    centred_CB = g_CB - (q_CB * g_CB).sum(1, keepdim=True)
    return Cost(value_C, (q_CB * centred_CB)[:, :-1], centred_CB[:, -1])
