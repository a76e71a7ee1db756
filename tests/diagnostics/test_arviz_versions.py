"""arviz 0.2x and 1.x behind the same names. Nothing here needs torch:

pytest --noconftest -c /dev/null tests/diagnostics/test_arviz_versions.py

runs in an environment with arviz 1.x alone, which needs Python 3.12.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scalabl_pyro import arviz_versions as versions  # noqa: E402
from scalabl_pyro.arviz_versions import az  # noqa: E402


def file_of_diagnostics(name: str) -> ModuleType:
    """A file of the folder without the folder's own imports, some of which need torch."""
    place = ROOT / "scalabl_pyro" / "diagnostics" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"scalabl_pyro.diagnostics._{name}", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Conjugate:
    """y_n ~ Normal(s, 1), s ~ Normal(0, 1): posteriors and their predictions in closed form."""

    def __init__(self, num_data: int = 12) -> None:
        rng = np.random.default_rng(0)
        self.y = rng.normal(0.5, 1.0, num_data)
        self.scale = (1 + num_data) ** -0.5
        self.loc = self.y.sum() * self.scale**2
        without = (self.y.sum() - self.y) / num_data  # mean of p(s | y_{-n}), whose variance is 1/N
        self.elpd = stats.norm(without, (1 + 1 / num_data) ** 0.5).logpdf(self.y)
        self.lppd = stats.norm(self.loc, (1 + self.scale**2) ** 0.5).logpdf(self.y)

    def data(self, widening: float, num_draws: int = 4000):
        """Draws of a normal that is so many times wider than the posterior."""
        q = stats.norm(self.loc, widening * self.scale)
        s = q.rvs(num_draws, random_state=1)[None]  # (chain, draw)
        likelihood = stats.norm(s[..., None], 1).logpdf(self.y)
        example = {"dims": {"label": ["example"]}, "coords": {"example": range(len(self.y))}}
        datasets = {
            "posterior": versions.dataset({"s": s}),
            "log_likelihood": versions.dataset({"label": likelihood}, **example),
            "log_prior": versions.dataset({"s": stats.norm.logpdf(s)}),
            "sample_stats": versions.dataset({"log_q": q.logpdf(s)}),
            "prior": versions.dataset({"s": s}).assign_attrs(num_data=len(self.y)),
        }
        return versions.groups(datasets)


def test_groups_are_found_by_name_and_survive_netcdf(tmp_path):
    data = Conjugate().data(1.2, num_draws=50)
    assert isinstance(data, xr.DataTree) == versions.MODULAR
    data.to_netcdf(tmp_path / "data.nc")
    for each in (data, az.from_netcdf(tmp_path / "data.nc")):
        assert "posterior" in each
        assert "posterior_predictive" not in each
        group = versions.group(each, "log_likelihood")
        assert isinstance(group, xr.Dataset)
        assert dict(group.sizes) == {"chain": 1, "draw": 50, "example": 12}
        assert versions.group(each, "prior").attrs["num_data"] == 12
        assert list(each["posterior"]["s"]["draw"].values) == list(range(50))


def test_names_of_further_dimensions():
    values = {"a": np.zeros((2, 3, 4)), "b": np.zeros((2, 3))}
    dataset = versions.dataset(values, coords={"rank": "wxyz", "other": [1]}, dims={"a": ["rank"]})
    assert dataset["a"].dims == ("chain", "draw", "rank")
    assert list(dataset["rank"].values) == list("wxyz")
    assert "other" not in dataset.coords
    assert versions.dataset(values)["a"].dims == ("chain", "draw", "a_dim_0")
    assert versions.dataset({"y": np.arange(3)}, dims={"y": ["n"]}, first=())["y"].dims == ("n",)


@pytest.mark.parametrize("k", [0.2, 0.6])
def test_k_is_that_of_the_right_tail_of_the_weights(k):
    """Weights of a Pareto distribution with that index; near 0 it is flat, so that 1 / w has 1."""
    weights = stats.genpareto(k).rvs((1, 100_000), random_state=0)
    smoothed, k_hat = versions.psis(np.log(weights))
    tail = (
        3 * 100_000**0.5
    )  # so many weights are looked at, and a standard error is (1 + k) / √tail
    assert k_hat.item() == pytest.approx(k, abs=3 * (1 + k) / tail**0.5)
    assert versions.psis(-np.log(weights))[1].item() == pytest.approx(1, abs=3 * 2 / tail**0.5)
    np.testing.assert_allclose(np.exp(smoothed).sum(-1), 1)
    body = np.sort(smoothed[0])[:50_000] - np.sort(np.log(weights[0]))[:50_000]
    np.testing.assert_allclose(body, body[0], rtol=1e-9)  # as they were, but for the sum


def test_psis_of_a_samplers_draws_is_the_loo_of_arviz():
    """The weights of leave-one-out are 1 / p(y_n | s)."""
    data = Conjugate().data(1.0)
    terms = versions.group(data, "log_likelihood")["label"].values[0].T  # (N, S)
    smoothed, k = versions.psis(-terms)
    loo = az.loo(data, pointwise=True, reff=1.0)
    pointwise = loo.elpd_i if versions.MODULAR else loo.loo_i
    np.testing.assert_allclose(np.log(np.exp(smoothed + terms).sum(-1)), pointwise, rtol=1e-6)
    np.testing.assert_allclose(k, loo.pareto_k, atol=1e-6)


@pytest.mark.parametrize(("num_draws", "good_k"), [(100, 0.5), (1000, 2 / 3), (4000, 0.7)])
def test_a_good_k_is_lower_of_few_draws(num_draws, good_k):
    """1 − 1 / log₁₀ S, and no more than 0.7."""
    data = Conjugate().data(1.2, num_draws=num_draws)
    assert file_of_diagnostics("psis").loo(data).good_k == pytest.approx(good_k)


def test_loo_of_a_guide_is_exact_where_there_is_a_closed_form():
    exact, psis = Conjugate(), file_of_diagnostics("psis")
    data = {name: exact.data(widening) for name, widening in (("close", 1.2), ("wide", 1.6))}
    by_guide = {name: psis.loo(each) for name, each in data.items()}
    for name, each in by_guide.items():
        total, pointwise = (
            (each.elpd, each.elpd_i) if versions.MODULAR else (each.elpd_loo, each.loo_i)
        )
        np.testing.assert_allclose(pointwise, exact.elpd, atol=0.03)
        assert total == pytest.approx(exact.elpd.sum(), abs=0.05)
        p_loo = each.p if versions.MODULAR else each.p_loo
        assert p_loo == pytest.approx(exact.lppd.sum() - exact.elpd.sum(), rel=0.05)
        assert psis.pareto_k(data[name]) < 0.5
        assert each.se == pytest.approx((12 * exact.elpd.var()) ** 0.5, rel=0.05)
    # Of the draws alone arviz judges the guide and not the posterior.
    plain = az.loo(data["wide"])
    assert (plain.elpd if versions.MODULAR else plain.elpd_loo) < exact.elpd.sum() - 0.1
    table = az.compare(by_guide)
    assert set(table.index) == set(by_guide)
    assert table["elpd_diff"].max() < 0.05


def test_k_hat_flags_a_guide_that_is_far_too_narrow():
    assert file_of_diagnostics("psis").pareto_k(Conjugate().data(0.4)) > 0.7


def test_the_density_is_near_the_one_that_was_drawn_from():
    grid, values = versions.density(stats.norm.rvs(size=20_000, random_state=0))
    np.testing.assert_allclose(values, stats.norm.pdf(grid), atol=0.02)


def test_pictures_are_drawn_of_groups():
    pytest.importorskip("matplotlib")
    plots = file_of_diagnostics("plots")
    rng = np.random.default_rng(0)
    named = {"coords": {"module": ["layers.0.q_proj", "layers.1.q_proj"]}}
    named |= {"dims": {"s": ["module", "rank"]}}
    draws = {
        name: versions.dataset({"s": rng.normal(size=(1, 50, 2, 3))}, **named)
        for name in ("posterior", "prior")
    }
    curves = xr.Dataset(
        {n: ("step", [1.0, 2.0]) for n in ("loss", "nll", "kl", "kl_weight")},
        coords={"step": [1, 2]},
    )
    data = versions.groups(draws | {"sample_stats": curves})
    assert len(plots.plot_prior_posterior(data).axes) == 2
    assert len(plots.plot_history(data).axes) == 4
    with pytest.raises(ValueError, match="there is no prior in the data"):
        plots.plot_prior_posterior(versions.groups({"posterior": draws["posterior"]}))
