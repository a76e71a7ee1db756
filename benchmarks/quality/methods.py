"""Every method on one task: a real encoder, real questions, 5 seeds.

    python -m benchmarks.quality.methods --model FOLDER --data FOLDER --save

The set-up is that of ``benchmarks.quality.calibration``, 400 steps. A row has at most four trials,
and a fifth where the best of four lay on the edge of their grid. It takes the one with the lowest
validation NLL on a seed of their own; that one runs on five further seeds, which are tested. What a
method does after training it does to the same runs as the others: one run of maximum likelihood
serves the temperature, the checkpoint ensemble, both kinds of Laplace and TFB, each with the
learning rate that is best for itself. The five seeds of maximum likelihood are also an ensemble:
one predictor, which stands in the table as if each seed had it, so that its intervals are those
over questions. Finished runs are kept in ``--runs``, a folder, and not run again, so that rows may
be run apart (``--rows``) and put together later. On a CPU without instructions for bfloat16 take
``--dtype float32``: what ran so is named in the figures. ``--save`` writes the page and tables of
``scalabl compare`` beside the figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks._report import RESULTS, report
from benchmarks.quality._openbookqa import Bench
from benchmarks.quality.calibration import (
    DRAWS,
    SEEDS,
    STEPS,
    TUNING_SEED,
    fit_config,
    mean_floor,
    tempered,
)
from benchmarks.quality.unknown import add_others, subjects
from scalabl_pyro.commands._report import write_report
from scalabl_pyro.commands._runs import ReportedRun
from scalabl_pyro.data import Split
from scalabl_pyro.files import whole_file
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
    Fitted,
    LaplaceLoRA,
    LastLayerLaplace,
    MCDropout,
    Method,
    Reference,
    ScalaBL,
)
from scalabl_pyro.prediction.intervals import (
    auroc_per_question,
    crossed_interval,
    paired_difference,
    per_question,
    stacked,
)
from scalabl_pyro.prediction.metrics import (
    average,
    entropy,
    evaluate,
    mutual_information,
    summarise,
)
from scalabl_pyro.prediction.predictor import Predictions, Predictor, Predicts, predict

#: what a row predicts with, of a training run
Derive = Callable[[Bench, Fitted], Predicts]
PLAIN: dict[str, Any] = {"progress": False}
#: the row that the others are compared with
OURS = "ScalaBL"


def own(bench: Bench, fitted: Fitted) -> Predicts:
    """The method's own predictor."""
    return fitted.predictor


def point(bench: Bench, fitted: Fitted) -> Predictor:
    """The matrices as they are."""
    return Predictor(fitted.model.adapter)


def posterior_mean(bench: Bench, fitted: Fitted) -> Predictor:
    assert fitted.guide is not None
    return Predictor(fitted.model.adapter, fitted.guide.median()["s"][None])


def point_tempered(bench: Bench, fitted: Fitted) -> Predicts:
    return tempered(bench, replace(fitted, predictor=point(bench, fitted)))


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
    :param together: the seeds of one setting are one predictor, an ensemble. All settings are
        trained with each seed, and the ensembles' validation NLL chooses.
    """

    family: str
    labels: tuple[str, ...]
    derive: dict[str, Derive] = field(default_factory=lambda: {"": own})
    together: bool = False


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
    "MLE early-stopped, A from activations": rates(
        lambda lr: MLE(fit_config(STEPS, lr=lr, eval_every=25, keep="best"), **PLAIN),
        1e-3, 2e-3, 3e-3, 5e-3,
    ),
    "MAP": rates(lambda lr: MAP(fit_config(STEPS, lr=lr, weight_decay=1.0), **PLAIN), 3e-4, 1e-3),
    "SWAG": rates(
        lambda lr: SWAG(fit_config(STEPS, lr=lr, decay="constant"), draws=DRAWS, **PLAIN),
        2e-4, 3e-4, 6e-4, 1e-3,
    ),
    "MC dropout": rates(
        lambda lr: MCDropout(fit_config(STEPS, lr=lr), dropout=0.2, draws=DRAWS, **PLAIN),
        2e-4, 3e-4, 6e-4, 1e-3,
    ),
    "ScalaBL": grid(
        scalabl, (5e-3, 3), (5e-3, 10), (5e-3, 30), (1e-2, 30), (2e-2, 100), names=KL
    ),
    "ScalaBL, V random": grid(scalabl, (5e-3, 3), (5e-3, 10), (5e-3, 30), (1e-2, 30), names=KL),
    "point s": grid(
        lambda lr, weight: scalabl(lr, weight, guide={"name": "delta"}),
        (1e-3, 10), (2e-3, 10), (5e-3, 10), (5e-3, 30), (5e-3, 100), names=KL,
    ),
    "ScalaBL, full core": grid(
        lambda lr, weight: scalabl(lr, weight, core="full"),
        (5e-3, 3), (5e-3, 10), (5e-3, 30), (1e-2, 30), names=KL,
    ),
    "V from activations, point s": grid(
        lambda lr, weight: scalabl(lr, weight, guide={"name": "delta"}),
        (5e-3, 10), (5e-3, 30), (1e-2, 30), (2e-2, 100), (2e-3, 30), names=KL,
    ),
    "ScalaBL, top block": grid(
        lambda lr, weight: scalabl(lr, weight, guide={"name": "top_normal", "blocks": 1}),
        (2e-3, 10), (5e-3, 3), (5e-3, 10), (5e-3, 30), names=KL,
    ),
    "DALorRA": grid(
        lambda lr, weight: scalabl(lr, weight, DALorRA),
        (3e-4, 1), (1e-3, 1), (2e-3, 1), (2e-3, 10), names=KL,
    ),
    "BLoB": grid(blob, (3e-4, 0.01), (1e-3, 0.001), (1e-3, 0.003), (1e-3, 0.01), names=KL),
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

#: where V comes from, if not from a random A
SUBSPACES = dict.fromkeys(
    ("ScalaBL", "ScalaBL, full core", "ScalaBL, top block", "DALorRA"), "auto"
) | dict.fromkeys(
    ("MLE early-stopped, A from activations", "V from activations, point s"), "activations"
)
ALL = {family: tuple(settings) for family, settings in FAMILIES.items()}
HIGH = ALL["MLE"][1:]

ROWS: dict[str, Row] = {
    "mle": Row("MLE", ALL["MLE"], {"": point}),
    "MLE, temperature": Row("MLE", ALL["MLE"], {"": point_tempered}),
    "MLE, checkpoint ensemble": Row("MLE", ALL["MLE"]),
    "ensemble of 5": Row("MLE", HIGH[:2], {"": point}, together=True),
    "MLE, last-layer Laplace": Row("MLE", HIGH, {"": then(LastLayerLaplace(**PLAIN))}),
    "MLE, Laplace-LoRA": Row("MLE", HIGH, {"": then(LaplaceLoRA(**PLAIN))}),
    "MLE, Laplace-LoRA, λ a matrix": Row(
        "MLE", HIGH, {"": then(LaplaceLoRA(per_matrix=True, **PLAIN))}
    ),
    "MLE, TFB": Row("MLE", HIGH[-2:], tfb(0.003, 0.03)),  # the last of its runs: it changes A and B
    "MLE early-stopped": Row("MLE early-stopped", ALL["MLE early-stopped"], {"": point}),
    "MLE early-stopped, temperature": Row(
        "MLE early-stopped", ALL["MLE early-stopped"], {"": point_tempered}
    ),
    "MLE early-stopped, A from activations": Row(
        "MLE early-stopped, A from activations", ALL["MLE early-stopped"], {"": point}
    ),
    "MLE early-stopped, A from activations, temperature": Row(
        "MLE early-stopped, A from activations", ALL["MLE early-stopped"], {"": point_tempered}
    ),
    "MAP": Row("MAP", ALL["MAP"], {"": point}),
    "MAP, TFB": Row("MAP", ALL["MAP"], tfb(0.003, 0.03)),
    "SWAG": Row("SWAG", ALL["SWAG"]),
    "MC dropout": Row("MC dropout", ALL["MC dropout"]),
    "ScalaBL": Row("ScalaBL", ALL["ScalaBL"]),
    "ScalaBL, posterior mean": Row("ScalaBL", ALL["ScalaBL"], {"": posterior_mean}),
    "ScalaBL, V random": Row("ScalaBL, V random", ALL["ScalaBL, V random"]),
    "V random, point s": Row("point s", ALL["point s"]),
    "V from activations, point s": Row(
        "V from activations, point s", ALL["V from activations, point s"]
    ),
    "ScalaBL, full core": Row("ScalaBL, full core", ALL["ScalaBL, full core"]),
    "ScalaBL, random in the top block": Row("ScalaBL, top block", ALL["ScalaBL, top block"]),
    "DALorRA": Row("DALorRA", ALL["DALorRA"]),
    "BLoB": Row("BLoB", ALL["BLoB"]),
    "BLoB mean": Row("BLoB", ALL["BLoB"], {"": point}),
    "BLoB mean, TFB": Row("BLoB", ALL["BLoB"][2:], tfb(0.003, 0.03)),
    "BLoB, published": Row("BLoB, published", ALL["BLoB, published"]),
    "reference": Row("reference", ALL["reference"]),
    "IVON": Row("IVON", ALL["IVON"]),
    "IVON mean": Row("IVON", ALL["IVON"], {"": point}),
}


# ---------------------------------------------------------------------- runs


def trials_of(bench: Bench, names: Sequence[str]) -> dict[str, dict[tuple[str, str], float]]:
    """Row → (label, variant) → validation NLL. One training run serves all rows of its family."""
    by_run: dict[tuple[str, str], list[str]] = {}
    for name in (name for name in ROWS if name in names):
        for label in ROWS[name].labels:
            by_run.setdefault((ROWS[name].family, label), []).append(name)
    nlls = {run: trial(bench, *run, rows) for run, rows in by_run.items()}
    return {
        name: {
            (label, variant): nlls[ROWS[name].family, label][f"{name}|{variant}"]
            for label in ROWS[name].labels
            for variant in ROWS[name].derive
        }
        for name in names
    }


def trial(bench: Bench, family: str, label: str, names: Sequence[str]) -> dict[str, float]:
    """Validation NLL of these rows' variants, as ``name|variant``, of one training run."""
    run = f"{family} {label} trial"
    nlls = bench.finished().get(run, {})
    todo = [(name, v) for name in names for v in ROWS[name].derive if f"{name}|{v}" not in nlls]
    if todo:
        print(f"running {run}", flush=True)
        fitted = train(bench, family, label, TUNING_SEED)
        nlls = nlls | {
            f"{name}|{v}": bench.validate(ROWS[name].derive[v](bench, fitted))["nll"]
            for name, v in todo
        }
        bench.keep(run, nlls | {"dtype": bench.config.dtype})
    return nlls


def train(bench: Bench, family: str, label: str, seed: int) -> Fitted:
    subspace = SUBSPACES.get(family, "random")
    return bench.fit(FAMILIES[family][label](), seed, subspace=subspace)


def run_file(bench: Bench, name: str, choice: tuple[str, str], seed: int) -> Path:
    words = " ".join(filter(None, (name, *choice, f"seed {seed}")))
    return bench.runs.parent / f"{_words(words)}.safetensors"


def _words(text: str) -> str:
    return text.replace(",", "").replace(" ", "_")


def in_float32(bench: Bench, names: Sequence[str]) -> list[str]:
    """The trials and the files of these rows' seeds that ran in float32, as the others did not."""
    runs = {f"{ROWS[name].family} {label} trial" for name in names for label in ROWS[name].labels}
    known = bench.finished()
    trials = [run for run in runs if known.get(run, {}).get("dtype") == "float32"]
    files = []
    for name in names:
        for path in bench.runs.parent.glob(f"{_words(name)}_lr=*_seed_*.safetensors"):
            with safe_open(path, "pt") as file:
                # The first runs, all in bfloat16, have no such note.
                if (file.metadata() or {}).get("dtype") == "float32":
                    files.append(path.stem)
    return sorted(trials) + sorted(files)


def run_missing(bench: Bench, choices: Mapping[str, Sequence[tuple[str, str]]], seed: int) -> None:
    """Train what no row has of this seed yet, and keep log p̄ (N, C) and mutual information (N,) of
    the questions of ``all``; and log p̄ of ``validation``."""
    todo: dict[tuple[str, str], dict[str, str]] = {}
    for name in ROWS:  # in their order: what changes the matrices comes last
        for label, variant in choices.get(name, ()):
            if not run_file(bench, name, (label, variant), seed).exists():
                todo.setdefault((ROWS[name].family, label), {})[name] = variant
    for (family, label), names in todo.items():
        print(f"running {family} {label} seed {seed}: {', '.join(names)}", flush=True)
        fitted = train(bench, family, label, seed)
        for name, variant in names.items():
            predictor = ROWS[name].derive[variant](bench, fitted)
            logits = predict(predictor, bench.splits["all"]).logits
            validation = predict(predictor, bench.splits["validation"]).logits
            tensors = {
                "log_probs": average(logits).contiguous(),
                "mutual_information": mutual_information(logits).contiguous(),
                "validation": average(validation).contiguous(),
            }
            with whole_file(run_file(bench, name, (label, variant), seed)) as part:
                save_file(tensors, part, metadata={"dtype": bench.config.dtype})


def ensemble(bench: Bench, name: str, choice: tuple[str, str]) -> dict[str, Tensor]:
    """The seeds of one setting as one predictor: log p̄ of both kinds, and mutual information."""
    members = [load_file(run_file(bench, name, choice, seed)) for seed in SEEDS]
    log_probs, validation = (
        torch.stack([member[kind] for member in members]) for kind in ("log_probs", "validation")
    )
    return {
        "log_probs": average(log_probs),
        "mutual_information": mutual_information(log_probs),
        "validation": average(validation),
    }


def known(split: Split | Predictions) -> Tensor:
    assert split.labels is not None
    return split.labels


def by_split(bench: Bench, values: Tensor) -> dict[str, Tensor]:
    """What is known of each question of ``all``, by split."""
    names = ("test", *subjects(bench))
    parts = values.split([len(bench.splits[name]) for name in names])
    return dict(zip(names, parts, strict=True))


def predictions(bench: Bench, run: Mapping[str, Tensor]) -> dict[str, Predictions]:
    return {
        name: Predictions(part[None], bench.splits[name].labels)
        for name, part in by_split(bench, run["log_probs"]).items()
    }


# ---------------------------------------------------------------------- the table


def differences(runs: Mapping[str, Sequence[ReportedRun]], reference: str) -> dict[str, Any]:
    """Row → metric of ``test`` → its difference from a reference, paired by seed and question."""
    values, floors = {}, {}
    for name, row in runs.items():
        tests = [run.predictions["test"] for run in row]
        values[name] = stacked([per_question(test.logits, known(test)) for test in tests])
        floors[name] = mean_floor([summarise(test.logits).probabilities for test in tests])
    return {
        name: {
            metric: paired_difference(
                of_row[metric],
                values[reference][metric],
                bias=(floors[name], floors[reference]) if metric == "ece" else (0.0, 0.0),
            )._asdict()
            for metric in of_row
        }
        for name, of_row in values.items()
        if name != reference
    }


def aurocs(bench: Bench, runs: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """How well entropy and mutual information find wrong answers and, at equal length, other
    subjects."""
    labels = known(bench.splits["test"])
    lengths = {n: torch.tensor(bench.splits[n].lengths) for n in ("test", *subjects(bench))}
    each: list[dict[str, Tensor]] = []
    for run in runs:
        areas: dict[str, Tensor] = {}
        log_probs = by_split(bench, run["log_probs"])
        wrong = log_probs["test"].argmax(-1) != labels
        scores = {"entropy": entropy(run["log_probs"][None])}
        if run["mutual_information"].max() > 1e-6:  # of one draw it is rounding
            scores["mutual information"] = run["mutual_information"]
        for score, values in scores.items():
            of = by_split(bench, values)
            areas[f"wrong by {score}"] = auroc_per_question(of["test"], wrong)
            for other in subjects(bench):
                both = torch.cat([of["test"], of[other]])
                is_other = torch.arange(len(both)) >= len(of["test"])
                length = torch.cat([lengths["test"], lengths[other]])
                areas[f"{other} by {score}"] = auroc_per_question(both, is_other, length)
        each.append(areas)
    return {name: crossed_interval(values)._asdict() for name, values in stacked(each).items()}


def table(
    bench: Bench, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, list[ReportedRun]]]:
    """Trials, choices, those at an edge of their grid, AUROCs; and the runs of each row."""
    together = {n: [(s, "") for s in ROWS[n].labels] for n in names if ROWS[n].together}
    trials = trials_of(bench, [name for name in names if name not in together])
    best = {name: [min(nlls, key=nlls.__getitem__)] for name, nlls in trials.items()}
    for seed in SEEDS:
        run_missing(bench, best | together, seed)
    for name, choices in together.items():
        labels = known(bench.splits["validation"])
        ensembles = {choice: ensemble(bench, name, choice)["validation"] for choice in choices}
        trials[name] = {c: evaluate(p[None], labels)["nll"] for c, p in ensembles.items()}
    chosen = {name: min(nlls, key=nlls.__getitem__) for name, nlls in trials.items()}
    runs: dict[str, list[ReportedRun]] = {}
    figures: dict[str, Any] = {"trials": {}, "chosen": {}, "edges": [], "auroc": {}}
    for name in names:
        options, choice = ROWS[name].labels, chosen[name]
        settings = {"training": ROWS[name].family, "settings": " ".join(filter(None, choice))}
        tensors = (
            [ensemble(bench, name, choice)] * len(SEEDS)
            if name in together
            else [load_file(run_file(bench, name, choice, seed)) for seed in SEEDS]
        )
        figures["auroc"][name] = aurocs(bench, tensors)
        figures["trials"][name] = {
            " ".join(filter(None, c)): nll for c, nll in trials[name].items()
        }
        figures["chosen"][name] = " ".join(filter(None, choice))
        if len(options) > 1 and choice[0] in (options[0], options[-1]):
            figures["edges"].append(name)
        runs[name] = [
            ReportedRun(f"{name} seed {seed}", predictions(bench, run), settings, seed)
            for run, seed in zip(tensors, SEEDS, strict=True)
        ]
    return figures, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with openbookqa/, mmlu/ and more")
    parser.add_argument("--runs", type=Path, default=RESULTS / "methods", help="finished runs")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--save", action="store_true", help="write results/methods.json, and more")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.model, args.data, args.runs / "runs.jsonl", dtype=args.dtype)
    add_others(bench, args.data)
    figures, runs = table(bench, args.rows)
    figures["float32"] = in_float32(bench, args.rows)
    trials = {
        name: [{"trial": {"settings": t}, "validation_nll": nll} for t, nll in nlls.items()]
        for name, nlls in figures["trials"].items()
    }
    out = RESULTS / "methods_report" if args.save else args.runs / "report"
    for own in (OURS, f"{OURS}, V random"):
        if own in runs:
            figures[f"minus {own}"] = differences(runs, own)
    figures |= write_report(out, runs, chosen=figures["chosen"], trials=trials)
    report("quality.methods", figures, save=args.save)


if __name__ == "__main__":
    main()
