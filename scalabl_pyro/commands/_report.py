"""A table over runs: mean ± standard error, paired differences, and what entropy tells apart."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..files import write_whole
from ..prediction.metrics import auroc, entropy
from ..prediction.predictor import Predictions
from ._plots import plot_comparison

__all__ = ["format_table", "load_predictions", "write_report"]

METRICS = ("acc", "ece", "nll", "brier")
REFERENCE = "mle"


def load_predictions(folder: Path) -> dict[str, Predictions]:
    """The predictions of a run folder, by split."""
    tensors = load_file(folder / "predictions.safetensors")
    names = sorted({name.rpartition(".")[0] for name in tensors})
    return {n: Predictions(tensors[f"{n}.logits"], tensors.get(f"{n}.labels")) for n in names}


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
    :returns: metrics by row and split as [mean, standard error], differences to ``mle`` paired by
        seed, and the AUROC of entropy for telling the examples of a further split from ``test``.
    """
    predictions = {name: [load_predictions(f) for f in row] for name, row in folders.items()}
    metrics = {
        name: [json.loads((f / "metrics.json").read_text()) for f in row]
        for name, row in folders.items()
    }
    splits = [s for s in next(iter(metrics.values()))[0] if s != "validation"]
    table: dict[str, Any] = {
        "metrics": {
            name: {s: {m: _mean([run[s][m] for run in runs]) for m in METRICS} for s in splits}
            for name, runs in metrics.items()
        },
        "auroc_of_entropy": {
            name: {s: _mean([_auroc(run, s) for run in runs]) for s in splits if s != "test"}
            for name, runs in predictions.items()
        },
        "chosen": dict(chosen),
        "trials": dict(trials),
    }
    if REFERENCE in metrics:
        table[f"minus_{REFERENCE}"] = {
            name: {
                s: {
                    m: _mean(
                        [a[s][m] - b[s][m] for a, b in zip(runs, metrics[REFERENCE], strict=True)]
                    )
                    for m in METRICS
                }
                for s in splits
            }
            for name, runs in metrics.items()
            if name != REFERENCE
        }
    text = format_table(table)
    write_whole(out / "table.json", json.dumps(table, indent=1) + "\n")
    write_whole(out / "table.csv", _csv(table))
    write_whole(out / "table.txt", text + "\n")
    plot_comparison(predictions, out / "comparison.png")
    return table


def format_table(table: Mapping[str, Any]) -> str:
    """The table as text, for a terminal."""
    head = f"{'':12s}{'':16s}{'ACC %':>14s}{'ECE %':>14s}{'NLL':>18s}{'Brier':>16s}{'AUROC':>16s}"
    lines = ["mean ± standard error over seeds; AUROC: entropy of this split against test", head]
    for split in next(iter(table["metrics"].values())):
        for name, row in table["metrics"].items():
            auroc = table["auroc_of_entropy"][name].get(split)
            last = _cell(auroc, 1, 3) if auroc else ""
            lines.append(f"{split:12s}{name:16s}{_cells(row[split])}{last:>16s}")
    for name, row in table.get(f"minus_{REFERENCE}", {}).items():
        for split, cells in row.items():
            lines.append(f"{split:12s}{name + ' − ' + REFERENCE:20s}{_cells(cells)[4:]}")
    return "\n".join(lines)


def _cells(row: Mapping[str, tuple[float, float | None]]) -> str:
    percent = [_cell(row[m], 100, 1) for m in ("acc", "ece")]
    plain = [_cell(row[m], 1, 3) for m in ("nll", "brier")]
    return f"{percent[0]:>14s}{percent[1]:>14s}{plain[0]:>18s}{plain[1]:>16s}"


def _cell(value: tuple[float, float | None], unit: float, digits: int) -> str:
    mean, error = value
    return f"{unit * mean:.{digits}f}" + (
        f" ± {unit * error:.{digits}f}" if error is not None else ""
    )


def _csv(table: Mapping[str, Any]) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["method", "split", "metric", "mean", "standard_error"])
    for name, row in table["metrics"].items():
        for split, values in row.items():
            writer.writerows([name, split, m, *value] for m, value in values.items())
    return file.getvalue()


def _mean(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error, which one value does not have."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(values) ** 0.5) if len(values) > 1 else None


def _auroc(run: Mapping[str, Predictions], split: str) -> float:
    known, other = entropy(run["test"].logits), entropy(run[split].logits)
    return auroc(torch.cat([known, other]), torch.arange(len(known) + len(other)) >= len(known))
