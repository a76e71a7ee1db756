"""What ``scalabl predict`` tells of how unlike a run's training data a record is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..data import DataError, Record, Split
from ..models.model import ScalaBLModel
from ..prediction.mahalanobis import feature_distances
from ..prediction.novelty import novelty
from ..prediction.outliers import conformal_p_values
from ..prediction.predictor import Predictor
from ..runs.folder import Run, point_of
from ..runs.settings import ConfigError
from ._input import own_records, warn_of_trained
from ._jsonl import significant

__all__ = ["UNFAMILIARITY", "check_unfamiliar", "trained_on", "unfamiliarity"]

log = logging.getLogger(__name__)

#: functions of training examples, N others and B that return (N,)
Scores = Callable[[Split, Split, int], Tensor]

#: records that p has to compare with so that 0.05 can be reached
_FEWEST = 19


def check_unfamiliar(name: str | None) -> None:
    """:raises ValueError: if there is no such score."""
    if name is not None and name not in UNFAMILIARITY:
        raise ValueError(f"unfamiliar is {name!r}: expected one of {sorted(UNFAMILIARITY)}")


def unfamiliarity(
    name: str,
    scores: Scores,
    run: Run,
    records: Sequence[Record],
    calibration: Sequence[Record],
    batch_size: int,
) -> list[dict[str, Any]]:
    """What the line of each record gains: its score, and p among records that trained nothing (see
    :func:`~scalabl_pyro.prediction.conformal_p_values`).

    :param name: a key of :data:`UNFAMILIARITY`, and what it gave for this run.
    :param records: those to be told of.
    :param calibration: records that trained nothing; their labels are not looked at.
    :raises DataError: if the run's training records cannot be read.
    """
    train = trained_on(run, f"unfamiliar is {name!r}", "leave it out")
    warn_of_trained(run, records, f"{name} compares them with themselves")
    if len(calibration) < _FEWEST:
        log.warning(
            "p is 1/%d or more, as it compares with %d records: give %d or more by"
            " calibration=FILE, so that 0.05 can be reached",
            len(calibration) + 1,
            len(calibration),
            _FEWEST,
        )
    # All at once, for a score may look at the training data anew in each call.
    asked = run.encode([*calibration, *records])
    known, values = scores(train, asked, batch_size).split([len(calibration), len(records)])
    ps = conformal_p_values(known, values)
    return [
        {name: significant(value), f"{name}_p": significant(p)}
        for value, p in zip(values, ps, strict=True)
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


def _mahalanobis(run: Run) -> Scores:
    if not isinstance(run.predictor, Predictor):
        raise ConfigError(
            f"unfamiliar is 'mahalanobis', which takes the features of one model, and method"
            f" {run.config.method['name']} predicts by several models: leave it out, or take a run"
            " of another method, such as mle"
        )
    adapter, s = run.predictor.adapter, point_of(run.predictor, run.guide)

    def scores(train: Split, split: Split, batch_size: int) -> Tensor:
        (distances,) = feature_distances(adapter, train, [split], s, batch_size=batch_size)
        return distances

    return scores


def _novelty(run: Run) -> Scores:
    if not isinstance(run.model, ScalaBLModel) or run.guide is None:
        able = isinstance(run.predictor, Predictor)
        raise ConfigError(
            f"unfamiliar is 'novelty', but method {run.config.method['name']} has no posterior over"
            f" s: {'use unfamiliar=mahalanobis' if able else 'take a run of method scalabl'}"
        )
    model, loc = run.model, run.guide.median()["s"]

    def scores(train: Split, split: Split, batch_size: int) -> Tensor:
        shares = novelty(model, train, split, loc=loc, batch_size=batch_size)
        return shares.nan_to_num(0.0)  # where no contrast depends on s nothing is new about it

    return scores


#: scores by name, high for what is unlike the training data: functions of a run, which refuse one
#: that has no such score, that return :data:`Scores`
UNFAMILIARITY: dict[str, Callable[[Run], Scores]] = {
    "mahalanobis": _mahalanobis,
    "novelty": _novelty,
}
