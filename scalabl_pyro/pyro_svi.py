"""What SVI of any Pyro program has found, as arviz `InferenceData`: ``from_pyro_svi``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .arviz_versions import az, dataset, groups

__all__ = ["from_pyro_svi"]

Samples = Mapping[str, Tensor]


def from_pyro_svi(
    svi: SVI | None = None,
    *,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    prior: Samples | None = None,
    posterior_predictive: Samples | None = None,
    predictions: Samples | None = None,
    constant_data: Mapping[str, Any] | None = None,
    predictions_constant_data: Mapping[str, Any] | None = None,
    log_likelihood: bool = False,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    pred_dims: Mapping[str, Sequence[str]] | None = None,
    num_samples: int = 1000,
) -> az.InferenceData:
    """The posterior of a guide, and what is known about it, as arviz's ``InferenceData`` (with
    arviz 1.x an xarray ``DataTree`` of the same groups).

    It is to :func:`arviz.from_pyro`, which takes an ``MCMC``, what ``from_numpyro_svi`` of
    arviz-base is to ``from_numpyro``, and has its arguments. It knows of no language model: the
    program is whatever ``svi`` holds. :func:`~scalabl_pyro.to_inference_data` is for the draws of
    a :class:`~scalabl_pyro.Predictor`.

    ============================= =============================================================
    group                         holds
    ============================= =============================================================
    ``posterior``                 draws from the guide of the model's latent sites
    ``log_likelihood``            log p(y_n | z_k) of the observed sites, with ``log_likelihood``
    ``observed_data``             values of the observed sites
    ``prior``                     what ``prior`` has of the latent sites
    ``prior_predictive``          and what it has beside them
    ``posterior_predictive``, …   the argument of this name
    ============================= =============================================================

    Draws stand in one chain: dimensions (chain, draw, …), which all of arviz can read. They are
    independent, so R-hat and effective sample size say nothing about the guide. The log-likelihood
    is that of each example: masks count, the scale of a subsampled plate does not. A plate that
    draws its own subsample draws it once, and its indices are the coordinates of its dimension.

    :param svi: after its last step. Without it there is no posterior.
    :param model_args: what the model and the guide are called with; ``model_kwargs`` likewise.
    :param prior: samples of :class:`pyro.infer.Predictive`, (S, …) by site;
        ``posterior_predictive`` and ``predictions`` (for other inputs) likewise.
    :param constant_data: inputs by name; ``predictions_constant_data`` those of ``predictions``.
    :param log_likelihood: run the model once for each draw to compute it.
    :param coords: labels by dimension.
    :param dims: names of a site's dimensions, by site. Those of other sites are the names of their
        plates and ``infer={"event_dims": [...]}`` of the sample statement, else ``NAME_dim_0``, ….
    :param pred_dims: the same for ``predictions``; ``dims`` if left out.
    :param num_samples: S, the number of draws from the guide.
    :raises TypeError: if ``svi`` is something else.
    :raises ValueError: if there is nothing to convert; if ``num_samples`` is less than 1; if the
        guide lacks a latent site of the model; or if names do not fit a site's dimensions.
    """
    extra_groups = {
        "posterior_predictive": posterior_predictive,
        "predictions": predictions,
        "constant_data": constant_data,
        "predictions_constant_data": predictions_constant_data,
    }
    if svi is not None and not isinstance(svi, SVI):
        raise TypeError(
            f"svi is a {type(svi).__name__}: expected pyro.infer.SVI; az.from_pyro takes an MCMC"
        )
    if svi is None and log_likelihood:
        raise ValueError("log_likelihood needs the model and the guide: pass svi")
    if svi is None and prior is None and all(value is None for value in extra_groups.values()):
        raise ValueError(
            "there is nothing to convert: pass svi, or one of prior, posterior_predictive,"
            " predictions, constant_data and predictions_constant_data"
        )
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: expected 1 or more")
    own = dict(dims or {})
    datasets: dict[str, xr.Dataset] = {}
    latent = None
    if svi is not None:
        args, kwargs = tuple(model_args), dict(model_kwargs or {})
        with torch.no_grad():
            sites, subsamples = _sites(svi.model, args, kwargs)
            # One subsample for all: the guide, and each run of the model.
            model, guide = (poutine.condition(p, subsamples) for p in (svi.model, svi.guide))
            draws = _draws(guide, sites, args, kwargs, num_samples)
            likelihood = _log_likelihood(model, draws, args, kwargs) if log_likelihood else {}
        # Of these runs alone: samples that are given had subsamples of their own.
        placed = {name: each.tolist() for name, each in subsamples.items()} | dict(coords or {})
        own = {name: _dims(site) for name, site in sites.items()} | own
        latent = draws.keys()
        observed = {name: site["value"] for name, site in sites.items() if name not in latent}
        datasets["posterior"] = _dataset(draws, placed, own)
        if likelihood:
            batch = {name: list(own[name])[: value.ndim - 1] for name, value in likelihood.items()}
            datasets["log_likelihood"] = _dataset(likelihood, placed, batch)
        if observed:
            datasets["observed_data"] = _dataset(observed, placed, own, first=())
    if prior is not None:
        known = {name: value for name, value in prior.items() if latent is None or name in latent}
        further = {name: value for name, value in prior.items() if name not in known}
        datasets["prior"] = _dataset(known, coords, own)
        if further:
            datasets["prior_predictive"] = _dataset(further, coords, own)
    for name, values in extra_groups.items():
        if values is not None:
            of_new = name.startswith("predictions") and pred_dims is not None
            first = () if name.endswith("constant_data") else ("chain", "draw")
            datasets[name] = _dataset(values, coords, pred_dims if of_new else own, first)
    return groups(datasets)


def _sites(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sample sites of a model by name, but for what :func:`pyro.deterministic` and
    :func:`pyro.factor` leave in a trace; and the indices that plates have drawn, by plate."""
    # A start for priors that cannot be sampled, such as an improper one.
    started = InitMessenger(init_to_sample)(model)
    nodes: dict[str, Any] = poutine.trace(started).get_trace(*args, **kwargs).nodes
    subsamples = {n: node["value"] for n, node in nodes.items() if site_is_subsample(node)}
    sites = {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample"
        and name not in subsamples
        and not node["infer"].get("_deterministic")
        and not isinstance(node["fn"], dist.Unit)
    }
    return sites, subsamples


def _draws(
    guide: Any, sites: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], num: int
) -> dict[str, Tensor]:
    """Draws (S, …) of the model's latent sites; a guide's auxiliary ones are left out."""
    sampled = Predictive(guide, num_samples=num)(*args, **kwargs)
    latent = [name for name, site in sites.items() if not site["is_observed"]]
    missing = sorted(set(latent) - sampled.keys())
    if missing:
        raise ValueError(f"the guide has no site {missing[0]!r}, which the model samples")
    # Predictive puts dimensions of size 1 in front where other sites have more plates.
    return {name: sampled[name].reshape(num, *sites[name]["value"].shape) for name in latent}


def _log_likelihood(
    model: Any, draws: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """log p(y | z_k) by observed site, (S, *batch)."""
    terms: dict[str, list[Tensor]] = {}
    for k in range(len(next(iter(draws.values()), ()))):
        values = {name: value[k] for name, value in draws.items()}
        sites, _ = _sites(poutine.condition(model, values), args, kwargs)
        for name, site in sites.items():
            if name not in draws:
                log_prob = site["fn"].log_prob(site["value"])
                terms.setdefault(name, []).append(scale_and_mask(log_prob, 1.0, site["mask"]))
    return {name: torch.stack(each) for name, each in terms.items()}


def _dims(site: dict[str, Any]) -> list[str]:
    """Names of a site's batch dimensions, by its plates, and of its event dimensions."""
    plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
    batch, event = len(site["fn"].batch_shape), len(site["fn"].event_shape)
    names = [plates.get(dim) for dim in range(-batch, 0)]
    own = list(site["infer"].get("event_dims", []))
    names += own if len(own) == event else [None] * event
    return [name or f"{site['name']}_dim_{place}" for place, name in enumerate(names)]


def _dataset(
    values: Mapping[str, Any],
    coords: Mapping[str, Sequence[Any]] | None,
    dims: Mapping[str, Sequence[str]] | None,
    first: Sequence[str] = ("chain", "draw"),
) -> xr.Dataset:
    """Variables, (S, …) as (chain, draw, …) where these are the first dimensions."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in values.items():
        array = _array(value)[None] if first else _array(value)
        if not array.size:
            continue  # of pyro.factor
        own, ahead = (dims or {}).get(name), len(first)
        if own is not None:
            while array.ndim - ahead > len(own) and array.shape[ahead] == 1:
                array = array.squeeze(ahead)  # of Predictive, as in _draws
            if array.ndim - ahead != len(own):
                raise ValueError(
                    f"dims of {name} are {list(own)}: expected {array.ndim - ahead} names, for"
                    f" its shape {array.shape[ahead:]}"
                )
        arrays[name] = array
    return dataset(arrays, coords=coords, dims=dims, first=first)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
