"""SVI of any Pyro program in arviz; right values from closed forms, arviz and loops by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_value
from scipy import stats

from scalabl_pyro import (
    AutoSubspaceNormal,
    Predictor,
    ScalaBLModel,
    draw,
    from_pyro_svi,
    to_inference_data,
)

PLACES = ["Bath", "Ghent", "Lund"]


def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """Intercepts (place) around a slope; 4 observations each."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("place", 3, dim=-1):
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        with pyro.plate("time", 4, dim=-2):
            mean = pyro.deterministic("mean", level + slope * x)
            pyro.factor("nothing", torch.zeros(4, 3))
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


@pytest.fixture
def data() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    return {"x": x, "y": 0.7 * x + torch.tensor([-1.0, 0.0, 1.0]) + 0.5 * torch.randn(4, 3)}


def fitted(program, guide, **inputs) -> SVI:
    """Before its first step: how good the guide is does not matter here."""
    guide(**inputs)  # the first call makes the guide's parameters
    return SVI(program, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())


def test_groups_names_and_values_are_those_of_arviz_for_mcmc(data):
    kernel = NUTS(model)
    chain = MCMC(kernel, num_samples=20, warmup_steps=5, disable_progbar=True)
    chain.run(**data)
    other = az.from_pyro(chain, log_likelihood=True)
    svi = fitted(model, AutoNormal(model), **data)
    ours = from_pyro_svi(svi, model_kwargs=data, log_likelihood=True, num_samples=20)
    assert set(ours.groups()) == set(other.groups()) - {"sample_stats"}
    assert ours.posterior["level"].dims == ("chain", "draw", "place")
    assert ours.log_likelihood["y"].dims == ("chain", "draw", "time", "place")
    for name, values in other.posterior.items():
        assert ours.posterior[name].shape == values.shape
    # arviz takes the deterministic site for an observed one.
    assert set(ours.observed_data) == set(other.observed_data) - {"mean", "nothing"}
    np.testing.assert_array_equal(ours.observed_data["y"], other.observed_data["y"])


def test_the_log_likelihood_is_the_closed_form_of_the_draws(data):
    converted = from_pyro_svi(
        fitted(model, AutoMultivariateNormal(model), **data),
        model_kwargs=data,
        log_likelihood=True,
        num_samples=7,
    )
    level, slope = (converted.posterior[name].values[0] for name in ("level", "slope"))
    mean = level[:, None, :] + slope[:, None, None] * data["x"].numpy()
    expected = stats.norm(mean, 0.5).logpdf(data["y"].numpy())
    np.testing.assert_allclose(converted.log_likelihood["y"].values[0], expected, atol=1e-5)
    assert set(converted.posterior) == {"level", "slope"}  # and not the guide's own site


def test_draws_have_the_mean_and_scale_of_the_posterior():
    torch.manual_seed(1)
    y = torch.randn(30) + 0.8

    def conjugate(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    scale = (1 + len(y)) ** -0.5
    loc = y.sum() * scale**2
    exact = AutoNormal(conjugate, init_loc_fn=init_to_value(values={"mean": loc}), init_scale=scale)
    exact(y)
    svi = SVI(conjugate, exact, pyro.optim.Adam({}), Trace_ELBO())
    converted = from_pyro_svi(svi, model_args=(y,), num_samples=4000, log_likelihood=True)
    mean = converted.posterior["mean"]
    assert float(mean.mean()) == pytest.approx(float(loc), abs=5 * scale / 4000**0.5)
    assert float(mean.std()) == pytest.approx(scale, rel=0.06)
    # Cross-validation by the stock function, against the closed form of each left-out example.
    without = (y.sum() - y) / len(y)
    elpd = stats.norm(without.numpy(), (1 + 1 / len(y)) ** 0.5).logpdf(y.numpy()).sum()
    assert float(az.loo(converted)["elpd_loo"]) == pytest.approx(elpd, abs=0.2)


def test_subsampling_scales_nothing_and_masks_count():
    y = torch.tensor([0.3, -1.0, 2.0, 0.1])
    seen = torch.tensor([True, False, True, True])

    def half(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 40, subsample=torch.arange(4)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    converted = from_pyro_svi(
        fitted(half, AutoNormal(half), y=y), model_args=(y,), log_likelihood=True, num_samples=5
    )
    mean = converted.posterior["mean"].values[0][:, None]
    expected = np.where(seen.numpy(), stats.norm(mean, 1.0).logpdf(y.numpy()), 0.0)
    np.testing.assert_allclose(converted.log_likelihood["y"].values[0], expected, atol=1e-5)


def test_a_guide_by_hand_with_a_site_of_its_own(data):
    def guide(x, y=None):
        helper = pyro.sample("helper", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("slope", dist.Delta(helper + 3.0))
        with pyro.plate("place", 3, dim=-1):
            pyro.sample("level", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 1e-3))

    converted = from_pyro_svi(fitted(model, guide, **data), model_kwargs=data, num_samples=40)
    assert set(converted.posterior) == {"level", "slope"}
    np.testing.assert_allclose(converted.posterior["level"].mean("draw")[0], [-1, 0, 1], atol=1e-2)
    assert float(converted.posterior["slope"].std()) > 0.5  # each draw is one of its own


def test_predictions_of_pyro_stand_beside_the_posterior(data):
    svi = fitted(model, AutoNormal(model), **data)
    samples = {
        "prior": Predictive(model, num_samples=6)(data["x"]),
        "posterior_predictive": Predictive(model, guide=svi.guide, num_samples=5)(data["x"]),
        "predictions": Predictive(model, guide=svi.guide, num_samples=5)(data["x"] + 1),
    }
    converted = from_pyro_svi(
        svi,
        model_kwargs=data,
        **samples,
        constant_data={"x": data["x"]},
        predictions_constant_data={"x": data["x"] + 1},
        coords={"place": PLACES},
        dims={"x": ["time", "place"]},
        pred_dims={"y": ["later", "place"]},
    )
    assert set(converted.prior) == {"level", "slope"}
    assert set(converted.prior_predictive) == {"y", "mean"}
    assert converted.prior["slope"].shape == (1, 6)  # (6, 1, 1) of Predictive
    np.testing.assert_array_equal(converted.prior["level"][0], samples["prior"]["level"][:, 0])
    assert converted.posterior_predictive["y"].dims == ("chain", "draw", "time", "place")
    assert converted.predictions["y"].dims == ("chain", "draw", "later", "place")
    assert converted.constant_data["x"].dims == ("time", "place")
    assert list(converted.posterior["place"].values) == PLACES
    np.testing.assert_array_equal(converted.predictions_constant_data["x"], data["x"] + 1)


def test_samples_alone_need_no_inference(data):
    samples = Predictive(model, num_samples=6)(data["x"])
    converted = from_pyro_svi(prior=samples)
    assert set(converted.groups()) == {"prior"}
    np.testing.assert_array_equal(converted.prior["y"][0], samples["y"])


def test_event_dimensions_take_the_names_of_the_statement():
    def regression():
        infer = {"event_dims": ["feature"]}
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer=infer)
        pyro.sample("v", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))

    converted = from_pyro_svi(fitted(regression, AutoNormal(regression)), num_samples=3)
    assert converted.posterior["w"].dims == ("chain", "draw", "feature")
    assert converted.posterior["v"].dims == ("chain", "draw", "v_dim_0")


def test_a_language_model_with_a_guide_of_its_own_and_of_pyros(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    batch = split.collate(list(split))
    program = ScalaBLModel(adapter, num_data=10 * len(split))
    guide = AutoSubspaceNormal(program, init_scale=0.3)
    for each in (guide, AutoNormal(program)):
        svi = SVI(program, each, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        converted = from_pyro_svi(svi, model_args=(batch,), log_likelihood=True, num_samples=4)
        s = torch.from_numpy(converted.posterior["s"].values[0])
        assert s.shape == (4, len(adapter.module_names), adapter.rank)
        expected = to_inference_data(Predictor(adapter, s), split, model=program)
        np.testing.assert_allclose(
            converted.log_likelihood["label"], expected.log_likelihood["label"], atol=1e-5
        )
    assert draw(guide, 4, seed=0).shape == s.shape


def test_what_cannot_be_converted_is_refused(data):
    svi = fitted(model, AutoNormal(model), **data)
    with pytest.raises(ValueError, match="nothing to convert"):
        from_pyro_svi()
    with pytest.raises(TypeError, match=r"svi is a NUTS: expected .*az\.from_pyro"):
        from_pyro_svi(NUTS(model))
    with pytest.raises(ValueError, match=r"log_likelihood needs .* pass svi"):
        from_pyro_svi(prior={"a": torch.zeros(2)}, log_likelihood=True)
    with pytest.raises(ValueError, match="num_samples is 0: expected 1 or more"):
        from_pyro_svi(svi, model_kwargs=data, num_samples=0)
    with pytest.raises(ValueError, match=r"dims of level are \['a', 'b'\]: expected 1 names"):
        from_pyro_svi(svi, model_kwargs=data, dims={"level": ["a", "b"]}, num_samples=2)
    short = AutoDelta(poutine.block(model, hide=["slope"]))
    short(**data)
    lacking = SVI(model, short, pyro.optim.Adam({}), Trace_ELBO())
    with pytest.raises(ValueError, match="the guide has no site 'slope'"):
        from_pyro_svi(lacking, model_kwargs=data, num_samples=2)


def test_a_point_is_a_posterior_of_equal_draws(data):
    svi = fitted(model, AutoDelta(model), **data)
    converted = from_pyro_svi(svi, model_kwargs=data, log_likelihood=True, num_samples=3)
    assert np.ptp(converted.posterior["slope"].values) == 0
    assert math.isfinite(float(converted.log_likelihood["y"].sum()))


def test_a_plate_that_draws_its_own_subsample_draws_it_once():
    """Against the density of the very values that it was to have drawn, column by column."""
    y = torch.arange(30.0)

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 100.0))
        with pyro.plate("n", 30, subsample_size=6) as some:
            pyro.sample("y", dist.Normal(mean, 10.0), obs=y[some])

    svi = fitted(model, AutoNormal(model), y=y)
    converted = from_pyro_svi(svi, model_args=(y,), log_likelihood=True, num_samples=5)
    observed = converted.observed_data["y"]
    np.testing.assert_array_equal(observed.values, y.numpy()[observed["n"].values])
    assert len(set(observed.values)) == 6
    given = {"mean": torch.zeros(5), "y": torch.zeros(5, 6)}
    others = from_pyro_svi(svi, model_args=(y,), prior=given, num_samples=5).prior_predictive
    assert list(others["n"].values) == list(range(6)), "which had a subsample of its own"
    mean = converted.posterior["mean"].values[0][:, None]
    expected = stats.norm(mean, 10.0).logpdf(observed.values)
    np.testing.assert_allclose(converted.log_likelihood["y"].values[0], expected, rtol=1e-5)


EARLIER = """
import pyro, torch
import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
import scalabl_pyro as sp

def model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

y = torch.tensor([0.5, 1.0, 1.5])
pyro.param("of no module", torch.tensor(2.0))
guide = AutoNormal(model)
svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=20))
for _ in range(100):
    svi.step(y)
before = float(guide.median()["mean"])
sp.from_pyro_svi(svi, model_args=(y,), num_samples=3)
assert not pyro.settings.get("module_local_params"), "for others it changes nothing"
sp.ScalaBLModel
assert pyro.settings.get("module_local_params")
assert float(guide.median()["mean"]) == before
for _ in range(300):
    svi.step(y)
assert abs(float(guide.median()["mean"]) - 0.75) < 0.1  # 3/4 of the mean, in closed form
assert list(pyro.get_param_store()) == ["of no module"]
"""


def test_what_was_fitted_before_goes_on():
    """In a process of its own, where no model of this package was made yet."""
    done = subprocess.run(
        [sys.executable, "-c", EARLIER], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
