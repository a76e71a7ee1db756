"""The command line: ``scalabl train``, ``evaluate``, ``predict`` and ``compare``.

The first word picks a command; everything after it is Hydra's own: overrides such as
``fit.steps=100``, ``--multirun``, ``--cfg job``, ``--help``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from .checkpoint import Run, load_run
from .compare import CompareConfig, compare
from .config import ConfigError, RunConfig, build
from .console import quiet_libraries
from .data import DataSource, Record, iter_records
from .experiment import run
from .files import write_whole
from .metrics import entropy, evaluate, mutual_information
from .predict import Predictor, average, predict
from .report import format_table

__all__ = ["main"]

CONFIGS = "pkg://scalabl_pyro.configs"
USAGE = """usage: scalabl COMMAND [key=value ...]

  train      fine-tune a model on labelled records and write a run folder
  evaluate   metrics of a run folder on a labelled split
  predict    answers, probabilities and uncertainty for records with or without labels
  compare    methods × seeds in one table, with pictures; finished runs are skipped

scalabl COMMAND --help shows the settings of a command with their defaults."""


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """Settings of ``scalabl evaluate``, described in configs/evaluate.yaml."""

    run: str
    data: DataSource
    split: str = "test"
    posterior_mean: bool = False
    output: str | None = None
    batch_size: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)


@dataclass(frozen=True, slots=True)
class PredictConfig:
    """Settings of ``scalabl predict``, described in configs/predict.yaml."""

    run: str
    input: str
    output: str
    posterior_mean: bool = False
    batch_size: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: expected 1 or more")


def train(config: RunConfig) -> dict[str, Any]:
    """Train and evaluate; the result is a run folder."""
    return {"run": config.run_dir, **run(config)}


def evaluate_run(config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of a run folder on one split."""
    trained = load_run(config.run)
    classes = config.data.classes or _class_names(trained)
    records = replace(config.data, classes=classes).read_split(config.split)
    split = trained.readout.encode(records)
    found = predict(
        _predictor(trained, config), split, batch_size=config.batch_size, progress=config.progress
    )
    metrics = evaluate(found.logits, found.labels)
    if config.output is not None:
        write_whole(Path(config.output), json.dumps(metrics) + "\n")
    return metrics


def predict_file(config: PredictConfig) -> dict[str, Any]:
    """Answer the records of a file, one JSON object a line."""
    output = Path(config.output)
    if output.exists():
        raise FileExistsError(f"the output {output} exists; choose another, or remove it")
    trained = load_run(config.run)
    records = list(iter_records(config.input, _class_names(trained)))
    predictor = _predictor(trained, config)
    trained.readout.encode(records)  # every record is checked before the first is predicted
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for start in tqdm(range(0, len(records), config.batch_size), disable=not config.progress):
            chunk = trained.readout.encode(records[start : start + config.batch_size])
            logits = predict(predictor, chunk, batch_size=config.batch_size).logits
            file.writelines(f"{line}\n" for line in _answers(chunk.records, logits))
    part.replace(output)
    return {"output": str(output), "records": len(records)}


def compare_methods(config: CompareConfig) -> str:
    """Methods × seeds in one table."""
    return f"{format_table(compare(config))}\n\ntable and pictures: {config.out}"


def _predictor(trained: Run, config: EvaluateConfig | PredictConfig) -> Predictor:
    if not config.posterior_mean:
        return trained.predictor
    if trained.guide is None:
        raise ConfigError(f"{config.run} is a point estimate: posterior_mean=true means nothing")
    return replace(trained.predictor, draws=trained.guide.median()["s"][None])


def _class_names(trained: Run) -> tuple[str, ...]:
    """The choices that all records of a run share, where it knows them."""
    model = trained.config.model
    letters = model.readout == "label_tokens" and model.prompt == "letters"
    return trained.config.data.classes or (() if letters else trained.classes.words)


def _answers(records: Sequence[Record], logits: torch.Tensor) -> list[str]:
    probs = average(logits).exp()
    rows = zip(records, probs, entropy(logits), mutual_information(logits), strict=True)
    return [
        json.dumps(
            {
                "id": record.id,
                "answer": record.choices[int(p.argmax())],
                "label": int(p.argmax()),
                "probabilities": [round(float(x), 6) for x in p[: len(record.choices)]],
                "entropy": round(float(h), 6),
                "mutual_information": round(float(i), 6),
            },
            ensure_ascii=False,
        )
        for record, p, h, i in rows
    ]


COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "train": (RunConfig, train),
    "evaluate": (EvaluateConfig, evaluate_run),
    "predict": (PredictConfig, predict_file),
    "compare": (CompareConfig, compare_methods),
}


def main() -> None:
    """Entry point of ``scalabl``."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked = len(sys.argv) == 2 and sys.argv[1] in ("-h", "--help", "help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    name = sys.argv.pop(1)
    config_class, command = COMMANDS[name]
    quiet_libraries()

    def task(overrides: DictConfig) -> None:
        try:
            values = OmegaConf.to_container(overrides, resolve=True)
            found = command(build(config_class, values))
            print(found if isinstance(found, str) else json.dumps(found, indent=2))
        except (ValueError, OSError, RuntimeError) as error:
            logging.getLogger(__name__).debug("traceback", exc_info=True)
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    hydra.main(version_base="1.3", config_path=CONFIGS, config_name=name)(task)()
