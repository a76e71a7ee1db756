"""Posteriors in arviz: draws of s and log-likelihoods with named coordinates."""

from __future__ import annotations

from typing import Any

import arviz as az

from .data import Split
from .predict import Predictor, predict

__all__ = ["to_inference_data"]


def to_inference_data(
    predictor: Predictor, split: Split | None = None, *, batch_size: int = 64
) -> az.InferenceData:
    """The draws of a posterior as arviz's ``InferenceData``.

    * ``posterior``: ``s`` (chain, draw, module, rank)
    * ``log_likelihood``: ``label`` (chain, draw, example), log p(y_n | x_n, s_k), of a given split
    * ``observed_data``: ``label`` (example)

    Draws of a guide are independent, in one chain: R-hat and effective sample size say nothing
    about them. A temperature is part of the likelihood.

    :param predictor: with a bank of draws.
    :param split: labelled examples.
    :raises ValueError: if there are no draws, or a record has no label.
    """
    if predictor.draws is None:
        raise ValueError("a point estimate has no posterior: the predictor holds no draws")
    groups: dict[str, Any] = {"posterior": {"s": predictor.draws.cpu().numpy()[None]}}
    dims = {"s": ["module", "rank"], "label": ["example"]}
    coords = {
        "module": list(predictor.adapter.module_names),
        "rank": range(predictor.adapter.rank),
    }
    if split is not None:
        found = predict(predictor, split, batch_size=batch_size)
        if found.labels is None:
            raise ValueError("the log-likelihood needs a label in every record")
        each = found.logits.log_softmax(-1)  # (S, N, C)
        index = found.labels.expand(len(each), -1)[..., None]
        groups["log_likelihood"] = {"label": each.gather(-1, index)[None, ..., 0].numpy()}
        groups["observed_data"] = {"label": found.labels.numpy()}
        coords["example"] = [record.id for record in split.records]
    return az.from_dict(**groups, coords=coords, dims=dims)
