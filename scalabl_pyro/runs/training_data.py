"""The records that a run is trained on, and those that trained the run before it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..data import Record, asked
from ..lora.loading import load_readout
from ..readouts import Classes
from .config import RunConfig
from .prior import class_names, find_prior_run
from .reading import find_run, read_trained_on

__all__ = ["TrainingData", "read_data", "trained_before", "warn_of_trained_before"]

log = logging.getLogger(__name__)


class TrainingData(NamedTuple):
    """What a run is trained on.

    :param splits: the labelled records.
    :param classes: what they, or the run's ``prior_run``, fix about the readout.
    :param config: the run's settings, with what the data decided.
    """

    splits: dict[str, list[Record]]
    classes: Classes
    config: RunConfig


def read_data(config: RunConfig) -> TrainingData:
    """The labelled records of a run by split, and what they fix.

    :raises ConfigError: if the settings contradict those of ``prior_run``.
    :raises DataError: if a file is missing or bad, or the prompt cannot put the records.
    :raises RunFolderError: if ``prior_run`` is no complete run folder.
    """
    if config.prior_run is None:
        splits, data = config.data.decided_splits(seed=config.seed)
        return TrainingData(splits, config.classes(splits), replace(config, data=data))
    _, info = find_prior_run(config)
    given = class_names(config, info)
    names = config.data.classes or load_readout(config.model, info.classes).class_names
    source = replace(config.data, classes=names)
    splits, data = source.decided_splits(seed=config.seed, default=given)
    data = replace(data, classes=given)  # as that run's settings have them
    return TrainingData(splits, info.classes, replace(config, data=data))


def trained_before(config: RunConfig) -> set[str]:
    """Hashes of what the records asked that trained the run which this one goes on from, be it
    ``prior_run`` or a run whose adapter is ``lora.start``.

    :raises RunFolderError: if ``prior_run`` is neither a folder nor on the Hub.
    """
    before: set[str] = set()
    if config.prior_run is not None:
        before |= read_trained_on(find_run(config.prior_run))
    if config.lora.start is not None:
        before |= read_trained_on(Path(config.lora.start).parent)
    return before


def warn_of_trained_before(config: RunConfig, splits: Mapping[str, Sequence[Record]]) -> None:
    """Tell of records of this run that trained the one before it."""
    known = trained_before(config)
    for split, records in splits.items():
        consequence = "what is said of them is too good"
        if split == "validation":
            consequence = "what is chosen by them, and said of them, is too good"
        if split == "train":
            if config.prior_run is None:
                continue  # an adapter is trained further, and no prior made of it
            consequence = "the posterior counts them twice"
        count = sum(key in known for key in asked(records))
        if count:
            log.warning(
                "%d of the %d records of %s trained the run that this one goes on from: %s",
                *(count, len(records), split, consequence),
            )
