"""Calibration of ScalaBL's variants and of its baselines: a real encoder, real questions, 5 seeds.

    python -m benchmarks.quality.calibration --model FOLDER --data FOLDER --save

Fine-tunes an encoder (made for all-MiniLM-L6-v2) for multiple choice with LoRA r = 8 on query and
value, on 1,000 questions of OpenBookQA in batches of 16, last checkpoint unless a row says other.
Each row has at most five trials (V frozen eight), chosen by validation NLL on a seed of their own;
the chosen one runs on five further seeds, which are tested. At 800 steps the trials are what was
chosen at 400 and what is slower or more regularised beside it. Finished runs are kept in ``--runs``
and not run again, so that rows may be run apart (``--steps``, ``--rows``) and put together without
either.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from benchmarks._report import IMAGES, RESULTS, report
from benchmarks.quality._openbookqa import Bench
from scalabl_pyro.files import whole_file
from scalabl_pyro.infer import FitConfig
from scalabl_pyro.infer.kl import KLSchedule
from scalabl_pyro.lora.adapter import ProjectionMode
from scalabl_pyro.methods import (
    MAP,
    MLE,
    TFB,
    BLoB,
    Ensemble,
    Fitted,
    LaplaceLoRA,
    MCDropout,
    Method,
    ScalaBL,
    TemperatureScaling,
)
from scalabl_pyro.methods.reference import Reference
from scalabl_pyro.prediction.calibration import ece_floor
from scalabl_pyro.prediction.predictor import Predictor

BATCH, DRAWS, STEPS = 16, 10, 400
TUNING_SEED, SEEDS = 100, range(5)

#: what a row trains, from the number of steps; its trials by label
Trials = dict[str, Callable[[int], Method]]


@dataclass(frozen=True)
class Row:
    """A row of the table, and the further rows that its training runs give.

    :param fit: trains, from (bench, method, seed).
    :param derive: name of a row → (bench, fitted) → the predictor that it tests.
    """

    trials: Trials
    fit: Callable[..., Fitted] = Bench.fit
    derive: dict[str, Callable[[Bench, Fitted], Predictor]] = field(default_factory=dict)


def fit_config(steps: int, **settings: Any) -> FitConfig:
    return FitConfig(steps=steps, batch_size=BATCH, **settings)


def mle(
    lr: float, *, projections: ProjectionMode = "free", **settings: Any
) -> Callable[[int], Method]:
    return lambda steps: MLE(
        fit_config(steps, lr=lr, **settings), progress=False, projections=projections
    )


def decayed(lr: float, decay: float) -> Callable[[int], Method]:
    return lambda steps: MAP(fit_config(steps, lr=lr, weight_decay=decay), progress=False)


def scalabl(
    lr: float,
    weight: float = 1.0,
    *,
    projections: ProjectionMode = "free",
    budget: float | None = None,
    **settings: Any,
) -> Callable[[int], Method]:
    return lambda steps: ScalaBL(
        fit_config(steps, lr=lr, kl=KLSchedule(weight), kl_budget=budget),
        draws=DRAWS,
        progress=False,
        projections=projections,
        **settings,
    )


def blob(lr: float, weight: float) -> Callable[[int], Method]:
    return lambda steps: BLoB(
        fit_config(steps, lr=lr, kl=KLSchedule(weight)), draws=DRAWS, progress=False
    )


def baseline(method: type[Method], lr: float, **settings: Any) -> Callable[[int], Method]:
    return lambda steps: method(fit_config(steps, lr=lr), progress=False, **settings)


def reference(lr: float) -> Callable[[int], Method]:
    return lambda steps: Reference(
        fit_config(steps, lr=lr, lr_guide=lr, eps=1e-6), draws=DRAWS, progress=False
    )


def tempered(bench: Bench, fitted: Fitted) -> Predictor:
    scaling = TemperatureScaling(progress=False)
    return scaling.temper(fitted, bench.splits["validation"]).predictor


def posterior_mean(bench: Bench, fitted: Fitted) -> Predictor:
    return Predictor(fitted.model.adapter, fitted.guide.median()["s"][None])


def trained_then_s(bench: Bench, method: Method, seed: int) -> Fitted:
    """MLE on the first 800 questions, then inference on s alone on the other 200."""
    lr = 3e-4 if method.config.steps == STEPS else 1e-4  # what MLE chooses
    first = bench.fit(mle(lr)(method.config.steps), seed, questions=slice(800))
    with TemporaryDirectory() as folder:
        first.predictor.adapter.peft_model.save_pretrained(folder)
        return bench.fit(method, seed, questions=slice(800, None), start=folder)


ROWS: dict[str, Row] = {
    "MLE": Row(
        {f"lr={lr:g}": mle(lr) for lr in (1e-4, 2e-4, 3e-4, 1e-3, 3e-3)},
        derive={"MLE tempered": tempered},
    ),
    "MLE early-stopped": Row(
        {f"lr={lr:g}": mle(lr, eval_every=25, keep="best") for lr in (3e-4, 1e-3, 3e-3)}
    ),
    "MLE, A frozen": Row(
        {f"lr={lr:g}": mle(lr, projections="frozen_v") for lr in (1e-3, 2e-3, 5e-3)}
    ),
    "MAP": Row(
        {
            f"lr={lr:g} weight_decay={decay:g}": decayed(lr, decay)
            for lr, decay in ((3e-4, 0.1), (3e-4, 1.0), (1e-3, 0.1), (1e-3, 1.0))
        }
    ),
    "tempered ELBO": Row(
        {
            f"lr={lr:g} kl_weight={weight:g}": scalabl(lr, weight)
            for lr, weight in ((1e-3, 3), (1e-3, 10), (1e-3, 30), (2e-3, 30), (2e-3, 100))
        },
        derive={"its posterior mean": posterior_mean},
    ),
    "MLE at lr 2e-3": Row({"lr=0.002": mle(2e-3)}),
    "plain ELBO": Row({f"lr={lr:g}": scalabl(lr, 1.0) for lr in (3e-4, 1e-3, 2e-3)}),
    "KL budget": Row(
        {
            f"lr={lr:g} budget={nats}": scalabl(lr, budget=nats)
            for lr, nats in ((1e-3, 60), (2e-3, 30), (2e-3, 60), (2e-3, 100))
        }
    ),
    "unit-norm V": Row(
        {
            f"lr={lr:g} kl_weight={weight:g}": scalabl(lr, weight, projections="unit")
            for lr, weight in ((1e-3, 30), (2e-3, 10), (2e-3, 30), (2e-3, 100))
        }
    ),
    "prior on B": Row(
        {
            f"scale_B={scale:g} kl_weight={weight:g}": scalabl(2e-3, weight, scale_B=scale)
            for scale, weight in ((0.3, 30), (1.0, 10), (1.0, 30), (3.0, 30))
        }
    ),
    "frozen V": Row(
        {
            f"lr={lr:g} kl_weight={weight:g}": scalabl(lr, weight, projections="frozen_v")
            for lr, weight in (
                *((2e-3, 10), (2e-3, 30), (5e-3, 10), (5e-3, 30)),
                # Beyond the edges, on which the best of these four lies.
                *((5e-3, 3), (1e-2, 3), (1e-2, 10), (1e-2, 30)),
            )
        }
    ),
    "trained, then s on fresh data": Row(
        {
            f"scale={scale:g} kl_weight={weight:g}": scalabl(
                0.0, weight, projections="fixed", prior={"name": "normal", "scale": scale}
            )
            for scale, weight in ((0.3, 1), (1.0, 1), (1.0, 10))
        },
        fit=trained_then_s,
    ),
    "reference": Row(
        {f"lr={lr:g}": reference(lr) for lr in (3e-4, 1e-3, 2e-3)},
    ),
    "MC dropout": Row(
        {
            f"lr={lr:g} dropout={p:g}": baseline(MCDropout, lr, dropout=p, draws=DRAWS)
            for lr, p in ((3e-4, 0.1), (3e-4, 0.3), (1e-3, 0.1), (1e-3, 0.3))
        }
    ),
    "ensemble of 3": Row(
        {f"lr={lr:g}": baseline(Ensemble, lr, members=3) for lr in (3e-4, 1e-3)},
    ),
    "Laplace-LoRA": Row(
        {
            f"lr={lr:g} precision={precision or 'evidence'}": baseline(
                LaplaceLoRA, lr, prior_precision=precision
            )
            for lr, precision in ((3e-4, None), (3e-4, 1e3), (1e-3, None), (1e-3, 1e3))
        }
    ),
    "TFB": Row(
        {
            f"lr={lr:g} tolerance={tolerance:g}": baseline(
                TFB, lr, tolerance=tolerance, max_scale=0.2, examples=200, draws=DRAWS
            )
            for lr, tolerance in ((3e-4, 0.003), (3e-4, 0.03), (1e-3, 0.003), (1e-3, 0.03))
        }
    ),
    "BLoB": Row(
        {
            f"lr={lr:g} kl_weight={weight:g}": blob(lr, weight)
            for lr, weight in ((3e-4, 0.001), (3e-4, 0.01), (1e-3, 0.01), (1e-3, 0.1))
        }
    ),
}

#: the row of the package's own defaults, from which the others are subtracted
DEFAULT = "frozen V"

#: the rows that also run longer, and their trials then
LONGER: dict[str, tuple[str, ...]] = {
    "MLE": ("lr=0.0001", "lr=0.0002", "lr=0.0003"),
    "MLE early-stopped": ("lr=0.001", "lr=0.003"),
    "tempered ELBO": (
        "lr=0.001 kl_weight=30",
        "lr=0.002 kl_weight=30",
        "lr=0.002 kl_weight=100",
    ),
    "plain ELBO": ("lr=0.0003", "lr=0.001"),
    "KL budget": ("lr=0.002 budget=30", "lr=0.002 budget=60"),
    "unit-norm V": ("lr=0.002 kl_weight=30", "lr=0.002 kl_weight=100"),
    "prior on B": ("scale_B=1 kl_weight=30", "scale_B=3 kl_weight=30"),
    "frozen V": ("lr=0.005 kl_weight=10", "lr=0.005 kl_weight=30"),
    "trained, then s on fresh data": ("scale=0.3 kl_weight=1", "scale=1 kl_weight=1"),
    "reference": ("lr=0.001", "lr=0.002"),
}


def mean_floor(each: Sequence[Tensor]) -> float:
    """The mean ECE floor of several seeds' probabilities (N, C), by up to which their ECE is too
    high."""
    return sum(ece_floor(probabilities).mean for probabilities in each) / len(each)


def summary(fitted: Fitted) -> dict[str, float]:
    """KL in nats, and the median of σ/|μ|, of a posterior."""
    if fitted.guide is None:
        return {}
    q = fitted.guide.marginals()
    ratio = (q.scale / q.loc.abs()).detach()
    return {"kl": fitted.result.history[-1]["kl"], "noise_to_signal": float(ratio.median())}


def trial(bench: Bench, name: str, label: str, steps: int) -> float:
    """Validation NLL of one trial."""

    def run() -> dict:
        row = ROWS[name]
        fitted = row.fit(bench, row.trials[label](steps), TUNING_SEED)
        return bench.validate(fitted.predictor) | summary(fitted)

    return bench.cached(f"{steps} {name} {label} trial", run)["nll"]


def tested(bench: Bench, name: str, label: str, steps: int, seed: int) -> dict[str, dict]:
    """The rows that come from one training run, on test."""

    def run() -> dict:
        row = ROWS[name]
        fitted = row.fit(bench, row.trials[label](steps), seed)
        by_row = {name: bench.test(fitted.predictor) | summary(fitted)}
        if fitted.result.best_step != steps:
            by_row[name]["step"] = fitted.result.best_step
        for other, derive in row.derive.items():
            by_row[other] = bench.test(derive(bench, fitted))
        return by_row

    return bench.cached(f"{steps} {name} {label} seed {seed}", run)


def known(runs: list[dict]) -> list[str]:
    """The figures of a row: without draws that disagree, mutual information is rounding."""
    single = all(run["mutual_information"] < 1e-6 for run in runs)
    keys = {key: None for run in runs for key in run}
    return [key for key in keys if not (single and key.startswith("mi_"))]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(values) ** 0.5)


def table(bench: Bench, names: list[str], steps: int) -> dict:
    """All figures at one number of steps."""
    trials, chosen, rows = {}, {}, {}
    for name in names:
        labels = LONGER[name] if steps > STEPS else tuple(ROWS[name].trials)
        chosen[name] = labels[0]
        if len(labels) > 1:
            trials[name] = {label: trial(bench, name, label, steps) for label in labels}
            chosen[name] = min(trials[name], key=trials[name].get)
        for seed in SEEDS:
            for row, metrics in tested(bench, name, chosen[name], steps, seed).items():
                rows.setdefault(row, []).append(metrics)
    figures = {
        "trials": trials,
        "chosen": chosen,
        "test": {
            row: {key: mean_and_error([run.get(key, steps) for run in runs]) for key in known(runs)}
            for row, runs in rows.items()
        },
    }
    if DEFAULT in rows:
        figures[f"{DEFAULT} minus"] = {
            row: {
                key: mean_and_error(
                    [a[key] - b[key] for a, b in zip(rows[DEFAULT], runs, strict=True)]
                )
                for key in ("acc", "ece", "nll", "brier")
            }
            for row, runs in rows.items()
            if row != DEFAULT
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with openbookqa/ and mmlu/")
    parser.add_argument(
        "--runs", default=str(RESULTS / "calibration_runs.jsonl"), help="finished runs"
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[STEPS, 2 * STEPS], choices=[STEPS, 2 * STEPS]
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--save", action="store_true", help="write results/calibration.json")
    args = parser.parse_args()
    bench = Bench(args.model, args.data, args.runs)
    figures = {}
    for steps in args.steps:
        names = [name for name in args.rows if steps == STEPS or name in LONGER]
        figures[str(steps)] = table(bench, names, steps)
        print_table(steps, figures[str(steps)])
    if args.save:
        plot_tables(figures, IMAGES / "calibration.png")
    report("quality.calibration", figures, save=args.save)


def plot_tables(figures: dict, path: Path) -> None:
    """NLL and ECE of rows that beat guessing, mean ± standard error; further left is better."""
    first = next(iter(figures.values()))["test"]
    # One that is worse than guessing would squeeze the others into a corner.
    names = sorted(
        (name for name in first if first[name]["nll"][0] < math.log(4)),
        key=lambda name: -first[name]["nll"][0],
    )
    figure, axes = plt.subplots(
        1, 2, figsize=(8.5, 0.3 * len(names) + 0.8), layout="constrained", sharey=True
    )
    for shift, (steps, by_split) in enumerate(figures.items()):
        for axis, metric, unit in zip(axes, ("nll", "ece"), (1, 100), strict=True):
            points = [
                (i, by_split["test"][n][metric])
                for i, n in enumerate(names)
                if n in by_split["test"]
            ]
            rows = [i - 0.2 * shift for i, _ in points]
            values = [unit * value for _, (value, _) in points]
            errors = [unit * error for _, (_, error) in points]
            axis.errorbar(
                values, rows, xerr=errors, fmt="o", ms=4, color=f"C{shift}", label=f"{steps} steps"
            )
    for axis, label in zip(axes, ("NLL (nats)", "ECE (%)"), strict=True):
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    labels = {
        DEFAULT: "ScalaBL (V frozen)",
        "tempered ELBO": "V and B free",
        "its posterior mean": "V and B free, posterior mean",
        "plain ELBO": "V and B free, plain ELBO",
    }
    axes[0].set_yticks(range(len(names)), [labels.get(name, name) for name in names])
    axes[0].axvline(math.log(4), color="gray", linestyle="--", linewidth=1, label="guessing")
    for axis in axes:
        axis.legend(fontsize="small")
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=130)


def print_table(steps: int, figures: dict) -> None:
    head = f"{'ACC %':>13s}{'ECE %':>13s}{'NLL':>16s}{'Brier':>16s}"
    print(f"{f'{steps} steps, test':42s}{head}   AUROC: entropy, MI; wrong | physics")
    for name, row in figures["test"].items():
        areas = (f"{score}_auroc_{of}" for of in ("wrong", "ood") for score in ("entropy", "mi"))
        tail = " ".join(f"{row[key][0]:.3f}" if key in row else "  –  " for key in areas)
        print(f"{name:42s}{_cells(row)}   {tail}")
    for name, row in figures.get(f"{DEFAULT} minus", {}).items():
        print(f"{DEFAULT} − {name:31s}" + _cells(row))


def _cells(row: dict) -> str:
    percent = (f"{100 * row[k][0]:.1f} ± {100 * row[k][1]:.1f}" for k in ("acc", "ece"))
    plain = (f"{row[k][0]:.3f} ± {row[k][1]:.3f}" for k in ("nll", "brier"))
    return "".join(f"{c:>13s}" for c in percent) + "".join(f"{c:>16s}" for c in plain)


if __name__ == "__main__":
    main()
