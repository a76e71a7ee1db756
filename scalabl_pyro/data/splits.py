"""Splits that never mix: hold out a part, and leave out what another split also asks."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from .records import DataError, Record, question_key

__all__ = [
    "asked",
    "check_split",
    "disjoint",
    "draw_shots",
    "fingerprint",
    "fingerprints",
    "hold_out",
    "subsample",
    "without_overlap",
]

log = logging.getLogger(__name__)


def fingerprint(splits: Mapping[str, Sequence[Record]]) -> str:
    """A hash of the records themselves, which a path does not pin down."""
    rows = {name: [asdict(record) for record in records] for name, records in splits.items()}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def fingerprints(splits: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """:func:`fingerprint` of each split by itself."""
    return {name: fingerprint({name: records}) for name, records in splits.items()}


def asked(records: Sequence[Record]) -> list[str]:
    """A hash of what each record asks, whatever the order of its choices and its answer."""
    keys = ([question, sorted(choices)] for question, choices in map(question_key, records))
    return [hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16] for key in keys]


def check_split(splits: Mapping[str, list[Record]], name: str) -> list[Record]:
    """The split called ``name``.

    :raises DataError: if it does not exist; the message lists those that do.
    """
    if name not in splits:
        raise DataError(
            f"there is no split {name!r}; the data set has {sorted(splits)}: give a folder with a"
            f" file for each split (data.root), or data.split_names.{name}, the one to take for it"
        )
    return splits[name]


def hold_out(
    records: Sequence[Record], fraction: float, *, seed: int
) -> tuple[list[Record], list[Record]]:
    """Split off a random fraction, for data sets without a validation split.

    :param fraction: share of the records to hold out, between 0 and 1; at least one is.
    :returns: the remaining records and those held out, each in the original order.
    :raises DataError: if nothing would remain on either side.
    """
    count = max(1, round(fraction * len(records))) if 0 < fraction < 1 else len(records)
    if count >= len(records):
        raise DataError(
            f"cannot hold out {fraction} of {len(records)} records for validation: expected a share"
            " between 0 and 1 that leaves one or more (data.validation_fraction), or validation"
            " records of your own, in a file beside the training file (data.root)"
        )
    held = set(random.Random(seed).sample(range(len(records)), count))
    rest = [record for index, record in enumerate(records) if index not in held]
    return rest, [records[index] for index in sorted(held)]


def subsample(records: Sequence[Record], count: int) -> list[Record]:
    """``count`` records at random, in their order; all where there are not more.

    Always the same ones, so that all runs are trained and tested on the same; a larger sample
    holds a smaller one. Files are often sorted by class, so that the first would not do.
    """
    order = random.Random(0).sample(range(len(records)), len(records))
    return [records[index] for index in sorted(order[:count])]


def draw_shots(train: Sequence[Record], count: int, *, seed: int) -> tuple[Record, ...]:
    """Records of the training split to show before each question, drawn without replacement.

    :raises DataError: if there are fewer.
    """
    if count > len(train):
        raise DataError(
            f"model.shots is {count}, but the training split has {len(train)} records: expected at"
            " most that many"
        )
    return tuple(random.Random(seed).sample(train, count))


def disjoint(splits: Mapping[str, list[Record]]) -> dict[str, list[Record]]:
    """Splits of which no question is trained on and also validated on or tested on.

    The training split gives way to all others and the validation split to all but that one, so
    that what is tested stays whole.

    :raises DataError: if nothing would remain of a split.
    """
    by_name = dict(splits)
    for name, exempt in (("train", {"train"}), ("validation", {"train", "validation"})):
        for other in sorted(by_name.keys() - exempt) if name in by_name else ():
            by_name[name] = without_overlap(by_name[name], splits[other], name=other, split=name)
            if not by_name[name]:
                raise DataError(f"every question of {name} is also in {other}: nothing remains")
    return by_name


def without_overlap(
    records: Sequence[Record], others: Sequence[Record], *, name: str, split: str = "train"
) -> list[Record]:
    """The records whose question and set of choices do not occur in ``others``, in any spelling.

    :param name: what ``others`` is called in the log, where the number left out is reported.
    :param split: what ``records`` is called there.
    """
    taken = {question_key(record) for record in others}
    remaining = [record for record in records if question_key(record) not in taken]
    if len(remaining) < len(records):
        log.warning(
            "left out %d questions of %s that are also in %s",
            len(records) - len(remaining),
            split,
            name,
        )
    return remaining
