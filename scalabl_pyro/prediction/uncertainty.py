"""Scores of how uncertain an answer is, from logits (S, N, C) of S draws or from features."""

from __future__ import annotations

import torch
from torch import Tensor

from .metrics import average

__all__ = ["max_probability", "noise_to_signal"]


def max_probability(logits: Tensor) -> Tensor:
    """max_c p̄_c of the model average, in [1/C, 1], (N,) from (S, N, C): low is uncertain."""
    return average(logits).exp().amax(-1)


def noise_to_signal(logits: Tensor) -> Tensor:
    r"""How far the draws disagree about the contrasts between choices, over the contrasts
    themselves, ≥ 0, (N,) from (S, N, C): high is uncertain.

    .. math:: \frac{\mathrm{tr}(P Σ_f P)}{\| P \bar f \|^2}, \qquad P = I - \tfrac{1}{C} 1 1^⊤

    with the mean f̄ and the covariance Σ_f of the logits over the draws; P takes the mean over the
    choices that exist away, on which no probability depends. Unlike mutual information it does not
    grow with the contrasts: multiplying all logits by a number leaves it as it is.

    :returns: 0 for one draw, and where there is one choice; inf where f̄ is the same for all choices.
    :raises ValueError: as :func:`average`.
    """
    average(logits)
    missing = logits.isinf()
    f = logits.double().masked_fill(missing, 0.0)
    f = (f - f.sum(-1, keepdim=True) / (~missing).sum(-1, keepdim=True)).masked_fill(missing, 0.0)
    if len(f) == 1:
        return torch.zeros_like(f[0, :, 0]).to(logits)
    noise = f.var(0).sum(-1)
    found = noise / f.mean(0).square().sum(-1)
    return torch.where(noise == 0, 0.0, found).to(logits)
