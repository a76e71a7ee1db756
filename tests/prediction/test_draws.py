from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import run_snippet, whole
from pyro.infer.autoguide import AutoNormal
from scipy import stats

from scalabl_pyro import ScalaBLModel, draw
from scalabl_pyro.guides import (
    AutoSubspaceDelta,
    AutoSubspaceLowRankMultivariateNormal,
    AutoSubspaceMultivariateNormal,
    AutoSubspaceNormal,
)
from scalabl_pyro.prediction import draws
from scalabl_pyro.prediction.draws import hold, signal_to_noise

GUIDES = {
    "normal": (AutoSubspaceNormal, {}),
    "multivariate": (AutoSubspaceMultivariateNormal, {}),
    "multivariate per module": (AutoSubspaceMultivariateNormal, {"per_module": True}),
    "low rank": (AutoSubspaceLowRankMultivariateNormal, {"rank": 2}),
    "low rank per module": (AutoSubspaceLowRankMultivariateNormal, {"per_module": True}),
}


@pytest.fixture
def model(make_causal) -> ScalaBLModel:
    return ScalaBLModel(make_causal(targets=("q_proj",)), num_data=12)


def make_guide(name: str, model: ScalaBLModel):
    """A guide with correlations and unequal scales, as far as it can have them."""
    kind, options = GUIDES[name]
    guide = kind(model, init_scale=0.3, **options)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return guide


@pytest.mark.parametrize("kind", ["sobol", "antithetic"])
@pytest.mark.parametrize("name", GUIDES)
def test_draws_of_each_kind_have_the_moments_of_q(model, name, kind):
    guide = make_guide(name, model)
    z = draw(guide, 4096, seed=0, kind=kind).flatten(1)
    expected = draw(guide, 200_000, seed=1).flatten(1)
    scale = expected.std(0)
    error = (z.mean(0) - expected.mean(0)) / scale
    torch.testing.assert_close(error, torch.zeros_like(error), atol=0.01, rtol=0)
    covariance = (z.T.cov() - expected.T.cov()) / scale[:, None] / scale
    torch.testing.assert_close(covariance, torch.zeros_like(covariance), atol=0.1, rtol=0)


def test_sobol_integrates_better_than_independent_draws(model):
    guide = make_guide("normal", model)
    q = guide.marginals()
    exact = (q.loc + q.scale**2 / 2).exp().detach()  # of E[exp s] where log E = μ + σ²/2

    def error(kind: str) -> float:
        banks = [draw(guide, 64, seed=seed, kind=kind).exp().mean(0) for seed in range(20)]
        return float((torch.stack(banks) / exact - 1).square().mean())

    assert error("sobol") < error("independent") / 10


def test_antithetic_draws_come_in_pairs_about_the_mean(model):
    guide = make_guide("multivariate", model)
    loc = guide.median()["s"]
    bank = draw(guide, 5, seed=0, kind="antithetic")
    assert bank.shape == (5, *model.adapter.shape)
    torch.testing.assert_close(bank[0] - loc, loc - bank[1])
    torch.testing.assert_close(bank[2] - loc, loc - bank[3])
    assert (bank[0] - bank[2]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["independent", "sobol", "antithetic"])
def test_banks_depend_on_their_seed_alone_and_leave_the_global_state(model, kind):
    guide = make_guide("normal", model)
    first = draw(guide, 6, seed=9, kind=kind)
    before = torch.random.get_rng_state()
    assert torch.equal(first, draw(guide, 6, seed=9, kind=kind))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, draw(guide, 6, seed=10, kind=kind))
    if kind == "sobol":
        torch.testing.assert_close(draw(guide, 4, seed=9, kind=kind), first[:4])


def test_draws_stay_in_the_support_of_the_prior(make_causal):
    model = ScalaBLModel(make_causal(), num_data=12, prior=dist.LogNormal(0.0, 1.0))
    guide = AutoSubspaceNormal(model, init_scale=2.0)
    bank = draw(guide, 64, seed=0, kind="sobol")
    assert (bank > 0).all()
    torch.testing.assert_close(bank.median(0).values, guide.median()["s"], rtol=0.6, atol=0)


def test_the_draws_of_contributing_are_stratified(model, monkeypatch):
    """One draw in each of S intervals that are equally likely, for every number of s."""
    monkeypatch.setattr(draws, "KINDS", dict(draws.KINDS))
    run_snippet("def _latin_hypercube", dict(vars(draws)))
    guide = make_guide("normal", model)
    bank = draw(guide, 50, seed=0, kind="latin_hypercube")
    q = guide.marginals()
    u = stats.norm.cdf(((bank - q.loc) / q.scale).flatten(1).double().detach())  # (S, M·r)
    strata = np.sort(np.floor(50 * u), 0)
    np.testing.assert_array_equal(strata, np.arange(50)[:, None].repeat(u.shape[1], 1))
    assert not torch.equal(bank[:, 0].argsort(0), bank[:, 1].argsort(0))


def test_what_has_no_normal_map_is_refused(model, records):
    with pytest.raises(ValueError, match="'halton': expected one of"):
        draw(AutoSubspaceNormal(model), 2, seed=0, kind="halton")
    with pytest.raises(ValueError, match=r"draws of a Delta.*kind='independent'"):
        draw(AutoSubspaceDelta(model), 2, seed=0, kind="sobol")
    guide = AutoNormal(model, init_loc_fn=model.init_loc_fn)
    batch = whole(model.adapter.readout.encode(records))
    assert draw(guide, 2, seed=0, batch=batch).shape == (2, *model.adapter.shape)
    with pytest.raises(ValueError, match="this one is a AutoNormal"):
        draw(guide, 2, seed=0, kind="antithetic", batch=batch)


def test_signal_to_noise_and_holding_modules(model):
    M, r = model.adapter.shape
    loc = torch.full((M, r), 3.0)
    scale = torch.linspace(0.5, 3.0, M)[:, None]
    bank = loc + scale * torch.randn(20_000, M, r)
    ratios = signal_to_noise(bank)
    torch.testing.assert_close(ratios, 3.0 / scale[:, 0], rtol=0.03, atol=0)
    random = ratios < 2
    assert random.any()
    assert not random.all()
    held = hold(bank, loc, random)
    assert torch.equal(held[:, random], bank[:, random])
    assert torch.equal(held[:, ~random], loc[~random].expand(20_000, -1, -1))
    assert math.isclose(float(held[:, ~random].std(0).sum()), 0.0)
    assert model.adapter.trunk.depth_for(held) >= int((~random).nonzero()[0])


def test_a_module_that_is_held_has_no_s_perp():
    bank, loc = torch.randn(5, 3, 6), torch.randn(3, 2)
    held = hold(bank, loc, torch.tensor([True, False, True]))
    assert torch.equal(held[:, [0, 2]], bank[:, [0, 2]])
    assert torch.equal(held[:, 1, :2], loc[1].expand(5, 2))
    assert not held[:, 1, 2:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_draws_on_a_gpu_leave_its_random_state(model):
    guide = AutoSubspaceNormal(model).cuda()
    before = torch.cuda.get_rng_state()
    assert draw(guide, 3, seed=0).is_cuda
    assert torch.equal(before, torch.cuda.get_rng_state())
    pyro.clear_param_store()


def test_a_guide_of_pyro_needs_a_batch(make_causal):
    model = ScalaBLModel(make_causal(), num_data=4)
    with pytest.raises(ValueError, match="give batch=, one of the training split"):
        draw(AutoNormal(model), 2, seed=0)
