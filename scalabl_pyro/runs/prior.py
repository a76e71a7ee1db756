"""One run after another: the posterior of a finished run is the prior of s in the next.

The function of s stays as the first run left it: the base model, V, B and heads, and the classes
and shots of the readout. The new run folder holds all of it, and the parameters of the prior too,
so that it is read without the first one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..data import Record, asked
from ..lora.loading import load_readout
from ..readouts import Classes
from .config import RunConfig
from .folder import PosteriorInfo, Run, read_posterior_info, restore
from .places import resolved
from .reading import find_run, read_settings, read_trained_on
from .settings import ConfigError

__all__ = [
    "TrainingData",
    "load_prior_run",
    "prior_fingerprint",
    "read_data",
    "trained_before",
    "warn_of_trained_before",
]

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
    _, info = _checked(config)
    given = _class_names(config, info)
    names = given or load_readout(config.model, info.classes).class_names
    splits, data = replace(config.data, classes=names).decided_splits(seed=config.seed)
    data = replace(data, classes=given)  # as that run's settings have them
    return TrainingData(splits, info.classes, replace(config, data=data))


def load_prior_run(config: RunConfig) -> Run:
    """The run ``prior_run``, its model loaded as ``config.model`` says.

    :raises ConfigError: if the settings contradict those of the run.
    :raises RunFolderError: if it is no complete run folder, or was made on other base weights.
    """
    folder, info = _checked(config)
    settings = replace(read_settings(folder), model=config.model, lora=config.lora)
    return restore(folder, settings, info)


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
    consequences = {"validation": "what is chosen by them, and said of them, is too good"}
    if config.prior_run is not None:
        consequences["train"] = "the posterior counts them twice"
    for split, consequence in consequences.items():
        count = sum(key in known for key in asked(splits[split]))
        if count:
            log.warning(
                "%d of the %d records of %s trained the run that this one goes on from: %s",
                *(count, len(splits[split]), split, consequence),
            )


def prior_fingerprint(config: RunConfig) -> str:
    """A hash of the tensors of ``prior_run``, which a path does not pin down; ``""`` without it.

    :raises RunFolderError: if it is neither a folder nor on the Hub.
    """
    if config.prior_run is None:
        return ""
    folder, digest = find_run(config.prior_run), hashlib.sha256()
    for name in ("projections.safetensors", "posterior.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _class_names(config: RunConfig, info: PosteriorInfo) -> tuple[str, ...]:
    """Those given, or else those of ``prior_run``."""
    return config.data.classes or tuple(info.settings.get("data.classes", ()))


def _checked(config: RunConfig) -> tuple[Path, PosteriorInfo]:
    """The folder of ``prior_run`` and what it says of itself, which the settings must not
    contradict."""
    folder = find_run(str(config.prior_run))
    info = read_posterior_info(folder)
    data = replace(config.data, classes=_class_names(config, info))
    for attempt in replace(config, data=data).attempts():
        mine = resolved(attempt.function_settings())
        before = resolved(attempt.completed(info.settings))
        wrong = [
            f"{key} is {mine.get(key)!r}, expected {before.get(key)!r}"
            for key in sorted(mine.keys() | before.keys())
            if mine.get(key) != before.get(key)
        ]
        if wrong:
            raise ConfigError(
                f"prior_run is {config.prior_run!r}, whose model stays as it is:"
                f" {'; '.join(wrong)}; give these settings as that run's config.yaml has them"
            )
    return folder, info
