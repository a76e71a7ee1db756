from __future__ import annotations

import math

import pytest
import torch

from scalabl_pyro.prediction import conformal_p_values


def test_p_is_the_share_of_known_scores_that_are_as_high():
    known = torch.tensor([1.0, 2.0, 2.0, 5.0])
    p = conformal_p_values(known, torch.tensor([6.0, 5.0, 2.0, 1.5, 1.0, -3.0]))
    assert p.tolist() == pytest.approx([1 / 5, 2 / 5, 4 / 5, 4 / 5, 1.0, 1.0])
    assert conformal_p_values(known, torch.tensor([math.nan, math.inf])).isnan().tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("ties", [False, True])
def test_familiar_questions_are_called_unfamiliar_as_rarely_as_p_says(ties):
    """P(p ≤ k / (n + 1)) = k / (n + 1) without ties, and at most that with them, on average over
    the known ones too."""
    torch.manual_seed(0)
    n, rounds = 19, 4000
    scores = torch.randn(rounds, n + 1)
    if ties:
        scores = scores.mul(2).round()
    p = torch.stack([conformal_p_values(row[:n], row[n:]) for row in scores])[:, 0]
    for k in (1, 2, 5, 10):
        alpha = k / (n + 1)
        found = float((p <= alpha + 1e-9).double().mean())
        error = math.sqrt(alpha * (1 - alpha) / rounds)
        assert found <= alpha + 3 * error
        if not ties:
            assert found >= alpha - 3 * error


@pytest.mark.parametrize(
    ("known", "scores"),
    [
        (torch.tensor([]), torch.zeros(2)),
        (torch.tensor([1.0, math.nan]), torch.zeros(2)),
        (torch.zeros(3, 2), torch.zeros(2)),
        (torch.zeros(3), torch.zeros(2, 2)),
    ],
)
def test_what_nothing_can_be_compared_with_is_refused(known, scores):
    with pytest.raises(ValueError, match="expected numbers"):
        conformal_p_values(known, scores)
