"""The precision of the highest evidence, against MacKay's condition and a closed form."""

from __future__ import annotations

import pytest
import torch

from scalabl_pyro.infer.evidence import log_det_by_eigenvalues, precision_by_evidence


@pytest.mark.parametrize("distance", [1e-4, 0.3, 5.0, 2e3])
def test_the_slope_is_0_there(distance):
    """λ‖θ* − μ‖² = Σ h / (h + λ), the number of parameters that the data determine."""
    root = torch.randn(6, 9, dtype=torch.float64)
    H = root.mT @ root  # of 9 eigenvalues three are 0
    precision = precision_by_evidence(log_det_by_eigenvalues(H), 9, distance)
    h = torch.linalg.eigvalsh(H).clamp(min=0)
    assert precision * distance == pytest.approx(float((h / (h + precision)).sum()), rel=1e-3)


def test_with_one_curvature_it_is_in_closed_form(caplog):
    """λ d = P h / (h + λ) is a quadratic equation."""
    P, h, d = 4, 2.0, 3.0
    expected = (-h * d + (h * h * d * d + 4 * d * P * h) ** 0.5) / (2 * d)
    assert precision_by_evidence(
        log_det_by_eigenvalues(h * torch.eye(P, dtype=torch.float64)), P, d
    ) == pytest.approx(expected, rel=1e-4)
    assert not caplog.records


@pytest.mark.parametrize(("distance", "bound"), [(1e-12, 1e6), (1e12, 1e-6)])
def test_a_bound_is_told(distance, bound, caplog):
    H = torch.eye(3, dtype=torch.float64) * 1e3
    assert precision_by_evidence(log_det_by_eigenvalues(H), 3, distance) == bound
    assert f"lies beyond {bound:g}, where it is looked for" in caplog.text
