"""Pictures of predictions: reliability diagrams, and the entropy of familiar and new inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import whole_file
from ..prediction.metrics import average, entropy
from ..prediction.predictor import Predictions

__all__ = ["plot_comparison", "plot_entropy", "plot_reliability", "save_figure"]


def plot_reliability(axis: Axes, found: Sequence[Predictions], *, bins: int = 10) -> None:
    """Accuracy against confidence in equal-width bins, over several runs.

    A bar below the diagonal is over-confident. Bars are as dark as their share of the examples.
    """
    probs = torch.cat([average(f.logits).exp() for f in found])
    labels = torch.cat([f.labels for f in found if f.labels is not None])
    confidence, answer = probs.max(-1)
    right = (answer == labels).float()
    index = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.bincount(index, minlength=bins).float()
    accuracy = torch.bincount(index, right, minlength=bins) / count.clamp(min=1)
    mean = torch.bincount(index, confidence, minlength=bins) / count.clamp(min=1)
    for i in torch.nonzero(count).flatten().tolist():
        share = float(count[i] / count.max())
        axis.bar(
            (i + 0.5) / bins, float(accuracy[i]), 0.9 / bins, color="C0", alpha=0.15 + 0.75 * share
        )
        axis.plot(float(mean[i]), float(accuracy[i]), ".", color="black", markersize=3)
    axis.plot([0, 1], [0, 1], "--", color="gray", linewidth=1)
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")


def plot_entropy(axis: Axes, runs: Mapping[str, Sequence[Predictions]], *, bins: int = 25) -> None:
    """Histograms of predictive entropy, one a split."""
    for name, found in runs.items():
        values = torch.cat([entropy(f.logits) for f in found])
        top = float(torch.log(torch.tensor(float(found[0].logits.shape[-1]))))
        axis.hist(values, bins=bins, range=(0, top), density=True, alpha=0.5, label=name)
    axis.set(yticks=[])


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
    for column, (name, found) in enumerate(runs.items()):
        axes[0, column].set_title(name)
        for row, split in enumerate(splits):
            plot_reliability(axes[row, column], [run[split] for run in found])
        plot_entropy(axes[-1, column], {s: [run[s] for run in found] for s in splits})
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
