from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats

from scalabl_pyro import evaluate
from scalabl_pyro.prediction import (
    aurc_per_question,
    auroc_at_equal_length,
    auroc_per_question,
    crossed_interval,
    ece_floor,
    paired_difference,
    per_question,
)


def crossed(seeds, questions, rest, *, K=5, N=500, generator):
    """μ = 0 with effects of seeds, of questions and of both, of these standard deviations."""
    a = seeds * torch.randn(K, 1, generator=generator, dtype=torch.float64)
    b = questions * torch.randn(1, N, generator=generator, dtype=torch.float64)
    return a + b + rest * torch.randn(K, N, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("seeds", "questions", "rest"),
    [
        (0.02, 0.5, 0.5),
        (0.05, 0.3, 0.3),  # seeds decide
        (0.0, 1.0, 0.1),  # questions decide
        (0.0, 0.0, 1.0),
        (0.01, 0.2, 1.0),
    ],
)
def test_intervals_cover_the_mean_of_crossed_data(seeds, questions, rest):
    generator = torch.Generator().manual_seed(0)
    hits, low = 0, 0
    for _ in range(1000):
        interval = crossed_interval(crossed(seeds, questions, rest, generator=generator))
        hits += interval.low <= 0 <= interval.high
        low += interval.p < 0.05
    assert hits / 1000 >= 0.92
    assert low == 1000 - hits


def test_intervals_over_seeds_alone_would_not_cover():
    """What the questions add is seen: seeds that share them agree too well."""
    generator = torch.Generator().manual_seed(0)
    hits = alone = 0
    for _ in range(300):
        values = crossed(0.0, 1.0, 0.1, generator=generator)
        means = values.mean(1)
        alone += abs(float(means.mean())) <= 2.776 * float(means.std()) / 5**0.5
        interval = crossed_interval(values)
        hits += interval.low <= 0 <= interval.high
    assert alone / 300 < 0.5
    assert hits / 300 >= 0.92


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_an_interval_is_that_of_an_analysis_of_variance_by_hand(level):
    x = np.array([[1.0, 2.0, 4.0], [2.0, 5.0, 5.0]])
    mean = 19 / 6
    # Sums of squares, from the means of rows (7/3, 4) and of columns (1.5, 3.5, 4.5).
    rows = 3 * ((7 / 3 - mean) ** 2 + (4 - mean) ** 2)
    columns = 2 * ((1.5 - mean) ** 2 + (3.5 - mean) ** 2 + (4.5 - mean) ** 2)
    left = (((x - mean) ** 2).sum() - rows - columns) / 2
    expected = (rows / 1 + columns / 2 - left) / 6
    # Satterthwaite's degrees of freedom, of mean squares with 1, 2 and 2.
    degrees = (6 * expected) ** 2 / (rows**2 / 1 + (columns / 2) ** 2 / 2 + left**2 / 2)
    ends = stats.t(degrees, mean, expected**0.5).interval(level)
    p = 2 * stats.t.sf(mean / expected**0.5, degrees)
    first = torch.tensor([[0.5, 0.1, 7.0], [-3.0, 2.0, 0.0]]).double()
    of_difference = paired_difference(first, first - torch.tensor(x), level=level)
    for interval in (crossed_interval(torch.tensor(x), level=level), of_difference):
        assert interval == pytest.approx((mean, expected**0.5, *ends, p))


@pytest.mark.parametrize("shape", [(1, 4), (4, 1)])
def test_one_seed_or_one_question_leaves_students_interval_of_the_other(shape):
    interval = crossed_interval(torch.tensor([1.0, 2.0, 4.0, 9.0]).reshape(shape))
    error = math.sqrt(((1 - 4) ** 2 + (2 - 4) ** 2 + 0 + (9 - 4) ** 2) / 3 / 4)
    assert interval.standard_error == pytest.approx(error)
    assert interval.high - 4 == pytest.approx(
        3.182446 * error, rel=1e-5
    )  # t of 3 degrees at 97.5 %
    assert interval.low + interval.high == pytest.approx(8)


def test_paired_differences_leave_out_what_both_share():
    generator = torch.Generator().manual_seed(0)
    shared = crossed(0.3, 2.0, 0.0, generator=generator)
    a = shared + 0.05 + crossed(0.01, 0.1, 0.1, generator=generator)
    b = shared + crossed(0.01, 0.1, 0.1, generator=generator)
    difference = paired_difference(a, b)
    assert difference.p < 0.02
    assert difference.low <= 0.05 <= difference.high
    assert crossed_interval(a).standard_error > 5 * difference.standard_error
    same = paired_difference(a, a)
    assert (same.mean, same.standard_error, same.p) == (0, 0, 1)


def test_the_means_of_what_questions_add_are_the_metrics():
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(3, 50, 4), torch.randint(4, (50,))
    metrics = evaluate(logits, labels)
    for name, values in per_question(logits, labels).items():
        assert values.shape == (50,)
        assert float(values.mean()) == pytest.approx(metrics[name], abs=1e-6)


def weighted_aurc(uncertainty, losses, weights):
    """The area with each example as often as its weight says, by a loop; no two uncertainties are
    the same."""
    area, seen, lost = 0.0, 0.0, 0.0
    for n in uncertainty.argsort().tolist():
        seen, lost = seen + weights[n], lost + weights[n] * losses[n]
        area = area + weights[n] * lost / seen
    return area / weights.sum()


def test_what_a_question_adds_to_an_aurc_is_its_influence():
    """By automatic differentiation: the area, and how it moves as a question weighs more."""
    uncertainty, losses = torch.randn(40).double(), (torch.rand(40) < 0.3).double()
    weights = torch.ones(40, dtype=torch.float64, requires_grad=True)
    area = weighted_aurc(uncertainty, losses, weights)
    (slope,) = torch.autograd.grad(area, weights)
    torch.testing.assert_close(
        aurc_per_question(uncertainty, losses), area.detach() + len(losses) * slope
    )


def test_questions_of_one_uncertainty_share_their_places():
    """How the area moves as a question weighs more: in all orders of the tied ones, one by one, of
    which each has their mean loss."""
    uncertainty = torch.tensor([0.1, 0.5, 0.5, 0.5, 0.9]).double()
    losses = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]).double()
    per_order = []
    for order in permutations(range(3)):
        moved = uncertainty + 1e-6 * torch.tensor([0, *order, 0])
        weights = torch.ones(5, dtype=torch.float64, requires_grad=True)
        tied = (weights * losses)[1:4].sum() / weights[1:4].sum()
        area = weighted_aurc(moved, torch.stack([losses[0], tied, tied, tied, losses[4]]), weights)
        (slope,) = torch.autograd.grad(area, weights)
        per_order.append(area.detach() + 5 * slope)
    torch.testing.assert_close(
        aurc_per_question(uncertainty, losses),
        torch.stack(per_order).mean(0),
    )


def test_intervals_of_an_aurc_cover_it():
    """Errors that are likelier the more uncertain an answer is: the area of many examples is known,
    and about 95 % of the intervals of 500 hold it."""

    def examples(count, generator):
        uncertainty = torch.rand(count, generator=generator)
        return uncertainty, torch.rand(count, generator=generator) < 0.6 * uncertainty

    # P(wrong, U ≤ u) = 0.3 u², so that R(u) = 0.3 u, and the area is 0.15.
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        interval = crossed_interval(aurc_per_question(*examples(500, generator))[None])
        inside += interval.low <= 0.15 <= interval.high
    assert 0.92 <= inside / 400 <= 0.98


def test_one_number_has_no_interval():
    interval = crossed_interval(torch.tensor([[3.0]]))
    assert interval.mean == 3
    assert all(math.isnan(x) for x in interval[1:])


def scores_and_kinds(*, shift=1.0, N=60, generator):
    """Scores of which a third is positive, and so much higher."""
    positive = torch.rand(N, generator=generator) < 1 / 3
    positive[:2] = torch.tensor([True, False])
    return torch.randn(N, generator=generator) + shift * positive, positive


def test_the_variance_of_an_auroc_is_delongs():
    """By his structural components, one pair at a time; with ties."""
    scores, positive = scores_and_kinds(generator=torch.Generator().manual_seed(0))
    scores = (2 * scores).round()
    shares = auroc_per_question(scores, positive)
    known, others = scores[positive].tolist(), scores[~positive].tolist()
    pairs = len(known) * len(others)
    assert float(shares.mean()) == pytest.approx(stats.mannwhitneyu(known, others)[0] / pairs)
    pairs = np.array([[(a > b) + 0.5 * (a == b) for b in others] for a in known])
    m, n = pairs.shape
    delong = pairs.mean(1).var(ddof=1) / m + pairs.mean(0).var(ddof=1) / n
    assert float(shares.var()) / (m + n) == pytest.approx(delong, rel=0.05)  # of order 1 / n alike


def test_an_auroc_at_equal_length_is_the_mean_of_what_questions_add():
    generator = torch.Generator().manual_seed(0)
    scores, positive = scores_and_kinds(generator=generator)
    lengths = torch.randint(5, 30, (60,), generator=generator)
    shares = auroc_per_question(scores, positive, lengths)
    expected = auroc_at_equal_length(scores, positive, lengths)
    assert float(shares.mean()) == pytest.approx(expected)
    everyone = auroc_per_question(scores, positive, lengths, apart=100)
    torch.testing.assert_close(everyone, auroc_per_question(scores, positive))


def test_lengths_may_be_a_list_and_labels_of_any_whole_type():
    generator = torch.Generator().manual_seed(1)
    scores, positive = scores_and_kinds(generator=generator)
    lengths = torch.randint(5, (len(scores),), generator=generator)
    for function in (auroc_per_question, auroc_at_equal_length):
        of_list, expected = (function(scores, positive, x) for x in (lengths.tolist(), lengths))
        torch.testing.assert_close(torch.as_tensor(of_list), torch.as_tensor(expected))
    logits, labels = torch.randn(2, 20, 3, generator=generator), torch.arange(20) % 3
    for function in (evaluate, per_question):
        of_int32, expected = (function(logits, labels.to(t)) for t in (torch.int32, torch.int64))
        assert of_int32.keys() == expected.keys()
        torch.testing.assert_close(of_int32["brier"], expected["brier"])


def test_without_a_pair_there_is_no_auroc_to_add_to():
    with pytest.raises(ValueError, match="no pair of a positive and a negative"):
        auroc_per_question(torch.rand(4), torch.ones(4))


@pytest.mark.parametrize("lengths", [False, True])
def test_intervals_of_an_auroc_cover_it(lengths):
    """Five seeds whose scores share the questions, of normals at a known distance."""
    generator = torch.Generator().manual_seed(0)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    hits = 0
    for _ in range(300):
        shared, positive = scores_and_kinds(shift=0, N=150, generator=generator)
        where = torch.randint(10, 13, (150,), generator=generator) if lengths else None
        values = []
        for _ in range(5):
            own = torch.randn(150, generator=generator)
            scores = (shared + own) / math.sqrt(2) + positive
            values.append(auroc_per_question(scores, positive, where, apart=1))
        interval = crossed_interval(torch.stack(values))
        hits += interval.low <= truth <= interval.high
    assert hits / 300 >= 0.92


def sure(confidence, right, classes=4):
    """Log-probabilities (1, N, C) of an answer, the first class, and labels."""
    probabilities = ((1 - confidence) / (classes - 1))[:, None].repeat(1, classes)
    probabilities[:, 0] = confidence
    return probabilities.log()[None], torch.where(right, 0, 1)


@pytest.mark.parametrize("gap", [(0.0, 0.0), (0.2, 0.02), (0.05, 0.0)])
def test_intervals_of_an_ece_hold_the_true_one(gap):
    """Of models that are too sure by a known amount, and alike in nothing but their questions; with
    the floor left out, those of calibrated models miss the truth more often than not."""
    generator = torch.Generator().manual_seed(0)
    held, told_apart, without = [], [], []
    for _ in range(60):
        values, floors = [], []
        chance = torch.rand(400, generator=generator)
        for truth in gap:
            confidence = 0.35 + 0.6 * torch.rand(400, generator=generator)
            logits, labels = sure(confidence, chance < confidence - truth)
            values.append(per_question(logits, labels)["ece"][None])
            floors.append(ece_floor(logits[0].exp(), draws=200).mean)
            one = crossed_interval(values[-1], bias=(floors[-1], 0.0))
            held.append(one.low <= truth <= one.high)
            alone = crossed_interval(values[-1])
            without.append(alone.low <= truth <= alone.high)
        both = paired_difference(*values, bias=(floors[0], floors[1]))
        held.append(both.low <= gap[0] - gap[1] <= both.high)
        told_apart.append(both.p < 0.05)
    assert np.mean(held) >= 0.95
    assert np.mean(told_apart) > 0.7 if gap[0] == 0.2 else np.mean(told_apart) <= 0.05
    assert gap != (0.0, 0.0) or np.mean(without) < 0.5


def test_a_bias_widens_an_interval_on_its_side():
    x = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    plain, biased = crossed_interval(x), crossed_interval(x, bias=(3.0, 0.5))
    assert biased.low == pytest.approx(plain.low - 3)
    assert biased.high == pytest.approx(plain.high + 0.5)
    # Of a true mean of 0, the estimate would be 3 at most: 1 further is due to chance.
    assert biased.p == pytest.approx(2 * stats.t.sf(1 / plain.standard_error, 3))
    assert crossed_interval(x, bias=(5.0, 0.0)).p == 1
    same = crossed_interval(torch.full((2, 3), 0.2), bias=(0.3, 0.0))
    assert (same.low, same.high, same.p) == pytest.approx((-0.1, 0.2, 1.0))
