"""Which V a module has: at random, from activations, or from weights. A real encoder, 5 seeds.

    python -m benchmarks.quality.subspace --model FOLDER --data FOLDER --save

The set-up of :mod:`benchmarks.quality.calibration` at 400 steps, with V frozen. ``same``: all rows
with the package's own settings, which a random V was tuned for. ``chosen``: each row has three
trials, chosen by validation NLL on a seed of their own. Five further seeds are tested. They are the
same for all rows, with the same heads, order of data and noise, so that differences are paired.
Finished runs are kept in ``--runs`` and not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks._report import RESULTS, report
from benchmarks.quality._openbookqa import Bench, auroc_between
from benchmarks.quality.calibration import SEEDS, STEPS, TUNING_SEED, mean_floor, scalabl, summary
from scalabl_pyro.methods import Fitted
from scalabl_pyro.prediction.detection import auroc, auroc_at_equal_length
from scalabl_pyro.prediction.intervals import (
    crossed_interval,
    paired_difference,
    per_question,
    stacked,
)
from scalabl_pyro.prediction.metrics import (
    average,
    entropy,
    max_probability,
    mutual_information,
    noise_to_signal,
)
from scalabl_pyro.prediction.predictor import predict

ROWS = ("random", "activations", "weights")
TRIALS = {
    f"lr={lr:g} kl_weight={weight:g}": scalabl(lr, weight, projections="frozen_v")
    for lr, weight in ((5e-3, 10), (2e-3, 10), (5e-3, 3))
}
SAME = "lr=0.005 kl_weight=10"
PARTS = ("same", "chosen")
SCORES = {
    "entropy": entropy,
    "mutual_information": mutual_information,
    "noise_to_signal": noise_to_signal,
    "max_probability": lambda logits: -max_probability(logits),
}


def trial(bench: Bench, row: str, label: str) -> float:
    """Validation NLL of one trial."""

    def run() -> dict:
        fitted = bench.fit(TRIALS[label](STEPS), TUNING_SEED, subspace=row)
        return bench.validate(fitted.predictor) | summary(fitted)

    return bench.cached(f"{row} {label} trial", run)["nll"]


def tested(bench: Bench, row: str, label: str, seed: int) -> dict[str, Any]:
    """One training run on test."""

    def run() -> dict:
        return figures(bench, bench.fit(TRIALS[label](STEPS), seed, subspace=row))

    return bench.cached(f"{row} {label} seed {seed}", run)


def figures(bench: Bench, fitted: Fitted) -> dict[str, Any]:
    """log p̄ of each test question, and AUROCs of the scores: for wrong answers, for physics, and
    for physics among questions of about the same length."""
    test, ood = (predict(fitted.predictor, bench.splits[name]) for name in ("test", "ood"))
    log_probs = average(test.logits)
    assert test.labels is not None
    wrong = log_probs.argmax(-1) != test.labels
    lengths = torch.tensor(bench.splits["test"].lengths + bench.splits["ood"].lengths)
    other = torch.arange(len(lengths)) >= len(wrong)
    areas = {}
    for name, score in SCORES.items():
        known, unknown = score(test.logits), score(ood.logits)
        both = torch.cat([known, unknown])
        areas[name] = {
            "wrong": auroc(known, wrong),
            "physics": auroc_between(known, unknown),
            "physics_at_equal_length": auroc_at_equal_length(both, other, lengths),
        }
    rounded = [[round(x, 5) for x in row] for row in log_probs.tolist()]
    return summary(fitted) | {"auroc": areas, "log_probabilities": rounded}


def table(bench: Bench, rows: list[str], part: str, seeds: int) -> dict[str, Any]:
    """Means with 95 % intervals over seeds and questions, and paired differences from random."""
    labels = bench.splits["test"].labels
    assert labels is not None
    trials: dict[str, dict[str, float]] = {}
    if part == "chosen":
        trials = {row: {label: trial(bench, row, label) for label in TRIALS} for row in rows}
    chosen = {
        row: min(trials[row], key=trials[row].__getitem__) if trials else SAME for row in rows
    }
    # Seed by seed, so that what an interruption leaves can be compared.
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    for seed in SEEDS[:seeds]:
        for row in rows:
            runs[row].append(tested(bench, row, chosen[row], seed))
    contents: dict[str, Any] = {"trials": trials, "chosen": chosen, "test": {}, "minus random": {}}
    values, floors = {}, {}
    for row in rows:
        logits = [torch.tensor(run["log_probabilities"])[None] for run in runs[row]]
        values[row] = stacked([per_question(each, labels) for each in logits])
        floors[row] = mean_floor([each[0].softmax(-1) for each in logits])
        contents["test"][row] = {
            **{
                name: crossed_interval(
                    x, bias=(floors[row] if name == "ece" else 0.0, 0.0)
                )._asdict()
                for name, x in values[row].items()
            },
            "ece_floor": floors[row],
            "kl": sum(run["kl"] for run in runs[row]) / len(runs[row]),
            "auroc": _mean([run["auroc"] for run in runs[row]]),
        }
        if row != "random" and "random" in values:
            contents["minus random"][row] = {
                name: paired_difference(
                    x,
                    values["random"][name],
                    bias=(floors[row], floors["random"]) if name == "ece" else (0.0, 0.0),
                )._asdict()
                for name, x in values[row].items()
            }
    return contents


def _mean(areas: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        score: {of: sum(run[score][of] for run in areas) / len(areas) for of in areas[0][score]}
        for score in areas[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with openbookqa/ and mmlu/")
    parser.add_argument(
        "--runs", type=Path, default=RESULTS / "subspace_runs.jsonl", help="finished runs"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the first so many")
    parser.add_argument("--save", action="store_true", help="write results/subspace.json")
    args = parser.parse_args()
    bench = Bench(args.model, args.data, args.runs)
    tables = {part: table(bench, args.rows, part, args.seeds) for part in args.parts}
    report("quality.subspace", tables, save=args.save)


if __name__ == "__main__":
    main()
