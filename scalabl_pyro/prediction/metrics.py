"""Quality and uncertainty of predictions, from log-probabilities and labels."""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

__all__ = [
    "auroc",
    "average",
    "calibration_gaps",
    "ece",
    "entropy",
    "evaluate",
    "half_width",
    "mutual_information",
]


def entropy(logits: Tensor) -> Tensor:
    """Predictive entropy H[p̄] in nats, (N,) from (S, N, C): total uncertainty."""
    return torch.special.entr(average(logits).exp()).sum(-1)


def mutual_information(logits: Tensor) -> Tensor:
    """H[p̄] − mean_k H[p_k] ≥ 0 in nats, (N,) from (S, N, C): how far the draws disagree."""
    if len(logits) == 1:
        return logits.new_zeros(logits.shape[1:-1])  # and not the rounding of two equal numbers
    each = torch.special.entr(logits.softmax(-1)).sum(-1).mean(0)
    return (entropy(logits) - each).clamp(min=0)


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of a score ≥ 0 for telling the positive examples, ties at one half.

    :param scores: (N,), such as :func:`entropy`.
    :param positive: (N,), such as whether the answer was wrong.
    """
    # torchmetrics takes scores outside [0, 1] for logits; only their order counts.
    top = scores.max().clamp(min=torch.finfo(scores.dtype).tiny)
    return float(binary_auroc(scores / top, positive.long()))


def ece(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    r"""Expected calibration error in [0, 1], L1 with equal-width bins (Guo et al. 2017).

    .. math:: \sum_b \frac{n_b}{N} \, \big| \mathrm{acc}_b - \mathrm{conf}_b \big|

    Bin b holds the confidences max_c p_c in [b / bins, (b + 1) / bins); the last holds 1 too.

    :param probabilities: (N, C).
    :param labels: (N,).
    :raises ValueError: if these are no probabilities and labels, or there is no bin.
    """
    return float(calibration_gaps(probabilities, labels, bins).mean())


def calibration_gaps(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """(N,) in float64, what each example adds to :func:`ece`, which is their mean.

    That is confidence − [right], with the sign of its sum over the example's bin.

    :raises ValueError: as :func:`ece`.
    """
    check_labels(probabilities, labels)
    confidence, answer = check_probabilities(probabilities).max(-1)
    gap = confidence.double() - (answer == labels).double()
    place = bin_of(confidence, bins)
    return gap * torch.bincount(place, gap, minlength=bins).sign()[place]


def bin_of(confidence: Tensor, bins: int) -> Tensor:
    """(N,), the equal-width bin of each confidence in [0, 1]; the last bin is closed.

    :raises ValueError: if there is no bin.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}: expected 1 or more")
    # In the confidences' own type, so that 0.6 lies where the bin from 9/15 on begins.
    edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(confidence)
    return torch.bucketize(confidence, edges, right=True)


def check_probabilities(probabilities: Tensor) -> Tensor:
    """(N, C), as they are.

    :raises ValueError: if there are none, or a row does not hold numbers in [0, 1] that sum to 1.
    """
    if probabilities.dim() != 2 or not probabilities.numel():
        raise ValueError(
            f"probabilities has shape {tuple(probabilities.shape)}: expected (N, C), N of 1 or more"
        )
    bad = (probabilities < 0) | (probabilities > 1) | probabilities.isnan()
    # Rounding of C numbers in half precision stays below this.
    off = bad.any(-1) | ((probabilities.double().sum(-1) - 1).abs() > 0.02)
    if off.any():
        row = int(off.nonzero()[0])
        raise ValueError(
            f"probabilities holds {probabilities[row].tolist()} in row {row}: expected numbers from"
            " 0 to 1 that sum to 1; of logits, take the softmax"
        )
    return probabilities


def check_labels(probabilities: Tensor, labels: Tensor) -> None:
    """:raises ValueError: if labels are not N class indices for (N, C) probabilities."""
    N, C = probabilities.shape[0], probabilities.shape[-1]
    if labels.shape != (N,) or labels.is_floating_point():
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and type {labels.dtype}: expected {N} whole"
            " numbers, one for each example"
        )
    wrong = labels[(labels < 0) | (labels >= C)]
    if len(wrong):
        raise ValueError(
            f"labels holds {int(wrong[0])}: expected class indices from 0 to {C - 1}; leave"
            " examples out whose label is not known"
        )


def evaluate(logits: Tensor, labels: Tensor | None, *, bins: int = 15) -> dict[str, float]:
    """Metrics of the model average over S draws.

    * ``acc``: accuracy; ``ece``: expected calibration error, see :func:`ece`
    * ``nll``: mean −log p̄(y_n), in nats; ``brier``: mean Σ_c (p̄_c − [c = y_n])², in [0, 2]
    * ``entropy`` and ``mutual_information``: means, in nats

    :param logits: (S, N, C).
    :param labels: (N,).
    :raises ValueError: if there are no labels, or others than class indices.
    """
    if labels is None:
        raise ValueError("evaluation needs a label in every record")
    log_probs = average(logits)  # (N, C)
    probs = log_probs.exp()
    check_labels(probs, labels)
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1])
    values = {
        "acc": (probs.argmax(-1) == labels).float().mean(),
        "ece": ece(probs, labels, bins),
        "nll": torch.nn.functional.nll_loss(log_probs, labels),
        "brier": (probs - one_hot).square().sum(-1).mean(),
        "entropy": entropy(logits).mean(),
        "mutual_information": mutual_information(logits).mean(),
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
