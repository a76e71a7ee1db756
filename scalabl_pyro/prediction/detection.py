"""How well a score finds the positive examples: what :func:`~scalabl_pyro.prediction.auroc` leaves
out where positives are rare or most of them must be found."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["aupr", "counts_above", "fpr_at_tpr"]


def aupr(scores: Tensor, positive: Tensor) -> float:
    r"""Area under the precision-recall curve, as the average precision (no interpolation).

    .. math:: \sum_t (R_t - R_{t-1}) \, P_t

    over the different scores t from the highest down, where P_t and R_t are precision and recall of
    "score ≥ t". A score at random has the share of positive examples.

    :param scores: (N,), high for positive examples.
    :param positive: (N,), such as whether the answer was wrong.
    :returns: in [0, 1], and nan where no example is positive.
    :raises ValueError: if the shapes differ, or a score is no number.
    """
    hits, false = counts_above(scores, positive)
    if not len(hits) or not hits[-1]:
        return math.nan
    gained = hits.diff(prepend=hits.new_zeros(1)) / hits[-1]
    return float((gained * hits / (hits + false)).sum())


def fpr_at_tpr(scores: Tensor, positive: Tensor, tpr: float = 0.95) -> float:
    """Share of negative examples that are called positive where a share of the positive ones is.

    The threshold is the highest score at which at least ``tpr`` of the positive examples are found;
    FPR95 is that of 0.95 (Hendrycks and Gimpel 2017, arXiv 1610.02136, and what followed it).

    :param scores: (N,), high for positive examples.
    :param positive: (N,), such as whether the answer was wrong.
    :param tpr: above 0, up to 1.
    :returns: in [0, 1], and nan where all examples are positive, or none is.
    :raises ValueError: if the shapes differ, a score is NaN, or ``tpr`` is outside (0, 1].
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr is {tpr}: expected a number above 0, up to 1")
    hits, false = counts_above(scores, positive)
    if not len(hits) or not hits[-1] or not false[-1]:
        return math.nan
    reached = hits / hits[-1] >= tpr
    return float((false / false[-1])[int(reached.int().argmax())])


def counts_above(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Positive and negative examples at each different score or above, from the highest down."""
    if scores.dim() != 1 or scores.shape != positive.shape:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)} and positive {tuple(positive.shape)}: expected"
            " (N,) for both"
        )
    if scores.isnan().any():
        raise ValueError(
            f"scores holds nan at {int(scores.isnan().nonzero()[0])}: expected numbers"
        )
    levels, place = scores.unique(return_inverse=True)  # from the lowest up
    held = positive.to(scores.device).bool()
    counts = (torch.bincount(place[members], minlength=len(levels)) for members in (held, ~held))
    hits, false = (count.double().flip(0).cumsum(0) for count in counts)
    return hits, false
