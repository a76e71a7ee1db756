"""The picture of ``benchmarks.quality.causal``: how sure answers are, how often right, and NLL.

    python -m benchmarks.quality.causal_picture

It reads ``results/causal.json`` and the runs beside it, and writes ``docs/images/causal.png``.
"""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from benchmarks._report import IMAGES, RESULTS
from benchmarks.quality.causal import SEEDS, file_name
from scalabl_pyro.commands._plots import plot_reliability, save_figure
from scalabl_pyro.prediction.predictor import Predictions

TASK = "arc_easy"
#: row → what the picture calls it; the first and the last have a reliability diagram
ROWS = {
    "MLE, fixed recipe": "LoRA, fixed recipe",
    "zero-shot": "zero-shot",
    "MLE, fixed recipe, tempered": "fixed recipe, temperature *",
    "MLE, tempered": "LoRA tuned, temperature *",
    "V activations, 1,000 steps": "ScalaBL, defaults",
}


def main() -> None:
    figures = json.loads((RESULTS / "causal.json").read_text())["figures"][TASK]
    figure, axes = plt.subplots(
        1, 3, figsize=(10, 3.6), layout="constrained", width_ratios=(1, 1, 1.35)
    )
    first, *_, last = ROWS
    for axis, row in zip(axes, (first, last), strict=False):
        plot_reliability(axis, [predictions(row, figures["chosen"][row], s) for s in SEEDS])
        gap = 100 * figures["test"][row]["confidence_minus_acc"]["mean"]
        axis.set_title(f"{ROWS[row]}\n{gap:+.1f} points over-confident", fontsize="medium")
        axis.set_xlabel("probability of the answer")
    axes[0].set_ylabel("share of right answers")
    for place, (row, name) in enumerate(reversed(ROWS.items())):
        nll = figures["test"][row]["nll"]
        colour = {first: "C3", last: "C0"}.get(row, "dimgray")
        axes[2].plot([nll["low"], nll["high"]], [place, place], color=colour, linewidth=2)
        axes[2].plot(nll["mean"], place, "o", color=colour)
        end, side, align = (nll["low"], -8, "right") if row == first else (nll["high"], 8, "left")
        axes[2].annotate(
            *(name, (end, place), (side, 0)),
            textcoords="offset points", ha=align, va="center", fontsize="small", color=colour,
        )  # fmt: skip
    axes[2].set_title("test NLL with 95 % intervals", fontsize="medium")
    axes[2].set(xlabel="nats; left is better. * needs validation data", yticks=[])
    axes[2].margins(y=0.12)
    save_figure(figure, IMAGES / "causal.png")


def predictions(row: str, label: str, seed: int) -> Predictions:
    """Of the test questions."""
    run = load_file(RESULTS / "causal" / TASK / file_name(f"{row} {label} seed {seed}"))
    return Predictions(run["test.log_probs"][None].float(), run["test.labels"])


if __name__ == "__main__":
    main()
