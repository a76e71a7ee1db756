"""Thresholds on the largest probability: loops over all of them."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import beta

from scalabl_pyro.prediction import abstains, threshold_at_risk


def two(*confidences):
    return torch.tensor([[c, 1 - c] for c in confidences])


def test_answers_below_the_threshold_are_not_given():
    probabilities = two(0.6, 0.7, 0.8)
    assert abstains(probabilities, 0.7).tolist() == [True, False, False]
    assert abstains(probabilities, 0.0).tolist() == [False, False, False]
    assert abstains(probabilities, 1.0).tolist() == [True, True, True]


def by_hand(confidence, wrong, risk):
    """The lowest threshold that passes, its coverage, its share of errors, and the 95 % upper limit
    of that as Clopper and Pearson have it."""
    chosen = None
    for threshold in sorted(set(confidence), reverse=True):
        errors = [w for c, w in zip(confidence, wrong, strict=True) if c >= threshold]
        if sum(errors) / len(errors) <= risk:
            n, k = len(errors), sum(errors)
            chosen = threshold, n / len(wrong), k / n, beta.ppf(0.95, k + 1, n - k) if k < n else 1
    return chosen


def examples(count, levels):
    generator = torch.Generator().manual_seed(count)
    confidence = (5 + torch.randint(levels, (count,), generator=generator) * 5 / levels) / 10
    right = torch.rand(count, generator=generator) < confidence
    return torch.stack([confidence, 1 - confidence], -1), (~right).long()


@pytest.mark.parametrize(("count", "levels"), [(30, 4), (200, 10), (500, 10**6)])
@pytest.mark.parametrize("risk", [0.0, 0.1, 0.2, 0.3, 1.0])
def test_the_threshold_is_the_lowest_that_passes(count, levels, risk):
    probabilities, labels = examples(count, levels)
    confidence, answer = probabilities.max(-1)
    expected = by_hand(confidence.tolist(), (answer != labels).tolist(), risk)
    if expected is None:
        with pytest.raises(ValueError, match=f"risk is {risk}, and no threshold"):
            threshold_at_risk(probabilities, labels, risk)
        return
    chosen = threshold_at_risk(probabilities, labels, risk)
    assert chosen == pytest.approx(expected)
    answered = ~abstains(probabilities, chosen.abstain_below)
    assert float(answered.double().mean()) == pytest.approx(chosen.coverage)
    errors = (answer != labels)[answered].double().mean()
    assert float(errors) == pytest.approx(chosen.risk)


def test_a_lower_threshold_may_pass_where_a_higher_one_does_not():
    """The surest answer is wrong; the four below it make up for that."""
    probabilities, labels = two(0.99, 0.9, 0.8, 0.7, 0.6, 0.55), torch.tensor([1, 0, 0, 0, 0, 1])
    chosen = threshold_at_risk(probabilities, labels, 0.2)
    assert chosen[:3] == pytest.approx((0.6, 5 / 6, 0.2))
    with pytest.raises(ValueError, match=r"lowest share is 0\.2, of 5 answers"):
        threshold_at_risk(probabilities, labels, 0.1)


def test_new_examples_have_more_errors_than_the_estimate_says():
    """The plug-in estimate is no bound, as documented: on average it is too low."""
    beyond = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        confidence = 0.5 + torch.rand(2100, generator=generator) / 2
        labels = (torch.rand(2100, generator=generator) > confidence).long()
        probabilities = torch.stack([confidence, 1 - confidence], -1)
        chosen = threshold_at_risk(probabilities[:100], labels[:100], 0.2)
        answered = ~abstains(probabilities[100:], chosen.abstain_below)
        beyond.append(float(labels[100:][answered].double().mean()) - chosen.risk)
    assert 0.005 < sum(beyond) / len(beyond) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: abstains(two(0.5), 1.5), r"abstain_below is 1\.5"),
        (lambda: abstains(torch.randn(2, 2), 0.5), "probabilities holds"),
        (lambda: threshold_at_risk(two(0.5), torch.tensor([0]), -0.1), r"risk is -0\.1"),
        (lambda: threshold_at_risk(two(0.5), torch.tensor([2]), 0.1), "labels holds 2"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
