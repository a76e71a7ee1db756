"""Guides: one contract, supports, further latent sites, closed forms."""

from __future__ import annotations

import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import keeps_the_contract, whole
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroParam

from scalabl_pyro import AutoSubspaceDelta, AutoSubspaceNormal, ScalaBLModel, draw, fit
from scalabl_pyro.guides import GUIDES, AutoSubspace, make_guide
from scalabl_pyro.infer import FitConfig
from scalabl_pyro.lora import set_perp
from scalabl_pyro.models.priors import HierarchicalNormal, Horseshoe

SPREAD = [
    {"name": "normal"},
    {"name": "multivariate_normal"},
    {"name": "multivariate_normal", "per_module": True},
    {"name": "low_rank_multivariate_normal", "rank": 2},
    {"name": "low_rank_multivariate_normal", "per_module": True},
    {"name": "top_normal", "blocks": 2},
]
EVERY = [*SPREAD, {"name": "delta"}, {"name": "top_normal", "blocks": 1}]
#: of a file of their own: for one kind of prior
SPECIAL = {"relaxed_bernoulli"}


def identity(options):
    return "-".join(str(value) for value in options.values())


def test_every_guide_is_tested():
    assert {options["name"] for options in EVERY} | SPECIAL == set(GUIDES)


@pytest.mark.parametrize("options", SPREAD, ids=identity)
def test_guide_contract(make_causal, options):
    """What any guide can give: nothing here asks for a normal q, or for an icdf."""
    model = ScalaBLModel(make_causal(), num_data=3)
    guide = make_guide(model, init_scale=0.25, **options)
    keeps_the_contract(guide, model, init_scale=0.25)


@pytest.mark.parametrize("options", SPREAD, ids=identity)
def test_normal_guides_are_as_wide_as_their_quantiles(make_causal, options):
    model = ScalaBLModel(make_causal(), num_data=3)
    guide = make_guide(model, init_scale=0.25, **options)
    low, high = guide.quantiles([0.1586553, 0.8413447])["s"]
    draws = guide.sample(4000)
    torch.testing.assert_close(draws.std(0), (high - low) / 2, atol=0.0, rtol=0.08)
    assert float((high - low).mean()) == pytest.approx(0.5, rel=0.1)


def test_a_guide_without_an_icdf_says_what_is_missing(model):
    class StudentT(AutoSubspaceNormal):
        def marginals(self):
            return dist.StudentT(4.0, self.loc, self.scale)

    message = r"StudentT: a StudentT has no icdf, .* override quantiles\(\)"
    with pytest.raises(NotImplementedError, match=message):
        StudentT(model).median()


def test_the_point_guide_is_a_point(make_causal):
    model = ScalaBLModel(make_causal(), num_data=3)
    guide = AutoSubspaceDelta(model)
    assert torch.equal(guide.median()["s"], model.init_loc)
    assert torch.equal(guide.sample(2)[1], model.init_loc)
    assert sum(p.numel() for p in guide.parameters()) == model.init_loc.numel()
    start = guide._init_loc.clone()
    with torch.no_grad():
        guide.loc += 1
    assert torch.equal(guide._init_loc, start)
    with pytest.raises(TypeError, match="is a point"):
        guide.marginals()


@pytest.mark.parametrize("options", SPREAD, ids=identity)
def test_kl_in_closed_form_equals_the_sampled_one(make_causal, options):
    prior = dist.Normal(0.5, 2.0)
    model = ScalaBLModel(make_causal(targets=("lm_head",)), num_data=3, prior=prior)
    guide = make_guide(model, init_scale=0.3, **options)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        q, p = guide.get_posterior(), model.prior()
        draws = q.sample((20_000,))
        ratio = q.log_prob(draws) - p.log_prob(draws)
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert guide.kl(p) == pytest.approx(float(ratio.mean()), abs=4 * error)
    assert guide.kl(dist.Laplace(torch.zeros(model.adapter.shape), 1.0).to_event(2)) is None


def test_a_guide_that_says_too_little_is_named(model):
    class Bare(AutoSubspace):
        pass

    with pytest.raises(NotImplementedError, match=r"Bare must define base\(\)"):
        Bare(model).sample(1)
    with pytest.raises(NotImplementedError, match=r"Bare must define marginals\(\), or override"):
        Bare(model).median()


class Mixture(AutoSubspace):
    """Two normals for each coordinate, whose quantiles have no closed form."""

    def __init__(self, model):
        super().__init__(model)
        pair = torch.stack([self._init_loc - 0.1, self._init_loc + 0.1], -1)
        self.loc = PyroParam(pair, constraints.real, 3)
        self.scale = PyroParam(torch.full_like(pair, 0.05), constraints.softplus_positive, 3)

    def base(self):
        return self.marginals().to_event(2)

    def marginals(self):
        components = dist.Normal(self.loc, self.scale)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones_like(self.loc)), components)

    def quantiles(self, quantiles):
        draws = self.sample(500)
        return {"s": draws.quantile(torch.tensor(quantiles), 0)}


def test_a_guide_that_is_not_normal_trains(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = Mixture(model)
    assert guide.kl(model.prior()) is None
    history = fit(model, guide, split, FitConfig(steps=2), progress=False).history
    assert math.isfinite(history[-1]["kl"])
    assert guide.median()["s"].shape == adapter.shape


def test_per_module_guides_have_no_correlation_between_modules(make_causal):
    model = ScalaBLModel(make_causal(), num_data=3)
    M, r = model.adapter.shape
    for name in ("multivariate_normal", "low_rank_multivariate_normal"):
        guide = make_guide(model, name, per_module=True)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter += torch.randn_like(parameter)
        draws = guide.sample(20_000)
        correlation = draws.flatten(1).T.corrcoef().view(M, r, M, r)
        within = torch.stack([correlation[m, :, m] for m in range(M)]) - torch.eye(r)
        assert float(within.abs().max()) > 0.2
        across = torch.stack([correlation[m, :, n] for m in range(M) for n in range(m)])
        assert float(across.abs().max()) < 0.05


@pytest.mark.parametrize("options", EVERY, ids=identity)
@pytest.mark.parametrize(
    "prior",
    [
        dist.LogNormal(0.0, 1.0),
        dist.RelaxedBernoulli(torch.tensor(0.5), probs=torch.tensor(0.5)),
    ],
    ids=["positive", "unit_interval"],
)
def test_guides_stay_in_the_support_of_the_prior(make_causal, records, options, prior):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    before = adapter(split.collate(list(split)), adapter.init_loc).detach()
    model = ScalaBLModel(adapter, num_data=len(split), prior=prior)
    after = adapter(split.collate(list(split)), model.init_loc).detach()
    torch.testing.assert_close(after, before)  # wherever the start had to move
    guide = make_guide(model, **options)
    torch.testing.assert_close(guide.median()["s"], model.init_loc)
    fit(model, guide, split, FitConfig(steps=3, lr_guide=0.1), progress=False)
    assert model.prior.support.check(guide.sample(50)).all()
    assert not torch.equal(guide.median()["s"], model.init_loc)


@pytest.mark.parametrize("options", EVERY, ids=identity)
@pytest.mark.parametrize("make_prior", [HierarchicalNormal, Horseshoe])
def test_guides_cover_the_latent_sites_of_the_prior(make_causal, records, options, make_prior):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split), prior=make_prior(adapter.shape))
    guide = make_guide(model, **options)
    before = {name: value.detach().clone() for name, value in guide.named_parameters()}
    for elbo in (
        Trace_ELBO(max_plate_nesting=1),
        Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    ):
        fit(model, guide, split, FitConfig(steps=2), elbo=elbo, progress=False)
    unmoved = [n for n, value in guide.named_parameters() if torch.equal(value, before[n])]
    assert unmoved == []


@pytest.mark.parametrize("make_prior", [HierarchicalNormal, Horseshoe])
def test_quantiles_are_of_every_latent_site(make_causal, records, make_prior):
    adapter = make_causal(targets=("lm_head",), perp=2, projections="frozen_v")
    split = adapter.readout.encode(records)
    set_perp(adapter, split)
    prior = make_prior(adapter.shape)
    model = ScalaBLModel(adapter, num_data=len(split), prior=prior, perp_scale=0.5)
    guide = AutoSubspaceNormal(model, init_scale=0.3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    batch = whole(split)
    latent = poutine.trace(model).get_trace(batch).stochastic_nodes
    median, levels = guide.median(batch), [0.1, 0.5, 0.9]
    assert {*median, "data"} == set(latent)  # and the plate
    conditioned = poutine.trace(poutine.condition(model, data=median)).get_trace(batch)
    assert conditioned.stochastic_nodes == ["data"]
    assert conditioned.log_prob_sum().isfinite()
    drawn = [guide() for _ in range(4000)]
    for name, found in guide.quantiles(levels).items():
        assert torch.equal(found[1], median[name])
        draws = torch.stack([each[name] for each in drawn]).detach()
        for level, value in zip(levels, found, strict=True):
            below = (draws <= value).float().mean(0)
            torch.testing.assert_close(below, torch.full_like(below, level), atol=0.03, rtol=0)


def test_a_hierarchical_scale_finds_the_scale_of_the_coordinates(make_causal):
    """Readings of s with little noise: the scale's posterior is near their root mean square."""
    adapter = make_causal(targets=("lm_head",))
    truth = torch.tensor([[3.0, -3.0, 2.5, -3.5]])

    class Readings(ScalaBLModel):
        def forward(self, batch):
            s = pyro.sample("s", self.prior())
            pyro.sample("y", dist.Normal(s, 0.01).to_event(2), obs=truth)

    def scale(width):
        pyro.set_rng_seed(0)
        prior = HierarchicalNormal(adapter.shape, scale=width)
        model = Readings(adapter, num_data=1, prior=prior)
        guide = AutoSubspaceNormal(model, init_loc=truth, init_scale=0.01)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        for _ in range(600):
            svi.step(None)
        return float(guide.module_scale_loc.detach().exp())

    # The grid gives the median of p(τ | s) ∝ HalfNormal(τ | width) Π_j Normal(s_j | 0, τ²).
    grid = torch.linspace(0.5, 20, 4000, dtype=torch.float64)
    for width in (1.0, 10.0):
        log_p = dist.HalfNormal(width).log_prob(grid)
        log_p = log_p + dist.Normal(0.0, grid[:, None]).log_prob(truth.double()).sum(-1)
        cumulative = log_p.softmax(0).cumsum(0)
        median = float(grid[(cumulative > 0.5).nonzero()[0, 0]])
        assert scale(width) == pytest.approx(median, rel=0.1)


def test_guide_adds_two_numbers_per_coordinate_and_pickles_without_the_llm(model):
    guide = AutoSubspaceNormal(model)
    M, r = model.adapter.shape
    assert sum(p.numel() for p in guide.parameters()) == 2 * M * r
    data = pickle.dumps(guide)
    assert len(data) < 20_000
    copy = pickle.load(io.BytesIO(data))
    torch.testing.assert_close(copy.median()["s"], guide.median()["s"])


def test_guide_refuses_bad_arguments(model, make_causal):
    guide = AutoSubspaceNormal(model)
    with pytest.raises(ValueError, match="number of draws is 0"):
        guide.sample(0)
    for scale in (0, "abc"):
        with pytest.raises(ValueError, match=f"init_scale is {scale!r}"):
            AutoSubspaceNormal(model, init_scale=scale)
    with pytest.raises(ValueError, match=r"init_loc has shape \(2,\)"):
        AutoSubspaceNormal(model, init_loc=torch.ones(2))
    positive = ScalaBLModel(make_causal(), num_data=3, prior=dist.LogNormal(0.0, 1.0))
    with pytest.raises(ValueError, match="leaves the support of the prior"):
        AutoSubspaceNormal(positive, init_loc=-positive.init_loc)
    with pytest.raises(ValueError, match="rank is 0: expected a whole number from 1 to 4"):
        make_guide(model, "low_rank_multivariate_normal", rank=0, per_module=True)


def test_history_holds_the_closed_form(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = make_guide(model, "multivariate_normal", init_scale=0.2)
    first = guide.kl(model.prior())
    history = fit(model, guide, split, FitConfig(steps=2), progress=False).history
    assert history[0]["kl"] == pytest.approx(first, rel=1e-6)


def test_a_guide_that_draws_in_forward_is_drawn_from_there(make_causal, records):
    """As where s depends on another latent site, and q(s) is no single distribution."""
    model = ScalaBLModel(make_causal(), num_data=12)

    class Own(AutoSubspace):
        def base(self):
            return dist.Normal(self._init_loc, 0.1).to_event(2)

        def forward(self, batch):
            assert batch is not None
            q = dist.Normal(torch.zeros(model.adapter.shape), 1.0).to_event(2)
            pyro.sample("s", q)

    guide = Own(model)
    batch = whole(model.adapter.encode(records))
    draws = draw(guide, 500, seed=0, batch=batch)
    torch.testing.assert_close(draws.mean(), torch.tensor(0.0), atol=0.1, rtol=0)
    torch.testing.assert_close(draws.std(), torch.tensor(1.0), atol=0.1, rtol=0)
    for kind in ("antithetic", "sobol"):
        with pytest.raises(ValueError, match="Own overrides forward; use kind='independent'"):
            draw(guide, 4, seed=0, kind=kind)
    with pytest.raises(ValueError, match="Own overrides forward, and a prior is get_posterior"):
        guide.as_prior()


def test_base_alone_is_enough_to_train(make_causal, records):
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))

    class Mixture(AutoSubspace):
        """No normal, and without marginals: its KL is that of its draws."""

        def __init__(self, model):
            super().__init__(model)
            self.loc = PyroParam(self._init_loc.clone(), event_dim=2)

        def base(self):
            return dist.StudentT(5.0, self.loc, 0.1).to_event(2)

    guide = Mixture(model)
    assert guide.kl(model.prior()) is None
    result = fit(model, guide, split, FitConfig(3, batch_size=4), progress=False)
    assert all(math.isfinite(row["kl"]) for row in result.history)


def test_draws_of_ordinary_guides_of_pyro(make_causal, records):
    adapter = make_causal()
    batch = whole(adapter.encode(records))
    model = ScalaBLModel(adapter, num_data=len(records))

    def returns_a_tensor(batch):
        return pyro.sample("s", dist.Normal(adapter.init_loc, 0.1).to_event(2))

    def returns_nothing(batch):
        returns_a_tensor(batch)

    def hides_its_site(batch):
        with pyro.poutine.block():
            return {"s": returns_a_tensor(batch)}

    for guide in (returns_a_tensor, returns_nothing, hides_its_site):
        draws = draw(guide, 300, seed=0)
        torch.testing.assert_close(draws.mean(0), adapter.init_loc, atol=0.03, rtol=0)
    moved = pyro.poutine.reparam(model, {"s": LocScaleReparam(0.0)})
    with pytest.raises(ValueError, match=r"samples \[.*'s_decentered'\], and not 's'"):
        draw(AutoNormal(moved), 3, seed=0, batch=batch)


def test_medians_take_what_those_of_pyros_guides_take(make_causal, records):
    """So that one guide stands for the other in a line."""
    model = ScalaBLModel(make_causal(), num_data=12)
    batch = whole(model.adapter.encode(records))
    for name in ("normal", "delta", "top_normal"):
        guide = make_guide(model, name)
        assert torch.equal(guide.median(batch)["s"], guide.median()["s"])
        assert torch.equal(guide.quantiles([0.5], batch)["s"], guide.quantiles([0.5])["s"])


def test_draws_of_a_point_stay_when_it_is_trained_on(model, split):
    guide = AutoSubspaceDelta(model)
    draws = draw(guide, 2, seed=0)
    before = draws.clone()
    fit(model, guide, split, FitConfig(steps=3, lr_guide=0.5), progress=False)
    assert not torch.equal(guide.median()["s"], before[0])
    assert torch.equal(draws, before)
    assert not draws.requires_grad


def test_a_guide_that_runs_the_model_inside_itself_is_for_svi(model, split):
    guide = AutoNormalMessenger(model)
    with pytest.raises(TypeError, match="AutoNormalMessenger, which runs the model inside itself"):
        fit(model, guide, split, FitConfig(steps=1), progress=False)
    batch = whole(split)
    guide(batch)
    with pytest.raises(ValueError, match="AutoNormalMessenger runs the model, which needs a batch"):
        draw(guide, 2, seed=0)
    assert draw(guide, 2, seed=0, batch=batch).shape == (2, *model.adapter.shape)
