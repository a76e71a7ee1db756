"""Simulation-based calibration in small: benchmarks/sbc.py on fewer replicates."""

from __future__ import annotations

import pytest
import torch

from benchmarks.correctness import sbc


@pytest.mark.parametrize("name", ["full_rank", "mean_field"])
def test_ranks_tell_a_right_posterior_from_one_that_is_too_narrow(name):
    figures = sbc.calibrate(name, 20)
    counts = torch.tensor(figures["rank_counts"])
    assert counts.shape == (4, 20)
    assert counts.sum(-1).tolist() == [20] * 4
    assert figures["mean_error"] < 0.1
    if name == "full_rank":
        assert figures["sd_ratio"] == pytest.approx(1, abs=0.03)
        assert figures["outer"] < 0.35
    else:
        assert figures["sd_ratio"] < 0.6
        assert figures["outer"] > 0.4


def test_exact_draws_pass_and_shifted_ones_fail(monkeypatch):
    """The test of ranks itself, with draws from the posterior in closed form."""

    def exact(shift: float):
        def run(model, split, seed):
            posterior = model.posterior(split)
            draws = posterior.sample((sbc.RANKS - 1,)) + shift * posterior.stddev
            return draws.unflatten(-1, (-1, 2)), posterior.mean, posterior.stddev

        return run

    monkeypatch.setitem(sbc.METHODS, "exact", exact(0.0))
    monkeypatch.setitem(sbc.METHODS, "shifted", exact(1.0))
    assert sbc.calibrate("exact", 200)["uniform"]
    assert not sbc.calibrate("shifted", 200)["uniform"]
