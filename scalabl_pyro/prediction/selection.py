"""Which records to label next: those that a score ranks highest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import DataError, Record, Split
from ..guides import AutoSubspace
from ..models.model import ScalaBLModel
from .novelty import novelty
from .predictor import Predicts, predict

__all__ = ["SELECTION_SCORES", "Pool", "Selection", "check_selection", "select"]


class Pool(NamedTuple):
    """What a score may look at.

    :param predictor: whose answers are uncertain.
    :param split: the N records without a label.
    :param model: p(s, y | x), where there is one.
    :param guide: the posterior over s, where it is known.
    :param train: what the model has been trained on, where it is known.
    :param seed: of ``random``.
    :param batch_size: B of a forward pass.
    """

    predictor: Predicts
    split: Split
    model: ScalaBLModel | None = None
    guide: AutoSubspace | None = None
    train: Split | None = None
    seed: int = 0
    batch_size: int = 64


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
    model: ScalaBLModel | None = None,
    guide: AutoSubspace | None = None,
    train: Split | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Selection:
    """The ``count`` unlabelled records with the highest score; of equal ones, the earlier.

    * ``bald``: mutual information between the label and s (Houlsby et al. 2011, arXiv 1112.5745)
    * ``entropy``: predictive entropy, which is high for ambiguous questions too
    * ``novelty``: the share of the prior's uncertainty that ``train`` left (see
      :func:`~scalabl_pyro.prediction.novelty`), high for questions that are unlike it
    * ``random``: what any score has to beat

    Each record is scored alone, so that records that teach the same may be chosen together.

    :param records: those with a label are left out.
    :param by: a key of :data:`SELECTION_SCORES`.
    :param model: for ``novelty``, what was trained; ``guide`` its posterior, at whose median logits
        are linearised; ``train`` all examples that it was trained on.
    :param seed: of ``random``.
    :param batch_size: B of a forward pass before draws multiply it.
    :raises ValueError: if the score is unknown, the count is below 1, ``bald`` is asked of a
        predictor with one draw, which knows no mutual information, or ``novelty`` without a
        posterior over s with a normal prior, or without training data.
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
    scores = SELECTION_SCORES[by](Pool(predictor, split, model, guide, train, seed, batch_size))
    order = scores.argsort(descending=True, stable=True)[:count]
    return Selection(tuple(pool[i] for i in order.tolist()), scores[order])


def check_selection(count: int, by: str) -> None:
    """:raises ValueError: if the count is below 1, or there is no such score."""
    if count < 1:
        raise ValueError(f"count is {count}: expected 1 or more")
    if by not in SELECTION_SCORES:
        raise ValueError(f"by is {by!r}: expected one of {sorted(SELECTION_SCORES)}")


def _bald(pool: Pool) -> Tensor:
    if pool.predictor.num_draws < 2:
        raise ValueError(
            f"by is 'bald', but the predictor has {pool.predictor.num_draws} draw, so that no draws"
            " disagree: use by='entropy'"
        )
    return predict(pool.predictor, pool.split, batch_size=pool.batch_size).mutual_information


def _entropy(pool: Pool) -> Tensor:
    return predict(pool.predictor, pool.split, batch_size=pool.batch_size).entropy


def _novelty(pool: Pool) -> Tensor:
    if pool.model is None or pool.guide is None or pool.train is None:
        raise ValueError(
            "by is 'novelty', which compares with the training data under a posterior over s: give"
            " model, guide and train, or use by='entropy'"
        )
    loc = pool.guide.median()["s"]
    shares = novelty(pool.model, pool.train, pool.split, loc=loc, batch_size=pool.batch_size)
    # Where no contrast depends on s there is nothing to learn of it.
    return shares.nan_to_num(0.0)


def _random(pool: Pool) -> Tensor:
    return torch.rand(len(pool.split), generator=torch.Generator().manual_seed(pool.seed))


#: scores by name: functions of a :class:`Pool` that return (N,), high for a record that is worth a
#: label
SELECTION_SCORES: dict[str, Callable[[Pool], Tensor]] = {
    "bald": _bald,
    "entropy": _entropy,
    "novelty": _novelty,
    "random": _random,
}
