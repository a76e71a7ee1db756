"""Quality and uncertainty of predictions, from log-probabilities and labels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)

__all__ = [
    "Averaged",
    "auroc",
    "average",
    "entropy",
    "evaluate",
    "half_width",
    "mutual_information",
    "summarise",
]


class Averaged(NamedTuple):
    """The model average over draws, and how uncertain it is.

    :param probabilities: (N, C).
    :param log_probabilities: (N, C), exact where the former are 0 by rounding.
    :param entropy: (N,), see :func:`entropy`.
    :param mutual_information: (N,), see :func:`mutual_information`.
    """

    probabilities: Tensor
    log_probabilities: Tensor
    entropy: Tensor
    mutual_information: Tensor


def summarise(logits: Tensor) -> Averaged:
    """All of it from (S, N, C), with the average computed once."""
    log_probs = average(logits)
    probs = log_probs.exp()
    total = torch.special.entr(probs).sum(-1)
    if len(logits) == 1:
        between = torch.zeros_like(total)  # and not the rounding of two equal numbers
    else:
        each = torch.special.entr(logits.softmax(-1)).sum(-1).mean(0)
        between = (total - each).clamp(min=0)
    return Averaged(probs, log_probs, total, between)


def entropy(logits: Tensor) -> Tensor:
    """Predictive entropy H[p̄] in nats, (N,) from (S, N, C): total uncertainty."""
    return torch.special.entr(average(logits).exp()).sum(-1)


def mutual_information(logits: Tensor) -> Tensor:
    """H[p̄] − mean_k H[p_k] ≥ 0 in nats, (N,) from (S, N, C): how far the draws disagree.

    It is not free of scale. With a scorer that all choices share, it is small wherever the choices
    are alike, familiar or not.
    """
    return summarise(logits).mutual_information


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of a score ≥ 0 for telling the positive examples, ties at one half.

    :param scores: (N,), such as :func:`entropy`.
    :param positive: (N,), such as whether the answer was wrong.
    """
    # torchmetrics takes scores outside [0, 1] for logits; only their order counts.
    top = scores.max().clamp(min=torch.finfo(scores.dtype).tiny)
    return float(binary_auroc(scores / top, positive.long()))


def evaluate(logits: Tensor, labels: Tensor | None, *, bins: int = 15) -> dict[str, float]:
    """Metrics of the model average over S draws.

    * ``acc``: accuracy; ``ece``: expected calibration error, L1, equal-width bins
    * ``nll``: mean −log p̄(y_n), in nats; ``brier``: mean Σ_c (p̄_c − [c = y_n])², in [0, 2]
    * ``entropy`` and ``mutual_information``: means, in nats

    :param logits: (S, N, C).
    :param labels: (N,).
    :raises ValueError: if there are no labels.
    """
    if labels is None:
        raise ValueError("evaluation needs a label in every record")
    probs, log_probs, total, between = summarise(logits)
    classes = probs.shape[-1]
    one_hot = torch.nn.functional.one_hot(labels, classes)
    values = {
        "acc": multiclass_accuracy(probs, labels, classes, average="micro"),
        "ece": multiclass_calibration_error(probs, labels, classes, n_bins=bins, norm="l1"),
        "nll": torch.nn.functional.nll_loss(log_probs, labels),
        "brier": (probs - one_hot).square().sum(-1).mean(),
        "entropy": total.mean(),
        "mutual_information": between.mean(),
    }
    return {name: float(value) for name, value in values.items()}


def average(logits: Tensor) -> Tensor:
    r"""Log-probabilities of the Bayesian model average, (N, C) from (S, N, C), in log space.

    .. math:: \log p(y \mid x) = \mathrm{logsumexp}_k \log\mathrm{softmax} f(x; s_k) - \log S

    :raises ValueError: if there is no dimension of draws.
    """
    if logits.dim() < 3:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}: expected (S, N, C); of one draw, logits[None]"
        )
    # Rounding may leave a sure answer just above probability 1.
    return (logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))).clamp(max=0)


def half_width(logits: Tensor, *, level: float = 0.95) -> Tensor:
    r"""How far the averaged probabilities may be from those of infinitely many draws, (N,).

    Half the width of Student's confidence interval, for the class where it is widest:

    .. math:: \max_c \; t_{S-1} \; \mathrm{sd}_k\big(p_c(x; s_k)\big) / \sqrt{S}

    It is made for independent draws. Sobol draws do better than it says; antithetic ones where a
    probability is about linear in s, but worse where it is about even in s − μ.

    :param logits: (S, N, C), S ≥ 2.
    """
    S = len(logits)
    t = float(stats.t.ppf((1 + level) / 2, S - 1))
    return logits.softmax(-1).std(0).amax(-1) * t / math.sqrt(S)
