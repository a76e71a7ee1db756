from __future__ import annotations

import pytest
import torch

from scalabl_pyro import evaluate
from scalabl_pyro.prediction import ece


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
