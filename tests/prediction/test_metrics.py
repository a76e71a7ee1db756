from __future__ import annotations

import math

import pytest
import torch

from scalabl_pyro import evaluate
from scalabl_pyro.prediction import auroc, ece, ece_floor


def ece_by_hand(rows, labels, bins):
    """Bins [b / bins, (b + 1) / bins), the last one closed, in a loop over numbers."""
    held = {b: [] for b in range(bins)}
    for row, label in zip(rows, labels, strict=True):
        confidence = max(row)
        b = next((b for b in range(bins) if b / bins <= confidence < (b + 1) / bins), bins - 1)
        held[b].append((confidence, row.index(confidence) == label))
    return sum(
        abs(sum(confidence for confidence, _ in cell) - sum(right for _, right in cell))
        for cell in held.values()
    ) / len(rows)


def two(*confidences):
    return [[c, 1 - c] for c in confidences]


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (two(0.95, 1.0), [0, 1]),
        (two(1.0, 1.0, 1.0), [0, 1, 1]),
        (two(0.94, 0.99, 1.0, 1.0, 0.6), [1, 0, 1, 0, 1]),
        (two(0.6, 0.6, 0.6, 0.8, 0.8), [0, 1, 1, 1, 0]),  # ties, on the edges of bins
        (two(0.5, 0.5), [0, 1]),
        ([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]], [0, 2]),
    ],
)
def test_ece_is_that_of_a_loop_over_bins_whose_last_is_closed(rows, labels, bins):
    for dtype in (torch.float64, torch.float32):
        found = ece(torch.tensor(rows, dtype=dtype), torch.tensor(labels), bins)
        assert found == pytest.approx(ece_by_hand(rows, labels, bins), abs=1e-6)


def test_ece_of_many_rows_is_that_of_the_loop():
    torch.manual_seed(0)
    probabilities = (4 * torch.randn(300, 5, dtype=torch.float64)).softmax(-1)
    probabilities[::7] = torch.eye(5, dtype=torch.float64)[torch.arange(43) % 5]
    labels = torch.randint(5, (300,))
    for bins in (15, 50):
        expected = ece_by_hand(probabilities.tolist(), labels.tolist(), bins)
        assert ece(probabilities, labels, bins) == pytest.approx(expected, abs=1e-12)


def test_evaluate_gives_that_ece_for_sure_answers():
    logits = torch.tensor([[0.95, 0.05], [1.0, 0.0]]).log()[None]
    assert evaluate(logits, torch.tensor([0, 1]))["ece"] == pytest.approx(0.475, abs=1e-6)


def absolute_deviation(p, n):
    """E|k/n − p| of k ~ Binomial(n, p), summed over all k."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) * abs(k / n - p) for k in range(n + 1))


@pytest.mark.parametrize(
    "groups", [[(0.7, 20)], [(0.55, 8), (0.95, 12)], [(0.6, 5), (0.75, 9), (1.0, 6)], [(0.99, 1)]]
)
def test_the_floor_is_the_mean_deviation_of_binomials(groups):
    """Confidences of one bin each: the expected ECE is known."""
    rows = two(*(p for p, n in groups for _ in range(n)))
    count = len(rows)
    expected = sum(n / count * absolute_deviation(p, n) for p, n in groups)
    found = ece_floor(torch.tensor(rows, dtype=torch.float64), draws=20000, seed=1)
    assert found.mean == pytest.approx(expected, rel=0.03, abs=1e-12)
    assert found.low <= found.mean <= found.high or groups == [(0.99, 1)]


def test_the_floor_holds_the_ece_of_calibrated_models_and_removes_its_bias():
    torch.manual_seed(0)
    probabilities = torch.randn(400, 4).softmax(-1)
    floor = ece_floor(probabilities)
    found = [ece(probabilities, torch.multinomial(probabilities, 1)[:, 0]) for _ in range(400)]
    inside = [floor.low <= value <= floor.high for value in found]
    assert sum(inside) / len(inside) == pytest.approx(0.9, abs=0.04)
    assert sum(found) / len(found) == pytest.approx(floor.mean, rel=0.03)
    assert ece_floor(probabilities) == floor
    assert ece_floor(probabilities, seed=1) != floor


def test_evaluate_gives_the_floor_and_what_tells_wrong_answers():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 60, 4), torch.randint(4, (60,))
    found = evaluate(logits, labels)
    probabilities = logits.softmax(-1).mean(0)
    assert found["ece_floor"] == pytest.approx(ece_floor(probabilities).mean, abs=1e-6)
    assert found["ece_debiased"] == pytest.approx(found["ece"] - found["ece_floor"])
    wrong = (probabilities.argmax(-1) != labels).tolist()
    scores = (-(probabilities * probabilities.log()).sum(-1)).tolist()
    assert found["auroc_entropy"] == pytest.approx(pairs_won(scores, wrong), abs=1e-6)
    assert 0 <= found["auroc_mutual_information"] <= 1
    one = evaluate(logits[:1], labels)
    assert math.isnan(one["auroc_mutual_information"])
    right = evaluate(logits, probabilities.argmax(-1))
    assert math.isnan(right["auroc_entropy"])


def pairs_won(scores, positive):
    """The share of pairs that the positive example wins; a draw is half a win."""
    high = [s for s, p in zip(scores, positive, strict=True) if p]
    low = [s for s, p in zip(scores, positive, strict=True) if not p]
    return sum((a > b) + (a == b) / 2 for a in high for b in low) / (len(high) * len(low))


@pytest.mark.parametrize(
    ("scores", "positive"),
    [
        ([-3.0, -1.0, -2.0, -0.5], [0, 1, 0, 1]),
        ([-3.0, -1.0, -2.0, -0.5, -2.0], [1, 0, 0, 1, 1]),
        ([0.0, 0.0, 0.0], [1, 0, 1]),
        ([5.0, -5.0, 1e30, 1e-30], [0, 1, 1, 0]),
        ([float("inf"), 1.0, float("-inf")], [1, 0, 0]),
        ([1.0, 2.0, 2.0, 3.0, 2.0], [0, 1, 0, 1, 1]),
    ],
)
def test_auroc_is_the_share_of_pairs_in_order(scores, positive):
    found = auroc(torch.tensor(scores), torch.tensor(positive).bool())
    assert found == pytest.approx(pairs_won(scores, positive), abs=1e-12)


@pytest.mark.parametrize("positive", [[0, 0, 0], [1, 1, 1]])
def test_auroc_of_one_class_is_no_number(positive):
    assert math.isnan(auroc(torch.tensor([0.1, 0.5, 0.3]), torch.tensor(positive).bool()))
