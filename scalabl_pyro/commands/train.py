"""``scalabl train``: fine-tune a model and write a run folder."""

from __future__ import annotations

import logging
from typing import Any

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
    for attempt in config.attempts():
        for line in attempt.without_effect():
            log.warning(line)
    return {"run": config.run_dir, **train_run(config)}
