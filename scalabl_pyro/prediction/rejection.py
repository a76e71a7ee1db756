r"""What is gained by leaving out the answers that a score calls uncertain.

With the N examples in the order of their uncertainty, the most certain first, the risk at coverage
k/N is the mean loss of the first k,

.. math:: R_k = \frac{1}{k} \sum_{i \le k} \ell_i, \qquad
    \mathrm{AURC} = \frac{1}{N} \sum_{k=1}^N R_k

(Geifman and El-Yaniv 2017, arXiv 1705.08500; the area of Geifman et al. 2019, arXiv 1805.08206).
Examples of one uncertainty have no order among themselves: each stands for their mean loss, which
is what all their orders give on average.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .calibration import mean_by_value
from .detection import check_scores

__all__ = ["aurc", "prr", "risk_at_coverage", "risk_coverage_curve"]


def risk_coverage_curve(uncertainty: Tensor, losses: Tensor) -> Tensor:
    """(N,) in float64, the mean loss R_k of the k most certain examples, k = 1 … N.

    :param uncertainty: (N,), such as an entropy, or 1 − the largest probability.
    :param losses: (N,), such as whether the answer was wrong.
    :raises ValueError: if the shapes differ, there is no example, or a number is NaN.
    """
    check_scores(uncertainty=uncertainty, losses=losses)
    if not len(losses):
        raise ValueError("there is no example: expected (N,), N of 1 or more")
    expected = mean_by_value(uncertainty, losses.double())[uncertainty.argsort()]
    counts = torch.arange(1, len(losses) + 1, dtype=torch.float64, device=losses.device)
    return expected.cumsum(0) / counts


def aurc(uncertainty: Tensor, losses: Tensor) -> float:
    """Area under the risk-coverage curve: the mean of R_k over k; lower is better.

    :raises ValueError: as :func:`risk_coverage_curve`.
    """
    return float(risk_coverage_curve(uncertainty, losses).mean())


def risk_at_coverage(uncertainty: Tensor, losses: Tensor, coverage: float) -> float:
    """R_k of the k = ⌈coverage · N⌉ most certain examples.

    :param coverage: share of the examples that are answered, above 0, up to 1.
    :raises ValueError: if the coverage is outside (0, 1], or as :func:`risk_coverage_curve`.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}: expected a number above 0, up to 1")
    curve = risk_coverage_curve(uncertainty, losses)
    return float(curve[math.ceil(round(coverage * len(curve), 9)) - 1])


def prr(uncertainty: Tensor, losses: Tensor) -> float:
    r"""Prediction rejection ratio: 1 for the best order there is, 0 for one at random; may be < 0.

    .. math:: \frac{R_N - \mathrm{AURC}}{R_N - \mathrm{AURC}^*}

    AURC* is that of the losses themselves as uncertainty, and R_N, the mean loss, that of a random
    order on average (Malinin et al. 2017, as in lm-polygraph: Fadeeva et al. 2023, arXiv
    2311.07383, where the mean over random orders is simulated).

    :returns: nan where all losses are equal.
    :raises ValueError: as :func:`risk_coverage_curve`.
    """
    curve = risk_coverage_curve(uncertainty, losses)
    best = risk_coverage_curve(losses, losses)
    if losses.min() == losses.max():
        return math.nan
    return float((curve[-1] - curve.mean()) / (best[-1] - best.mean()))
