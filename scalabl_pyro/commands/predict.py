"""``scalabl predict``: answer the records of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data import Columns, Record
from ..prediction.metrics import noise_to_signal, summarise
from ..prediction.predictor import Predictions, predict
from ..prediction.texts import score_split
from ..runs.folder import Run, load_run
from ..runs.predictors import PredictionConfig, make_predictor
from ..runs.settings import ConfigError
from ._decisions import DecisionConfig, Decisions, calibrate
from ._input import begun_for, read_input, read_texts
from ._jsonl import ResumableJsonl, new_jsonl, significant
from ._texts import given, scored

__all__ = ["PredictConfig", "predict_file"]


@dataclass(frozen=True, slots=True)
class PredictConfig(DecisionConfig):
    """Settings of ``scalabl predict``, described in configs/predict.yaml."""

    run: str
    input: str
    output: str
    columns: Columns = field(default_factory=Columns)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    batch_size: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        DecisionConfig.__post_init__(self)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: expected 1 or more")
        if self.conformal in (None, "lac"):  # whose score uses no random numbers
            self.prediction.check_seed()


def predict_file(config: PredictConfig) -> dict[str, Any]:
    """Answer the records of a file, one JSON object a line; go on where an earlier call stopped.

    :returns: the number of records, and of decisions with labelled records what these gave.
    :raises FileExistsError: if the output exists.
    :raises ValueError: if a record is bad, the output was begun with other settings or for other
        records, or no threshold does what is asked.
    """
    new_jsonl(Path(config.output))  # before a large model is loaded
    run = load_run(config.run)
    if run.readout.reads_texts:
        return _score_file(config, run)
    records = read_input(config.input, run, config.columns)
    predictor = make_predictor(run, config.prediction)
    split = run.encode(records)  # every record is checked before the first is predicted
    decisions = calibrate(
        config,
        run,
        predictor,
        config.columns,
        answered=records,
        seed=config.prediction.seed,
        batch_size=config.batch_size,
        tolerance=config.prediction.tolerance,
    )
    settings = _begun(config, run, records) | decisions.settings()
    with (
        ResumableJsonl(config.output, [record.id for record in records], settings) as file,
        tqdm(initial=file.done, total=len(records), disable=not config.progress) as bar,
    ):
        # Chunks begin where they began before an interruption, as rounding depends on them.
        first = file.done - file.done % config.batch_size
        for chunk in split.batches(config.batch_size, start=first):
            predictions = predict(
                predictor,
                chunk,
                batch_size=config.batch_size,
                tolerance=config.prediction.tolerance,
            )
            written = file.done - first
            answers = _answers(chunk.records, predictions, decisions)
            file.write(islice(answers, written, None))
            bar.update(len(chunk) - written)
            first = file.done
    done: dict[str, Any] = {"output": config.output, "records": len(records)}
    return done | ({"calibration": decisions.calibration} if decisions.calibration else {})


def _score_file(config: PredictConfig, run: Run) -> dict[str, Any]:
    """The same for a file of completions, whose tokens are given: how probable they are."""
    for setting in fields(DecisionConfig):
        if (value := getattr(config, setting.name)) != setting.default:
            raise ConfigError(
                f"{setting.name} is {value!r}, which decides about answers among choices, and"
                f" {config.run} reads texts: leave it out"
            )
    records = read_texts(config.input, config.run, config.columns, known=True)
    predictor = make_predictor(run, config.prediction)
    split = run.encode(records)  # type: ignore[arg-type]  # texts are the records of this readout
    settings = _begun(config, run, records)
    with (
        ResumableJsonl(config.output, [record.id for record in records], settings) as file,
        tqdm(initial=file.done, total=len(records), disable=not config.progress) as bar,
    ):
        # Chunks begin where they began before an interruption, as rounding depends on them.
        first = file.done - file.done % config.batch_size
        for chunk in split.batches(config.batch_size, start=first):
            written = file.done - first
            texts = score_split(predictor, chunk, weights=config.prediction.weights)[written:]
            rows = zip(records[file.done :], texts, strict=False)
            file.write([given(record) | scored(text) for record, text in rows])
            bar.update(len(texts))
            first = file.done
    return {"output": config.output, "records": len(records)}


def _begun(config: PredictConfig, run: Run, records: Sequence[Any]) -> dict[str, Any]:
    """What an interrupted output goes on with alone."""
    return {
        "run": config.run,
        "prediction": asdict(config.prediction),
        "batch": config.batch_size,
        **begun_for(run, records),
    }


def _answers(
    records: Sequence[Record], predictions: Predictions, decisions: Decisions
) -> Iterator[dict[str, Any]]:
    summary = summarise(predictions.logits)
    ratios = noise_to_signal(predictions.logits)
    scores = zip(summary.entropy, summary.mutual_information, ratios, strict=True)
    decided = decisions.of(records, summary)
    rows = zip(records, summary.probabilities, scores, decided, strict=True)
    for index, (record, p, (h, i, ratio), decision) in enumerate(rows):
        answer: dict[str, Any] = {
            "id": record.id,
            "answer": record.choices[int(p.argmax())],
            "label": int(p.argmax()),
            "choices": list(record.choices),
            "probabilities": [significant(x) for x in p[: len(record.choices)]],
            "entropy": significant(h),
            "mutual_information": significant(i),
            "noise_to_signal": significant(ratio),
        }
        if predictions.used is not None:
            answer["draws"] = int(predictions.used[index])
        yield answer | decision
