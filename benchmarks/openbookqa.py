"""ScalaBL against its baselines: a real encoder on 1,000 real questions, 5 seeds.

    python benchmarks/openbookqa.py --model FOLDER --data FOLDER/openbookqa --save

Fine-tunes an encoder (made for all-MiniLM-L6-v2) for multiple choice with LoRA r = 8 on query and
value: 400 steps of batch 16, last checkpoint. Each method has four trials, chosen by validation NLL
on a seed of their own; the chosen one runs on five further seeds, which are tested. Finished runs
are kept in ``--work`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib.pyplot as plt
import torch
import transformers
from _report import report, write_json

from scalabl_pyro.data import Split, disjoint, read_folder
from scalabl_pyro.kl import KLSchedule
from scalabl_pyro.loading import AdapterConfig, Classes, ModelConfig, load_readout, make_adapter
from scalabl_pyro.methods import MAP, MLE, Fitted, Method, ScalaBL, TemperatureScaling
from scalabl_pyro.metrics import evaluate
from scalabl_pyro.predict import Predictor, predict
from scalabl_pyro.svi import FitConfig

STEPS, BATCH, DRAWS = 400, 16, 10
TUNING_SEED, SEEDS = 100, range(5)
IMAGES = Path(__file__).parents[1] / "docs" / "images"

TRIALS: dict[str, dict[str, Callable[[], Method]]] = {
    "mle": {
        f"lr={lr:g}": lambda lr=lr: MLE(FitConfig(steps=STEPS, batch_size=BATCH, lr=lr))
        for lr in (1e-4, 3e-4, 1e-3, 3e-3)
    },
    "map": {
        f"lr={lr:g} weight_decay={decay:g}": lambda lr=lr, decay=decay: MAP(
            FitConfig(steps=STEPS, batch_size=BATCH, lr=lr, weight_decay=decay)
        )
        for lr, decay in ((3e-4, 0.1), (3e-4, 1.0), (1e-3, 0.1), (1e-3, 1.0))
    },
    "scalabl": {
        f"lr={lr:g} kl_weight={weight:g}": lambda lr=lr, weight=weight: ScalaBL(
            FitConfig(steps=STEPS, batch_size=BATCH, lr=lr, kl=KLSchedule(weight)), draws=DRAWS
        )
        for lr, weight in ((1e-3, 10), (1e-3, 30), (1e-3, 100), (2e-3, 30))
    },
}


class Bench:
    """Data and model of this benchmark."""

    def __init__(self, model: str, data: str, work: str) -> None:
        self.work = Path(work)
        self.config = ModelConfig(
            model, readout="multiple_choice", dtype="bfloat16", attention="eager"
        )
        self.adapter = AdapterConfig(targets=("query", "value"), heads=("classifier",))
        records = disjoint(read_folder(data))
        records["train"] = records["train"][:1000]
        self.readout = load_readout(self.config, Classes(4))
        self.splits: dict[str, Split] = {k: self.readout.encode(v) for k, v in records.items()}

    def fit(self, method: Method, seed: int) -> Fitted:
        def make(*, svd: bool):
            return make_adapter(self.config, self.adapter, self.readout, svd=svd)

        return method.fit(make, self.splits["train"], self.splits["validation"], seed=seed)

    def evaluate(self, predictor: Predictor, split: str) -> dict[str, float]:
        found = predict(predictor, self.splits[split])
        return evaluate(found.logits, found.labels)

    def cached(self, name: str, run: Callable[[], dict]) -> dict:
        """The result of an earlier run, or run now."""
        path = self.work / f"{name}.json".replace(" ", "_")
        if not path.exists():
            print(f"running {name}", flush=True)
            write_json(path, run())
        return json.loads(path.read_text())

    def trial(self, name: str, trial: str) -> float:
        """Validation NLL of one trial."""

        def run() -> dict:
            fitted = self.fit(TRIALS[name][trial](), TUNING_SEED)
            return self.evaluate(fitted.predictor, "validation") | summary(fitted)

        return self.cached(f"trial {name} {trial}", run)["nll"]


def summary(fitted: Fitted) -> dict[str, float]:
    """KL in nats, and the median ratio σ/|μ|, of a posterior."""
    if fitted.guide is None:
        return {}
    q = fitted.guide.get_posterior()
    ratio = q.stddev / q.mean.abs()
    return {"kl": fitted.result.history[-1]["kl"], "noise_to_signal": float(ratio.median())}


def seed_run(bench: Bench, name: str, trial: str, seed: int) -> dict[str, dict[str, float]]:
    """The table's rows that come from one training run, on test."""
    method = TRIALS[name][trial]()
    fitted = bench.fit(method, seed)
    rows = {name: bench.evaluate(fitted.predictor, "test") | summary(fitted)}
    if name == "mle":
        scaling = TemperatureScaling(method.config)
        tempered = scaling.temper(fitted, bench.splits["validation"])
        rows["mle tempered"] = bench.evaluate(tempered.predictor, "test")
        rows["mle tempered"]["temperature"] = tempered.predictor.temperature
    if name == "scalabl":
        mean = fitted.guide.median()["s"][None]
        rows["posterior mean"] = bench.evaluate(Predictor(fitted.model.adapter, mean), "test")
    return rows


def early_stopped(bench: Bench, trial: str, seed: int) -> dict[str, dict[str, float]]:
    """MLE that keeps the step with the best validation NLL, on test."""
    lr = TRIALS["mle"][trial]().config.lr
    config = FitConfig(steps=STEPS, batch_size=BATCH, lr=lr, eval_every=25, keep="best")
    fitted = bench.fit(MLE(config), seed)
    row = bench.evaluate(fitted.predictor, "test") | {"step": fitted.result.best_step}
    return {"mle early-stopped": row}


def without_posterior(bench: Bench, trial: str, seed: int) -> dict[str, dict[str, float]]:
    """MLE at ScalaBL's learning rate, which was not tuned for it: the same training but for s."""
    lr = TRIALS["scalabl"][trial]().config.lr
    fitted = bench.fit(MLE(FitConfig(steps=STEPS, batch_size=BATCH, lr=lr)), seed)
    return {f"mle at lr={lr:g}": bench.evaluate(fitted.predictor, "test")}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(values) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with train, validation, test .jsonl")
    parser.add_argument("--work", default="runs/openbookqa", help="where finished runs are kept")
    parser.add_argument("--only", help="run the trials and seeds of one method, without a table")
    parser.add_argument("--save", action="store_true", help="write results/openbookqa.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench = Bench(args.model, args.data, args.work)

    chosen, trials, rows = {}, {}, {}
    for name in [args.only] if args.only else TRIALS:
        trials[name] = {trial: bench.trial(name, trial) for trial in TRIALS[name]}
        chosen[name] = min(trials[name], key=trials[name].get)
        for seed in SEEDS:
            found = bench.cached(
                f"seed {seed} {name} {chosen[name]}",
                lambda name=name, seed=seed: seed_run(bench, name, chosen[name], seed),
            )
            if name == "mle":
                found |= bench.cached(
                    f"seed {seed} early {chosen[name]}",
                    lambda seed=seed: early_stopped(bench, chosen["mle"], seed),
                )
            if name == "scalabl":
                found |= bench.cached(
                    f"seed {seed} without posterior {chosen[name]}",
                    lambda seed=seed: without_posterior(bench, chosen["scalabl"], seed),
                )
            for row, metrics in found.items():
                rows.setdefault(row, []).append(metrics)
    if args.only:
        return
    table = {
        row: {key: mean_and_error([run[key] for run in runs]) for key in runs[0]}
        for row, runs in rows.items()
    }
    paired = {
        row: {
            key: mean_and_error(
                [a[key] - b[key] for a, b in zip(rows["scalabl"], runs, strict=True)]
            )
            for key in ("acc", "ece", "nll", "brier")
        }
        for row, runs in rows.items()
        if row != "scalabl"
    }
    figures = {"trials": trials, "chosen": chosen, "test": table, "scalabl minus": paired}
    print_table(table, paired)
    if args.save:
        plot_table(table, IMAGES / "openbookqa.png")
    report("openbookqa", figures, save=args.save)


def plot_table(table: dict, path: Path) -> None:
    """NLL and ECE of each row, mean ± standard error; further left is better."""
    names = sorted(table, key=lambda name: -table[name]["nll"][0])
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 2.6), layout="constrained", sharey=True)
    for axis, metric, label, unit in zip(
        axes, ("nll", "ece"), ("NLL (nats)", "ECE (%)"), (1, 100), strict=True
    ):
        for row, name in enumerate(names):
            value, error = (unit * x for x in table[name][metric])
            colour = "C1" if name == "scalabl" else "C0"
            axis.errorbar(value, row, xerr=error, fmt="o", color=colour, capsize=3)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].axvline(math.log(4), color="gray", linestyle="--", linewidth=1, label="guessing")
    axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    figure.savefig(part, format="png", dpi=130)
    part.replace(path)


def print_table(table: dict, paired: dict) -> None:
    print(f"{'test, mean ± s.e.':20s}{'ACC %':>14s}{'ECE %':>14s}{'NLL':>16s}{'Brier':>16s}")
    for name, row in table.items():
        print(f"{name:20s}" + _cells(row))
    for name, row in paired.items():
        print(f"{'scalabl − ' + name:28s}" + _cells(row))


def _cells(row: dict) -> str:
    percent = (f"{100 * row[k][0]:.1f} ± {100 * row[k][1]:.1f}" for k in ("acc", "ece"))
    plain = (f"{row[k][0]:.3f} ± {row[k][1]:.3f}" for k in ("nll", "brier"))
    return "".join(f"{c:>14s}" for c in percent) + "".join(f"{c:>16s}" for c in plain)


if __name__ == "__main__":
    main()
