"""A real causal language model that scores the texts of choices: ScalaBL and its baselines.

    python -m benchmarks.quality.causal --model FOLDER --data FOLDER --zero-shot --save
    python -m benchmarks.quality.causal --model FOLDER --data FOLDER --runs FILE --save

Made for SmolLM2-135M-Instruct (see ``--model``) on ARC-Easy and OpenBookQA. ``--zero-shot`` tells
how good the likelihood of the choices is before any training. Else each row fine-tunes with LoRA
r = 8 on q_proj and v_proj of the 8 upper of 30 blocks, above a trunk that is run once, on 1,000
questions, 400 steps of 8. A row has at most three trials, chosen by validation NLL on a seed of
their own; the chosen one runs on further seeds, which are tested. Finished runs are kept in
``--runs`` and not run again, so that rows may be run apart (``--tasks``, ``--rows``).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from benchmarks._report import RESULTS, report
from benchmarks.quality.calibration import (
    known,
    mean_and_error,
    posterior_mean,
    summary,
    tempered,
)
from scalabl_pyro.data import Record, Split, disjoint, read_folder
from scalabl_pyro.infer.kl import KLSchedule
from scalabl_pyro.infer.svi import FitConfig
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import load_readout, make_adapter
from scalabl_pyro.methods import MLE, Fitted, Method, ScalaBL
from scalabl_pyro.prediction.metrics import auroc, entropy, evaluate, mutual_information
from scalabl_pyro.prediction.predictor import Predictor, predict
from scalabl_pyro.readouts.choice_likelihood import NORMALISE, fit_kappa

STEPS, BATCH, DRAWS = 400, 8, 10
#: questions of each split at most: more would cost more than they tell
QUESTIONS = {"train": 1000, "validation": 300, "test": 1000}
#: training questions that choose κ without training
KAPPA = 200
TUNING_SEED, SEEDS = 100, range(3)
UPPER = 8
TASKS = ("arc_easy", "openbookqa")

#: accuracies in % that are published, from model cards and lm-evaluation-harness
PUBLISHED = {
    "arc_easy": {
        "SmolLM2-135M-Instruct, ARC-Easy, lm-evaluation-harness": 54.1,
        "SmolLM2-135M-Instruct, mean of ARC-Easy and ARC-Challenge, model card": 37.3,
    },
    "openbookqa": {"SmolLM2-135M (base model), model card": 34.6},
}


def read_task(data: str, task: str) -> dict[str, list[Record]]:
    """The splits of a task, of which no question stands in two."""
    return disjoint(read_folder(Path(data) / task))


# ---------------------------------------------------------------------- before training


def zero_shot(model: str, data: str, task: str) -> dict[str, Any]:
    """Accuracy, NLL and ECE of the untrained model on test, for each way to count a choice's size.

    One pass over each question gives log p of its choices; κ is the best one on training questions.
    """
    config = ModelConfig(
        model,
        readout="choice_likelihood",
        dtype="bfloat16",
        attention="eager",
        normalise="none",
        temperature="none",
    )
    records = read_task(data, task)
    train, test = spread(records["train"], KAPPA), records["test"]
    readout = load_readout(config, config.classes([*train, *test]))
    settings = AdapterConfig(targets=("q_proj",), layers=(0,))  # untrained: the model as it is
    predictor = Predictor(make_adapter(config, settings, readout, svd=False))
    splits = {"train": readout.encode(train), "test": readout.encode(test)}
    found = {name: predict(predictor, split, batch_size=8) for name, split in splits.items()}
    figures: dict[str, Any] = {"n": len(test), "n_kappa": len(train)}
    for normalise in NORMALISE:
        readout.normalise = normalise
        scores = {
            name: found[name].logits[0] / sizes(readout.encode(split.records))
            for name, split in splits.items()
        }
        kappa = fit_kappa(scores["train"], found["train"].labels)
        metrics = evaluate(kappa * scores["test"][None], found["test"].labels)
        figures[normalise] = {key: metrics[key] for key in ("acc", "nll", "ece", "brier")}
        figures[normalise] |= {
            "kappa": kappa,
            "acc_standard_error": (metrics["acc"] * (1 - metrics["acc"]) / len(test)) ** 0.5,
        }
    return figures


def sizes(split: Split) -> torch.Tensor:
    """(N, C), what log p of each choice is divided by."""
    return split.collate(list(split)).inputs["sizes"]


def spread(records: list[Record], count: int) -> list[Record]:
    """At most so many records, evenly spread."""
    return records[:: -(-len(records) // count)]


# ---------------------------------------------------------------------- training


class Bench:
    """A task, read by choice likelihood, with what leaves the trunk computed once.

    :param model: folder of the language model.
    :param data: folder with ``<task>/``, JSON Lines of records.
    :param runs: JSON Lines of finished runs, which are not run again.
    """

    def __init__(self, model: str, data: str, task: str, runs: str | Path) -> None:
        self.task, self.runs = task, Path(runs)
        self.config = ModelConfig(
            model, readout="choice_likelihood", dtype="bfloat16", attention="eager"
        )
        blocks = transformers.AutoConfig.from_pretrained(model).num_hidden_layers
        self.adapter = AdapterConfig(
            targets=("q_proj", "v_proj"), layers=tuple(range(max(1, blocks - UPPER), blocks))
        )
        records = read_task(data, task)
        self.readout = load_readout(
            self.config, self.config.classes([r for each in records.values() for r in each])
        )
        self._records = {name: records[name][:count] for name, count in QUESTIONS.items()}
        self._splits: dict[str, Split] = {}

    @property
    def splits(self) -> dict[str, Split]:
        if not self._splits:  # minutes: not where all runs are finished
            adapter = make_adapter(self.config, self.adapter, self.readout, svd=False)
            self._splits = {
                name: adapter.cache_trunk(self.readout.encode(records), batch_size=8)
                for name, records in self._records.items()
            }
        return self._splits

    def fit(self, method: Method, seed: int) -> Fitted:
        make = partial(make_adapter, self.config, self.adapter, self.readout)
        return method.fit(make, self.splits["train"], self.splits["validation"], seed=seed)

    def validate(self, predictor: Predictor) -> dict[str, float]:
        found = predict(predictor, self.splits["validation"], batch_size=8)
        return evaluate(found.logits, found.labels)

    def test(self, predictor: Predictor) -> dict[str, float]:
        """Metrics, and AUROCs of the two uncertainties for wrong answers."""
        found = predict(predictor, self.splits["test"], batch_size=8)
        metrics = evaluate(found.logits, found.labels)
        wrong = found.logits.softmax(-1).mean(0).argmax(-1) != found.labels
        for name, score in (("entropy", entropy), ("mi", mutual_information)):
            metrics[f"{name}_auroc_wrong"] = auroc(score(found.logits), wrong)
        llm = predictor.adapter.peft_model.get_base_model()
        return metrics | {"kappa": float(self.readout.kappa(llm).detach())}

    def cached(self, name: str, run: Callable[[], dict]) -> dict:
        """The result of an earlier run, or run now."""
        return cached(self.runs, f"{self.task} {name}", run)


def cached(runs: Path, name: str, run: Callable[[], dict]) -> dict:
    """The result of a run that the file knows, or run now and kept there."""
    finished = {}
    if runs.exists():
        for line in runs.read_text().splitlines():
            finished |= json.loads(line)
    if name not in finished:
        print(f"running {name}", flush=True)
        finished[name] = run()
        with runs.open("a") as file:  # one write, so that two processes may share it
            file.write(json.dumps({name: finished[name]}) + "\n")
    return finished[name]


@dataclass(frozen=True)
class Row:
    """A row of the table, and the further rows that its training runs give.

    :param trials: methods by label.
    :param derive: name of a row → (bench, fitted) → the predictor that it tests.
    """

    trials: dict[str, Method]
    derive: dict[str, Callable[[Any, Fitted], Predictor]] = field(default_factory=dict)


def mle(lr: float, **settings: Any) -> Method:
    config = FitConfig(steps=STEPS, batch_size=BATCH, lr=lr, **settings)
    return MLE(config, eval_batch_size=BATCH, progress=False)


def scalabl(lr: float, weight: float, **settings: Any) -> Method:
    config = FitConfig(steps=STEPS, batch_size=BATCH, lr=lr, kl=KLSchedule(weight))
    return ScalaBL(config, eval_batch_size=BATCH, draws=DRAWS, progress=False, **settings)


def scalabl_row(name: str, *trials: tuple[float, float], **settings: Any) -> Row:
    return Row(
        {
            f"lr={lr:g} kl_weight={weight:g}": scalabl(lr, weight, **settings)
            for lr, weight in trials
        },
        derive={f"{name}, posterior mean": posterior_mean},
    )


ROWS: dict[str, Row] = {
    "MLE": Row(
        {f"lr={lr:g}": mle(lr) for lr in (3e-4, 1e-3, 3e-3)}, derive={"MLE, tempered": tempered}
    ),
    "V frozen": scalabl_row("V frozen", (5e-3, 10), (5e-3, 3), (2e-3, 10)),
    "MLE, fixed recipe": Row(
        {"lr=0.0002": mle(2e-4)}, derive={"MLE, fixed recipe, tempered": tempered}
    ),
    "MLE, early-stopped": Row(
        {f"lr={lr:g}": mle(lr, eval_every=50, keep="best") for lr in (3e-4, 1e-3, 3e-3)},
        derive={"MLE, early-stopped, tempered": tempered},
    ),
    "V free": scalabl_row("V free", (1e-3, 10), (1e-3, 3), (2e-3, 10), projections="free"),
    "full rank": scalabl_row(
        "full rank", (5e-3, 10), (5e-3, 3), (2e-3, 10), guide={"name": "multivariate_normal"}
    ),
    "low rank": scalabl_row(
        "low rank",
        *((5e-3, 10), (5e-3, 3), (2e-3, 10)),
        guide={"name": "low_rank_multivariate_normal"},
    ),
}


def trial(bench: Bench, name: str, label: str) -> float:
    """Validation NLL of one trial."""

    def run() -> dict:
        fitted = bench.fit(ROWS[name].trials[label], TUNING_SEED)
        return bench.validate(fitted.predictor) | summary(fitted)

    return bench.cached(f"{name} {label} trial", run)["nll"]


def tested(bench: Bench, name: str, label: str, seed: int) -> dict[str, dict]:
    """The rows that come from one training run, on test."""

    def run() -> dict:
        fitted = bench.fit(ROWS[name].trials[label], seed)
        found = {name: bench.test(fitted.predictor) | summary(fitted)}
        for other, derive in ROWS[name].derive.items():
            found[other] = bench.test(derive(bench, fitted))
        return found

    return bench.cached(f"{name} {label} seed {seed}", run)


def table(bench: Bench, names: list[str]) -> dict[str, Any]:
    """All figures of one task."""
    trials, chosen, rows = {}, {}, {}
    for name in names:
        labels = list(ROWS[name].trials)
        trials[name] = (
            {label: trial(bench, name, label) for label in labels} if len(labels) > 1 else {}
        )
        chosen[name] = min(labels, key=lambda label: trials[name].get(label, 0.0))
        for seed in SEEDS:
            for row, metrics in tested(bench, name, chosen[name], seed).items():
                rows.setdefault(row, []).append(metrics)
    return {
        "trials": trials,
        "chosen": chosen,
        "test": {
            row: {key: mean_and_error([run[key] for run in runs]) for key in known(runs)}
            for row, runs in rows.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="folder with arc_easy/ and openbookqa/")
    parser.add_argument("--zero-shot", action="store_true", help="nothing is trained")
    parser.add_argument("--runs", default=str(RESULTS / "causal_runs.jsonl"), help="finished runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--save", action="store_true", help="write results/causal*.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    figures: dict[str, Any] = {}
    for task in args.tasks:
        if args.zero_shot:
            run = partial(zero_shot, args.model, args.data, task)
            found = cached(Path(args.runs), f"{task} zero-shot", run)
            figures[task] = found | {"published": PUBLISHED[task]}
        else:
            figures[task] = table(Bench(args.model, args.data, task, args.runs), args.rows)
        print(json.dumps({task: figures[task]}, indent=1), flush=True)
    name = "causal_zero_shot" if args.zero_shot else "causal"
    report("quality.causal", figures, save=args.save, name=name)


if __name__ == "__main__":
    main()
