"""Priors: by name, of any distribution, learned, and the scale of B."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_records, whole
from pyro.poutine import condition, trace
from scipy import stats

from scalabl_pyro import AutoSubspaceNormal, Predictor, ScalaBLModel, fit
from scalabl_pyro.infer import FitConfig, make_elbo
from scalabl_pyro.models.priors import PRIORS, FixedPrior, LearnedNormal, make_prior


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_every_prior_gives_a_density_over_all_coordinates(name):
    prior = make_prior((3, 2), name)
    s = prior()
    assert s.event_shape == (3, 2)
    draw = s.sample()
    assert prior.support.check(draw).all()
    assert torch.isfinite(s.log_prob(draw))
    assert set(trace(prior).get_trace().stochastic_nodes) == set(prior.latents)


def test_named_priors_take_options():
    s = torch.full((3, 2), 0.7)
    assert float(make_prior((3, 2), "normal", loc=1.0, scale=2.0)().log_prob(s)) == pytest.approx(
        float(dist.Normal(1.0, 2.0).log_prob(s).sum())
    )
    assert float(make_prior((3, 2), "laplace", scale=3.0)().log_prob(s)) == pytest.approx(
        float(dist.Laplace(0.0, 3.0).log_prob(s).sum())
    )


def test_scales_of_their_own_have_the_densities_that_are_named():
    """The log joint density of fixed values, by scipy."""
    s = torch.tensor([[0.7, -0.2], [0.1, 1.5], [-2.0, 0.4]])
    tau, lam = torch.tensor([[0.5], [1.2], [2.0]]), s.abs() + 0.3
    sites = {
        "hierarchical_normal": {"module_scale": tau},
        "horseshoe": {"global_scale": tau[:1], "local_scale": lam},
    }
    expected = {
        "hierarchical_normal": stats.halfnorm(scale=0.3).logpdf(tau).sum()
        + stats.norm(scale=tau).logpdf(s).sum(),
        "horseshoe": stats.halfcauchy(scale=0.3).logpdf(0.5)
        + stats.halfcauchy().logpdf(lam).sum()
        + stats.norm(scale=0.5 * lam).logpdf(s).sum(),
    }
    for name, values in sites.items():
        conditioned = trace(condition(make_prior((3, 2), name, scale=0.3), values)).get_trace()
        log_joint = conditioned.log_prob_sum() + conditioned.nodes["_RETURN"]["value"].log_prob(s)
        assert float(log_joint) == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("name", "site", "expected"),
    [
        ("hierarchical_normal", "module_scale", stats.halfnorm(scale=0.3)),
        ("horseshoe", "local_scale", stats.halfcauchy()),
    ],
)
def test_draws_of_scales_have_their_quantiles(name, site, expected):
    draws = trace(make_prior((100_000, 1), name, scale=0.3)).get_trace().nodes[site]["value"]
    for level in (0.1, 0.5, 0.9, 0.99):
        assert float((draws < expected.ppf(level)).float().mean()) == pytest.approx(level, abs=5e-3)


def test_gates_have_the_density_of_a_logistic_variable_that_is_squashed():
    """x = σ((log-odds + L) / t) with L logistic, by the change of variables; ½ and ½ by default."""
    x = np.array([[0.1, 0.5], [0.97, 0.3]])
    for options, odds, t in (
        ({}, 1.0, 0.5),
        ({"probs": 0.2, "temperature": 0.8}, 0.25, 0.8),
    ):
        L = t * np.log(x / (1 - x)) - math.log(odds)
        expected = (stats.logistic.logpdf(L) + np.log(t / (x * (1 - x)))).sum()
        s = make_prior((2, 2), "relaxed_bernoulli", **options)()
        assert float(s.log_prob(torch.tensor(x).float())) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "name",
    ["hierarchical_normal", "horseshoe", "laplace", "learned_normal", "log_normal", "normal"],
)
def test_scales_must_be_positive(name):
    with pytest.raises(ValueError, match=r"scale is 0\.0: expected a number above 0"):
        make_prior((3, 2), name, scale=0.0)
    with pytest.raises(ValueError, match="scale is 'wide': expected a number above 0"):
        make_prior((3, 2), name, scale="wide")


def test_a_probability_is_below_1():
    with pytest.raises(ValueError, match="probs is 2: expected a number above 0 and below 1"):
        make_prior((3, 2), "relaxed_bernoulli", probs=2)


def test_priors_on_an_interval_are_taken_whatever_their_class(make_causal):
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 1.0]), 0.5)
    )
    model = ScalaBLModel(make_causal(), num_data=3, prior=mixture)
    assert model.prior().event_shape == model.adapter.shape


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (dist.Normal(torch.zeros(3), 1.0), "batch shape"),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), "one continuous number"),
        (dist.Poisson(1.0), "one continuous number"),
        (FixedPrior((1, 2), dist.Normal(0.0, 1.0)), r"the prior has shape \(1, 2\)"),
        (dist.Normal(float("nan"), 1.0), "the prior's loc is nan: expected finite"),
        (
            dist.StudentT(3.0, torch.tensor([0.0, float("-inf"), 0.0, 0.0])),
            "the prior's loc is -inf",
        ),
        (dist.Uniform(0.0, float("inf")), "the prior's high is inf"),
    ],
)
def test_other_priors_are_refused(make_causal, prior, message):
    with pytest.raises(ValueError, match=message):
        ScalaBLModel(make_causal(), num_data=3, prior=prior)


@pytest.mark.parametrize("per_module", [False, True])
def test_a_learned_scale_goes_where_empirical_bayes_puts_it(make_causal, records, per_module):
    """With q(s) held, the best τ² is the mean of μ² + σ² over the coordinates that share it."""
    adapter = make_causal()
    split = adapter.readout.encode(records)
    prior = LearnedNormal(adapter.shape, scale=0.3, per_module=per_module)
    model = ScalaBLModel(adapter, num_data=len(split), prior=prior)
    guide = AutoSubspaceNormal(model, init_scale=0.1).requires_grad_(False)
    config = FitConfig(steps=400, batch_size=2, lr=0.0, lr_guide=0.1, clip_norm=1e9)
    fit(model, guide, split, config, progress=False)
    q = guide.marginals()
    square = q.loc**2 + q.scale**2
    best = square.mean(-1, keepdim=True).sqrt() if per_module else square.mean().sqrt()
    torch.testing.assert_close(prior.scale.detach(), best.expand_as(prior.scale), rtol=0.05, atol=0)


def test_a_prior_that_would_move_what_was_trained_is_refused(make_causal):
    adapter = make_causal()
    draws = torch.ones(1, *adapter.shape)
    split = adapter.readout.encode(make_records(4))
    before = Predictor(adapter, draws).logits(whole(split))
    ScalaBLModel(adapter, num_data=4, prior=dist.LogNormal(0.0, 1.0))  # need not move
    assert torch.equal(Predictor(adapter, draws).logits(whole(split)), before)
    with torch.no_grad():
        next(iter(adapter.matrices.B.values())).weight.mul_(1.5)
    before = Predictor(adapter, draws).logits(whole(split))
    with pytest.raises(ValueError, match=r"B, which has been trained .* build a new adapter"):
        ScalaBLModel(adapter, num_data=4, prior=dist.Uniform(0.0, 0.1))
    assert torch.equal(Predictor(adapter, draws).logits(whole(split)), before)


@pytest.mark.parametrize("prior", ["normal", 1.0])
def test_what_is_no_distribution_is_refused(make_causal, prior):
    with pytest.raises(ValueError, match=f"prior is {prior!r}: expected a distribution of Pyro"):
        ScalaBLModel(make_causal(), num_data=4, prior=prior)


def test_a_prior_on_B_adds_its_log_density(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    batch = split.collate(list(split))

    def log_joint(scale_B):
        model = ScalaBLModel(adapter, num_data=len(split), scale_B=scale_B)
        torch.manual_seed(0)
        return float(trace(model).get_trace(batch).log_prob_sum().detach())

    log_prob = dist.Normal(0.0, 0.5).log_prob
    expected = sum(float(log_prob(B.weight).sum().detach()) for B in adapter.matrices.B.values())
    assert log_joint(0.5) - log_joint(None) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="scale_B is -1"):
        log_joint(-1)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("name", ["normal", "horseshoe"])
def test_the_density_of_B_is_no_part_of_the_likelihood(make_causal, records, name, particles):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    rows = []
    for scale_B in (None, 0.01):
        prior = make_prior(adapter.shape, name)
        model = ScalaBLModel(adapter, num_data=len(split), prior=prior, scale_B=scale_B)
        guide = AutoSubspaceNormal(model)
        torch.manual_seed(0)
        config = FitConfig(steps=1, batch_size=len(split), lr=0.0, lr_guide=0.0)
        elbo = make_elbo(num_particles=particles)
        rows.append(fit(model, guide, split, config, elbo=elbo, progress=False).history[0])
    assert rows[0]["nll"] == pytest.approx(rows[1]["nll"], rel=1e-5)
    assert rows[0]["kl"] == pytest.approx(rows[1]["kl"], rel=0.01)
    assert rows[1]["loss"] > rows[0]["loss"]


def test_a_trained_start_is_moved_off_the_edge_of_the_support(make_causal, records, tmp_path):
    """A gate at s = 1 would have no gradient."""
    source = make_causal(svd=False)
    source.peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = make_causal(start=tmp_path, filled=False)
    batch = source.readout.encode(records)
    expected = source(batch.collate(list(batch)))
    prior = make_prior(adapter.shape, "relaxed_bernoulli")
    model = ScalaBLModel(adapter, num_data=len(records), prior=prior)
    guide = AutoSubspaceNormal(model)
    start = guide.median()["s"]
    assert ((start > 0.2) & (start < 0.8)).all()
    logits = adapter(batch.collate(list(batch)), start)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_support_around_0_is_not_started_in_its_middle(make_causal):
    adapter = make_causal(filled=False)
    model = ScalaBLModel(adapter, num_data=3, prior=dist.Uniform(-0.3, 0.3))
    assert (model.init_loc.abs() > 0.01).all()
    with pytest.raises(ValueError, match="s = 0 cannot be the start"):
        adapter.move_start(torch.zeros(adapter.shape))


@pytest.mark.parametrize("prior", [dist.Normal(0.0, 1.0), dist.Laplace(0.0, 1.0), None])
def test_building_a_prior_leaves_the_global_random_state_alone(prior, make_causal):
    adapter = make_causal()
    before = torch.get_rng_state()
    ScalaBLModel(adapter, num_data=4, prior=prior or make_prior(adapter.shape, "horseshoe"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_goes_where_its_module_goes(name):
    """No device but the CPU may be here, but ``meta`` always is."""
    moved = make_prior((3, 2), name).to("meta")
    with pyro.validation_enabled(False), pyro.poutine.block():
        assert moved().sample().device.type == "meta"


def test_a_prior_that_is_not_on_the_whole_line_as_it_says_is_refused(make_causal):
    """The support of a transformed distribution is that of its transform's values."""
    below_one = dist.TransformedDistribution(
        dist.Exponential(1.0), [dist.transforms.AffineTransform(1.0, -1.0)]
    )
    shifted = dist.TransformedDistribution(
        dist.Normal(0.0, 1.0),
        [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(-1.0, 1.0)],
    )
    for prior, where in ((below_one, "10"), (shifted, "-1")):
        with pytest.raises(ValueError, match=f"real line, and it has no density at {where}:"):
            ScalaBLModel(make_causal(), num_data=3, prior=prior)
    scaled = dist.TransformedDistribution(
        dist.StudentT(3.0), [dist.transforms.AffineTransform(1.0, -2.0)]
    )
    for prior in (scaled, dist.Cauchy(0.0, 1e-3), dist.Normal(5.0, 1e-4)):
        ScalaBLModel(make_causal(), num_data=3, prior=prior)
