"""From a teacher's logits to what is kept of them: the likeliest k with the exact rest, or an unbiased sample of k.

Owns the choice and its exact masses; how they are stored is codec.py's, what a loss makes of them divergence.py's.

    entries = top_k(logits_CV, labels_C, k=64, temperatures=(1.0, 2.0))

`C` tokens, `V` vocabulary, `P` planes (1 for top_k; one per temperature for a sample), `K` entries, `T` temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slm.losses import IGNORE


@dataclass(frozen=True)
class Entries:
    """log_p_CPK: top_k: log-probabilities at T = 1, falling; sample: of the exact heads at the plane's temperature, and of
    the drawn ones anything (their mass is one number, of which log_tail_CT has the logarithm for all of them).
    log_tail_CT: log of the mass outside of the entries (sample: of the exact heads) at each temperature.
    """

    index_CPK: torch.Tensor  # int64, distinct in a row
    log_p_CPK: torch.Tensor
    log_tail_CT: torch.Tensor
    heads_CP: torch.Tensor | None  # int64, number of exact heads of a sample
    label_log_p_C: torch.Tensor  # at T = 1; 0 where there is no label
    entropy_C: torch.Tensor  # at T = 1, nats


@torch.no_grad()
def top_k(logits_CV: torch.Tensor, labels_C: torch.Tensor, k: int, temperatures: Sequence[float]) -> Entries:
    """The likeliest k, k <= V. The rest is summed as such: 1 - sum would have no digits where it is small."""
    log_p_CV = logits_CV.float().log_softmax(1)
    head_CK, index_CK = log_p_CV.topk(k, dim=1)
    tails = []
    for temperature in temperatures:
        scaled_CV = log_p_CV / temperature
        total_C = scaled_CV.logsumexp(1)
        tails.append(scaled_CV.scatter_(1, index_CK, -torch.inf).logsumexp(1) - total_C)
    return Entries(index_CK[:, None], head_CK[:, None], torch.stack(tails, 1), None, *_of_tokens(log_p_CV, labels_C))


@torch.no_grad()
def sample(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    k: int,
    temperatures: Sequence[float],
    uniform_CT: torch.Tensor,
    order_V: torch.Tensor,
) -> Entries:
    """Exactly k distinct tokens whose weights are the teacher's probabilities on the average (systematic sampling with
    probability proportional to size: Madow, 1949; the threshold minimises the sum of variances for k entries).

    The m likeliest are kept as they are, m the least with p_(m+1) <= tau = (mass of the rest) / (k - m); of the others,
    k - m are drawn with probability p / tau and weigh tau each. uniform_CT: in [0, 1), where the walk along order_V (a
    permutation of the vocabulary) starts. The probabilities are exact for every order; which tokens are drawn together
    is not random beyond it, and need not be.
    """
    log_p_CV = logits_CV.float().log_softmax(1)
    planes = [
        _sample_one((log_p_CV / temperature).log_softmax(1), k, uniform_CT[:, i], order_V)
        for i, temperature in enumerate(temperatures)
    ]
    index, log_p, log_tail, heads = (torch.stack(parts, 1) for parts in zip(*planes, strict=True))
    return Entries(index, log_p, log_tail, heads, *_of_tokens(log_p_CV, labels_C))


def _of_tokens(log_p_CV: torch.Tensor, labels_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    label_C = log_p_CV.gather(1, labels_C.clamp(min=0)[:, None])[:, 0]
    entropy_C = -torch.where(log_p_CV > -torch.inf, log_p_CV.exp() * log_p_CV, 0.0).sum(1)
    return torch.where(labels_C != IGNORE, label_C, 0.0), entropy_C


def _sample_one(
    log_p_CV: torch.Tensor, k: int, uniform_C: torch.Tensor, order_V: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index_CK, log_p_CK, log_tail_C, heads_C) at one temperature, whose log-probabilities are given."""
    p_CV = log_p_CV.double().exp()
    p_CV /= p_CV.sum(1, keepdim=True)  # of float32 logarithms, the sum is 1 to 7 digits only
    head_CK, likeliest_CK = p_CV.topk(k, dim=1)
    beyond_C = p_CV.scatter(1, likeliest_CK, 0.0).sum(1)
    # rest_CK[:, m]: the mass without the m likeliest, from its own terms.
    rest_CK = head_CK.flip(1).cumsum(1).flip(1) + beyond_C[:, None]
    tau_CK = rest_CK / torch.arange(k, 0, -1, device=p_CV.device)
    heads_C = (head_CK <= tau_CK).int().argmax(1)  # true at k - 1 at the latest
    rest_C, tau_C = (x.gather(1, heads_C[:, None])[:, 0] for x in (rest_CK, tau_CK))
    places_K = torch.arange(k, device=p_CV.device)
    is_head_CK = places_K < heads_C[:, None]
    # The probability of each other token to be drawn, one after the other along the order; they add up to k - m.
    others_CV = p_CV.scatter_(1, likeliest_CK, torch.where(is_head_CK, 0.0, head_CK))[:, order_V]
    walk_CV = others_CV.div_(tau_CK.new_tensor(1.0) * tau_C.clamp(min=torch.finfo(torch.float64).tiny)[:, None])
    walk_CV = walk_CV.clamp_(max=1.0).cumsum_(1)
    drawn_C = k - heads_C
    walk_CV *= (drawn_C / walk_CV[:, -1].clamp(min=torch.finfo(torch.float64).tiny))[:, None]
    steps_CK = (places_K - heads_C[:, None] + uniform_C[:, None]).clamp(min=0.0)
    at_CK = torch.searchsorted(walk_CV, steps_CK, right=True).clamp(max=walk_CV.shape[1] - 1)
    index_CK = torch.where(is_head_CK, likeliest_CK, order_V[at_CK])
    # Nothing outside of the heads: the places are filled with the next likeliest, which weigh nothing.
    index_CK = torch.where((rest_C > 0)[:, None], index_CK, likeliest_CK)
    log_p_CK = torch.where(is_head_CK, head_CK.log(), 0.0)
    return index_CK, log_p_CK.float(), rest_C.log().float(), heads_C
