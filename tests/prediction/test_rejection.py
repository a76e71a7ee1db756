"""Rejection curves, AUPR, FPR95 and adaptive ECE: scikit-learn, and loops with ties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from scalabl_pyro import evaluate
from scalabl_pyro.prediction import (
    adaptive_ece,
    aupr,
    aurc,
    fpr_at_tpr,
    prr,
    risk_at_coverage,
    risk_coverage_curve,
)

TIED = torch.tensor([0.3, 0.1, 0.3, 0.7, 0.3, 0.1])
WRONG = torch.tensor([1, 0, 0, 1, 1, 1])


def curve_by_hand(uncertainty, losses):
    """The mean over all orders that the uncertainty allows."""
    items = list(zip(uncertainty.tolist(), losses.tolist(), strict=True))
    orders = [
        order
        for order in itertools.permutations(items)
        if all(a[0] <= b[0] for a, b in itertools.pairwise(order))
    ]
    return [
        sum(sum(loss for _, loss in order[:k]) / k for order in orders) / len(orders)
        for k in range(1, len(items) + 1)
    ]


def test_the_curve_is_the_mean_over_all_orders_of_ties():
    expected = curve_by_hand(TIED, WRONG)
    assert risk_coverage_curve(TIED, WRONG).tolist() == pytest.approx(expected)
    assert aurc(TIED, WRONG) == pytest.approx(sum(expected) / 6)
    shuffled = torch.tensor([4, 2, 0, 5, 1, 3])
    assert aurc(TIED[shuffled], WRONG[shuffled]) == pytest.approx(aurc(TIED, WRONG), abs=1e-12)


@pytest.mark.parametrize(("coverage", "k"), [(0.01, 1), (1 / 6, 1), (0.34, 3), (0.5, 3), (1.0, 6)])
def test_the_risk_at_a_coverage_is_that_of_so_many_examples(coverage, k):
    expected = curve_by_hand(TIED, WRONG)[k - 1]
    assert risk_at_coverage(TIED, WRONG, coverage) == pytest.approx(expected)


def test_a_coverage_that_rounding_lifts_over_a_whole_number_is_that_number():
    """0.07 · 100 is a little more than 7 in floating point."""
    uncertainty, losses = torch.arange(100.0), torch.arange(100.0)
    assert risk_at_coverage(uncertainty, losses, 0.07) == pytest.approx(3.0)


def prr_by_simulation(uncertainty, quality):
    """The area under mean quality of what is kept, against the best order and random ones."""

    def area(certainty):
        answered = quality[certainty.argsort(descending=True)]
        return float((answered.cumsum(0) / torch.arange(1, len(answered) + 1)).mean())

    generator = torch.Generator().manual_seed(0)
    chance = [area(torch.rand(len(quality), generator=generator)) for _ in range(4000)]
    chance = sum(chance) / len(chance)
    return (area(-uncertainty) - chance) / (area(quality) - chance)


def test_prr_is_the_ratio_of_areas_against_random_orders():
    generator = torch.Generator().manual_seed(1)
    quality = torch.rand(60, generator=generator, dtype=torch.float64)
    uncertainty = 0.5 * torch.rand(60, generator=generator) - quality
    expected = prr_by_simulation(uncertainty, quality)
    assert prr(uncertainty, 1 - quality) == pytest.approx(expected, abs=0.01)
    assert 0.3 < expected < 1, "neither chance nor the best order"


def test_prr_is_one_for_the_best_order_and_zero_for_none():
    losses = torch.tensor([0.0, 1.0, 0.2, 0.9])
    assert prr(losses, losses) == pytest.approx(1)
    assert prr(torch.ones(4), losses) == pytest.approx(0)
    assert prr(-losses, losses) < 0
    assert math.isnan(prr(losses, torch.ones(4)))


def counts_at(scores, positive, threshold):
    called = [s >= threshold for s in scores]
    hits = sum(c and p for c, p in zip(called, positive, strict=True))
    return hits, sum(called) - hits


def aupr_by_hand(scores, positive):
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        hits, false = counts_at(scores, positive, threshold)
        recall = hits / sum(positive)
        area += (recall - before) * hits / (hits + false)
        before = recall
    return area


def fpr_by_hand(scores, positive, tpr):
    for threshold in sorted(set(scores), reverse=True):
        hits, false = counts_at(scores, positive, threshold)
        if hits / sum(positive) >= tpr:
            return false / (len(positive) - sum(positive))
    raise AssertionError


def examples():
    generator = torch.Generator().manual_seed(2)
    for count, levels in ((6, 2), (40, 4), (200, 30), (500, 10**6)):
        scores = torch.randint(levels, (count,), generator=generator) / levels
        positive = torch.rand(count, generator=generator) < 0.2 + 0.4 * scores
        positive[:2] = torch.tensor([True, False])
        yield scores, positive
    yield torch.zeros(5), torch.tensor([True, False, False, True, False])


@pytest.mark.parametrize("number", range(5))
def test_aupr_and_fpr95_are_those_of_loops_over_thresholds(number):
    scores, positive = list(examples())[number]
    by_hand = scores.tolist(), positive.tolist()
    assert aupr(scores, positive) == pytest.approx(aupr_by_hand(*by_hand))
    for tpr in (0.5, 0.95, 1.0):
        assert fpr_at_tpr(scores, positive, tpr) == pytest.approx(fpr_by_hand(*by_hand, tpr))


@pytest.mark.parametrize("number", range(5))
def test_aupr_and_fpr95_are_those_of_scikit_learn(number):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positive = list(examples())[number]
    expected = metrics.average_precision_score(positive.numpy(), scores.numpy())
    assert aupr(scores, positive) == pytest.approx(expected)
    rates = metrics.roc_curve(positive.numpy(), scores.numpy(), drop_intermediate=False)
    expected = rates[0][(rates[1] >= 0.95).argmax()]
    assert fpr_at_tpr(scores, positive) == pytest.approx(expected)


def test_without_positive_or_negative_examples_there_is_no_rate():
    scores = torch.rand(4)
    none, every = torch.zeros(4).bool(), torch.ones(4).bool()
    assert math.isnan(aupr(scores, none))
    assert aupr(scores, every) == pytest.approx(1)
    assert math.isnan(fpr_at_tpr(scores, none))
    assert math.isnan(fpr_at_tpr(scores, every))


def adaptive_by_hand(confidences, right, bins):
    order = sorted(range(len(right)), key=confidences.__getitem__)
    size, more = divmod(len(right), bins)
    total, start = 0.0, 0
    for b in range(bins):
        cell = order[start : start + size + (b < more)]
        start += len(cell)
        total += abs(sum(confidences[i] - right[i] for i in cell))
    return total / len(right)


@pytest.mark.parametrize(("count", "bins"), [(7, 3), (100, 15), (4, 15), (30, 1)])
def test_adaptive_ece_is_that_of_a_loop_over_bins_of_equal_mass(count, bins):
    generator = torch.Generator().manual_seed(3)
    probabilities = torch.randn(count, 4, generator=generator, dtype=torch.float64).softmax(-1)
    labels = torch.randint(4, (count,), generator=generator)
    confidence, answer = probabilities.max(-1)
    right = (answer == labels).double().tolist()
    expected = adaptive_by_hand(confidence.tolist(), right, bins)
    assert adaptive_ece(probabilities, labels, bins) == pytest.approx(expected)


def test_equal_confidences_have_no_order():
    """Two bins of two: 0.6 fills one and half of the other, with a mean accuracy of 2/3."""
    probabilities = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.9, 0.1]]).double()
    expected = (2 * abs(0.6 - 2 / 3) + abs(0.6 - 2 / 3 + 0.9 - 0)) / 4
    for labels in ([0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 0, 1]):
        error = adaptive_ece(probabilities, torch.tensor(labels), 2)
        assert error == pytest.approx(expected)


def test_evaluate_gives_them():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 60, 4), torch.randint(4, (60,))
    metrics = evaluate(logits, labels)
    probabilities = logits.softmax(-1).mean(0)
    confidence, answer = probabilities.max(-1)
    wrong = answer != labels
    by_hand = (confidence.tolist(), (~wrong).double().tolist(), 15)
    assert metrics["adaptive_ece"] == pytest.approx(adaptive_by_hand(*by_hand), abs=1e-6)
    order = sorted(range(60), key=lambda i: -float(confidence[i]))
    risks = [sum(bool(wrong[i]) for i in order[:k]) / k for k in range(1, 61)]
    best = sorted(wrong.tolist())
    best = [sum(best[:k]) / k for k in range(1, 61)]
    assert metrics["aurc"] == pytest.approx(sum(risks) / 60)
    expected = (risks[-1] - sum(risks) / 60) / (risks[-1] - sum(best) / 60)
    assert metrics["prr"] == pytest.approx(expected)
    entropy = (-(probabilities * probabilities.log()).sum(-1)).tolist()
    assert metrics["aupr_entropy"] == pytest.approx(aupr_by_hand(entropy, wrong.tolist()))
    assert metrics["fpr95_entropy"] == pytest.approx(fpr_by_hand(entropy, wrong.tolist(), 0.95))
    one = evaluate(logits[:1], labels)
    assert math.isnan(one["aupr_mutual_information"])
    assert math.isnan(one["fpr95_mutual_information"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: aurc(torch.zeros(2), torch.zeros(3)),
            r"losses has shape \(3,\): expected \(N,\) each",
        ),
        (lambda: aurc(torch.zeros(0), torch.zeros(0)), "N of 1 or more"),
        (lambda: prr(torch.tensor([0.0, math.nan]), torch.zeros(2)), "uncertainty holds nan at 1"),
        (lambda: prr(torch.zeros(2), torch.tensor([math.nan, 0.0])), "losses holds nan at 0"),
        (lambda: risk_at_coverage(TIED, WRONG, 0.0), "coverage is 0.0"),
        (
            lambda: aupr(torch.zeros(2), torch.zeros(3)),
            r"positive has shape \(3,\): expected \(N,\) each",
        ),
        (lambda: aupr(torch.tensor([math.nan]), torch.ones(1)), "scores holds nan at 0"),
        (lambda: fpr_at_tpr(TIED, WRONG, 1.5), "tpr is 1.5"),
        (lambda: adaptive_ece(torch.ones(1, 1), torch.zeros(1).long(), 0), "bins is 0"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
