"""Every method on one task: a real encoder, real questions, 5 seeds.

    python -m benchmarks.quality.methods --model FOLDER --data FOLDER --save

The set-up is that of ``benchmarks.quality.calibration``, 400 steps. A row has at most four trials,
and takes the one with the lowest validation NLL on a seed of their own; that one runs on five
further seeds, which are tested. What a method does after training it does to the same runs as the
others: one run of maximum likelihood serves the temperature, the checkpoint ensemble, both kinds
of Laplace and TFB, each with the learning rate that is best for itself. Finished runs are kept in
``--runs`` and not run again, so that rows may be run apart (``--rows``) and put together later.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks._report import RESULTS, report
from benchmarks.quality._openbookqa import Bench
from benchmarks.quality.calibration import (
    DRAWS,
    SEEDS,
    STEPS,
    TUNING_SEED,
    fit_config,
    known,
    mean_and_error,
    summary,
)
from scalabl_pyro.infer.kl import KLSchedule
from scalabl_pyro.methods import (
    IVON,
    MAP,
    MLE,
    SWAG,
    TFB,
    BLoB,
    CheckpointEnsemble,
    DALorRA,
    Ensemble,
    Fitted,
    LaplaceLoRA,
    LastLayerLaplace,
    MCDropout,
    Method,
    Reference,
    ScalaBL,
    TemperatureScaling,
)
from scalabl_pyro.prediction.predictor import Predictor, Predicts

#: what a row predicts with, of a training run
Derive = Callable[[Bench, Fitted], Predicts]
PLAIN: dict[str, Any] = {"progress": False}


def own(bench: Bench, fitted: Fitted) -> Predicts:
    """The method's own predictor."""
    return fitted.predictor


def point(bench: Bench, fitted: Fitted) -> Predictor:
    """The matrices as they are."""
    return Predictor(fitted.model.adapter)


def posterior_mean(bench: Bench, fitted: Fitted) -> Predictor:
    assert fitted.guide is not None
    return Predictor(fitted.model.adapter, fitted.guide.median()["s"][None])


def tempered(bench: Bench, fitted: Fitted) -> Predicts:
    at_point = replace(fitted, predictor=point(bench, fitted))
    return TemperatureScaling(**PLAIN).temper(at_point, bench.splits["validation"]).predictor


def then(method: Method) -> Derive:
    """What a method does after training."""
    return lambda bench, fitted: (
        method.finish(fitted, bench.splits["train"], bench.splits["validation"], seed=0).predictor
    )


def tfb(*tolerances: float) -> dict[str, Derive]:
    settings: dict[str, Any] = {"max_scale": 1.0, "bisections": 8, "examples": 200, "draws": DRAWS}
    return {
        f"tolerance={tolerance:g}": then(TFB(tolerance=tolerance, **settings, **PLAIN))
        for tolerance in tolerances
    }


@dataclass(frozen=True)
class Row:
    """A row of the table.

    :param family: what is trained, a key of :data:`FAMILIES`.
    :param labels: which of its settings are tried, in the order of the grid.
    :param derive: what is made of each, tried too.
    """

    family: str
    labels: tuple[str, ...]
    derive: dict[str, Derive] = field(default_factory=lambda: {"": own})


def rates(build: Callable[[float], Method], *lrs: float) -> dict[str, Callable[[], Method]]:
    return {f"lr={lr:g}": lambda lr=lr: build(lr) for lr in lrs}  # type: ignore[misc]


def scalabl(lr: float, weight: float, method: type[ScalaBL] = ScalaBL, **settings: Any) -> Method:
    config = fit_config(STEPS, lr=lr, kl=KLSchedule(weight))
    return method(config, draws=DRAWS, **settings, **PLAIN)


def blob(lr: float, weight: float) -> Method:
    return BLoB(fit_config(STEPS, lr=lr, kl=KLSchedule(weight)), draws=DRAWS, **PLAIN)


def published(method: type[BLoB] | type[Reference], lr: float, **settings: Any) -> Method:
    return method(fit_config(STEPS, lr=lr, lr_guide=lr), draws=DRAWS, **settings, **PLAIN)


def grid(
    build: Callable[..., Method], *points: tuple[float, float], names: tuple[str, str]
) -> dict[str, Callable[[], Method]]:
    return {
        f"{names[0]}={a:g} {names[1]}={b:g}": lambda a=a, b=b: build(a, b)  # type: ignore[misc]
        for a, b in points
    }


KL = ("lr", "kl_weight")

#: training runs by the name of what is trained and of its settings
FAMILIES: dict[str, dict[str, Callable[[], Method]]] = {
    # It is MLE whose last iterates are kept.
    "MLE": rates(
        lambda lr: CheckpointEnsemble(fit_config(STEPS, lr=lr), **PLAIN), 2e-4, 3e-4, 6e-4, 1e-3
    ),
    "MLE early-stopped": rates(
        lambda lr: MLE(fit_config(STEPS, lr=lr, eval_every=25, keep="best"), **PLAIN),
        1e-3, 2e-3, 3e-3, 5e-3,
    ),
    "MAP": rates(lambda lr: MAP(fit_config(STEPS, lr=lr, weight_decay=1.0), **PLAIN), 3e-4, 1e-3),
    "SWAG": rates(
        lambda lr: SWAG(fit_config(STEPS, lr=lr, decay="constant"), draws=DRAWS, **PLAIN),
        2e-4, 3e-4, 6e-4, 1e-3,
    ),
    "ensemble": rates(
        lambda lr: Ensemble(fit_config(STEPS, lr=lr), members=3, **PLAIN), 3e-4, 6e-4, 1e-3
    ),
    "MC dropout": rates(
        lambda lr: MCDropout(fit_config(STEPS, lr=lr), dropout=0.2, draws=DRAWS, **PLAIN),
        3e-4, 6e-4, 1e-3,
    ),
    "ScalaBL": grid(scalabl, (5e-3, 3), (5e-3, 10), (5e-3, 30), (1e-2, 30), names=KL),
    "point s": grid(
        lambda lr, weight: scalabl(lr, weight, guide={"name": "delta"}),
        (1e-3, 10), (2e-3, 10), (5e-3, 10), (5e-3, 30), names=KL,
    ),
    "ScalaBL, top block": grid(
        lambda lr, weight: scalabl(lr, weight, guide={"name": "top_normal", "blocks": 1}),
        (2e-3, 10), (5e-3, 3), (5e-3, 10), (5e-3, 30), names=KL,
    ),
    "DALorRA": grid(
        lambda lr, weight: scalabl(lr, weight, DALorRA),
        (3e-4, 1), (1e-3, 1), (2e-3, 1), (2e-3, 10), names=KL,
    ),
    "BLoB": grid(blob, (3e-4, 0.01), (1e-3, 0.003), (1e-3, 0.01), (1e-3, 0.1), names=KL),
    "BLoB, published": grid(
        lambda lr, lr_kl: published(BLoB, lr, lr_kl=lr_kl),
        (3e-4, 0.01), (1e-3, 0.01), (2e-3, 0.01), (1e-3, 0.03), names=("lr", "lr_kl"),
    ),
    "reference": rates(lambda lr: published(Reference, lr), 1e-3, 2e-3, 3e-3, 5e-3),
    "IVON": grid(
        lambda lr, hess: IVON(
            fit_config(STEPS, lr=lr, clip_norm=float("inf")), hess_init=hess, draws=DRAWS, **PLAIN
        ),
        (0.03, 1.0), (0.1, 1.0), (0.3, 1.0), (0.1, 0.3), names=("lr", "hess_init"),
    ),
}  # fmt: skip

ALL = {family: tuple(settings) for family, settings in FAMILIES.items()}
HIGH = ALL["MLE"][1:]

ROWS: dict[str, Row] = {
    "MLE": Row("MLE", ALL["MLE"], {"": point}),
    "MLE, temperature": Row("MLE", ALL["MLE"], {"": tempered}),
    "MLE, checkpoint ensemble": Row("MLE", ALL["MLE"]),
    "MLE, last-layer Laplace": Row("MLE", HIGH, {"": then(LastLayerLaplace(**PLAIN))}),
    "MLE, Laplace-LoRA": Row("MLE", HIGH, {"": then(LaplaceLoRA(**PLAIN))}),
    "MLE, Laplace-LoRA, λ a matrix": Row(
        "MLE", HIGH, {"": then(LaplaceLoRA(per_matrix=True, **PLAIN))}
    ),
    "MLE, TFB": Row("MLE", HIGH[-2:], tfb(0.003, 0.03)),  # the last of its runs: it changes A and B
    "MLE early-stopped": Row("MLE early-stopped", ALL["MLE early-stopped"], {"": point}),
    "MLE early-stopped, temperature": Row(
        "MLE early-stopped", ALL["MLE early-stopped"], {"": tempered}
    ),
    "MAP": Row("MAP", ALL["MAP"], {"": point}),
    "MAP, TFB": Row("MAP", ALL["MAP"], tfb(0.003, 0.03)),
    "SWAG": Row("SWAG", ALL["SWAG"]),
    "ensemble of 3": Row("ensemble", ALL["ensemble"]),
    "MC dropout": Row("MC dropout", ALL["MC dropout"]),
    "ScalaBL": Row("ScalaBL", ALL["ScalaBL"]),
    "ScalaBL, posterior mean": Row("ScalaBL", ALL["ScalaBL"], {"": posterior_mean}),
    "V frozen, point s": Row("point s", ALL["point s"]),
    "ScalaBL, random in the top block": Row("ScalaBL, top block", ALL["ScalaBL, top block"]),
    "DALorRA": Row("DALorRA", ALL["DALorRA"]),
    "BLoB": Row("BLoB", ALL["BLoB"]),
    "BLoB mean": Row("BLoB", ALL["BLoB"], {"": point}),
    "BLoB mean, TFB": Row("BLoB", ALL["BLoB"][1:3], tfb(0.003, 0.03)),
    "BLoB, published": Row("BLoB, published", ALL["BLoB, published"]),
    "reference": Row("reference", ALL["reference"]),
    "IVON": Row("IVON", ALL["IVON"]),
    "IVON mean": Row("IVON", ALL["IVON"], {"": point}),
}


def run(bench: Bench, family: str, label: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of one training run, by row and variant: the validation NLL of the seed that chooses,
    and those on test of the others."""

    def measured() -> dict[str, dict[str, float]]:
        fitted = bench.fit(FAMILIES[family][label](), seed)
        found = {}
        for name, row in ROWS.items():
            for variant, derive in row.derive.items():
                if row.family == family and label in row.labels:
                    predictor: Any = derive(bench, fitted)
                    if seed == TUNING_SEED:
                        figures = {"validation_nll": bench.validate(predictor)["nll"]}
                    else:
                        figures = bench.test(predictor)
                    found[f"{name}|{variant}"] = figures | summary(fitted)
        return found

    return bench.cached(f"{family} {label} seed {seed}", measured)


def table(bench: Bench, names: list[str]) -> dict[str, Any]:
    """All figures: trials, the chosen ones, those at an edge of their grid, and the rows."""
    figures: dict[str, Any] = {"trials": {}, "chosen": {}, "edges": [], "test": {}}
    for name in names:
        row = ROWS[name]
        trials = {
            (label, variant): run(bench, row.family, label, TUNING_SEED)[f"{name}|{variant}"]
            for label in row.labels
            for variant in row.derive
        }
        label, variant = min(trials, key=lambda trial: trials[trial]["validation_nll"])
        figures["trials"][name] = {
            " ".join(filter(None, trial)): found["validation_nll"]
            for trial, found in trials.items()
        }
        figures["chosen"][name] = " ".join(filter(None, (label, variant)))
        if len(row.labels) > 1 and label in (row.labels[0], row.labels[-1]):
            figures["edges"].append(name)
        runs = [run(bench, row.family, label, seed)[f"{name}|{variant}"] for seed in SEEDS]
        figures["test"][name] = {key: mean_and_error([r[key] for r in runs]) for key in known(runs)}
        _print(name, figures)
    return figures


def _print(name: str, figures: dict[str, Any]) -> None:
    row = figures["test"][name]
    cells = (f"{key} {row[key][0]:.4f} ± {row[key][1]:.4f}" for key in ("acc", "ece", "nll"))
    edge = " (edge of its grid)" if name in figures["edges"] else ""
    print(f"{name:34s} {'  '.join(cells)}  {figures['chosen'][name]}{edge}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with openbookqa/ and mmlu/")
    parser.add_argument("--runs", default=str(RESULTS / "methods_runs.jsonl"), help="finished runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--save", action="store_true", help="write results/methods.json")
    args = parser.parse_args()
    figures = table(Bench(args.model, args.data, args.runs), args.rows)
    report("quality.methods", figures, save=args.save)


if __name__ == "__main__":
    main()
