from __future__ import annotations

from collections.abc import Sequence

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_records, whole
from pyro.infer.autoguide import AutoNormal

from scalabl_pyro import (
    AutoSubspaceMultivariateNormal,
    AutoSubspaceNormal,
    Predictor,
    ScalaBLModel,
    Split,
    draw,
)
from scalabl_pyro.data import Batch
from scalabl_pyro.data.batches import Example
from scalabl_pyro.diagnostics.inference_data import to_inference_data
from scalabl_pyro.diagnostics.psis import loo, pareto_k
from scalabl_pyro.guides import GUIDES
from scalabl_pyro.infer import laplace
from scalabl_pyro.models.priors import PRIORS, Prior

HISTORY = [
    {"step": 1, "loss": 3.0, "nll": 2.0, "kl": 8.0, "kl_weight": 0.5},
    {"step": 2, "loss": 2.0, "nll": 1.5, "kl": 9.0, "kl_weight": 1.0, "validation_nll": 1.7},
]


@pytest.fixture
def trained(make_causal, records):
    """Model, guide, predictor and split."""
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceMultivariateNormal(model, init_scale=0.3)
    return model, guide, Predictor(adapter, draw(guide, 30, seed=0)), split


def test_every_group_has_named_coordinates_and_survives_netcdf(trained, tmp_path):
    model, guide, predictor, split = trained
    data = to_inference_data(predictor, split, model=model, guide=guide, history=HISTORY)
    data.to_netcdf(tmp_path / "posterior.nc")
    names = list(model.adapter.module_names)
    for each in (data, az.from_netcdf(tmp_path / "posterior.nc")):
        assert set(each.groups()) == {
            "posterior",
            "prior",
            "posterior_predictive",
            "log_likelihood",
            "log_prior",
            "observed_data",
            "sample_stats",
        }
        assert each.posterior["s"].dims == ("chain", "draw", "module", "rank")
        assert list(each.prior["module"].values) == names
        assert list(each.log_likelihood["example"].values) == [r.id for r in split.records]
        assert each.posterior_predictive["label"].shape == (1, 30, len(split))
        assert list(each.sample_stats["kl"].sel(step=[2]).values) == [9.0]
        assert np.isnan(each.sample_stats["validation_nll"].values[0])
        np.testing.assert_array_equal(each.posterior["s"][0], predictor.draws)
        for group in data.groups():
            assert each[group].equals(data[group]), group
    assert pareto_k(each) == pareto_k(data)


def test_densities_against_the_distributions_themselves(trained):
    model, guide, predictor, split = trained
    data = to_inference_data(predictor, split, model=model, guide=guide)
    expected = model.adapter(whole(split), predictor.draws[2]).log_softmax(-1).detach()
    picked = expected[torch.arange(len(split)), split.labels]
    np.testing.assert_allclose(data.log_likelihood["label"].sel(draw=2)[0], picked, atol=1e-5)
    with torch.no_grad():
        log_prior = model.prior().log_prob(predictor.draws)
        log_q = guide.get_posterior().log_prob(predictor.draws)
    np.testing.assert_allclose(data.log_prior["s"][0], log_prior, rtol=1e-5)
    np.testing.assert_allclose(data.sample_stats["log_q"][0], log_q, rtol=1e-5)


def test_the_likelihood_is_the_models_own(trained):
    model, guide, predictor, split = trained

    class Noisy(ScalaBLModel):
        """A tenth of the labels is drawn at random, and each counts half."""

        def observe(self, batch, logits):
            batch = batch.to(logits.device)
            p = 0.9 * logits.softmax(-1) + 0.1 / logits.shape[-1]
            with self.data_plate(batch), pyro.poutine.scale(scale=0.5):
                pyro.sample("label", dist.Categorical(p), obs=batch.labels)
            return logits

    noisy = Noisy(model.adapter, num_data=len(split))
    plain = to_inference_data(predictor, split, model=model, guide=guide, batch_size=3)
    data = to_inference_data(predictor, split, model=noisy, guide=guide, batch_size=3)
    p = np.exp(plain.log_likelihood["label"].values)
    expected = 0.5 * np.log(0.9 * p + 0.1 / 4)
    np.testing.assert_allclose(data.log_likelihood["label"].values, expected, rtol=1e-4)
    direct = to_inference_data(predictor, split).log_likelihood["label"].values
    np.testing.assert_allclose(plain.log_likelihood["label"].values, direct, rtol=1e-5)


def test_further_latent_sites_of_a_prior_stand_beside_s(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    prior = PRIORS["hierarchical_normal"](adapter.shape)
    model = ScalaBLModel(adapter, num_data=len(split), prior=prior)
    guide = AutoSubspaceNormal(model)
    predictor = Predictor(adapter, draw(guide, 6, seed=0))
    data = to_inference_data(predictor, split, model=model, guide=guide)
    scale = data.posterior["module_scale"]
    assert scale.dims == data.prior["module_scale"].dims == ("chain", "draw", "module")
    tau = torch.tensor(scale.values[0])[..., None]  # (S, M, 1)
    expected = dist.Normal(0.0, tau).log_prob(predictor.draws).sum((-1, -2))
    np.testing.assert_allclose(data.log_prior["s"][0], expected, rtol=1e-5)
    expected = dist.HalfNormal(1.0).log_prob(tau).sum((-1, -2))
    np.testing.assert_allclose(data.log_prior["module_scale"][0], expected, rtol=1e-5)
    with torch.no_grad():
        log_q = guide.get_posterior().log_prob(predictor.draws)
        q = dist.LogNormal(guide.module_scale_loc, guide.module_scale_scale)
        log_q = log_q + q.log_prob(tau).sum((-1, -2))
    np.testing.assert_allclose(data.sample_stats["log_q"][0], log_q, rtol=1e-4)


def test_chains_of_a_sampler_come_apart_again(trained):
    _, _, predictor, split = trained
    data = to_inference_data(predictor, split, chains=3)
    assert dict(data.posterior.sizes) | {"chain": 3, "draw": 10} == dict(data.posterior.sizes)
    np.testing.assert_array_equal(data.posterior["s"][1, 4], predictor.draws[14])
    single = to_inference_data(predictor, split)
    np.testing.assert_array_equal(
        data.log_likelihood["label"][2, 9], single.log_likelihood["label"][0, 29]
    )
    assert np.isfinite(az.rhat(data)["s"]).all()


def test_what_is_drawn_follows_its_seed_and_leaves_the_global_state(trained):
    model, _, predictor, split = trained
    state = torch.random.get_rng_state()
    first = to_inference_data(predictor, split, model=model, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(1)
    again = to_inference_data(predictor, split, model=model, seed=1)
    other = to_inference_data(predictor, split, model=model, seed=2)
    for group in ("prior", "posterior_predictive"):
        assert first[group].equals(again[group])
        assert not first[group].equals(other[group])


def test_what_cannot_be_converted_is_refused(make_causal, trained):
    model, guide, predictor, split = trained
    with pytest.raises(ValueError, match="point estimate"):
        to_inference_data(Predictor(model.adapter))
    unlabelled = model.adapter.readout.encode(make_records(3, labelled=False))
    with pytest.raises(ValueError, match="label in every record"):
        to_inference_data(predictor, unlabelled)
    with pytest.raises(ValueError, match="chains is 4: expected a divisor of the 30 draws"):
        to_inference_data(predictor, chains=4)
    with pytest.raises(ValueError, match="pass model beside guide"):
        to_inference_data(predictor, split, guide=guide)
    with pytest.raises(ValueError, match="AutoSubspaceDelta is a point"):
        to_inference_data(predictor, split, model=model, guide=GUIDES["delta"](model))
    with pytest.raises(ValueError, match="the guide is a AutoNormal, whose density"):
        to_inference_data(predictor, split, model=model, guide=AutoNormal(model))


def test_leave_one_out_needs_the_densities_of_the_training_split(trained):
    model, guide, predictor, split = trained
    for check in (loo, pareto_k):
        with pytest.raises(ValueError, match="no log_prior, sample_stats in the data"):
            check(to_inference_data(predictor, split, model=model))
        half = model.adapter.readout.encode(make_records(5))
        with pytest.raises(ValueError, match=r"holds 5 examples, but .* N = 12"):
            check(to_inference_data(predictor, half, model=model, guide=guide))
        few = Predictor(model.adapter, predictor.draws[:24])
        with pytest.raises(ValueError, match="there are 24 draws"):
            check(to_inference_data(few, split, model=model, guide=guide))


# -------------------------------------------------------------------- against exact leave-one-out


class Logistic:
    """Logistic regression with the interface of an adapter: "modules" are two slopes, r is 1."""

    module_names = ("a", "b")
    rank = 1
    shape = (2, 1)
    init_loc = torch.zeros(2, 1)
    device = torch.device("cpu")

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features  # (N, 2)

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def eval(self) -> None:
        pass

    def __call__(self, batch: Batch, s: torch.Tensor) -> torch.Tensor:
        z = self.features[batch.inputs["input_ids"][:, 0]] @ s  # (*draws, B, 1)
        return torch.cat([torch.zeros_like(z), z], -1)


def stack(examples: Sequence[Example]) -> Batch:
    ids = torch.tensor([example.rows["input_ids"][0] for example in examples])
    labels = torch.tensor([example.label for example in examples])
    return Batch({"input_ids": ids}, torch.ones(len(ids), 2, dtype=torch.bool), labels)


class Exact:
    """Logistic regression on N data, and its posterior on a grid."""

    def __init__(self, num_data: int) -> None:
        features = torch.randn(num_data, 2)
        labels = (features @ torch.tensor([1.0, -0.5]) + torch.randn(num_data) > 0).long()
        examples = [Example({"input_ids": [[n]]}, 2, int(y)) for n, y in enumerate(labels)]
        self.split = Split(make_records(num_data), examples, stack)
        self.adapter = Logistic(features)
        self.model = ScalaBLModel(self.adapter, num_data=num_data)
        axis = torch.linspace(-6, 6, 401)
        self.grid = torch.cartesian_prod(axis, axis).double()  # (G, 2)
        logits = self.adapter(whole(self.split), self.grid[..., None].float())
        log_likelihood = logits.double().log_softmax(-1)[:, range(num_data), labels]  # (G, N)
        log_p = dist.Normal(0.0, 1.0).log_prob(self.grid).sum(-1) + log_likelihood.sum(-1)
        self.weights = log_p.softmax(0)
        without = (log_p[:, None] - log_likelihood).log_softmax(0)  # p(s | y_{-n})
        self.elpd = (without + log_likelihood).logsumexp(0).numpy()  # (N,)

    def data(self, *, scale: float = 1.0, num_draws: int = 4000) -> az.InferenceData:
        """Draws of a normal with the posterior's mean, and its covariance times scale²."""
        mean = self.weights @ self.grid
        covariance = (self.grid - mean).T @ ((self.grid - mean) * self.weights[:, None])
        tril = scale * torch.linalg.cholesky(covariance)
        guide = AutoSubspaceMultivariateNormal(self.model)
        guide.loc = mean.float()
        guide.scale = tril.diagonal().float()
        guide.scale_tril = (tril / tril.diagonal()[:, None]).float()
        predictor = Predictor(self.adapter, draw(guide, num_draws, seed=0), max_rows=10**6)
        return to_inference_data(predictor, self.split, model=self.model, guide=guide)


@pytest.fixture
def exact() -> Exact:
    return Exact(20)


def test_loo_is_exact_leave_one_out_for_a_guide_that_covers_the_posterior(exact):
    data = exact.data(scale=1.2)
    estimate = loo(data)
    assert pareto_k(data) < 0.5
    assert not estimate.warning
    np.testing.assert_allclose(estimate.loo_i, exact.elpd, atol=0.03)
    assert estimate.elpd_loo == pytest.approx(exact.elpd.sum(), abs=0.05)
    assert estimate.se == pytest.approx((20 * exact.elpd.var()) ** 0.5, rel=0.05)
    # Without the correction for q the guide is judged, not the posterior.
    assert az.loo(data).elpd_loo < exact.elpd.sum() - 0.5


@pytest.mark.parametrize("scale", [0.2, 0.75])
def test_k_hat_flags_a_guide_that_misses_the_posterior(exact, scale):
    data = exact.data(scale=scale)
    with pytest.warns(UserWarning, match=r"Pareto k is above 0\.70 for \d+ of 20 examples"):
        estimate = loo(data)
    assert estimate.warning
    assert (estimate.pareto_k > estimate.good_k).any()
    # az.loo takes the draws for the posterior's: it is optimistic, and sees nothing.
    plain = az.loo(data)
    assert not plain.warning
    assert plain.elpd_loo > exact.elpd.sum() + 0.3
    assert abs(estimate.elpd_loo - exact.elpd.sum()) < plain.elpd_loo - exact.elpd.sum()


def test_k_hat_of_a_guide_that_is_far_too_narrow(exact):
    assert pareto_k(exact.data(scale=0.2)) > 0.7


def test_draws_of_another_guide_are_told(trained, caplog):
    model, guide, predictor, _ = trained
    to_inference_data(predictor, model=model, guide=guide)
    assert not caplog.records
    wide = AutoSubspaceNormal(model, init_scale=3.0)
    to_inference_data(predictor, model=model, guide=wide)
    assert "they come from another one, or it was trained further" in caplog.text


def test_guides_compare_in_arviz(exact):
    datas = {"close": exact.data(scale=1.2), "wide": exact.data(scale=1.4)}
    table = az.compare({name: loo(data) for name, data in datas.items()})
    assert set(table.index) == set(datas)
    # One posterior, whatever the guide that it is seen through.
    assert table["elpd_diff"].max() < 0.05
    assert az.compare(datas)["elpd_diff"].max() > 0.3
    assert "elpd_loo" in str(loo(datas["close"]))


@pytest.mark.parametrize("scale", [0.5, 0.7])
def test_k_hat_against_its_closed_form(scale):
    """Where the data say nothing, the ratio N(0, 1) / N(0, σ²) has tail index 1 − σ²."""
    toy = Exact(1)
    toy.adapter.features.zero_()
    guide = AutoSubspaceNormal(toy.model, init_scale=scale)
    predictor = Predictor(toy.adapter, draw(guide, 100_000, seed=0), max_rows=10**6)
    data = to_inference_data(predictor, toy.split, model=toy.model, guide=guide)
    assert pareto_k(data) == pytest.approx(1 - scale**2, abs=0.05)


def test_what_would_be_computed_without_the_models_own_forward_is_refused(make_causal, records):
    class Tripled(ScalaBLModel):
        def forward(self, batch):
            self.projections()
            s = pyro.sample("s", self.prior())
            return self.observe(batch, 3 * self.adapter(batch, s))

    adapter = make_causal()
    split = adapter.encode(records)
    model = Tripled(adapter, num_data=len(split))
    predictor = Predictor(adapter, torch.randn(4, *adapter.shape))
    with pytest.raises(ValueError, match="Tripled overrides forward, and to_inference_data"):
        to_inference_data(predictor, split, model=model)
    with pytest.raises(ValueError, match="Tripled overrides forward, and laplace"):
        laplace(model, split)


def test_sites_of_prior_and_guide_are_the_same_or_told(make_causal, records):
    class Forgetful(Prior):
        """Samples a scale, and does not say so."""

        def forward(self):
            scale = pyro.sample("tau", dist.HalfNormal(1.0).expand((1, 1)).to_event(2))
            return dist.Normal(scale.new_zeros(self.shape), scale).to_event(2)

    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split), prior=Forgetful(adapter.shape))
    guide = AutoSubspaceNormal(model)
    predictor = Predictor(adapter, draw(guide, 30, seed=0))
    with pytest.raises(ValueError, match=r"prior samples \['s', 'tau'\], and the guide \['s'\]"):
        to_inference_data(predictor, split, model=model, guide=guide)


def test_likelihoods_of_which_no_label_can_be_drawn_are_named(make_causal, records):
    class Factor(ScalaBLModel):
        def observe(self, batch, logits):
            with self.data_plate(batch):
                pyro.factor("label", dist.Categorical(logits=logits).log_prob(batch.labels))
            return logits

    class Renamed(ScalaBLModel):
        def observe(self, batch, logits):
            with self.data_plate(batch):
                pyro.sample("y", dist.Categorical(logits=logits), obs=batch.labels)
            return logits

    adapter = make_causal()
    split = adapter.encode(records)
    predictor = Predictor(adapter, torch.randn(4, *adapter.shape))
    for kind in (Factor, Renamed):
        model = kind(adapter, num_data=len(split))
        with pytest.raises(ValueError, match=rf"{kind.__name__} observes .*: expected a site"):
            to_inference_data(predictor, split, model=model)
