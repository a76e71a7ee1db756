"""A labelled split, predicted and measured: answers among choices, or texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import DataError, Record, Split
from .metrics import evaluate
from .predictor import Predicts, predict
from .texts import evaluate_texts, score_split

__all__ = ["Assessment", "assess", "check_labelled"]


class Assessment(NamedTuple):
    """What is told of a split.

    :param metrics: see :func:`evaluate`, and of texts :func:`evaluate_texts`; ``nll`` is in both.
    :param tensors: ``logits`` (S, N, C), ``labels`` (N,) and ``tokens`` (N,), those of each
        example's longest row; of texts with T tokens in all ``log_probs`` (S, T), ``entropy`` and
        ``mutual_information`` (T,) and ``lengths`` (N,).
    """

    metrics: dict[str, float]
    tensors: dict[str, Tensor]


def assess(
    predictor: Predicts,
    split: Split,
    *,
    batch_size: int = 64,
    tolerance: float | None = None,
    weights: str = "equal",
    progress: bool = False,
) -> Assessment:
    """Predict a split by any method, and measure it.

    :param batch_size: as in :func:`predict`; of texts as many run at once as have few logits.
    :param tolerance: as in :func:`predict`; of no effect on texts.
    :param weights: of the draws in texts, as in :class:`~scalabl_pyro.prediction.Decoding`; of no
        effect on choices.
    :raises DataError: before any work, if a record has no label.
    :raises NonFinitePredictionsError: if a logit is NaN or infinite.
    """
    if predictor.adapter.readout.reads_texts:
        texts = score_split(predictor, split, weights=weights, progress=progress)
        rows = {
            "log_probs": torch.cat([text.draw_log_probs for text in texts], dim=-1),
            "entropy": torch.cat([text.entropy for text in texts]),
            "mutual_information": torch.cat([text.mutual_information for text in texts]),
            "lengths": torch.tensor([len(text.ids) for text in texts]),
        }
        return Assessment(evaluate_texts(texts), rows)
    check_labelled(split.records, "the split")
    predictions = predict(
        predictor, split, batch_size=batch_size, tolerance=tolerance, progress=progress
    )
    metrics = evaluate(predictions.logits, predictions.labels)
    assert predictions.labels is not None
    tensors = {
        "logits": predictions.logits,
        "labels": predictions.labels,
        "tokens": torch.tensor(split.lengths),
    }
    return Assessment(metrics, tensors)


def check_labelled(records: Sequence[Record], place: str) -> None:
    """Refuse records whose answers nobody could call right or wrong.

    :param place: where they are from, for the message.
    :raises DataError: if one has no label.
    """
    for record in records:
        if record.label is None:
            raise DataError(
                f"{place}: record {record.id!r} has no label: give it one, name the column that has"
                " it, or leave the record out"
            )
