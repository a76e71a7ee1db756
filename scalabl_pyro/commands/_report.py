"""A table over runs: means with their intervals, paired differences, what entropy tells apart."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import json_text, write_whole
from ..prediction.calibration import CalibrationFloor, ece_floor
from ..prediction.intervals import (
    Interval,
    auroc_per_question,
    crossed_interval,
    paired_difference,
    per_question,
    stacked,
)
from ..prediction.metrics import average, entropy
from ..prediction.predictor import Predictions
from ..runs.reading import RunFolderError, read_json, read_tensors
from ._plots import plot_comparison

__all__ = ["format_table", "load_predictions", "write_report"]

METRICS = ("acc", "ece", "nll", "brier")
REFERENCE = "mle"


def load_predictions(folder: Path) -> dict[str, Predictions]:
    """The predictions of a run folder, by split.

    :raises RunFolderError: if they are missing or damaged.
    """
    path = folder / "predictions.safetensors"
    tensors = read_tensors(path)
    found = {}
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        logits, labels = (tensors.get(f"{name}.{part}") for part in ("logits", "labels"))
        if logits is None or labels is None or labels.shape != logits.shape[1:2]:
            shapes = {n: tuple(t.shape) for n, t in tensors.items() if n.startswith(f"{name}.")}
            raise RunFolderError.damaged(
                path, f"{name} has {shapes}: expected logits (S, N, C) and labels (N,)"
            )
        found[name] = Predictions(logits, labels)
    return found


def write_report(
    out: Path,
    folders: Mapping[str, list[Path]],
    *,
    chosen: Mapping[str, Any],
    trials: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``table.json``, ``table.csv``, ``table.txt`` and ``comparison.png``.

    :param folders: a row's name → its run folders, one a seed, in the same order in each row.
    :param chosen: the settings of each row; ``trials`` those that were tried.
    :returns: by row and split each metric's ``mean``, ``standard_error`` and 95 % interval ``low``
        to ``high``, over seeds and questions; the same and ``p`` for differences to ``mle``, paired
        by seed and question; ``confidence``, the probability of the answer; ``ece_floor``, the ECE
        of calibrated models with the same probabilities; and the AUROC of entropy for telling the
        examples of a further split from ``test``.
    :raises ValueError: if runs answer other questions than the first.
    """
    predictions = {name: [load_predictions(f) for f in row] for name, row in folders.items()}
    first = next(iter(folders.values()))[0]
    names = read_json(first / "metrics.json")
    splits = [s for s in names if s != "validation"]
    for name, row in predictions.items():
        for folder, run in zip(folders[name], row, strict=True):
            _check_labels(folder, run, first, predictions, splits)
    values = {
        name: {s: stacked([per_question(*_known(run[s])) for run in row]) for s in splits}
        for name, row in predictions.items()
    }
    table: dict[str, Any] = {
        "metrics": {
            name: {s: {m: _mean(row[s][m]) for m in METRICS} for s in splits}
            for name, row in values.items()
        },
        "confidence": {
            name: {s: _mean(torch.stack([_confidence(run[s]) for run in row])) for s in splits}
            for name, row in predictions.items()
        },
        "ece_floor": {
            name: {s: _floor([run[s] for run in row]) for s in splits}
            for name, row in predictions.items()
        },
        "auroc_of_entropy": {
            name: {
                s: _mean(torch.stack([_auroc(run, s) for run in row]))
                for s in splits
                if s != "test"
            }
            for name, row in predictions.items()
        },
        "chosen": dict(chosen),
        "trials": dict(trials),
    }
    if REFERENCE in values:
        table[f"minus_{REFERENCE}"] = {
            name: {
                s: {
                    m: _entry(paired_difference(row[s][m], values[REFERENCE][s][m]), p=True)
                    for m in METRICS
                }
                for s in splits
            }
            for name, row in values.items()
            if name != REFERENCE
        }
    text = format_table(table)
    write_whole(out / "table.json", json_text(table, indent=1) + "\n")
    write_whole(out / "table.csv", _csv(table))
    write_whole(out / "table.txt", text + "\n")
    plot_comparison(predictions, out / "comparison.png")
    return table


HEADER = """\
mean ± half of its 95 % interval over seeds and questions (Student's t; one seed: over questions)
ECE: beside it in brackets its floor, what calibrated models with the same probabilities would show
"""
AUROC = "AUROC: entropy of this split against test"


def format_table(table: Mapping[str, Any]) -> str:
    """The table as text, for a terminal."""
    head = f"{'':32s}{'ACC %':>14s}{'ECE % (floor)':>20s}{'NLL':>18s}{'Brier':>16s}"
    lines = [*HEADER.splitlines(), head]
    if any(table["auroc_of_entropy"].values()):
        lines = [*HEADER.splitlines(), AUROC, f"{head}{'AUROC':>16s}"]
    for split in next(iter(table["metrics"].values())):
        for name, row in table["metrics"].items():
            auroc = table["auroc_of_entropy"][name].get(split)
            last = _cell(auroc, 1, 3) if auroc else ""
            floor = f" ({100 * table['ece_floor'][name][split]['mean']:.1f})"
            lines.append(f"{split:12s}{name:20s}{_cells(row[split], floor)}{last:>16s}")
    differences = table.get(f"minus_{REFERENCE}", {})
    if differences:
        lines.append("differences, paired by seed and question, and p of none (two-sided)")
    for name, row in differences.items():
        for split, cells in row.items():
            lines.append(f"{split:12s}{name + ' − ' + REFERENCE:20s}{_cells(cells)}")
            p = {m: _p(cells[m]["p"]) for m in METRICS}
            lines.append(f"{'':32s}{p['acc']:>14s}{p['ece']:>20s}{p['nll']:>18s}{p['brier']:>16s}")
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: Mapping[str, Mapping[str, float]], floor: str = "") -> str:
    accuracy, error = (_cell(row[m], 100, 1) for m in ("acc", "ece"))
    nll, brier = (_cell(row[m], 1, 3) for m in ("nll", "brier"))
    return f"{accuracy:>14s}{error + floor:>20s}{nll:>18s}{brier:>16s}"


def _cell(value: Mapping[str, float], unit: float, digits: int) -> str:
    half = (value["high"] - value["low"]) / 2
    known = "" if math.isnan(half) else f" ± {unit * half:.{digits}f}"
    return f"{unit * value['mean']:.{digits}f}{known}"


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _csv(table: Mapping[str, Any]) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["method", "split", "metric", "mean", "standard_error", "low", "high"])
    for name, row in table["metrics"].items():
        for split, values in row.items():
            writer.writerows([name, split, m, *value.values()] for m, value in values.items())
    return file.getvalue()


def _mean(values: Tensor) -> dict[str, float]:
    return _entry(crossed_interval(values))


def _entry(found: Interval, *, p: bool = False) -> dict[str, float]:
    names = ("mean", "standard_error", "low", "high", *(("p",) if p else ()))
    return {name: getattr(found, name) for name in names}


def _confidence(run: Predictions) -> Tensor:
    """(N,), the probability of the answer."""
    return average(run.logits).exp().amax(-1)


def _floor(runs: Sequence[Predictions]) -> dict[str, float]:
    """Of each seed; their mean."""
    floors = torch.tensor([ece_floor(average(run.logits).exp()) for run in runs])
    return CalibrationFloor(*floors.mean(0).tolist())._asdict()


def _known(run: Predictions) -> tuple[Tensor, Tensor]:
    assert run.labels is not None  # a run evaluates all its splits
    return run.logits, run.labels


def _check_labels(
    folder: Path,
    run: Mapping[str, Predictions],
    first: Path,
    predictions: Mapping[str, Sequence[Mapping[str, Predictions]]],
    splits: Sequence[str],
) -> None:
    wanted = next(iter(predictions.values()))[0]
    for split in splits:
        if split not in run or not torch.equal(_known(run[split])[1], _known(wanted[split])[1]):
            raise ValueError(
                f"{folder} answers other questions of {split!r} than {first}: expected the same, in"
                " the same order; make a table of each"
            )


def _auroc(run: Mapping[str, Predictions], split: str) -> Tensor:
    """What each question of ``test`` and of the split adds to it."""
    known, other = entropy(run["test"].logits), entropy(run[split].logits)
    is_other = torch.arange(len(known) + len(other)) >= len(known)
    return auroc_per_question(torch.cat([known, other]), is_other)
