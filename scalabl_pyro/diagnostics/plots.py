"""Pictures of a posterior over s, from the groups of ``to_inference_data``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..arviz_versions import az, density, group

__all__ = [
    "plot_correlation",
    "plot_forest",
    "plot_history",
    "plot_prior_posterior",
    "plot_signal_to_noise",
]


def plot_forest(data: az.InferenceData, *, rows: int = 30) -> Figure:
    """Every coordinate of s: its median, and the interval that holds 90 % of the draws.

    A row is a module, with a line for each of its r coordinates; a colour is a kind of module. Many
    modules run on in further columns, from the input to the output of the language model.

    :param data: with ``posterior``.
    :param rows: most modules in a column.
    """
    s = _draws(data, "posterior")  # (S, M, r)
    low, middle, high = np.quantile(s, [0.05, 0.5, 0.95], axis=0)  # (M, r)
    places = _places(data)
    columns = math.ceil(len(places) / rows)
    rows = math.ceil(len(places) / columns)
    figure, axes = plt.subplots(
        1,
        columns,
        figsize=(2.2 + 2.3 * columns, 1.3 + 0.26 * rows),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    colours = _colours(places)
    offsets = np.linspace(-0.36, 0.36, s.shape[2]) if s.shape[2] > 1 else np.zeros(1)
    for axis, start in zip(axes[0], range(0, len(places), rows), strict=True):
        shown = range(start, min(start + rows, len(places)))
        for m in shown:
            y = m - start + offsets
            axis.hlines(y, low[m], high[m], color=colours[places[m].kind], linewidth=0.8)
            axis.plot(middle[m], y, ".", color=colours[places[m].kind], markersize=2.5)
            if (m - start) % 2:
                axis.axhspan(m - start - 0.5, m - start + 0.5, color="0.95", zorder=0, linewidth=0)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(ylim=(rows - 0.5, -0.5), xlabel="s")
        axis.set_yticks(range(len(shown)), [places[m].label for m in shown], fontsize=7)
        axis.tick_params("y", length=0)
    figure.legend(
        handles=[Line2D([], [], color=colour, label=kind) for kind, colour in colours.items()],
        loc="outside upper center",
        ncols=2 * columns,
        fontsize="small",
    )
    return figure


def plot_signal_to_noise(data: az.InferenceData, *, ax: Axes | None = None) -> Axes:
    r"""\|μ\| / σ of each coordinate by the depth of its block, with the median of each module.

    The scale of s is not identified while V is learned; this ratio is. Modules outside of the
    blocks, such as ``lm_head``, stand at the right.

    :param data: with ``posterior``; 100 draws or more, for σ is theirs.
    :param ax: where to draw; new axes if left out.
    """
    axis = plt.subplots()[1] if ax is None else ax
    s = _draws(data, "posterior")
    ratio = np.abs(s.mean(0)) / s.std(0, ddof=1)  # (M, r)
    places = _places(data)
    colours = _colours(places)
    blocks = [place.block for place in places if place.block is not None]
    first, end = (min(blocks), max(blocks) + 1) if blocks else (0, 0)
    step = math.ceil((end - first) / 14) or 1
    outside = list(dict.fromkeys(place.kind for place in places if place.block is None))
    positions = {kind: end + step * (number + 1) for number, kind in enumerate(outside)}
    for number, (kind, colour) in enumerate(colours.items()):
        chosen = [m for m, place in enumerate(places) if place.kind == kind]
        # Kinds stand beside each other within a block.
        shift = 0.5 * ((number + 0.5) / len(colours) - 0.5)
        depths = [places[m].block for m in chosen]
        x = np.array([positions[kind] if d is None else d + shift for d in depths])
        each, middle = ratio[chosen], np.median(ratio[chosen], axis=1)
        axis.plot(np.repeat(x, s.shape[2]), each.ravel(), ".", color=colour, alpha=0.4, ms=3)
        axis.plot(x, middle, "o-", color=colour, label=kind, ms=4)
    shown = range(first, end, step)
    axis.set_xticks([*shown, *positions.values()], [*map(str, shown), *positions])
    axis.set(xlabel="block", ylabel="|μ| / σ", ylim=(0, None))
    axis.legend(fontsize="small")
    return axis


def plot_history(data: az.InferenceData) -> Figure:
    """−ELBO/N, NLL, KL in nats and the KL weight by step; lines in bold are running means.

    :param data: with the training history in ``sample_stats``.
    :raises ValueError: if there is none.
    """
    curves = group(data, "sample_stats") if "sample_stats" in data else xr.Dataset()
    if "step" not in curves:
        raise ValueError("there is no history in the data: to_inference_data(..., history=history)")
    titles = {
        "loss": "−ELBO / N, as weighted",
        "nll": "NLL",
        "kl": "KL(q ‖ p) in nats",
        "kl_weight": "KL weight",
    }
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.6), layout="constrained")
    step = curves["step"].values
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        values = curves[name]
        axis.set(title=title, xlabel="step")
        if name == "kl_weight":
            axis.plot(step, values, color="C0")
            continue
        mean = values.rolling(step=max(1, len(step) // 20), center=True, min_periods=1).mean()
        axis.plot(step, values, color="C0", alpha=0.3, linewidth=0.7)
        axis.plot(step, mean, color="C0")
    if "validation_nll" in curves:
        axes[1].plot(step, curves["validation_nll"], "o", color="C1", markersize=4)
        axes[1].legend(
            handles=[
                Line2D([], [], color="C0", label="minibatch"),
                Line2D([], [], color="C1", marker="o", linestyle="", label="validation"),
            ],
            fontsize="small",
        )
    return figure


def plot_correlation(data: az.InferenceData, *, ax: Axes | None = None) -> Axes:
    """Correlations of all M·r coordinates, module after module; the diagonal is left blank.

    Correlations of S draws scatter by 1/√S about those of the guide. Colours reach to the largest,
    but at least to 10/√S, so that this noise stays pale.

    :param data: with ``posterior``; 1,000 draws or more.
    :param ax: where to draw; new axes if left out.
    """
    axis = plt.subplots()[1] if ax is None else ax
    s = _draws(data, "posterior")
    rank = s.shape[2]
    correlation = np.atleast_2d(np.corrcoef(s.reshape(len(s), -1), rowvar=False))
    np.fill_diagonal(correlation, 0.0)
    end = min(1.0, max(float(np.abs(correlation).max()), 10 / len(s) ** 0.5))
    np.fill_diagonal(correlation, np.nan)
    image = axis.imshow(correlation, cmap="RdBu_r", vmin=-end, vmax=end, interpolation="nearest")
    places = _places(data)
    if len(places) <= 32:
        for edge in range(1, len(places)):
            axis.axhline(edge * rank - 0.5, color="0.6", linewidth=0.4)
            axis.axvline(edge * rank - 0.5, color="0.6", linewidth=0.4)
    named = range(0, len(places), math.ceil(len(places) / 16))
    middles = [(m + 0.5) * rank - 0.5 for m in named]
    labels = [places[m].label for m in named]
    axis.set_xticks(middles, labels, rotation=90, fontsize=7)
    axis.set_yticks(middles, labels, fontsize=7)
    axis.tick_params(length=2)
    axis.figure.colorbar(image, ax=axis, label="correlation", shrink=0.8)
    return axis


def plot_prior_posterior(
    data: az.InferenceData, modules: Sequence[str] | None = None, *, panels: int = 6
) -> Figure:
    """Densities of the prior and of each coordinate's posterior, a panel for a module.

    Each curve is scaled to a peak of 1: a posterior may be much narrower than its prior.

    :param data: with ``posterior`` and ``prior``.
    :param modules: names in ``data.posterior["module"]``; spread evenly over all if left out.
    :param panels: how many, if ``modules`` is left out.
    :raises ValueError: if there is no prior, or no module of that name.
    """
    if "prior" not in data:
        raise ValueError("there is no prior in the data: to_inference_data(..., model=model)")
    places, names = _places(data), list(data["posterior"]["module"].values)
    if modules is None:
        spread = np.linspace(0, len(names) - 1, min(panels, len(names))).round()
        modules = [names[int(m)] for m in spread]
    unknown = [name for name in modules if name not in names]
    if unknown:
        raise ValueError(f"there is no module {unknown[0]!r}: expected some of {names}")
    s, prior = _draws(data, "posterior"), _draws(data, "prior")
    rows = math.ceil(len(modules) / 3)
    columns = math.ceil(len(modules) / rows)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns, 2.2 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(modules) :]:
        axis.remove()
    for axis, name in zip(axes.flat, modules, strict=False):
        m = names.index(name)
        for j in range(s.shape[2]):
            axis.plot(*_density(s[:, m, j]), color="C0", linewidth=0.9)
        axis.fill_between(*_density(prior[:, m].ravel()), color="0.85", zorder=0)
        axis.set(title=places[m].label, yticks=[], ylim=(0, None))
    for axis in axes[-1]:
        axis.set_xlabel("s")
    handles = [
        Line2D([], [], color="0.85", linewidth=6, label="prior"),
        Line2D([], [], color="C0", label="posterior, a line for each coordinate"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize="small")
    return figure


class Place(NamedTuple):
    """Where a module stands in the language model."""

    block: int | None  # None outside of the blocks
    kind: str

    @property
    def label(self) -> str:
        return self.kind if self.block is None else f"{self.block} {self.kind}"


def _places(data: az.InferenceData) -> list[Place]:
    """Block and kind of each module: ``model.layers.3.self_attn.q_proj`` is (3, q_proj)."""
    parsed: list[tuple[int | None, list[str]]] = []
    for name in map(str, data["posterior"]["module"].values):
        match = re.search(r"(?:^|\.)(\d+)\.(.+)", name)
        parsed.append((int(match[1]), match[2].split(".")) if match else (None, name.split(".")))
    # As few parts of a name as tell all modules apart.
    for parts in range(1, max(len(path) for _, path in parsed) + 1):
        places = [Place(block, ".".join(path[-parts:])) for block, path in parsed]
        if len(set(places)) == len(places):
            break
    return places


def _draws(data: az.InferenceData, group: str) -> np.ndarray:
    """(S, M, r), all chains together."""
    s = data[group]["s"].stack(sample=("chain", "draw"))
    return s.transpose("sample", "module", "rank").values


def _colours(places: Sequence[Place]) -> dict[str, str]:
    kinds = dict.fromkeys(place.kind for place in places)
    return {kind: f"C{number}" for number, kind in enumerate(kinds)}


def _density(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel density estimate of the middle 99 % of the draws, with a peak of 1."""
    low, high = np.quantile(draws, [0.005, 0.995])
    grid, values = density(draws[(draws >= low) & (draws <= high)])
    return grid, values / values.max()
