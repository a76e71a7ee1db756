"""What a report tells of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..prediction.predictor import Predictions
from ..runs.config import MAY_CHANGE_ON_RESUME
from ..runs.cost import Cost, read_cost
from ..runs.reading import read_fingerprints, read_json, read_predictions, read_settings

__all__ = ["ReportedRun"]


@dataclass(frozen=True)
class ReportedRun:
    """A run of one row and seed.

    :param name: in messages.
    :param predictions: by split, ``test`` among them, with labels.
    :param settings: by full names.
    :param cost: ``None`` where nobody knows it.
    :param tokens: (N,) by split, of each question, as far as they are known.
    :param mahalanobis: (N,) by split, distances of features from those of the training questions,
        as far as they are known.
    :param data: hashes of the records by split, as far as they are known.
    :param folder: where it is kept, which the page links to.
    """

    name: str
    predictions: Mapping[str, Predictions]
    settings: Mapping[str, Any]
    seed: int
    cost: Cost | None = None
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    mahalanobis: Mapping[str, Tensor] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def read(cls, folder: Path) -> ReportedRun:
        """Of a run folder, without its validation split.

        :raises RunFolderError: if a file is missing or damaged.
        """
        config, saved = read_settings(folder), read_predictions(folder)
        splits = [name for name in read_json(folder / "metrics.json") if name != "validation"]
        leave = (*MAY_CHANGE_ON_RESUME, "seed", "trials")
        return cls(
            str(folder),
            {n: Predictions(saved[n]["logits"], saved[n]["labels"]) for n in splits if n in saved},
            {k: v for k, v in config.flat().items() if k.split(".")[0] not in leave},
            config.seed,
            read_cost(folder),
            {name: parts["tokens"] for name, parts in saved.items() if "tokens" in parts},
            {n: parts["mahalanobis"] for n, parts in saved.items() if "mahalanobis" in parts},
            read_fingerprints(folder),
            folder,
        )
