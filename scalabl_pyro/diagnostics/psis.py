"""Pareto-smoothed importance sampling: leave-one-out cross-validation, and k of a guide."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.special import logsumexp

from ..arviz_versions import az, elpd_data, group, psis

__all__ = ["loo", "pareto_k"]


def loo(data: az.InferenceData) -> az.ELPDData:
    r"""PSIS-LOO for draws of an approximate posterior: the sum of log p(y_n | y_{-n}) over N data.

    .. math::
        \mathrm{elpd} &= \sum_n \log \frac{\sum_k w_{nk} \, p(y_n \mid s_k)}{\sum_k w_{nk}} \\
        w_{nk} &= \mathrm{PSIS}_k \frac{p(s_k) \prod_i p(y_i \mid s_k)}{q(s_k) \, p(y_n \mid s_k)}

    (Magnusson et al. 2019, arXiv 1904.10679). ``az.loo`` takes the draws for those of the
    posterior, w = 1 / p(y_n | s_k): right for a sampler's draws, wrong for a guide's as far as the
    guide is. Results go into ``az.compare({"normal": loo(a), "joint": loo(b)})``.

    Projections are points that have seen every example: leave-one-out leaves it out of s only.

    :param data: of :func:`to_inference_data` with training split, model and guide; S of 1,000 or
        more.
    :returns: as ``az.loo(data, pointwise=True)`` of the installed version; ``pareto_k`` (N,) above
        ``good_k`` says which terms are not to be trusted, and ``warning`` that there are some.
    :raises ValueError: if a group is missing, examples are, or there are fewer than 25 draws.
    """
    log_ratio = _log_ratio(data)  # (S,)
    log_likelihood = group(data, "log_likelihood")["label"].stack(draws=("chain", "draw"))  # (N, S)
    terms = log_likelihood.values.astype(float)
    log_weights, pareto_shape = psis(log_ratio - terms)
    elpd = logsumexp(log_weights + terms, axis=-1)  # (N,)
    posterior_weights, _ = psis(log_ratio[None])
    lppd = logsumexp(posterior_weights + terms, axis=-1)
    good_k = _good_k(len(log_ratio))
    trusted = bool((pareto_shape <= good_k).all())
    if not trusted:
        warnings.warn(
            f"Pareto k is above {good_k:.2f} for {int((pareto_shape > good_k).sum())} of"
            f" {len(elpd)} examples: the guide's draws cannot stand for the posterior without"
            " them, and elpd_loo is not to be trusted; take more draws or a richer guide",
            stacklevel=2,
        )
    pointwise = log_likelihood.isel(draws=0, drop=True)
    return elpd_data(
        pointwise.copy(data=elpd),
        pointwise.copy(data=pareto_shape),
        p_loo=float((lppd - elpd).sum()),
        num_draws=len(log_ratio),
        warning=not trusted,
        good_k=good_k,
    )


def pareto_k(data: az.InferenceData) -> float:
    r"""Pareto k-hat of the importance ratios p(y, s_k) / q(s_k): how far q is from the posterior.

    Below 0.5 the guide is close; up to 0.7 its draws can be corrected by importance weights; above,
    they cannot: q misses a part of the posterior (Yao et al. 2018, arXiv 1802.02538). It is a check
    of q as a whole: each of many coordinates may be close while k is above 0.7. The posterior is
    that of KL weight 1, for the projections as they are; a tempered guide is meant to be wider or
    narrower.

    :param data: of :func:`to_inference_data` with training split, model and guide; S of 1,000 or
        more.
    :raises ValueError: if a group is missing, examples are, or there are fewer than 25 draws.
    """
    _, shape = psis(_log_ratio(data)[None])
    return float(shape[0])


def _log_ratio(data: az.InferenceData) -> np.ndarray:
    """log p(y, s_k) − log q(s_k), (S,), in float64."""
    missing = {name for name in ("log_likelihood", "log_prior", "sample_stats") if name not in data}
    if missing or "log_q" not in group(data, "sample_stats"):
        raise ValueError(
            f"there is no {', '.join(sorted(missing)) or 'log_q'} in the data: build it by"
            " to_inference_data(predictor, train, model=model, guide=guide); for a sampler's draws"
            " use az.loo"
        )
    log_likelihood = group(data, "log_likelihood")["label"]
    num_data = group(data, "prior").attrs["num_data"]
    if log_likelihood.sizes["example"] != num_data:
        raise ValueError(
            f"log_likelihood holds {log_likelihood.sizes['example']} examples, but the posterior is"
            f" that of N = {num_data}: build the data with the training split"
        )
    log_p = log_likelihood.astype(float).sum("example")
    log_p = log_p + group(data, "log_prior").astype(float).to_dataarray().sum("variable")
    log_q = group(data, "sample_stats")["log_q"]
    log_ratio = (log_p - log_q).stack(draws=("chain", "draw")).values
    if len(log_ratio) < 25:
        raise ValueError(
            f"there are {len(log_ratio)} draws: a Pareto tail needs 25 or more, better 1,000"
        )
    return log_ratio


def _good_k(num_draws: int) -> float:
    """Largest k at which S draws are enough (Vehtari et al. 2024, arXiv 1507.02646)."""
    return min(1 - 1 / np.log10(num_draws), 0.7)
