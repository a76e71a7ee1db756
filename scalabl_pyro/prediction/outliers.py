r"""How unusual a question's score is among questions that trained nothing: conformal p-values.

.. math:: p = \frac{1 + \#\{k : u_k \ge u\}}{n + 1}

with the scores u_1 … u_n of n such questions, high for what is unlike the training data, and u that
of a new one (Vovk, Gammerman and Shafer 2005; for outliers Bates et al. 2023, arXiv 2104.08279). If
the new question is exchangeable with the n, P(p ≤ α) ≤ α for every α: so many familiar questions
are called unfamiliar, on average over the n, whatever the score is. How many of the unfamiliar ones
are found depends on the score.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["conformal_p_values"]


def conformal_p_values(known: Tensor, scores: Tensor) -> Tensor:
    """p, (N,) in [1/(n + 1), 1], in float64; nan where a score is.

    :param known: (n,), scores of questions that trained nothing.
    :param scores: (N,), high is unfamiliar.
    :raises ValueError: if a known score is nan, there is none, or the shapes do not fit.
    """
    if known.dim() != 1 or not len(known) or scores.dim() != 1 or known.isnan().any():
        raise ValueError(
            f"known has shape {tuple(known.shape)}, {int(known.isnan().sum())} of them nan, and"
            f" scores {tuple(scores.shape)}: expected numbers (n,), n of 1 or more, and (N,)"
        )
    sorted_known = known.double().sort().values
    below = torch.searchsorted(sorted_known, scores.double())  # strictly, so that ties count
    p = (1 + len(known) - below).double() / (len(known) + 1)
    return p.masked_fill(scores.isnan(), torch.nan)
