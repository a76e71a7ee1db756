"""Quality and uncertainty of predictions, from log-probabilities and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .calibration import adaptive_ece, check_labels, ece, ece_floor
from .detection import aupr, auroc, fpr_at_tpr
from .rejection import aurc, prr

__all__ = [
    "Averaged",
    "all_alike",
    "average",
    "ece",
    "ece_floor",
    "entropy",
    "evaluate",
    "half_width",
    "max_probability",
    "mutual_information",
    "noise_to_signal",
    "summarise",
]


class Averaged(NamedTuple):
    """The model average over draws, and how uncertain it is, in float64: in float32 all of the
    largest probabilities above 1 − 6e-8 are the same, as are many of a model that is too sure.

    :param probabilities: (N, C).
    :param log_probabilities: (N, C), exact where the former are 0 by rounding.
    :param entropy: (N,), see :func:`entropy`.
    :param mutual_information: (N,), see :func:`mutual_information`.
    """

    probabilities: Tensor
    log_probabilities: Tensor
    entropy: Tensor
    mutual_information: Tensor

    @property
    def uncertainty(self) -> Tensor:
        """1 − max_c p̄_c, (N,), as the sum of all others, which knows what is left of a probability
        near 1."""
        answer = self.probabilities.argmax(-1, keepdim=True)
        return self.probabilities.scatter(-1, answer, 0.0).sum(-1)


def summarise(logits: Tensor) -> Averaged:
    """All of it from (S, N, C), with the average computed once."""
    exact = logits.double()
    log_probs = average(exact)
    probs = log_probs.exp()
    total = torch.special.entr(probs).sum(-1)
    each = torch.special.entr(exact.softmax(-1)).sum(-1).mean(0)
    between = (total - each).clamp(min=0).masked_fill(all_alike(logits), 0.0)
    return Averaged(probs, log_probs, total, between)


def all_alike(logits: Tensor) -> Tensor:
    """(N,), whether all draws of (S, N, C) are the same, of which rounding would make more."""
    return (logits == logits[:1]).all(-1).all(0)


def entropy(logits: Tensor) -> Tensor:
    """Predictive entropy H[p̄] in nats, (N,) from (S, N, C): total uncertainty."""
    return summarise(logits).entropy


def mutual_information(logits: Tensor) -> Tensor:
    """H[p̄] − mean_k H[p_k] ≥ 0 in nats, (N,) from (S, N, C): how far the draws disagree.

    It is not free of scale. With a scorer that all choices share, it is small wherever the choices
    are alike, familiar or not.
    """
    return summarise(logits).mutual_information


def max_probability(logits: Tensor) -> Tensor:
    """max_c p̄_c of the model average, in [1/C, 1], (N,) from (S, N, C): low is uncertain."""
    return summarise(logits).probabilities.amax(-1)


def noise_to_signal(logits: Tensor) -> Tensor:
    r"""How far the draws disagree about the contrasts between choices, over the contrasts
    themselves, ≥ 0, (N,) from (S, N, C): high is uncertain.

    .. math:: \frac{\mathrm{tr}(P Σ_f P)}{\| P \bar f \|^2}, \qquad P = I - \tfrac{1}{C} 1 1^⊤

    with the mean f̄ and the covariance Σ_f of the S logits; P takes the mean over the choices that
    exist away, on which no probability depends. Unlike mutual information it does not grow with
    the contrasts: multiplying all logits by a number leaves it as it is.

    :returns: 0 for one draw; inf where f̄ has no contrasts, but its draws have.
    :raises ValueError: as :func:`average`.
    """
    _check_draws(logits)
    missing = logits == float("-inf")
    f = logits.double().masked_fill(missing, 0.0)
    f = _numbers(f - f.sum(-1, keepdim=True) / (~missing).sum(-1, keepdim=True))
    f = f.masked_fill(missing, 0.0)
    noise = f.var(0, correction=0).sum(-1)
    signal = f.mean(0).square().sum(-1)
    return torch.where(noise == 0, 0.0, noise / signal).to(logits)


def evaluate(logits: Tensor, labels: Tensor | Sequence[int] | None = None) -> dict[str, float]:
    """Metrics of the model average over S draws.

    * ``acc``: accuracy; ``ece``: expected calibration error, see :func:`ece`
    * ``nll``: mean −log p̄(y_n), in nats; ``brier``: mean Σ_c (p̄_c − [c = y_n])², in [0, 2]
    * ``entropy`` and ``mutual_information``: means, in nats
    * ``ece_floor``: the mean of :func:`ece_floor`, what a perfectly calibrated model would have
    * ``ece_debiased``: ece − ece_floor, in [−1, 1]; 0 on average for a calibrated model, and up to
      ece_floor too low for one far from it, whose ECE has less bias (Kumar et al. 2019 and Roelofs
      et al. 2022 on that bias)
    * ``noise_to_signal``: the median of :func:`noise_to_signal`, a ratio whose mean few decide
    * ``adaptive_ece``: with bins of equal mass, see
      :func:`~scalabl_pyro.prediction.adaptive_ece`
    * ``aurc`` and ``prr``: errors under abstention by the largest probability, see
      :mod:`~scalabl_pyro.prediction.rejection`
    * ``auroc_max_probability`` (of 1 − the largest), ``auroc_entropy``,
      ``auroc_mutual_information`` and ``auroc_noise_to_signal``: how well they tell wrong answers
      from right ones, see :func:`auroc`; nan where all answers are right or all are wrong, and for
      the last two of one draw; so too ``aupr_…`` and ``fpr95_…``, see
      :mod:`~scalabl_pyro.prediction.detection`

    :param logits: (S, N, C).
    :param labels: (N,).
    :raises TypeError: if the logits are something else.
    :raises ValueError: if there are no labels, or others than class indices.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"logits is a {type(logits).__name__}: expected (S, N, C), such as answers.logits of"
            " answers = predict(predictor, split), with answers.labels"
        )
    if labels is None:
        raise ValueError("evaluation needs a label in every record")
    logits = logits.detach()
    summary = summarise(logits)
    probs, log_probs, total, mutual = summary
    labels = torch.as_tensor(labels)
    check_labels(probs, labels)
    labels = labels.long()
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1])
    ratio = noise_to_signal(logits)
    wrong = log_probs.argmax(-1) != labels
    error, floor = ece(probs, labels), ece_floor(probs).mean
    values: dict[str, Tensor | float] = {
        "acc": (~wrong).double().mean(),
        "ece": error,
        "nll": torch.nn.functional.nll_loss(log_probs, labels),
        "brier": (probs - one_hot).square().sum(-1).mean(),
        "entropy": total.mean(),
        "mutual_information": mutual.mean(),
        "noise_to_signal": float(np.median(ratio.double().cpu())),
        "ece_floor": floor,
        "ece_debiased": error - floor,
        "adaptive_ece": adaptive_ece(probs, labels),
        "aurc": aurc(summary.uncertainty, wrong),
        "prr": prr(summary.uncertainty, wrong),
    }
    several = len(logits) > 1
    both = bool(wrong.any()) and not bool(wrong.all())
    for name, measure in (("auroc", auroc), ("aupr", aupr), ("fpr95", fpr_at_tpr)):
        for score, of, known in (
            ("max_probability", summary.uncertainty, both),
            ("entropy", total, both),
            ("mutual_information", mutual, both and several),
            ("noise_to_signal", ratio, both and several),
        ):
            values[f"{name}_{score}"] = measure(of, wrong) if known else math.nan
    return {name: float(value) for name, value in values.items()}


def average(logits: Tensor, log_weights: Tensor | None = None) -> Tensor:
    r"""Log-probabilities of the Bayesian model average, (N, C) from (S, N, C), in log space.

    .. math:: \log p(y \mid x) = \mathrm{logsumexp}_k \log\mathrm{softmax} f(x; s_k) - \log S

    :param log_weights: (S, N), of weights of the draws that sum to 1, in the place of −log S.
    :raises ValueError: if there is no dimension of draws, or no draw, or a row of logits holds NaN
        or +∞, or nothing else than −∞.
    """
    _check_draws(logits)
    each = logits.log_softmax(-1)
    if log_weights is None:
        log_probs = each.logsumexp(0) - math.log(len(logits))
    else:
        log_probs = (each + log_weights[..., None]).logsumexp(0)
    # Rounding may leave a sure answer just above probability 1.
    return _numbers(log_probs.clamp(max=0))


def _check_draws(logits: Tensor) -> None:
    """:raises ValueError: if there is no dimension of draws, or no draw, example or class."""
    if logits.dim() < 3:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}: expected (S, N, C); of one draw, logits[None]"
        )
    if not logits.numel():
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}: expected (S, N, C), each 1 or more"
        )


def _numbers(values: Tensor) -> Tensor:
    """(…, N, C) of what a softmax gave, as they are.

    :raises ValueError: if a value is NaN.
    """
    bad = values.isnan().any(-1)
    if bad.any():
        raise ValueError(
            f"the logits of example {int(bad.nonzero()[0, -1])} hold NaN or infinity: expected"
            " finite numbers, and −inf where a choice does not exist; lower lr, or leave float16"
            " for bfloat16"
        )
    return values


def half_width(logits: Tensor) -> Tensor:
    r"""How far the averaged probabilities may be from those of infinitely many draws, (N,).

    Half the width of Student's 95 % confidence interval, for the class where it is widest:

    .. math:: \max_c \; t_{S-1} \; \mathrm{sd}_k\big(p_c(x; s_k)\big) / \sqrt{S}

    It is made for independent draws. Sobol draws do better than it says; antithetic ones where a
    probability is about linear in s, but worse where it is about even in s − μ.

    :param logits: (S, N, C), S ≥ 2.
    :raises ValueError: if there are fewer draws, or a row holds NaN or +∞, or nothing else than −∞.
    """
    S = len(logits)
    if logits.dim() < 3 or S < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: expected (S, N, C), S ≥ 2")
    t = float(stats.t.ppf(0.975, S - 1))
    return _numbers(logits.softmax(-1)).std(0).amax(-1) * t / math.sqrt(S)
