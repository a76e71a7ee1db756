"""The factor on scores that makes their probabilities the best: κ, or one over a temperature."""

from __future__ import annotations

import logging
import math

from torch import Tensor

__all__ = ["fit_kappa"]

log = logging.getLogger(__name__)


def fit_kappa(scores: Tensor, labels: Tensor) -> float:
    r"""The factor with the lowest NLL.

    .. math:: \arg\min_κ -\frac{1}{N} \sum_n \log \mathrm{softmax}(κ \, f_n)_{y_n}

    This is convex in κ. The answer is kept between 0.1 and 100 over the scores' mean standard
    deviation within a question: with less, nothing would reach what is trained, and where every
    answer is right there is no best one. At the upper bound a warning says so.

    :param scores: (N, C), −inf where a choice does not exist.
    :param labels: (N,).
    """
    missing = scores.isinf()
    f = scores.double().masked_fill(missing, 0.0)
    count = (~missing).sum(-1, keepdim=True)
    centred = (f - f.sum(-1, keepdim=True) / count).masked_fill(missing, 0.0)
    spread = float((centred.square().sum(-1) / count[:, 0]).sqrt().mean())
    if not spread:
        return 1.0
    low, high = 0.1 / spread, 100 / spread
    for _ in range(60):
        middle = (low * high) ** 0.5
        p = (middle * centred).masked_fill(missing, float("-inf")).softmax(-1)
        slope = (p * centred).sum(-1) - centred.gather(-1, labels[:, None])[:, 0]
        low, high = (low, middle) if slope.mean() > 0 else (middle, high)
    kappa = (low * high) ** 0.5
    # Scores that say nothing make nearly a guess, as they should; certainty is a mistake.
    for bound, what, level in (
        (0.1 / spread, "a guess", logging.INFO),
        (100 / spread, "certainty", logging.WARNING),
    ):
        if math.isclose(kappa, bound, rel_tol=1e-6):
            log.log(
                level,
                "of %d labelled examples the best probabilities are %s: their scores are multiplied"
                " by %.3g, the bound, which says little about others; give more examples",
                len(labels),
                what,
                kappa,
            )
    return kappa
