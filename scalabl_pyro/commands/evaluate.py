"""``scalabl evaluate``: metrics of a run folder on a labelled split."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data import DataSource
from ..files import json_text, new_path, write_whole
from ..prediction.metrics import evaluate
from ..prediction.predictor import predict
from ..runs.config import ConfigError
from ..runs.folder import load_run
from ..runs.predictors import PredictionConfig, make_predictor

__all__ = ["EvaluateConfig", "evaluate_run"]


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """Settings of ``scalabl evaluate``, described in configs/evaluate.yaml."""

    run: str
    data: DataSource
    split: str = "test"
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    output: str | None = None
    batch_size: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}: expected 1 or more")


def evaluate_run(config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of a run folder on one split.

    :raises FileExistsError: if the output exists.
    """
    if config.output is not None:
        new_path(Path(config.output))
    trained = load_run(config.run)
    classes = config.data.classes or trained.class_names
    records = replace(config.data, classes=classes).read_split(config.split)
    split = trained.encode(records)
    found = predict(
        make_predictor(trained, config.prediction),
        split,
        batch_size=config.batch_size,
        tolerance=config.prediction.tolerance,
        progress=config.progress,
    )
    metrics = evaluate(found.logits, found.labels)
    if config.output is not None:
        write_whole(Path(config.output), json_text(metrics) + "\n")
    return metrics
