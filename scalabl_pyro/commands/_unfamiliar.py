"""What ``scalabl predict`` tells of how unlike a run's training data a record is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..data import DataError, Record, Split
from ..models.model import ScalaBLModel
from ..prediction.mahalanobis import mahalanobis, pooled_features
from ..prediction.novelty import novelty
from ..prediction.outliers import conformal_p_values
from ..prediction.predictor import Predictor
from ..runs.config import ConfigError
from ..runs.folder import Run, posterior_mean
from ._input import own_records
from ._jsonl import significant

__all__ = ["UNFAMILIARITY", "check_unfamiliar", "trained_on", "unfamiliarity"]


def check_unfamiliar(name: str | None) -> None:
    """:raises ValueError: if there is no such score."""
    if name is not None and name not in UNFAMILIARITY:
        raise ValueError(f"unfamiliar is {name!r}: expected one of {sorted(UNFAMILIARITY)}")


def unfamiliarity(
    name: str, run: Run, records: Sequence[Record], calibration: Sequence[Record], batch_size: int
) -> list[dict[str, Any]]:
    """What the line of each record gains: its score, and ``p``, the share of the records that
    trained nothing whose score is as high.

    :param name: a key of :data:`UNFAMILIARITY`.
    :param records: those to be told of.
    :param calibration: records that trained nothing; their labels are not looked at.
    :raises DataError: if the run's training records cannot be read.
    :raises ConfigError: if the run has no such score.
    """
    check_unfamiliar(name)
    train = trained_on(run, f"unfamiliar is {name!r}", "leave it out")
    # All at once, for a score may look at the training data anew in each call.
    asked = run.encode([*calibration, *records])
    scores = UNFAMILIARITY[name](run, train, asked, batch_size)
    known, scores = scores.split([len(calibration), len(records)])
    ps = conformal_p_values(known, scores)
    return [
        {name: significant(score), f"{name}_p": significant(p)}
        for score, p in zip(scores, ps, strict=True)
    ]


def trained_on(run: Run, why: str, instead: str) -> Split:
    """The examples that trained the run.

    :param why: they are needed, and what to do ``instead``, for the message.
    :raises DataError: if they cannot be read, or are others now.
    """
    try:
        return run.encode(own_records(run, "train"))
    except DataError as error:
        raise DataError(f"{why}, but {error}; or {instead}") from error


def _mahalanobis(run: Run, train: Split, split: Split, batch_size: int) -> Tensor:
    if not isinstance(run.predictor, Predictor):
        raise ConfigError(
            f"unfamiliar is 'mahalanobis', which takes the features of one model, and method"
            f" {run.config.method['name']} predicts by several: leave it out"
        )
    adapter, s = run.predictor.adapter, posterior_mean(run.predictor, run.guide)
    return mahalanobis(
        pooled_features(adapter, train, s, batch_size=batch_size),
        pooled_features(adapter, split, s, batch_size=batch_size),
    )


def _novelty(run: Run, train: Split, split: Split, batch_size: int) -> Tensor:
    if not isinstance(run.model, ScalaBLModel) or run.guide is None:
        raise ConfigError(
            f"unfamiliar is 'novelty', but method {run.config.method['name']} has no posterior over"
            " s: use unfamiliar=mahalanobis"
        )
    loc = run.guide.median()["s"]
    shares = novelty(run.model, train, split, loc=loc, batch_size=batch_size)
    return shares.nan_to_num(0.0)  # where no contrast depends on s there is nothing new about it


#: scores by name, high for what is unlike the training data: functions of a run, its training
#: examples, N others and B that return (N,)
UNFAMILIARITY: dict[str, Callable[[Run, Split, Split, int], Tensor]] = {
    "mahalanobis": _mahalanobis,
    "novelty": _novelty,
}
