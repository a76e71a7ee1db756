"""The contraction benchmark: its toy, its figures, and what they are to show, on small sizes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from scalabl_pyro.data import Batch
from scalabl_pyro.methods.bursts import burst_steps


@pytest.fixture
def contraction():
    from benchmarks.correctness import contraction

    return contraction


def test_the_toy_adds_up_low_rank_updates(contraction):
    """f(x; s) = Σ_m B_m diag(s_m) V_m x_m, for each draw, example and seed."""
    adapter = contraction.LinearMaps(2)
    identity = torch.eye(contraction.R).expand(2, contraction.M, -1, -1)
    torch.testing.assert_close(adapter.V @ adapter.V.mT, identity, atol=1e-5, rtol=0)
    x = torch.randn(3, 2, contraction.M, contraction.WIDTH, 1)  # (B, K, M, d, 1)
    batch = Batch({"Vx": (adapter.V @ x).squeeze(-1)}, torch.ones(6, contraction.CLASSES))
    s = torch.randn(5, *adapter.shape)
    for draw, logits in zip(s, adapter(batch, s), strict=True):
        diagonal = torch.diag_embed(draw).unflatten(0, (2, contraction.M))
        updates = adapter.B @ diagonal @ adapter.V  # (K, M, C, d)
        expected = (updates @ x).squeeze(-1).sum(2)  # (B, K, C)
        torch.testing.assert_close(logits, expected.flatten(0, 1))


@pytest.mark.parametrize(("labels", "count"), [("separable", 20), ("coin flips", 40)])
def test_the_reference_obeys_its_schedule(contraction, labels, count):
    """After some rounds σ is √(1 + μ²), the minimum of KL(p‖q) over σ, at any N and any labels."""
    steps = 24 * (burst_steps(count, 4) + 1)  # the rate decays
    q = contraction.posterior("reference", count, labels, 2, steps)
    torch.testing.assert_close(q["sigma"], (1 + q["mean_squared"]).sqrt(), rtol=0.02, atol=0)


@pytest.mark.parametrize("labels", ["separable", "coin flips"])
def test_ours_contracts_with_data(contraction, labels):
    few, many = (contraction.posterior("scalabl", n, labels, 2, 200)["sigma"] for n in (20, 80))
    # A variance falls at most as 1 / N where the prior says nothing, and by less where it does.
    assert (few * (20 / 80) ** 0.5 < many).all()
    assert (many < few).all()
    assert (few < 1).all()


def test_the_benchmark_ends_with_its_figures(contraction, monkeypatch, capsys):
    words = ["contraction.py", "--sizes", "20", "30", "--seeds", "2", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", words)
    contraction.main()
    contents = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert contents["figures"]["steps"] == {"scalabl": 3, "reference": 3}
    for method in ("scalabl", "reference"):
        for labels in contraction.LABELS:
            rows = contents["figures"][method][labels]
            assert rows.keys() == {"20", "30"}
            for row in rows.values():
                mean, error = row["sigma"]
                assert 0 < mean < 1
                assert error >= 0
                assert 0 <= row["below_half"][0] <= 1
