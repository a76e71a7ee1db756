"""Buying labels: accuracy against the number of labels, by what chooses them. A real encoder.

    python -m benchmarks.quality.labels --model FOLDER --data FOLDER --save

The encoder of :mod:`benchmarks.quality.calibration` and its 1,000 training questions, whose labels
are bought in 6 rounds of 50. The first 50 are random, the same for all scores of a seed. After each
round ScalaBL with the package's defaults is trained anew for 150 steps, tested, and asked for the
next 50 (``sp.select``). BALD and random have five seeds, entropy and novelty three. Nothing is
tuned. Differences from random are paired by seed and question. Finished rounds are kept in
``--runs`` and not run again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._report import RESULTS, report
from benchmarks.quality._openbookqa import Bench
from benchmarks.quality.calibration import scalabl
from scalabl_pyro.lora.loading import make_adapter
from scalabl_pyro.methods import Fitted
from scalabl_pyro.prediction.intervals import crossed_interval, paired_difference, per_question
from scalabl_pyro.prediction.predictor import predict
from scalabl_pyro.prediction.selection import select

ROUNDS, COUNT, STEPS = 6, 50, 150
#: seeds by what chooses
SEEDS = {"random": 5, "bald": 5, "entropy": 3, "novelty": 3}


def start(bench: Bench, scores: Sequence[str], seed: int) -> dict[str, Any]:
    """The first round, of random questions, and what each score would buy next."""
    ids = [record.id for record in bench.splits["train"].records]
    bought = random.Random(seed).sample(ids, COUNT)

    def run() -> dict:
        fitted, tested = trained(bench, bought, seed)
        chosen = {by: choose(bench, fitted, bought, by, seed) for by in scores}
        return tested | {"bought": bought, "chosen": chosen}

    return bench.cached(f"seed {seed} start, {' '.join(scores)}", run)


def rounds(bench: Bench, scores: Sequence[str], by: str, seed: int) -> list[dict[str, Any]]:
    """What each round tells of the test questions."""
    outcomes = [start(bench, scores, seed)]
    bought = [*outcomes[0]["bought"], *outcomes[0]["chosen"][by]]
    for number in range(1, ROUNDS):
        last = number == ROUNDS - 1

        def run(bought: list[str] = bought, last: bool = last) -> dict:
            fitted, tested = trained(bench, bought, seed)
            return tested | {"chosen": [] if last else choose(bench, fitted, bought, by, seed)}

        outcomes.append(bench.cached(f"{by} seed {seed} round {number}", run))
        bought = [*bought, *outcomes[-1]["chosen"]]
    return outcomes


def trained(bench: Bench, bought: Sequence[str], seed: int) -> tuple[Fitted, dict[str, Any]]:
    """ScalaBL on some training questions, and ``acc`` and ``nll`` of each test question."""
    ids = set(bought)
    records = [record for record in bench.splits["train"].records if record.id in ids]
    train = bench.readout.encode(records)
    method = scalabl(5e-3, 10, projections="frozen_v")(STEPS)
    settings = replace(bench.adapter, subspace="auto")
    make = partial(make_adapter, bench.config, settings, bench.readout, prompts=train)
    fitted = method.fit(make, train, None, seed=seed)
    test = predict(fitted.predictor, bench.splits["test"])
    assert test.labels is not None
    each = per_question(test.logits, test.labels)
    return fitted, {name: [round(x, 5) for x in each[name].tolist()] for name in ("acc", "nll")}


def choose(bench: Bench, fitted: Fitted, bought: Sequence[str], by: str, seed: int) -> list[str]:
    """The ids of the next questions to label, chosen without their labels."""
    ids = set(bought)
    records = bench.splits["train"].records
    pool = [replace(record, label=None) for record in records if record.id not in ids]
    train = bench.readout.encode([record for record in records if record.id in ids])
    selection = select(
        fitted.predictor,
        pool,
        COUNT,
        by=by,
        model=fitted.model,
        guide=fitted.guide,
        train=train,
        seed=1000 * seed + len(bought),
    )
    return [record.id for record in selection.records]


def table(bench: Bench, seeds: dict[str, int]) -> dict[str, Any]:
    """Means with 95 % intervals over seeds and questions, for each number of labels and over all
    rounds but the first, and differences from random on the seeds that both have."""
    scores = list(seeds)
    runs: dict[str, list[list[dict[str, Any]]]] = {by: [] for by in scores}
    for seed in range(max(seeds.values())):
        for by in scores:
            if seed < seeds[by]:
                runs[by].append(rounds(bench, scores, by, seed))
    figures: dict[str, Any] = {}
    for by, each in runs.items():
        figures[by] = {"seeds": len(each), "minus random": {}}
        for metric in ("acc", "nll"):
            values = curves(each, metric)
            figures[by][metric] = {k: crossed_interval(x)._asdict() for k, x in values.items()}
            if by != "random" and "random" in runs:
                K = min(len(each), len(runs["random"]))
                other = curves(runs["random"], metric)
                figures[by]["minus random"][metric] = {
                    k: paired_difference(x[:K], other[k][:K])._asdict() for k, x in values.items()
                }
    return figures


def curves(runs: Sequence[Sequence[dict[str, Any]]], metric: str) -> dict[str, Tensor]:
    """(K, N) of seeds and test questions, by the number of labels, and their mean after the
    first round."""
    values = torch.tensor([[tested[metric] for tested in each] for each in runs])  # (K, R, N)
    by_count = {str(COUNT * (r + 1)): values[:, r] for r in range(values.shape[1])}
    return by_count | {"mean after the first": values[:, 1:].mean(1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with openbookqa/ and mmlu/")
    parser.add_argument(
        "--runs", type=Path, default=RESULTS / "labels_runs.jsonl", help="finished rounds"
    )
    parser.add_argument("--scores", nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--seeds", type=int, default=max(SEEDS.values()), help="at most so many")
    parser.add_argument("--save", action="store_true", help="write results/labels.json")
    args = parser.parse_args()
    seeds = {by: min(SEEDS[by], args.seeds) for by in args.scores}
    bench = Bench(args.model, args.data, args.runs)
    report("quality.labels", table(bench, seeds), save=args.save)


if __name__ == "__main__":
    main()
