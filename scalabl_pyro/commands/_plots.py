"""Pictures of predictions: reliability, risk and coverage, entropy, and quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator
from torch import Tensor

from ..files import whole_file
from ..prediction.calibration import bin_of, calibration_band
from ..prediction.metrics import average, entropy
from ..prediction.predictor import Predictions

__all__ = [
    "plot_comparison",
    "plot_cost",
    "plot_entropy",
    "plot_reliability",
    "plot_risk_coverage",
    "save_figure",
]


#: of a reliability diagram
_BINS = 10


def plot_reliability(axis: Axes, runs: Sequence[Predictions]) -> None:
    """Accuracy against confidence in ten bins of equal width, over several runs.

    A bar below the diagonal is over-confident. Bars are as dark as their share of the examples.
    Black lines are where 95 % of a calibrated model's bins would end, with the probabilities and
    the number of examples of one run, on average: all runs answer the same questions.
    """
    probs = torch.cat([average(run.logits).exp() for run in runs])
    labels = torch.cat([run.labels for run in runs if run.labels is not None])
    confidence, answer = probs.max(-1)
    right = (answer == labels).float()
    index = bin_of(confidence, _BINS)
    count = torch.bincount(index, minlength=_BINS).float()
    accuracy = torch.bincount(index, right, minlength=_BINS) / count.clamp(min=1)
    mean = torch.bincount(index, confidence, minlength=_BINS) / count.clamp(min=1)
    bands = torch.stack([calibration_band(average(run.logits).exp(), _BINS) for run in runs])
    low, high = bands.nanmean(0)
    for i in torch.nonzero(count).flatten().tolist():
        share = float(count[i] / count.max())
        axis.bar(
            (i + 0.5) / _BINS,
            float(accuracy[i]),
            0.9 / _BINS,
            color="C0",
            alpha=0.15 + 0.75 * share,
        )
        axis.plot(float(mean[i]), float(accuracy[i]), ".", color="black", markersize=3)
        axis.vlines((i + 0.5) / _BINS, float(low[i]), float(high[i]), color="black", linewidth=1)
    axis.plot([0, 1], [0, 1], "--", color="gray", linewidth=1)
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")


def plot_entropy(axis: Axes, runs: Mapping[str, Sequence[Predictions]]) -> None:
    """Histograms of predictive entropy, one a split, told apart by colour and by dashes."""
    for (name, predictions), dashes in zip(
        runs.items(), cycle(("-", "--", ":", "-.")), strict=False
    ):
        values = torch.cat([entropy(each.logits) for each in predictions])
        top = float(torch.log(torch.tensor(float(predictions[0].logits.shape[-1]))))
        axis.hist(
            values,
            bins=25,
            range=(0, top),
            density=True,
            histtype="step",
            linestyle=dashes,
            linewidth=1.3,
            label=name,
        )
    axis.set(yticks=[])


def plot_risk_coverage(axis: Axes, curves: Mapping[str, Tensor], name: str) -> None:
    """The error rate of the answers that are kept, against their share; one row in colour, the
    others in grey.

    :param curves: a row's name → R_k at k = 1 … N (N,), see ``risk_coverage_curve``.
    """
    for other, curve in sorted(curves.items(), key=lambda item: item[0] == name):
        coverage = torch.arange(1, len(curve) + 1) / len(curve)
        colour, width = ("C0", 1.8) if other == name else ("0.75", 0.7)
        axis.plot(coverage, curve, color=colour, linewidth=width)
    axis.set(xlim=(0, 1), ylim=(0, None), xlabel="coverage", ylabel="error rate")


def plot_cost(axis: Axes, points: Mapping[str, tuple[float, Mapping[str, float]]]) -> None:
    """Test NLL with its interval against a cost, with names at the right.

    :param points: a row's name → its cost and its NLL, with ``mean``, ``low`` and ``high``.
    """
    for cost, nll in points.values():
        axis.plot([cost, cost], [nll["low"], nll["high"]], color="C0", linewidth=1, alpha=0.5)
        axis.plot(cost, nll["mean"], "o", color="C0", markersize=4)
    order = sorted(points, key=lambda name: points[name][1]["mean"])
    for place, name in enumerate(order):
        cost, nll = points[name]
        axis.annotate(
            name,
            (cost, nll["mean"]),
            xytext=(1.08, (place + 0.5) / len(order)),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.5},
        )
    # The base model costs nothing to train.
    axis.set_xscale("symlog", linthresh=1, linscale=0.2)
    axis.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(ylabel="test NLL")


def plot_comparison(runs: Mapping[str, Sequence[Mapping[str, Predictions]]], path: Path) -> None:
    """A column a method: reliability on each split, then the entropy of all splits; a PNG.

    :param runs: method → a mapping from split to predictions for each seed.
    """
    splits = [s for s in next(iter(runs.values()))[0] if s != "validation"]
    splits.sort(key=lambda s: s != "test")
    rows, columns = len(splits) + 1, len(runs)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.5 * columns + 0.5, 2.4 * rows),
        layout="constrained",
        squeeze=False,
    )
    for column, (name, by_seed) in enumerate(runs.items()):
        axes[0, column].set_title(name)
        for row, split in enumerate(splits):
            plot_reliability(axes[row, column], [run[split] for run in by_seed])
        plot_entropy(axes[-1, column], {s: [run[s] for run in by_seed] for s in splits})
        axes[-2, column].set_xlabel("confidence")
        axes[-1, column].set_xlabel("entropy (nats)")
    for row, split in enumerate(splits):
        axes[row, 0].set_ylabel(f"{split}\naccuracy")
    axes[-1, 0].set_ylabel("density")
    axes[-1, -1].legend(fontsize="small")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all, and close the figure."""
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
    plt.close(figure)
