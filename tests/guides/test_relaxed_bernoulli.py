"""Gates: their distribution in closed form, and the method made of them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import whole
from scipy import stats

from scalabl_pyro import FitConfig, ScalaBLModel, make_prior
from scalabl_pyro.guides import make_guide
from scalabl_pyro.methods import DALorRA


@pytest.fixture
def guide(make_causal):
    adapter = make_causal()
    prior = make_prior(adapter.shape, "relaxed_bernoulli")
    made = make_guide(ScalaBLModel(adapter, num_data=3, prior=prior), "relaxed_bernoulli")
    with torch.no_grad():
        made.logits_unconstrained.normal_(0.0, 1.5)
    return made


def test_samples_have_the_mean_of_a_relaxed_bernoulli(guide):
    """E[s] = ∫₀¹ sigmoid((α + logit u) / τ) du, and P(s > ½) = sigmoid(α)."""
    alpha = guide.logits.detach().double()
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    expected = torch.stack([((a + u.logit()) / 0.5).sigmoid().mean() for a in alpha.flatten()])
    draws = guide.sample(40_000).double()
    torch.testing.assert_close(draws.mean(0).flatten(), expected, atol=0.008, rtol=0)
    open_gates = (draws > 0.5).double().mean(0)
    torch.testing.assert_close(open_gates, alpha.sigmoid(), atol=0.012, rtol=0)
    low, median, high = guide.quantiles([0.1, 0.5, 0.9])["s"]
    for level, quantile in ((0.1, low), (0.5, median), (0.9, high)):
        share = (draws < quantile).double().mean(0)
        torch.testing.assert_close(share, torch.full_like(share, level), atol=0.01, rtol=0)


def test_it_starts_at_the_start_and_has_a_number_for_each_coordinate(make_causal):
    adapter = make_causal()
    model = ScalaBLModel(adapter, num_data=3, prior=make_prior(adapter.shape, "relaxed_bernoulli"))
    guide = make_guide(model, "relaxed_bernoulli", temperature=0.3)
    torch.testing.assert_close(guide.median()["s"], model.init_loc)
    assert sum(p.numel() for p in guide.parameters()) == model.init_loc.numel()
    assert guide.kl(model.prior()) is None


def test_another_support_is_refused(make_causal):
    model = ScalaBLModel(make_causal(), num_data=3)
    with pytest.raises(ValueError, match=r"expected prior\.name relaxed_bernoulli"):
        make_guide(model, "relaxed_bernoulli")
    unit = ScalaBLModel(make_causal(), num_data=3, prior=make_prior((5, 4), "relaxed_bernoulli"))
    with pytest.raises(ValueError, match="temperature is 0"):
        make_guide(unit, "relaxed_bernoulli", temperature=0)


def test_dalorra_has_the_kl_of_an_elbo_and_gates_that_are_as_often_open_as_shut(make_causal):
    method = DALorRA()
    assert [method.config.kl(step, 100) for step in range(50, 100)] == [1] * 50  # after its rise
    adapter = make_causal()
    prior = method.make_model(adapter, num_data=12).prior()
    x = torch.full(adapter.shape, 0.1)
    # Of a logistic variable that is divided by ½ and squashed.
    density = 0.5 * stats.logistic.pdf(0.5 * math.log(0.1 / 0.9)) / (0.1 * 0.9)
    for value in (x, 1 - x):
        expected = x.numel() * math.log(density)
        assert float(prior.log_prob(value)) == pytest.approx(expected, rel=1e-4)


def test_dalorra_trains_gates_and_both_matrices(make_causal, records):
    split = make_causal().readout.encode(records)
    before = {}

    def make(**form):
        adapter = make_causal(**form)
        before.update({name: p.detach().clone() for name, p in adapter.state().items()})
        return adapter

    config = FitConfig(steps=4, batch_size=4, lr=0.01, lr_guide=0.1)
    fitted = DALorRA(config, progress=False, draws=5).fit(make, split, None, seed=0)
    after = fitted.model.adapter.state()
    assert not any(torch.equal(value, after[name]) for name, value in before.items())
    assert (fitted.guide.median()["s"] != 0.5).all()
    assert ((fitted.predictor.draws > 0) & (fitted.predictor.draws < 1)).all()
    assert fitted.predictor.logits(whole(split)).shape == (5, len(split), 4)
