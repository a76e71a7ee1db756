r"""Sets of choices that hold the right one with a chosen probability: split conformal prediction.

A score s(x, y) says how badly choice y suits question x. With the scores of n labelled examples
that trained nothing, s_(1) ≤ … ≤ s_(n), the set of a new question is

.. math:: \{y : s(x, y) \le s_{(k)}\}, \qquad k = \lceil (n + 1)(1 - \alpha) \rceil

If the new question is exchangeable with the n, the set holds the right choice with probability at
least 1 − α, and at most 1 − α + 1/(n + 1) where no two scores are equal (Vovk, Gammerman and Shafer
2005; Lei et al. 2018, arXiv 1604.04173). That is an average over the n examples and the new one:
given the n, the coverage of new questions is a draw of Beta(k, n + 1 − k). It is neither a promise
for each kind of question, nor does it say that a small set is right.

Scores take log-probabilities (N, C) of the model average, −∞ where a choice does not exist, and
numbers u (N,) in [0, 1), and return (N, C) in float64: +∞ where a choice does not exist, so that
it is in no set. A set may be empty: then all choices suit the question worse than usual.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from .calibration import check_labels

__all__ = [
    "CONFORMAL_SCORES",
    "aps",
    "conformal_sets",
    "conformal_threshold",
    "lac",
    "raps",
    "uniform_of",
]


def lac(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """1 − p_y: the smallest sets on average (Sadinle, Lei and Wasserman 2019); it uses no u."""
    return _missing(-torch.special.expm1(log_probs.double()), log_probs)


def aps(log_probs: Tensor, uniform: Tensor) -> Tensor:
    r"""The mass of the more probable choices and a share u of one's own (Romano, Sesia and Candès
    2020, arXiv 2006.02544), whose sets grow where a question is hard.

    .. math:: \sum_{c:\, p_c > p_y} p_c + u \, p_y

    Of equal probabilities the earlier choice counts as the more probable one.
    """
    probs, order = log_probs.double().exp().sort(dim=-1, descending=True, stable=True)
    ranked = probs.cumsum(-1) - probs * (1 - uniform.to(probs))[:, None]
    return _missing(torch.zeros_like(probs).scatter(-1, order, ranked), log_probs)


def raps(log_probs: Tensor, uniform: Tensor, *, penalty: float = 0.1, free: int = 1) -> Tensor:
    r"""APS with a penalty on choices of a low rank, which makes large sets rare (Angelopoulos et
    al. 2021, arXiv 2009.14193).

    .. math:: \mathrm{aps}_y + λ \, \max(0, \mathrm{rank}_y - k)

    :param penalty: λ ≥ 0.
    :param free: k, so many of the most probable choices pay none.
    """
    order = log_probs.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1) + 1  # 1 for the most probable choice
    return aps(log_probs, uniform) + penalty * (rank - free).clamp(min=0)


#: scores by name: functions of log-probabilities (N, C) and of u (N,) that return (N, C)
CONFORMAL_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "aps": aps,
    "lac": lac,
    "raps": raps,
}


def conformal_threshold(scores: Tensor, labels: Tensor, coverage: float) -> float:
    """s_(k) of the n scores of the right choices, k = ⌈(n + 1) · coverage⌉.

    :param scores: (n, C), what a score gives for examples that trained nothing.
    :param labels: (n,).
    :param coverage: 1 − α, between 0 and 1.
    :raises ValueError: if the coverage is outside (0, 1), a label names no choice, or n is so small
        that k would exceed it: then only the set of all choices has this coverage.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage is {coverage}: expected a number between 0 and 1")
    check_labels(scores, labels)
    n = len(labels)
    share = Fraction(str(coverage))  # in decimals: 0.07 · 100 is 7, and not a little more
    k = math.ceil((n + 1) * share)
    if k > n:
        raise ValueError(
            f"coverage is {coverage}, which takes {math.ceil(share / (1 - share))} labelled"
            f" examples or more, and there are {n}: give more, or ask for a lower coverage"
        )
    right = scores.gather(-1, labels[:, None])[:, 0]
    if right.isinf().any():
        row = int(right.isinf().nonzero()[0])
        raise ValueError(
            f"labels holds {int(labels[row])} at {row}, where that choice does not exist: expected"
            " labels among the choices"
        )
    return float(right.sort().values[k - 1])


def conformal_sets(scores: Tensor, threshold: float) -> Tensor:
    """(N, C), whether a choice is in the set: its score is at most the threshold."""
    return scores <= threshold


def uniform_of(names: Sequence[str], *, seed: int = 0) -> Tensor:
    """(N,) in [0, 1), a number u for each name, always the same one.

    So the set of a record depends neither on the records beside it nor on the time of the call.
    """
    return torch.tensor(
        [random.Random(f"{seed} {name}").random() for name in names], dtype=torch.float64
    )


def _missing(scores: Tensor, log_probs: Tensor) -> Tensor:
    if log_probs.dim() != 2 or log_probs.isnan().any() or (log_probs > 0).any():
        raise ValueError(
            f"log_probs has shape {tuple(log_probs.shape)} and values up to"
            f" {float(log_probs.max())}: expected log-probabilities (N, C), as average gives them"
        )
    return scores.masked_fill(log_probs.isneginf(), math.inf)
