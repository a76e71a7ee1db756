"""Expected calibration error, and how much of it chance alone gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CalibrationFloor",
    "adaptive_ece",
    "bin_of",
    "calibration_band",
    "calibration_gaps",
    "check_labels",
    "check_probabilities",
    "ece",
    "ece_floor",
    "mean_by_value",
]

#: random numbers drawn at once
_AT_ONCE = 2**22


def ece(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    r"""Expected calibration error in [0, 1], L1 with equal-width bins (Guo et al. 2017).

    .. math:: \sum_b \frac{n_b}{N} \, \big| \mathrm{acc}_b - \mathrm{conf}_b \big|

    Bin b holds the confidences max_c p_c in [b / bins, (b + 1) / bins); the last holds 1 too.

    :param probabilities: (N, C).
    :param labels: (N,).
    :raises ValueError: if a row is no distribution, a label is no class, or ``bins`` is below 1.
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


def adaptive_ece(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    r"""Expected calibration error in [0, 1] with bins of equal mass (Nguyen and O'Connor 2015).

    .. math:: \sum_b \frac{n_b}{N} \, \big| \mathrm{acc}_b - \mathrm{conf}_b \big|

    The N examples in the order of their confidence max_c p_c are cut into bins whose sizes differ
    by one at most. Equal confidences have no order: each of them stands for their mean accuracy.

    :param probabilities: (N, C).
    :param labels: (N,).
    :raises ValueError: as :func:`ece`.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}: expected 1 or more")
    check_labels(probabilities, labels)
    confidence, answer = check_probabilities(probabilities).max(-1)
    gap = confidence.double() - (answer == labels).double()
    parts = mean_by_value(confidence, gap)[confidence.argsort()].tensor_split(bins)
    return float(sum(part.sum().abs() for part in parts) / len(labels))


def mean_by_value(values: Tensor, of: Tensor) -> Tensor:
    """(N,), the mean of ``of`` (N,) over all examples that share an example's value."""
    levels, place = values.unique(return_inverse=True)
    means = of.new_zeros(len(levels)).scatter_reduce(0, place, of, "mean", include_self=False)
    return means[place]


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


class CalibrationFloor(NamedTuple):
    """The ECE that chance alone gives a perfectly calibrated model, in [0, 1].

    :param mean: its expectation.
    :param low: its 5 % quantile; ``high`` its 95 % quantile.
    """

    mean: float
    low: float
    high: float


def ece_floor(
    probabilities: Tensor, bins: int = 15, *, draws: int = 1000, seed: int = 0
) -> CalibrationFloor:
    """The expected ECE of a perfectly calibrated model with these probabilities, and its range.

    Labels are drawn from the probabilities themselves (consistency resampling, Bröcker and Smith
    2007); what :func:`ece` then finds is noise of N labels in so many bins.
    Two models whose ECE differs by less than that range are not told apart by it.

    :param probabilities: (N, C).
    :param draws: of N labels each.
    :param seed: of a generator of its own.
    :raises ValueError: if a row is no distribution, or ``bins`` or ``draws`` is below 1.
    """
    confidence = check_probabilities(probabilities).amax(-1).cpu()  # (N,)
    count, expected, right = _calibrated(confidence, bins, draws, seed)
    values = (right - expected).abs().sum(-1) / count.sum()
    low, high = torch.quantile(values, values.new_tensor([0.05, 0.95])).tolist()
    return CalibrationFloor(float(values.mean()), low, high)


def calibration_band(
    probabilities: Tensor,
    bins: int = 15,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Tensor:
    """(2, bins), between which the accuracies in bins of a perfectly calibrated model lie.

    Consistency bars (Bröcker and Smith 2007), from the labels that :func:`ece_floor` draws; each
    bin by itself lies inside with probability ``level``. NaN where a bin holds no example.

    :param probabilities: (N, C).
    :param draws: of N labels each.
    :param seed: of a generator of its own.
    :raises ValueError: if a row is no distribution, ``level`` is outside (0, 1), or ``bins`` or
        ``draws`` is below 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: expected a number between 0 and 1")
    confidence = check_probabilities(probabilities).amax(-1).cpu()  # (N,)
    count, _, right = _calibrated(confidence, bins, draws, seed)
    ends = count.new_tensor([(1 - level) / 2, (1 + level) / 2])
    return torch.quantile(right / count, ends, dim=0)


def _calibrated(
    confidence: Tensor, bins: int, draws: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """How many examples a bin holds, how many of them a calibrated model is expected to answer
    right, (bins,) each, and how many are right in draws of the labels, (draws, bins)."""
    if draws < 1:
        raise ValueError(f"draws is {draws}: expected 1 or more")
    member = torch.nn.functional.one_hot(bin_of(confidence, bins), bins).double()  # (N, bins)
    generator = torch.Generator().manual_seed(seed)
    right = []
    N = len(confidence)
    for chunk in torch.arange(draws).split(max(1, _AT_ONCE // N)):
        uniform = torch.rand(len(chunk), N, generator=generator, dtype=torch.float64)
        # The answer is the class that the label is drawn to be with probability max_c p_c.
        right.append((uniform < confidence).double() @ member)
    return member.sum(0), confidence.double() @ member, torch.cat(right)
