"""Chains against posteriors that are known."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from conftest import make_records, whole

from benchmarks.correctness._linear import LinearAdapter, LinearGaussian, make_split
from scalabl_pyro import (
    AutoSubspaceNormal,
    Predictor,
    ScalaBLModel,
    draw,
    make_prior,
    to_inference_data,
)
from scalabl_pyro.infer.batches import whole_split
from scalabl_pyro.infer.chains import Chains, _potential, mcmc
from scalabl_pyro.models.priors import Horseshoe


def correlated(count: int, D: int) -> torch.Tensor:
    """(N, 1, D) features whose columns have correlation 0.8."""
    return (torch.randn(count, D) * 0.2**0.5 + torch.randn(count, 1) * 0.8**0.5)[:, None]


@pytest.fixture
def linear() -> tuple[LinearGaussian, object]:
    features = correlated(20, 4)
    labels = features.sum(-1) + torch.randn(20, 1)
    model = LinearGaussian(LinearAdapter((2, 2)), num_data=20, noise=1.0)
    return model, make_split(features, labels)


@pytest.mark.parametrize(("kernel", "options"), [("nuts", {}), ("hmc", {"trajectory_length": 2.0})])
def test_chains_recover_a_known_posterior(linear, kernel, options):
    model, split = linear
    chains = mcmc(
        model,
        split,
        kernel=kernel,
        num_samples=150,
        warmup_steps=60,
        num_chains=2,
        progress=False,
        full_mass=True,
        **options,
    )
    posterior = model.posterior(split)
    assert chains.draws.shape == (2, 150, 2, 2)
    draws = chains.draws.flatten(0, 1).flatten(1)
    error = (draws.mean(0) - posterior.mean) / posterior.stddev
    assert error.abs().max() < 0.3
    torch.testing.assert_close(draws.std(0), posterior.stddev, rtol=0.25, atol=0)
    correlation = torch.corrcoef(draws.T)
    sd = posterior.stddev
    expected = posterior.covariance_matrix / sd / sd[:, None]
    assert expected[0, 1] < -0.2
    torch.testing.assert_close(correlation, expected, atol=0.25, rtol=0)
    diagnostics = chains.diagnostics()
    assert diagnostics["r_hat"] < 1.1
    assert diagnostics["ess_bulk"] > 50
    assert diagnostics["divergences"] == 0
    assert diagnostics["acceptance"] > 0.5


def test_the_potential_of_batches_is_that_of_the_whole(make_causal, records):
    """Value and gradient; batches of 5, 5 and 2, with an extra site of the prior."""
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split), prior=Horseshoe(adapter.shape))
    gradients = []
    for size in (None, 5):
        potential, _, start = _potential(model, whole_split(model, split, size))
        z = {name: torch.full_like(value, 0.3).requires_grad_() for name, value in start.items()}
        value = potential(z)
        gradients.append((value, *torch.autograd.grad(value, list(z.values()))))
    assert len(gradients[0]) == 4
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)
    # −log p(s, D) by hand for a normal prior, whose transform is the identity
    model = ScalaBLModel(adapter, num_data=len(split), prior=dist.Normal(0.5, 2.0))
    potential, _, start = _potential(model, whole_split(model, split, 5))
    nll = torch.nn.functional.cross_entropy(
        adapter(whole(split), start["s"]), split.labels, reduction="sum"
    )
    log_prior = dist.Normal(0.5, 2.0).log_prob(start["s"]).sum()
    torch.testing.assert_close(potential(start), nll - log_prior, rtol=1e-5, atol=1e-5)


def test_a_language_model_is_left_as_it_was(make_causal, records):
    adapter = make_causal(targets=("lm_head",))
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split), prior=Horseshoe(adapter.shape))
    before = {name: p.detach().clone() for name, p in adapter.state().items()}
    state = torch.get_rng_state()
    options = dict(num_samples=6, warmup_steps=4, num_chains=2, progress=False, max_tree_depth=3)
    chains = mcmc(model, split, **options)
    assert torch.equal(torch.get_rng_state(), state)
    again = mcmc(model, split, **options)
    assert torch.equal(chains.draws, again.draws)
    assert not torch.equal(chains.draws[0], chains.draws[1])
    assert not torch.equal(chains.draws, mcmc(model, split, seed=1, **options).draws)
    assert adapter.named_parameters().keys() == before.keys()
    for name, parameter in adapter.named_parameters().items():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert {name: tuple(draws.shape) for name, draws in chains.latents.items()} == {
        "global_scale": (2, 6, 1, 1),
        "local_scale": (2, 6, *adapter.shape),
    }
    assert all((draws > 0).all() for draws in chains.latents.values())
    bank = chains.thin(5)
    assert Predictor(adapter, bank).logits(whole(split)).shape == (5, len(split), 4)
    data = chains.to_inference_data()
    assert data.posterior["s"].dims == ("chain", "draw", "module", "rank")
    assert list(data.posterior["s"].coords["module"].values) == list(adapter.module_names)
    assert data.posterior["local_scale"].shape == (2, 6, *adapter.shape)
    assert data.sample_stats["diverging"].shape == (2, 6)


def test_a_bank_is_evenly_spaced_through_all_chains():
    draws = torch.arange(12.0).reshape(2, 6, 1, 1)
    chains = Chains(draws, {}, torch.zeros(2, 6, dtype=torch.bool), torch.ones(2), ("m",))
    assert chains.thin(12).flatten().tolist() == list(range(12))
    assert chains.thin(3).flatten().tolist() == [0, 6, 11]
    for count in (0, 13):
        with pytest.raises(ValueError, match=f"number of draws is {count}: expected 1 to 12"):
            chains.thin(count)


def test_starts_are_dispersed_about_the_given_one(linear):
    """Chains without warm-up, of tiny steps, stay where they start."""
    model, split = linear
    loc = torch.full((2, 2), 3.0)
    chains = mcmc(
        model,
        split,
        kernel="hmc",
        num_samples=4,
        warmup_steps=0,
        num_chains=30,
        init_loc=loc,
        dispersion=0.5,
        progress=False,
        step_size=1e-6,
        num_steps=1,
        adapt_step_size=False,
    )
    starts = chains.draws[:, 0]
    torch.testing.assert_close(starts.mean(0), loc, atol=0.35, rtol=0)
    assert 0.4 < float((starts - loc).std()) < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "gibbs"}, r"kernel is 'gibbs': expected one of \['hmc', 'nuts'\]"),
        ({"num_samples": 3}, "num_samples is 3: expected a whole number, 4 or more"),
        ({"num_samples": 4.5}, r"num_samples is 4\.5: expected a whole number"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"num_chains": 0}, "num_chains is 0"),
        ({"dispersion": -1.0}, "dispersion is -1.0"),
        ({"dispersion": float("inf")}, "dispersion is inf: expected a finite number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"init_loc": torch.zeros(3)}, r"init_loc has shape \(3,\): expected \(M, r\) \(2, 2\)"),
    ],
)
def test_bad_settings_are_refused(linear, options, message):
    model, split = linear
    with pytest.raises(ValueError, match=message):
        mcmc(model, split, progress=False, **options)


def test_the_split_must_be_the_labelled_data_of_the_model(make_causal):
    adapter = make_causal()
    model = ScalaBLModel(adapter, num_data=5)
    with pytest.raises(ValueError, match="holds 4 examples, but the model's num_data is 5"):
        mcmc(model, adapter.readout.encode(make_records(4)))
    with pytest.raises(ValueError, match="needs a label in every record"):
        mcmc(model, adapter.readout.encode(make_records(5, labelled=False)))


@pytest.mark.parametrize("prior", ["horseshoe", "hierarchical_normal"])
def test_latent_scales_have_the_dimensions_that_a_guide_gives_them(make_causal, records, prior):
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split), prior=make_prior(adapter.shape, prior))
    options = dict(num_samples=4, warmup_steps=2, num_chains=1, progress=False)
    chains = mcmc(model, split, max_tree_depth=1, **options).to_inference_data()
    guide = AutoSubspaceNormal(model)
    predictor = Predictor(adapter, draw(guide, 2, seed=0))
    ours = to_inference_data(predictor, split, model=model, guide=guide)
    for name in model.prior.latents:
        assert chains.posterior[name].dims == ours.posterior[name].dims
