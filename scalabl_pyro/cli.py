"""The command line: ``scalabl train``, ``scalabl evaluate``, ``scalabl predict``.

The first word picks a command; everything after it is Hydra's own: overrides such as
``fit.steps=100``, ``--multirun``, ``--cfg job``, ``--help``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm

from .checkpoint import Run, load_run, save_run
from .config import ConfigError, RunConfig, build
from .data import Record, check_split, iter_jsonl, read_folder, read_jsonl
from .loading import Classes, load_readout, make_adapter
from .metrics import entropy, evaluate, mutual_information
from .predict import Predictor, average, predict
from .svi import NonFiniteLossError

__all__ = ["main"]

CONFIGS = "pkg://scalabl_pyro.configs"
USAGE = """usage: scalabl COMMAND [key=value ...]

  train      fine-tune a model on labelled records and write a run folder
  evaluate   metrics of a run folder on a labelled split
  predict    answers, probabilities and uncertainty for records with or without labels

scalabl COMMAND --help shows the settings of a command with their defaults."""


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """Settings of ``scalabl evaluate``, described in configs/evaluate.yaml."""

    run: str
    data: dict[str, Any]
    split: str = "test"
    posterior_mean: bool = False
    output: str | None = None
    batch_size: int = 64
    progress: bool = True


@dataclass(frozen=True, slots=True)
class PredictConfig:
    """Settings of ``scalabl predict``, described in configs/predict.yaml."""

    run: str
    input: str
    output: str
    posterior_mean: bool = False
    batch_size: int = 64
    progress: bool = True


def train(config: RunConfig) -> dict[str, Any]:
    """Train, evaluate on every split but the training one, and write the run folder."""
    folder = config.check_run_dir()
    splits = config.data.splits(seed=config.seed)
    classes = Classes.of(config.model, [r for records in splits.values() for r in records])
    readout = load_readout(config.model, classes)
    encoded = {name: readout.encode(records) for name, records in splits.items()}

    fitted = config.make_method().fit(
        lambda *, svd: make_adapter(config.model, config.lora, readout, svd=svd),
        encoded["train"],
        encoded["validation"],
        seed=config.seed,
    )
    metrics = {}
    for name, split in encoded.items():
        if name != "train":
            found = predict(
                fitted.predictor, split, batch_size=config.eval_batch_size, progress=config.progress
            )
            metrics[name] = evaluate(found.logits, found.labels)
    save_run(folder, config, classes, fitted, metrics)
    return {"run": str(folder), **metrics}


def evaluate_run(config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of a run folder on one split."""
    if (config.data.get("root") is None) == (config.data.get("path") is None):
        raise ConfigError("give exactly one of data.root and data.path")
    if config.data.get("root") is not None:
        records = check_split(read_folder(config.data["root"]), config.split)
    else:
        records = read_jsonl(config.data["path"])
    run = load_run(config.run)
    split = run.readout.encode(records)
    found = predict(
        _predictor(run, config), split, batch_size=config.batch_size, progress=config.progress
    )
    metrics = evaluate(found.logits, found.labels)
    if config.output is not None:
        _write_whole(Path(config.output), [json.dumps(metrics)])
    return metrics


def predict_file(config: PredictConfig) -> dict[str, Any]:
    """Answer the records of a file, one JSON object a line."""
    output = Path(config.output)
    if output.exists():
        raise FileExistsError(f"the output {output} exists; choose another, or remove it")
    records = list(iter_jsonl(config.input))
    run = load_run(config.run)
    predictor = _predictor(run, config)
    run.readout.encode(records)  # every record is checked before the first is predicted
    lines = []
    for start in tqdm(range(0, len(records), config.batch_size), disable=not config.progress):
        chunk = records[start : start + config.batch_size]
        logits = predict(predictor, run.readout.encode(chunk)).logits
        lines += _answers(chunk, logits)
    _write_whole(output, lines)
    return {"output": str(output), "records": len(records)}


def _predictor(run: Run, config: EvaluateConfig | PredictConfig) -> Predictor:
    if not config.posterior_mean:
        return run.predictor
    if run.guide is None:
        raise ConfigError(f"{config.run} is a point estimate: posterior_mean=true means nothing")
    return replace(run.predictor, draws=run.guide.median()["s"][None])


def _answers(records: list[Record], logits: torch.Tensor) -> list[str]:
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


def _write_whole(path: Path, lines: list[str]) -> None:
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(path)


COMMANDS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "train": (RunConfig, train),
    "evaluate": (EvaluateConfig, evaluate_run),
    "predict": (PredictConfig, predict_file),
}


def main() -> None:
    """Entry point of ``scalabl``."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked = len(sys.argv) == 2 and sys.argv[1] in ("-h", "--help", "help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    name = sys.argv.pop(1)
    config_class, command = COMMANDS[name]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def run(overrides: DictConfig) -> None:
        try:
            values = OmegaConf.to_container(overrides, resolve=True)
            print(json.dumps(command(build(config_class, values)), indent=2))
        except (ValueError, OSError, NonFiniteLossError) as error:
            logging.getLogger(__name__).debug("traceback", exc_info=True)
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    hydra.main(version_base="1.3", config_path=CONFIGS, config_name=name)(run)()
