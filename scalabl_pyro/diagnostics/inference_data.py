"""A posterior, its predictions and its training as arviz `InferenceData`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..arviz_versions import az, dataset
from ..arviz_versions import groups as to_groups
from ..data import Split
from ..guides import AutoSubspace
from ..infer.messengers import ScaledToAll
from ..models.model import ScalaBLModel, check_latents_of_data, check_model, check_observes
from ..models.priors import latent_dims
from ..prediction.predictor import Predictor, predict
from ..rng import forked_rng

__all__ = ["to_inference_data"]

log = logging.getLogger(__name__)


def to_inference_data(
    predictor: Predictor,
    split: Split | None = None,
    *,
    model: ScalaBLModel | None = None,
    guide: AutoSubspace | None = None,
    history: Sequence[Mapping[str, float]] = (),
    chains: int = 1,
    seed: int = 0,
    batch_size: int = 64,
) -> az.InferenceData:
    """The draws of a posterior, and what is known about them, as arviz's ``InferenceData``
    (with arviz 1.x an xarray ``DataTree`` of the same groups).

    ======================== =========================== ==================================
    group                    variable (dimensions)       comes with
    ======================== =========================== ==================================
    ``posterior``            ``s`` (…, module, rank)     always
    ``observed_data``        ``label`` (example)         ``split``
    ``log_likelihood``       ``label`` (…, example)      ``split``: log p(y_n | x_n, s_k)
    ``posterior_predictive`` ``label`` (…, example)      ``split``: a draw of p(y | x_n, s_k)
    ``prior``                ``s`` (…, module, rank)     ``model``: as many draws of p(s)
    ``log_prior``            ``s`` (…)                   ``guide``: log p(s_k)
    ``sample_stats``         ``log_q`` (…)               ``guide``: log q(s_k)
    ``sample_stats``         ``loss``, ``kl``, … (step)  ``history``; a step is not a draw
    ======================== =========================== ==================================

    where … is (chain, draw). Draws of s_perp are a variable ``s_perp`` (…, module, direction).
    Further latent sites of the prior stand beside ``s``: in ``posterior`` and ``log_prior`` with
    ``guide``, in ``prior`` always; log q is that of all of them.

    R-hat and effective sample size are for the chains of a sampler. Draws of a guide are
    independent by construction: R-hat says nothing about them, and their effective sample size is S
    however far q is from the posterior. :func:`pareto_k` is the check for a guide.

    :param predictor: with draws (S, M, r). Its temperature is part of the likelihood.
    :param split: labelled examples; :func:`loo` and :func:`pareto_k` need the training split.
    :param model: the model with the prior of s.
    :param guide: the q that the draws come from.
    :param history: what :func:`~scalabl_pyro.infer.fit` returns under that name.
    :param chains: how many chains of equal length follow each other in the draws.
    :param seed: fixes the draws from the prior and of labels.
    :raises ValueError: if there are no draws, or they do not divide into chains; if a record has no
        label; if ``guide`` comes without ``model``, or is a point.
    """
    if model is not None:
        check_model(model)
        check_observes(model, "to_inference_data")
    if predictor.draws is None:
        raise ValueError("a point estimate has no posterior: the predictor holds no draws")
    num_draws = len(predictor.draws)
    if chains < 1 or num_draws % chains:
        raise ValueError(f"chains is {chains}: expected a divisor of the {num_draws} draws")
    if guide is not None and model is None:
        raise ValueError("log p(s) − log q(s) needs the prior too: pass model beside guide")
    if guide is not None and not isinstance(guide, AutoSubspace):
        raise ValueError(
            f"the guide is a {type(guide).__name__}, whose density of given draws is not known:"
            " expected a guide of scalabl_pyro; of others, pass the draws without guide"
        )
    if guide is not None and isinstance(guide.get_posterior(), dist.Delta):
        raise ValueError(f"{type(guide).__name__} is a point, which has no density q(s)")
    width = predictor.adapter.shape[1]
    coords: dict[str, Any] = {
        "module": list(predictor.adapter.module_names),
        "rank": range(width),
        "direction": range(predictor.draws.shape[-1] - width),
    }
    dims: dict[str, list[str | None]] = {
        "s": ["module", "rank"],
        "s_perp": ["module", "direction"],
        "label": ["example"],
    }
    sites = {"s": predictor.draws[..., :width]}
    if coords["direction"]:
        sites["s_perp"] = predictor.draws[..., width:]
    draws: dict[str, dict[str, Tensor]] = {}  # variables (S, ...) by group
    densities: dict[str, dict[str, Tensor]] = {}  # variables (S,) by group
    observed: dict[str, np.ndarray] = {}
    with forked_rng(seed), torch.no_grad():
        if split is not None:
            log_likelihood, replicated, labels = _predictions(predictor, split, batch_size, model)
            draws["log_likelihood"] = {"label": log_likelihood}
            draws["posterior_predictive"] = {"label": replicated}
            observed["label"] = labels.numpy()
            coords["example"] = [record.id for record in split.records]
        if model is not None:

            def prior() -> None:
                pyro.sample("s", model.prior())
                if model.prior_perp is not None:
                    pyro.sample("s_perp", model.prior_perp)

            draws["prior"], _ = _trace(prior, num_draws)
            for name, latent in model.prior.latents.items():
                dims[name] = latent_dims(latent.shape, predictor.adapter.shape)
            if guide is not None:
                sites, log_q = _trace(guide, num_draws, sites)
                _, log_prior = _trace(prior, num_draws, sites)
                if log_q.keys() != log_prior.keys():
                    raise ValueError(
                        f"the prior samples {sorted(log_prior)}, and the guide {sorted(log_q)}:"
                        " expected the same sites; a Prior names its own in latents"
                    )
                densities["log_prior"] = log_prior
                densities["sample_stats"] = {"log_q": torch.stack([*log_q.values()]).sum(0)}
                _tell_strangers(densities["sample_stats"]["log_q"], guide)
    groups = {
        **{name: _dataset(values, chains, coords, dims) for name, values in draws.items()},
        **{name: _dataset(values, chains) for name, values in densities.items()},
        "posterior": _dataset(sites, chains, coords, dims),
    }
    if observed:
        groups["observed_data"] = dataset(observed, coords=coords, dims=dims, first=())
    if history:
        curves = _curves(history)
        groups["sample_stats"] = xr.merge([groups.get("sample_stats", xr.Dataset()), curves])
    if model is not None:
        groups["prior"].attrs["num_data"] = model.num_data
    return to_groups(groups)


def _tell_strangers(log_q: Tensor, guide: AutoSubspace) -> None:
    """Warn of draws that hardly come from the guide: log q of its own has another mean."""
    _, own = _trace(guide, 200)
    expected = torch.stack([*own.values()]).sum(0)
    gap = float(log_q.mean() - expected.mean())
    error = float(expected.std()) * (1 / len(log_q) + 1 / len(expected)) ** 0.5
    if abs(gap) > 6 * error:
        log.warning(
            "the draws have log q = %.4g on average, and draws of the guide %.4g: they come from"
            " another one, or it was trained further; weights of this guide correct nothing",
            float(log_q.mean()),
            float(expected.mean()),
        )


def _predictions(
    predictor: Predictor, split: Split, batch_size: int, model: ScalaBLModel | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(y_n | x_n, s_k) and a drawn label, both (S, N), and the labels (N,).

    The likelihood is what the model observes; without a model it is that of classes.
    """
    predictions = predict(predictor, split, batch_size=batch_size)
    if predictions.labels is None:
        raise ValueError("the log-likelihood needs a label in every record")
    if model is None:
        classes = dist.Categorical(logits=predictions.logits)  # (S, N)
        return classes.log_prob(predictions.labels), classes.sample(), predictions.labels
    terms: list[Tensor] = []
    replicated: list[Tensor] = []
    parts = predictions.logits.split(batch_size, dim=1)
    for chunk, part in zip(split.batches(batch_size), parts, strict=True):
        batch = chunk.collate(chunk.examples)
        logits = part.to(predictor.adapter.device)
        observe = poutine.trace(model.observe)
        with ScaledToAll(model.num_data, len(batch)):
            sites: Any = observe.get_trace(batch, logits).nodes.values()
        check_latents_of_data(model, sites, "the log-likelihood of an example is given s alone")
        of_data = [n for n in sites if n["type"] == "sample" and not site_is_subsample(n)]
        wrong = [node["name"] for node in of_data if isinstance(node["fn"], dist.Unit)]
        if wrong or "label" not in {node["name"] for node in of_data}:
            raise ValueError(
                f"{type(model).__name__} observes {[node['name'] for node in of_data]}: expected a"
                " site 'label' with a distribution, of which labels can be drawn"
                + (f", and {wrong} is a factor" if wrong else "")
            )
        each = [_log_prob(node, model.num_data / len(batch)) for node in of_data]
        terms.append(torch.stack(each).sum(0))
        drawn: Any = observe.get_trace(replace(batch, labels=None), logits).nodes["label"]
        replicated.append(drawn["value"])
    return torch.cat(terms, -1).cpu(), torch.cat(replicated, -1).cpu(), predictions.labels


def _log_prob(node: dict[str, Any], plate: float) -> Tensor:
    """log p of each example of an observed site, with the model's own scale but the plate's."""
    log_prob = node["fn"].log_prob(node["value"])
    return scale_and_mask(log_prob, node["scale"] / plate, node["mask"])


def _trace(
    program: Callable[[], object], num_draws: int, fixed: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values (S, ...) and log-densities (S,) of the sites of a program, some of them given."""

    def many() -> None:
        with pyro.plate("draws", num_draws):
            program()

    nodes: dict[str, Any] = (
        poutine.trace(poutine.condition(many, data=fixed or {})).get_trace().nodes
    )
    sites = {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }
    return (
        {name: node["value"] for name, node in sites.items()},
        {name: node["fn"].log_prob(node["value"]) for name, node in sites.items()},
    )


def _dataset(
    variables: Mapping[str, Tensor],
    chains: int,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str | None]] | None = None,
) -> xr.Dataset:
    """Variables (chains · S, ...) as (chain, draw, ...)."""
    arrays = {
        name: value.unflatten(0, (chains, -1)).cpu().numpy() for name, value in variables.items()
    }
    return dataset(arrays, coords=coords, dims=dims)


def _curves(history: Sequence[Mapping[str, float]]) -> xr.Dataset:
    """The columns of a training history (step); NaN where a row lacks one."""
    names = dict.fromkeys(name for row in history for name in row if name != "step")
    return xr.Dataset(
        {name: ("step", [row.get(name, np.nan) for row in history]) for name in names},
        coords={"step": [int(row["step"]) for row in history]},
    )
