r"""How sure a mean over seeds and questions is.

Runs with several seeds answer the same questions, so that a mean over both has two sources of
chance. With x_kn of seed k and question n as a crossed design with random effects (Searle, Casella
and McCulloch 1992, chapter 4),

.. math:: x_{kn} = \mu + a_k + b_n + e_{kn}, \qquad
    \mathrm{Var}(\bar x) = \frac{\sigma_a^2}{K} + \frac{\sigma_b^2}{N} + \frac{\sigma_e^2}{K N}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from .calibration import calibration_gaps, check_labels, mean_by_value
from .detection import auroc, auroc_at_equal_length
from .metrics import summarise
from .rejection import risk_coverage_curve

__all__ = [
    "Interval",
    "aurc_per_question",
    "auroc_per_question",
    "crossed_interval",
    "paired_difference",
    "per_question",
    "per_text",
    "stacked",
]


class Interval(NamedTuple):
    """A mean, and how far chance may have moved it.

    :param mean: over seeds and questions.
    :param standard_error: of it, ``nan`` of one number.
    :param low: end of the 95 % interval; ``high`` the other.
    :param p: two-sided, of a true mean of 0; with a bias, of the nearest true mean that is
        possible.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    p: float


def crossed_interval(
    values: Tensor, *, level: float = 0.95, bias: tuple[float, float] = (0.0, 0.0)
) -> Interval:
    r"""The mean over seeds and questions, with Student's interval for both as random.

    The mean squares of the seeds' means, of the questions' means and of what is left give

    .. math:: \widehat{\mathrm{Var}}(\bar x) = \frac{MS_a + MS_b - MS_e}{K N}

    without bias; where chance makes it less than that of seeds or of questions alone, the larger of
    these. Degrees of freedom are Satterthwaite's (1946): about K − 1 where seeds decide and N − 1
    where questions do. One seed leaves the questions alone, one question the seeds. With two seeds
    that differ as much as questions do, intervals of 95 % hold the truth in about 89 %; with three,
    in 94 % and more.

    :param values: (K, N), such as the loss of seed k at question n.
    :param level: of the interval.
    :param bias: how far the mean may be too high, and too low, beside chance. An ECE is too high by
        up to its :func:`~scalabl_pyro.prediction.ece_floor`, which calibrated models reach, so
        that its bias is ``(floor, 0)``.
    :raises ValueError: if values are not (K, N), or not finite.
    """
    if values.dim() != 2 or not values.numel():
        raise ValueError(
            f"values has shape {tuple(values.shape)}: expected (K, N), seeds by questions"
        )
    if not values.isfinite().all():
        where = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"values holds {float(values[tuple(where)])} at seed {where[0]}, question {where[1]}:"
            " expected finite numbers"
        )
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: expected a number between 0 and 1")
    x = values.double()
    K, N = x.shape
    mean = float(x.mean())
    by_seed, by_question = x.mean(1), x.mean(0)
    rest = x - by_seed[:, None] - by_question + mean
    seeds = N * float(by_seed.var()) if K > 1 else 0.0
    questions = K * float(by_question.var()) if N > 1 else 0.0
    left = float(rest.square().sum()) / ((K - 1) * (N - 1)) if K > 1 and N > 1 else 0.0
    total = max(seeds + questions - left, seeds, questions)
    parts = [(seeds, K - 1), (questions, N - 1), (left, (K - 1) * (N - 1))]
    spread = sum(square**2 / degrees for square, degrees in parts if degrees)
    if K * N == 1:
        return Interval(mean, math.nan, math.nan, math.nan, math.nan)
    low, high = mean - bias[0], mean + bias[1]
    away = max(0.0, low, -high)  # from 0, of the nearest mean that is possible
    if total <= 1e-24 * mean**2 * K * N or spread == 0:  # all alike, but for rounding
        return Interval(mean, 0.0, low, high, 1.0 if away == 0 else 0.0)
    error = math.sqrt(total / (K * N))
    degrees = total**2 / spread
    half = float(stats.t.ppf((1 + level) / 2, degrees)) * error
    p = float(2 * stats.t.sf(away / error, degrees))
    return Interval(mean, error, low - half, high + half, p)


def paired_difference(
    first: Tensor,
    second: Tensor,
    *,
    level: float = 0.95,
    bias: tuple[float, float] = (0.0, 0.0),
) -> Interval:
    """:func:`crossed_interval` of first − second, (K, N) each, on the same seeds and questions.

    :param bias: of the difference; of ECEs the floor of the first, and that of the second.
    :raises ValueError: if their shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"the shapes {tuple(first.shape)} and {tuple(second.shape)} differ: expected (K, N) of"
            " the same seeds and questions"
        )
    return crossed_interval(first.double() - second.double(), level=level, bias=bias)


def per_question(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What each question adds to ``acc``, ``ece``, ``nll``, ``brier`` and ``aurc``, whose mean each
    is; (N,).

    For ``ece`` the sign of a bin's gap is taken as known. Where that gap is within its noise the
    ECE is too high, which an interval has to allow for: see ``bias`` of :func:`crossed_interval`.
    For ``aurc`` answers are left out by their largest probability, see :func:`aurc_per_question`.

    :param logits: (S, N, C).
    :param labels: (N,).
    """
    summary = summarise(logits)
    probs, log_probs = summary.probabilities, summary.log_probabilities
    check_labels(probs, labels)
    labels = labels.long()
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1])
    right = log_probs.argmax(-1) == labels
    return {
        "acc": right.double(),
        "ece": calibration_gaps(probs, labels),
        "nll": torch.nn.functional.nll_loss(log_probs, labels, reduction="none"),
        "brier": (probs - one_hot).square().sum(-1),
        "aurc": aurc_per_question(summary.uncertainty, ~right),
    }


def aurc_per_question(uncertainty: Tensor, losses: Tensor) -> Tensor:
    r"""What each question adds to an :func:`~scalabl_pyro.prediction.aurc`, whose mean it is; (N,).

    .. math:: x_q = R_{k(q)} + \sum_{k \ge k(q)} \frac{\ell_q - R_k}{k}

    with k(q) the place of q in the order of uncertainty. It is the area plus the influence of q on
    it, as in :func:`auroc_per_question`; questions of one uncertainty share their places.

    :param uncertainty: (N,); ``losses`` likewise.
    :raises ValueError: as :func:`~scalabl_pyro.prediction.risk_coverage_curve`.
    """
    risk = risk_coverage_curve(uncertainty, losses)  # R_k
    counts = torch.arange(1, len(risk) + 1, dtype=torch.float64, device=risk.device)
    of_own, of_all = (_from_here(each / counts) for each in (torch.ones_like(risk), risk))
    place = uncertainty.argsort().argsort()
    of_loss, rest = (mean_by_value(uncertainty, each[place]) for each in (of_own, risk - of_all))
    return losses.double() * of_loss + rest


def _from_here(values: Tensor) -> Tensor:
    """Σ of the values from each place to the end."""
    return values.flip(0).cumsum(0).flip(0)


def auroc_per_question(
    scores: Tensor,
    positive: Tensor,
    lengths: Tensor | Sequence[int] | None = None,
    *,
    apart: int = 2,
) -> Tensor:
    r"""What each question adds to an :func:`auroc`, whose mean it is; (N,).

    .. math:: x_q = A + N \, \frac{\sum_{(i, j) \ni q} w_{ij} (h_{ij} - A)}{\sum_{(i, j)} w_{ij}},
        \qquad h_{ij} = [u_i > u_j] + \tfrac{1}{2} [u_i = u_j]

    over pairs of a positive i and a negative j. It is A plus the influence of q on A (DeLong,
    DeLong and Clarke-Pearson 1988), so that the variance of the mean of x is that of A, and
    :func:`crossed_interval` and :func:`paired_difference` hold for it as for other means.

    :param scores: u, (N,).
    :param positive: (N,).
    :param lengths: of :func:`auroc_at_equal_length`, which A then is: w = 0 where two lengths
        differ by more than ``apart``; else w = 1.
    :raises ValueError: if the shapes differ, a score is no number, or there is no pair.
    """
    held = positive.cpu().bool()
    if lengths is None:
        area, pairs = auroc(scores, positive), int(held.sum() * (~held).sum())
    else:
        lengths = torch.as_tensor(lengths)
        area = auroc_at_equal_length(scores, positive, lengths, apart=apart)
    if math.isnan(area):
        raise ValueError("there is no pair of a positive and a negative example to compare")
    # Σ_j w_ij (h_ij − A) of each positive i, and Σ_i of each negative j.
    sums = torch.empty(len(scores), dtype=torch.float64)
    if lengths is None:
        below = _below(scores)
        sums[held] = below[held] - _below(scores[held]) - (~held).sum() * area
        sums[~held] = held.sum() * (1 - area) - (below[~held] - _below(scores[~held]))
    else:
        known, others, theirs = scores[held], scores[~held], lengths[~held]
        rows, columns, pairs = [], torch.zeros(len(others), dtype=torch.float64), 0
        for score, length in zip(known, lengths[held], strict=True):  # not all pairs at once
            near = (theirs - length).abs() <= apart
            above = (score > others).double() + 0.5 * (score == others).double()
            surplus = near * (above - area)
            rows.append(surplus.sum())
            columns += surplus
            pairs += int(near.sum())
        sums[held], sums[~held] = torch.stack(rows), columns
    return area + len(scores) * sums / pairs


def _below(scores: Tensor) -> Tensor:
    """(N,), how many of the others are lower, and half of those that are equal."""
    return torch.from_numpy(stats.rankdata(scores.detach().cpu().double().numpy())) - 1


def per_text(log_probs: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """What each completion adds to ``nll`` and ``tokens``, whose mean each is; (N,).

    :param log_probs: (S, T), of all completions' tokens one after another, under each draw.
    :param lengths: (N,), their tokens, T in all.
    """
    averaged = log_probs.double().logsumexp(0) - math.log(len(log_probs))  # (T,)
    sums = [part.sum() for part in averaged.split(lengths.tolist())]
    return {"nll": -torch.stack(sums), "tokens": lengths.double()}


def stacked(runs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """(K, N) by metric, of K runs' :func:`per_question`."""
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}
