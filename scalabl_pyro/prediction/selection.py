"""Which records to label next: those that a score ranks highest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import DataError, Record, Split
from .predictor import Predicts, predict

__all__ = ["SELECTION_SCORES", "Selection", "check_selection", "select"]


class Selection(NamedTuple):
    """Records to label, the first first.

    :param records: those chosen.
    :param scores: (count,), theirs, from the highest down.
    """

    records: tuple[Record, ...]
    scores: Tensor


def select(
    predictor: Predicts,
    records: Sequence[Record],
    count: int,
    *,
    by: str = "bald",
    seed: int = 0,
    batch_size: int = 64,
) -> Selection:
    """The ``count`` unlabelled records with the highest score; of equal ones, the earlier.

    * ``bald``: mutual information between the label and s (Houlsby et al. 2011, arXiv 1112.5745)
    * ``entropy``: predictive entropy, which is high for ambiguous questions too
    * ``random``: what any score has to beat

    Each record is scored alone, so that records that teach the same may be chosen together.

    :param records: those with a label are left out.
    :param by: a key of :data:`SELECTION_SCORES`.
    :param seed: of ``random``.
    :param batch_size: B of a forward pass before draws multiply it.
    :raises ValueError: if the score is unknown, the count is below 1, or ``bald`` is asked of a
        predictor with one draw, which knows no mutual information.
    :raises DataError: if fewer records are unlabelled, or one does not fit the readout.
    """
    check_selection(count, by)
    pool = [record for record in records if record.label is None]
    if len(pool) < count:
        raise DataError(
            f"count is {count}, but of {len(records)} records {len(pool)} have no label: ask for"
            " fewer, or give more"
        )
    split = predictor.adapter.readout.encode(pool)
    scores = SELECTION_SCORES[by](predictor, split, seed, batch_size)
    order = scores.argsort(descending=True, stable=True)[:count]
    return Selection(tuple(pool[i] for i in order.tolist()), scores[order])


def check_selection(count: int, by: str) -> None:
    """:raises ValueError: if the count is below 1, or there is no such score."""
    if count < 1:
        raise ValueError(f"count is {count}: expected 1 or more")
    if by not in SELECTION_SCORES:
        raise ValueError(f"by is {by!r}: expected one of {sorted(SELECTION_SCORES)}")


def _bald(predictor: Predicts, split: Split, seed: int, batch_size: int) -> Tensor:
    if predictor.num_draws < 2:
        raise ValueError(
            f"by is 'bald', but the predictor has {predictor.num_draws} draw, so that no draws"
            " disagree: use by='entropy'"
        )
    return predict(predictor, split, batch_size=batch_size).mutual_information


def _entropy(predictor: Predicts, split: Split, seed: int, batch_size: int) -> Tensor:
    return predict(predictor, split, batch_size=batch_size).entropy


def _random(predictor: Predicts, split: Split, seed: int, batch_size: int) -> Tensor:
    return torch.rand(len(split), generator=torch.Generator().manual_seed(seed))


#: scores by name: functions of the predictor, the N records, a seed and a batch size that return
#: (N,), high for a record that is worth a label
SELECTION_SCORES: dict[str, Callable[[Predicts, Split, int, int], Tensor]] = {
    "bald": _bald,
    "entropy": _entropy,
    "random": _random,
}
