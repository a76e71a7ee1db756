"""``scalabl train``: fine-tune a model and write a run folder."""

from __future__ import annotations

import logging
from typing import Any

from hydra.core.hydra_config import HydraConfig

from ..distributed import start
from ..runs.config import RunConfig
from ..runs.training import train_run

__all__ = ["RunConfig", "train"]

log = logging.getLogger(__name__)


def train(config: RunConfig) -> dict[str, Any]:
    """Train, as one of several processes if a launcher started them.

    :returns: the run folder, and what :func:`~scalabl_pyro.runs.train_run` returns.
    """
    start()
    for attempt, trial in zip(config.attempts(), config.trials or ({},), strict=True):
        for line in attempt.without_effect():
            log.warning(line)
        given = {*_given(), *trial.get("fit", {})}
        for name, (value, own) in attempt.foreign_fit(given).items():
            log.warning(
                "fit.%s is %r, and the one that method %s is made for is %r: give fit.%s yourself",
                *(name, value, attempt.method["name"], own, name),
            )
    return {"run": config.run_dir, **train_run(config)}


def _given() -> set[str]:
    """The settings of ``fit`` on the command line, and not of a protocol."""
    if not HydraConfig.initialized():
        return set()
    names = (word.lstrip("+").split("=")[0].split(".") for word in HydraConfig.get().overrides.task)
    return {name[1] for name in names if len(name) > 1 and name[0] == "fit"}
