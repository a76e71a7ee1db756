"""arviz 0.2x, which runs on Python 3.11, and arviz 1.x behind the same names.

One difference is silent: PSIS takes log weights in 0.2x and log-likelihoods in 1.x, which are the
*negative* log weights of leave-one-out. With the wrong sign the other tail would be smoothed, and
k̂ would be that of the other tail.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import logsumexp

__all__ = ["az", "dataset", "density", "elpd_data", "group", "groups", "psis"]

with warnings.catch_warnings():
    # The notice on the next version that 0.2x gives once a day when it is imported.
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
    import arviz as az

#: whether this is arviz 1.x, a collection of arviz_base, arviz_stats and arviz_plots
MODULAR = int(az.__version__.partition(".")[0]) >= 1


def dataset(
    variables: Mapping[str, np.ndarray],
    *,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    first: Sequence[str] = ("chain", "draw"),
) -> xr.Dataset:
    """Variables (chain, draw, …) with named dimensions.

    :param coords: of dimensions; of one that no variable has they are left out.
    :param dims: names of a variable's further dimensions; NAME_dim_0, … if left out. Where a name
        is ``None``, the dimension has size 1 and is dropped.
    :param first: names of the first dimensions of every variable.
    """
    named: dict[str, tuple[list[str], np.ndarray]] = {}
    for name, values in variables.items():
        own = (dims or {}).get(name, [f"{name}_dim_{i}" for i in range(values.ndim - len(first))])
        dropped = tuple(len(first) + place for place, dim in enumerate(own) if dim is None)
        named[name] = [*first, *filter(None, own)], values.squeeze(dropped)
    arrays = xr.Dataset(named, attrs={"inference_library": "pyro"})
    places = {dim: range(size) for dim, size in arrays.sizes.items()}
    places |= {dim: place for dim, place in (coords or {}).items() if dim in arrays.sizes}
    return arrays.assign_coords({dim: list(place) for dim, place in places.items()})


def groups(data: Mapping[str, xr.Dataset]) -> az.InferenceData:
    """Data sets by the name of their group, as arviz wants them: a ``DataTree`` with 1.x."""
    if MODULAR:
        tree: Any = xr.DataTree.from_dict(dict(data))
        return tree
    return az.InferenceData(**data)  # type: ignore[arg-type]  # of its one keyword


def group(data: az.InferenceData, name: str) -> xr.Dataset:
    """A group as a data set.

    :raises KeyError: if there is no such group.
    """
    return data[name].to_dataset() if isinstance(data, xr.DataTree) else data[name]


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed log weights (…, S) that sum to 1, and k̂ (…,) of their right tail.

    Vehtari et al. 2024 (arXiv 1507.02646).
    """
    if not MODULAR:
        smoothed, k = az.psislw(log_weights)
    else:
        places = [f"example_{i}" for i in range(log_weights.ndim - 1)]
        log_likelihood = xr.DataArray(-log_weights, dims=[*places, "draw"])
        weights, index = log_likelihood.azstats.psislw(dim="draw")
        smoothed, k = weights.values, index.values
    return smoothed - logsumexp(smoothed, axis=-1, keepdims=True), k


def elpd_data(
    elpd: xr.DataArray,
    pareto_k: xr.DataArray,
    *,
    p_loo: float,
    num_draws: int,
    warning: bool,
    good_k: float,
) -> az.ELPDData:
    """What ``az.loo(data, pointwise=True)`` returns, for ``az.compare``.

    The sum over examples is ``elpd_loo`` with 0.2x and ``elpd`` with 1.x, and each term is in
    ``loo_i`` or ``elpd_i``.

    :param elpd: (N,), log p(y_n | y_{-n}).
    :param pareto_k: (N,).
    """
    figures = {
        "se": float((elpd.size * elpd.values.var()) ** 0.5),
        "n_samples": num_draws,
        "n_data_points": elpd.size,
        "warning": warning,
        "pareto_k": pareto_k.rename("pareto_k"),
        "scale": "log",
        "good_k": good_k,
    }
    total = float(elpd.sum())
    if not MODULAR:
        figures |= {"elpd_loo": total, "p_loo": p_loo, "loo_i": elpd.rename("loo_i")}
        order = ("elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "warning", "loo_i")
        return az.ELPDData({name: figures[name] for name in dict.fromkeys((*order, *figures))})
    return az.ELPDDataLOO(  # type: ignore[attr-defined]  # of 1.x
        elpd=total, p=p_loo, elpd_i=elpd.rename("elpd_i"), **figures
    )


def density(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel density estimate of draws (S,): a grid and the density on it."""
    if not MODULAR:
        grid, values = az.kde(draws)
    else:
        estimate = xr.DataArray(draws, dims=["draw"]).azstats.kde(dim="draw")
        grid, values = (estimate.sel(plot_axis=axis).values for axis in ("x", "y"))
    return grid, values
