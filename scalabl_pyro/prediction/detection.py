"""How well a score finds the positive examples, such as wrong answers or unfamiliar inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor

__all__ = ["aupr", "auroc", "auroc_at_equal_length", "check_scores", "counts_above", "fpr_at_tpr"]


def auroc(scores: Tensor, positive: Tensor) -> float:
    r"""Area under the ROC curve of a score for telling the positive examples, ties at one half.

    The share of pairs of a positive and a negative example in which the positive one scores higher,
    from the sum R₊ of the ranks of the n₊ positive ones (Mann and Whitney 1947):

    .. math:: \frac{R_+ - n_+ (n_+ + 1) / 2}{n_+ n_-}

    :param scores: (N,), such as :func:`entropy`; of any sign, as only their order counts.
    :param positive: (N,), such as whether the answer was wrong.
    :returns: in [0, 1], and nan where all examples are positive, or none is.
    :raises ValueError: if the shapes differ, or a score is no number.
    """
    check_scores(scores=scores, positive=positive)
    held = positive.cpu().numpy().astype(bool)
    count = int(held.sum())
    pairs = count * (len(held) - count)
    if not pairs:
        return math.nan
    ranks = stats.rankdata(scores.detach().cpu().double().numpy())
    return float((ranks[held].sum() - count * (count + 1) / 2) / pairs)


def auroc_at_equal_length(
    scores: Tensor, positive: Tensor, lengths: Tensor | Sequence[int], *, apart: int = 2
) -> float:
    r"""The :func:`auroc` over the pairs whose lengths are about equal, which length cannot explain.

    .. math:: \frac{\sum_{i, j} w_{ij} \big([u_i > u_j] + \tfrac{1}{2} [u_i = u_j]\big)}
              {\sum_{i, j} w_{ij}}, \qquad w_{ij} = [\, |l_i - l_j| ≤ \mathrm{apart} \,]

    over positive i and negative j. Every example takes part that has a partner.

    :param scores: u, (N,).
    :param positive: (N,).
    :param lengths: l, (N,), such as ``split.lengths``, in tokens.
    :param apart: the largest difference between two lengths.
    :returns: in [0, 1], and nan where there is no such pair.
    :raises ValueError: if the shapes differ, or a score is no number.
    """
    lengths = torch.as_tensor(lengths)
    check_scores(scores=scores, positive=positive, lengths=lengths)
    above, pairs = 0.0, 0
    others, their_lengths = scores[~positive.bool()], lengths[~positive.bool()]
    for score, length in zip(scores[positive.bool()], lengths[positive.bool()], strict=True):
        near = others[(their_lengths - length).abs() <= apart]
        above += float((score > near).sum()) + 0.5 * float((score == near).sum())
        pairs += len(near)
    return above / pairs if pairs else math.nan


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
    check_scores(scores=scores, positive=positive)
    levels, place = scores.unique(return_inverse=True)  # from the lowest up
    held = positive.to(scores.device).bool()
    counts = (torch.bincount(place[members], minlength=len(levels)) for members in (held, ~held))
    hits, false = (count.double().flip(0).cumsum(0) for count in counts)
    return hits, false


def check_scores(**values: Tensor) -> None:
    """:raises ValueError: if they are not (N,) each, or one of them holds NaN."""
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        said = ", ".join(f"{name} has shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"{said}: expected (N,) each")
    for name, value in values.items():
        if value.isnan().any():
            raise ValueError(
                f"{name} holds nan at {int(value.isnan().nonzero()[0])}: expected numbers"
            )
