"""A report as one HTML page, which needs no other file: the pictures are in it."""

from __future__ import annotations

import base64
import io
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib
import torch
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .. import __version__
from ..prediction.metrics import entropy, summarise
from ..prediction.predictor import Predictions
from ..prediction.rejection import risk_coverage_curve
from ..runs.settings import flat
from ._formats import (
    AURC,
    AUROC_OF,
    BASELINE,
    BEST,
    COST,
    DIFFERENCES,
    HEADER,
    METRICS,
    TITLES,
    auroc_note,
    auroc_scores,
    aurocs,
    cost_cells,
    cost_ratio,
    cost_titles,
    difference_cell,
    differences,
    left_out,
    mark,
    metric_cells,
    p_value,
)
from ._plots import plot_cost, plot_entropy, plot_reliability, plot_risk_coverage
from ._runs import ReportedRun

__all__ = ["to_html"]

Runs = Sequence[Mapping[str, Predictions]]

#: text stays text, names hold no formulas, and the same picture is the same file
SVG: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scalabl",
    "font.size": 9,
    "text.parse_math": False,
}


class Picture(NamedTuple):
    """An image with a text in its place, and what is written below it."""

    source: str
    alt: str
    caption: str


def to_html(
    table: Mapping[str, Any],
    runs: Mapping[str, Sequence[ReportedRun]],
    out: Path,
) -> str:
    """The page of a table.

    :param table: as in ``table.json``.
    :param runs: a row's name → its runs, one a seed.
    :param out: the folder that the page is for, from which its links go.
    """
    predictions = {name: [run.predictions for run in row] for name, row in runs.items()}
    splits = sorted(next(iter(table["metrics"].values())), key=lambda split: split != "test")
    # Of what users call their rows, splits, choices and settings nothing is HTML.
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((files(__package__) / "report.html").read_text(encoding="utf-8"))
    return template.render(
        version=__version__,
        rows=list(runs),
        lost=left_out(table),
        links={
            name: [(str(run.seed), run.folder and _link(run.folder, out)) for run in row]
            for name, row in runs.items()
        },
        splits=splits,
        header=HEADER.strip().replace("\n", "; "),
        best=BEST,
        cost=COST,
        auroc=auroc_note(table),
        auroc_columns=[AUROC_OF[score] for score in auroc_scores(table)],
        aurocs=_by_split(aurocs(table)),
        columns=list(TITLES.values()),
        difference_columns=DIFFERENCES,
        aurc=AURC,
        cost_columns=cost_titles(table),
        cells={split: {name: _cells(table, split, name) for name in runs} for split in splits},
        costs={name: cost_cells(table, name) for name in runs},
        reference=BASELINE,
        differences=_by_split(
            (split, name, [(_signed(by_metric[m], m), p_value(by_metric[m]["p"])) for m in METRICS])
            for split, name, by_metric in differences(table)
        ),
        pictures={name: _pictures(table, predictions, name, splits) for name in runs},
        cost_pictures=_cost_pictures(table),
        settings=_settings({name: row[0].settings for name, row in runs.items()}),
        trials={name: _trials(table, name, row) for name, row in table["trials"].items()},
    )


def _link(folder: Path, out: Path) -> str:
    return quote(Path(os.path.relpath(folder.resolve(), out.resolve())).as_posix() + "/")


def _cells(table: Mapping[str, Any], split: str, name: str) -> list[tuple[str, str]]:
    """A row's metrics, each with its mark."""
    texts = metric_cells(table, name, split)
    return [(texts[metric], mark(table, split, metric, name).strip()) for metric in METRICS]


def _by_split(rows: Iterable[tuple[str, str, list[Any]]]) -> dict[str, list[tuple[str, list[Any]]]]:
    """Split → row and cells, of split, row and cells."""
    groups: dict[str, list[tuple[str, list[Any]]]] = {}
    for split, name, cells in rows:
        groups.setdefault(split, []).append((name, cells))
    return groups


def _signed(difference: Mapping[str, float], metric: str) -> str:
    return difference_cell(difference, metric).replace("-", "−")


# ---------------------------------------------------------------------- pictures


def _picture(
    draw: Callable[[Axes], None],
    alt: str,
    caption: str,
    size: tuple[float, float] = (2.6, 2.5),
) -> Picture:
    """:param size: in inches."""
    with matplotlib.rc_context(SVG):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    source = base64.b64encode(file.getvalue()).decode()
    return Picture(f"data:image/svg+xml;base64,{source}", alt, caption)


def _pictures(
    table: Mapping[str, Any], predictions: Mapping[str, Runs], name: str, splits: Sequence[str]
) -> list[Picture]:
    """Of one row: reliability on each split, risk and coverage on test, and other data."""
    runs = predictions[name]
    pictures = []
    for split in splits:
        ece = 100 * table["metrics"][name][split]["ece"]["mean"]
        floor = 100 * table["ece_floor"][name][split]["mean"]

        def reliability(axis: Axes, split: str = split) -> None:
            plot_reliability(axis, [run[split] for run in runs])
            axis.set(xlabel="confidence", ylabel="accuracy")

        alt = (
            f"Reliability of {name} on {split}: accuracy against confidence in ten bins. ECE"
            f" {ece:.1f} %, of a calibrated model {floor:.1f} %."
        )
        pictures.append(_picture(reliability, alt, f"Reliability on {split}"))
    curves = {row: _curve([run["test"] for run in its]) for row, its in predictions.items()}
    curve = curves[name]
    every, half = (100 * float(curve[k - 1]) for k in (len(curve), (len(curve) + 1) // 2))
    alt = (
        f"Risk and coverage of {name} on test: the error rate is {every:.1f} % of all answers and"
        f" {half:.1f} % of the half that is most certain."
    )
    caption = "Risk against coverage on test; the other rows in grey"
    pictures.append(_picture(lambda axis: plot_risk_coverage(axis, curves, name), alt, caption))
    if len(splits) > 1:
        by_split = {split: [run[split] for run in runs] for split in splits}

        def histograms(axis: Axes) -> None:
            plot_entropy(axis, by_split)
            axis.set(xlabel="entropy (nats)", ylabel="density")
            axis.legend(fontsize="small")

        medians = ", ".join(
            f"{split} {statistics.median(_entropies(parts)):.2f}"
            for split, parts in by_split.items()
        )
        alt = f"Histograms of the predictive entropy of {name}; medians in nats: {medians}."
        pictures.append(_picture(histograms, alt, "Entropy on test and on other data"))
    return pictures


def _curve(runs: Sequence[Predictions]) -> Tensor:
    """(N,), the mean over seeds of the error rate of the k most certain answers."""
    curves = []
    for run in runs:
        summary = summarise(run.logits)
        assert run.labels is not None  # a run evaluates all its splits
        wrong = summary.probabilities.argmax(-1) != run.labels
        curves.append(risk_coverage_curve(summary.uncertainty, wrong))
    return torch.stack(curves).mean(0)


def _entropies(runs: Sequence[Predictions]) -> list[float]:
    return torch.cat([entropy(run.logits) for run in runs]).tolist()


def _cost_pictures(table: Mapping[str, Any]) -> list[Picture]:
    """Quality against the cost of training and of prediction, in one unit for all rows."""
    pictures = []
    for key in ("training", "prediction"):
        costs = {name: row and row[key] for name, row in table["cost"].items()}
        plain_lora = costs.get(BASELINE)
        known: dict[str, float | None] = {
            name: cost_ratio(own, plain_lora) for name, own in costs.items()
        }
        unit = f"passes over {BASELINE}'s"
        if None in known.values():
            unit, each = ("seconds", 1) if key == "training" else ("milliseconds an answer", 1000)
            known = {name: own and each * own["seconds"] for name, own in costs.items()}
        points = {
            name: (cost, table["metrics"][name]["test"]["nll"])
            for name, cost in known.items()
            if cost is not None
        }
        if not points:
            continue

        def draw(axis: Axes, points: Any = points, label: str = f"{key}: {unit}") -> None:
            plot_cost(axis, points)
            axis.set(xlabel=label)

        said = "; ".join(f"{n} {c:.3g}, {nll['mean']:.3f}" for n, (c, nll) in points.items())
        alt = f"Test NLL against the cost of {key}. Row, {unit}, NLL: {said}."
        size = (4.4, max(2.5, 0.2 * len(points)))  # a line for each name
        pictures.append(_picture(draw, alt, f"Test NLL against the cost of {key}", size))
    return pictures


# ---------------------------------------------------------------------- settings


def _settings(
    runs: Mapping[str, Mapping[str, Any]],
) -> tuple[list[tuple[str, str]], dict[str, list[tuple[str, str]]]]:
    """Those that all rows share, and what each has of its own."""
    each = {name: {k: _value(v) for k, v in run.items()} for name, run in runs.items()}
    first = next(iter(each.values()))
    shared = {
        key: value
        for key, value in first.items()
        if all(row.get(key) == value for row in each.values())
    }
    own = {
        name: [(key, value) for key, value in row.items() if key not in shared]
        for name, row in each.items()
    }
    return list(shared.items()), own


def _trials(
    table: Mapping[str, Any], name: str, row: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """What was tried, the seed if it was tried on one of the table's, and the validation NLL."""
    trials = []
    for trial in row:
        text = ", ".join(f"{key}={_value(value)}" for key, value in flat(trial["trial"]).items())
        nll = trial["validation_nll"]
        score = "diverged" if nll is None else f"{nll:.4f}"
        trials.append((text, str(trial.get("seed", "")), score))
    return trials


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
