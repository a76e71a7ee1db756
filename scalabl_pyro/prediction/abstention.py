"""Which answers to give: those whose largest probability reaches a threshold.

The rule, and a threshold from validation data: El-Yaniv and Wiener 2010, Geifman and El-Yaniv 2017
(arXiv 1705.08500), who also give a bound where this gives an estimate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.stats import binomtest
from torch import Tensor

from .calibration import check_labels, check_probabilities
from .detection import counts_above

__all__ = ["AbstentionThreshold", "abstains", "threshold_at_risk"]


class AbstentionThreshold(NamedTuple):
    """A threshold on the largest probability, and what it did where it was chosen.

    :param abstain_below: in [0, 1]; answers below it are not given.
    :param coverage: the share of the examples that were answered.
    :param risk: the share of these answers that were wrong.
    :param risk_up_to: the largest error rate that so many errors in so many answers leave possible:
        the 95 % upper confidence limit of Clopper and Pearson 1934. It holds for a threshold that
        is given beforehand, and so is a little low for one that was chosen here.
    """

    abstain_below: float
    coverage: float
    risk: float
    risk_up_to: float


def abstains(probabilities: Tensor, abstain_below: float) -> Tensor:
    """(N,), whether max_c p_c < ``abstain_below``.

    :param probabilities: (N, C).
    :raises ValueError: if a row is no distribution, or the threshold is outside [0, 1].
    """
    if not 0 <= abstain_below <= 1:
        raise ValueError(f"abstain_below is {abstain_below}: expected a probability, 0 to 1")
    confidence = check_probabilities(probabilities).amax(-1)
    # In the confidences' own type, so that what is 0.7 there is not below 0.7.
    return confidence < torch.tensor(abstain_below, dtype=confidence.dtype)


def threshold_at_risk(probabilities: Tensor, labels: Tensor, risk: float) -> AbstentionThreshold:
    """The threshold that answers the most examples with a share of errors of at most ``risk``.

    The share is a plug-in estimate, not a bound: of all thresholds, the one is taken that just
    passes on these examples, so that new examples have more errors than it says, on average. The
    fewer examples are answered here, the more.

    :param probabilities: (N, C), of examples that trained nothing.
    :param labels: (N,).
    :param risk: the largest share of errors among the answers, from 0 to 1.
    :raises ValueError: if ``risk`` is outside [0, 1], a row is no distribution, a label is no
        class, or every threshold has more errors.
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"risk is {risk}: expected a share of errors, 0 to 1")
    check_labels(probabilities, labels)
    confidence, answer = check_probabilities(probabilities).max(-1)
    wrong, right = counts_above(confidence, answer != labels)
    errors = wrong / (wrong + right)  # of each different confidence, from the highest down
    passing = (errors <= risk).nonzero()
    if not len(passing):
        best = int(errors.argmin())
        raise ValueError(
            f"risk is {risk}, and no threshold on the largest probability has so few errors among"
            f" {len(labels)} examples: the lowest share is {float(errors[best]):.3g}, of"
            f" {int(wrong[best] + right[best])} answers; allow a higher risk, or give more examples"
        )
    last = int(passing[-1])
    answers = int(wrong[last] + right[last])
    of_errors = binomtest(int(wrong[last]), answers, alternative="less")
    return AbstentionThreshold(
        float(confidence.unique().flip(0)[last]),
        answers / len(labels),
        float(errors[last]),
        float(of_errors.proportion_ci(0.95, method="exact").high),
    )
