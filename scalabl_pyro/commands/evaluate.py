"""``scalabl evaluate``: metrics of a run folder, or of a base model, on a labelled split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from ..data import (
    DataError,
    DataSource,
    Record,
    Split,
    check_split,
    disjoint,
    draw_shots,
    subsample,
)
from ..files import json_text, new_path, write_whole
from ..lora.config import AdapterConfig, ModelConfig
from ..lora.loading import UntrainedHeadError, load_readout, make_adapter
from ..methods import ZeroShot
from ..prediction.assessment import assess, check_labelled
from ..prediction.predictor import Predicts
from ..readouts import Readout
from ..runs.folder import load_run
from ..runs.predictors import PredictionConfig, make_predictor
from ..runs.settings import ConfigError, build
from ._input import warn_of_trained

__all__ = ["EvaluateConfig", "evaluate_run"]


def _named(value: Any) -> Any:
    """The settings of a model; ``None`` if it has no name.

    :raises ConfigError: if it has none, but other settings.
    """
    if not isinstance(value, Mapping) or value.get("name") is not None:
        return value
    if build(ModelConfig, {**value, "name": ""}, "model.") != ModelConfig(""):
        raise ConfigError(
            "settings of model are given without model.name: give it too, or with run=… leave them"
            " out, as a run keeps its own"
        )
    return None


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """Settings of ``scalabl evaluate``, described in configs/evaluate.yaml.

    :raises ValueError: if not exactly one of ``run`` and ``model`` is given, or a way to predict
        with a posterior that the base model does not have, or a seed of no draws.
    """

    data: DataSource
    run: str | None = None
    model: Annotated[ModelConfig | None, BeforeValidator(_named)] = None
    split: str = "test"
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    output: str | None = None
    batch_size: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}: expected 1 or more")
        if (self.run is None) == (self.model is None):
            name = None if self.model is None else self.model.name
            raise ConfigError(
                f"run is {self.run!r} and model.name {name!r}: give exactly one, a run folder or a"
                " base model"
            )
        if self.model is not None and self.prediction != PredictionConfig():
            raise ConfigError("a base model has no posterior over s: leave prediction as it is")
        self.prediction.check_seed()


def evaluate_run(config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of a run folder, or of a base model without training, on one split.

    :raises FileExistsError: if the output exists.
    :raises DataError: before any prediction, if a record cannot be read or has no label.
    """
    if config.output is not None:
        new_path(Path(config.output))
    if config.run is not None:
        predictor, split = _of_run(config, config.run)
    else:
        assert config.model is not None
        predictor, split = _zero_shot(config, config.model)
    metrics = assess(
        predictor,
        split,
        batch_size=config.batch_size,
        tolerance=config.prediction.tolerance,
        weights=config.prediction.weights,
        progress=config.progress,
    ).metrics
    if config.output is not None:
        write_whole(Path(config.output), json_text(metrics) + "\n")
    return metrics


def _of_run(config: EvaluateConfig, run: str) -> tuple[Predicts, Split]:
    trained = load_run(run)
    source = replace(config.data, classes=config.data.classes or trained.readout.class_names)
    records = source.read_split(
        config.split, trained.config.data.columns, trained.config.data.classes
    )
    warn_of_trained(trained, records, "these metrics say nothing of other records")
    split = _encode(config, trained.readout, records)
    return make_predictor(trained, config.prediction), split


def _zero_shot(config: EvaluateConfig, model: ModelConfig) -> tuple[Predicts, Split]:
    """The base model, with what its readout fits to training records, and the split to evaluate.

    :raises DataError: if it fits something or shows shots, and there are no training records.
    """
    if config.data.path is None:
        splits = config.data.read()
        check_split(splits, config.split)
    else:
        splits = {config.split: config.data.read()["train"]}
    shots: Sequence[Record] = ()
    if model.shots:
        train = _training_records(splits, config, "model.shots shows records of", "model.shots=0")
        shots = draw_shots(train, model.shots, seed=0)
    records = [record for split in splits.values() for record in split]
    readout = load_readout(model, model.classes(records, shots=shots))
    count = (config.data.limit or {}).get(config.split)
    asked = splits[config.split]
    config.data.check_known(asked, config.split)
    split = fitted_to = _encode(
        config, readout, asked if count is None else subsample(asked, count)
    )
    if readout.fitted:
        why, instead = f"readout {model.readout} fits κ to", "model.temperature=none, for κ = 1"
        fitted_to = readout.encode(_training_records(splits, config, why, instead))
    # Any layers will do: what is not trained changes nothing.
    adapter = AdapterConfig(r=1, targets="all-linear")
    try:
        fitted = ZeroShot(eval_batch_size=config.batch_size, progress=config.progress).fit(
            partial(make_adapter, model, adapter, readout), fitted_to, None, seed=0
        )
    except UntrainedHeadError as error:
        raise ConfigError(
            f"{error.lack}, and nothing is trained here: give a checkpoint with a trained head, a"
            " run that trained one by lora.heads, or model.readout=label_tokens"
        ) from error
    return fitted.predictor, split


def _encode(config: EvaluateConfig, readout: Readout, records: Sequence[Record]) -> Split:
    """The records to evaluate; of texts the readout itself needs each token."""
    if not readout.reads_texts:
        check_labelled(records, config.data.path or f"the split {config.split}")
    return readout.encode(records)


def _training_records(
    splits: Mapping[str, list[Record]], config: EvaluateConfig, why: str, instead: str
) -> list[Record]:
    """Those whose questions are not asked, no more than their limit.

    :param why: they are needed.
    :param instead: the setting without which they are not.
    :raises DataError: if there are none.
    """
    if "train" not in splits or config.split == "train":
        raise DataError(
            f"{why} the split train, which is not the one to evaluate, and there are the splits"
            f" {sorted(splits)} with {config.split!r} to evaluate: give a folder or data set with"
            f" both, or {instead}"
        )
    unasked = disjoint({name: splits[name] for name in ("train", config.split)})["train"]
    count = (config.data.limit or {}).get("train")
    return unasked if count is None else subsample(unasked, count)
