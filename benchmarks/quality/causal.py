"""A real causal language model that scores the texts of choices: ScalaBL and its baselines.

    python -m benchmarks.quality.causal --model FOLDER --data FOLDER --runs FOLDER --save

Made for SmolLM2-135M-Instruct (see ``--model``) on ARC-Easy and OpenBookQA. Each row fine-tunes
with LoRA r = 8 on q_proj and v_proj of the 8 upper of 30 blocks, above a trunk that is run once, on
1,000 questions, 400 steps of 8 (the fixed recipe: 1,000). A row has three trials, chosen by
validation NLL on a seed of their own, and further ones while the best lies on the grid's edge.
Tempered and early-stopped rows choose for themselves among the same runs. The chosen ones run on
five further seeds, which are tested. Finished runs are kept in ``--runs``, a folder, and not run
again, so that rows may be run apart (``--tasks``, ``--rows``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks._report import RESULTS, report
from benchmarks._runs import cached
from benchmarks.quality.calibration import mean_floor, posterior_mean, summary, tempered
from scalabl_pyro.data import Record, Split, disjoint, read_folder
from scalabl_pyro.files import whole_file
from scalabl_pyro.infer import FitConfig, FitResult
from scalabl_pyro.infer.kl import KLSchedule
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import load_readout, make_adapter
from scalabl_pyro.methods import MAP, MLE, Fitted, Method, ScalaBL
from scalabl_pyro.methods.reference import Reference
from scalabl_pyro.prediction.intervals import (
    Interval,
    auroc_per_question,
    crossed_interval,
    paired_difference,
    per_question,
    stacked,
)
from scalabl_pyro.prediction.metrics import (
    ece_floor,
    entropy,
    evaluate,
    noise_to_signal,
    summarise,
)
from scalabl_pyro.prediction.predictor import Predictor, predict

STEPS, BATCH, DRAWS = 400, 8, 10
#: questions of each split at most: more would cost more than they tell
QUESTIONS = {"train": 1000, "validation": 300, "test": 1000}
#: training questions that nobody trains on, tested too where the test split is small
HELD_OUT = {"openbookqa": 1000}
#: questions of the other task, evenly spread
OTHERS = 400
TUNING_SEED, SEEDS = 100, range(5)
UPPER = 8
TASKS = ("arc_easy", "openbookqa")


def read_task(data: str, task: str) -> dict[str, list[Record]]:
    """The splits of a task, of which no question stands in two."""
    return disjoint(read_folder(Path(data) / task))


def spread(records: list[Record], count: int) -> list[Record]:
    """At most so many records, evenly spread."""
    return records[:: -(-len(records) // count)]


# ---------------------------------------------------------------------- the model and its data


class Bench:
    """A task, read by choice likelihood, with what leaves the trunk computed once.

    :param model: folder of the language model.
    :param data: folder with ``<task>/``, JSON Lines of records.
    :param runs: folder of finished runs, which are not run again.
    """

    def __init__(
        self, model: str, data: str, task: str, runs: str | Path, dtype: str = "bfloat16"
    ) -> None:
        self.task, self.runs = task, Path(runs)
        self.config = ModelConfig(
            model, readout="choice_likelihood", dtype=dtype, attention="eager"
        )
        blocks = transformers.AutoConfig.from_pretrained(model).num_hidden_layers
        self.adapter = AdapterConfig(
            targets=("q_proj", "v_proj"), layers=tuple(range(max(1, blocks - UPPER), blocks))
        )
        records = read_task(data, task)
        self._records = {name: records[name][:count] for name, count in QUESTIONS.items()}
        self._records["test"] += records["train"][-HELD_OUT.get(task, 0) :][: HELD_OUT.get(task, 0)]
        (other,) = (name for name in TASKS if name != task)
        self._records["other"] = spread(read_task(data, other)["test"], OTHERS)
        self.readout = load_readout(
            self.config, self.config.classes([r for each in self._records.values() for r in each])
        )
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

    def fit(self, method: Method, seed: int, subspace: str = "random") -> Fitted:
        """:param subspace: where V comes from."""
        adapter = replace(self.adapter, subspace=subspace)
        prompts = self.readout.encode(self._records["train"])
        make = partial(make_adapter, self.config, adapter, self.readout, prompts=prompts)
        return method.fit(make, self.splits["train"], self.splits["validation"], seed=seed)

    def validate(self, predictor: Predictor) -> float:
        """NLL of the validation questions."""
        predictions = predict(predictor, self.splits["validation"], batch_size=BATCH)
        return evaluate(predictions.logits, predictions.labels)["nll"]

    def test(self, predictor: Predictor) -> dict[str, Tensor]:
        """What the table needs of each question of ``test`` and ``other``: averaged
        log-probabilities (N, C), mutual information (N,), label and length."""
        tensors = {}
        for name in ("test", "other"):
            split = self.splits[name]
            logits = predict(predictor, split, batch_size=BATCH).logits
            averaged = summarise(logits)
            tensors |= {
                f"{name}.log_probs": averaged.log_probabilities.float(),
                f"{name}.mutual_information": averaged.mutual_information.float(),
                f"{name}.noise_to_signal": noise_to_signal(logits),
                f"{name}.labels": split.labels,
                f"{name}.lengths": torch.tensor(split.lengths),
            }
        return tensors


# ---------------------------------------------------------------------- rows


@dataclass(frozen=True)
class WatchedMLE(MLE):
    """MLE that ends at its last step, and remembers the state of lowest validation NLL."""

    best: dict[str, Any] = field(default_factory=dict)

    def _train(self, model: Any, guide: Any, train: Split, **options: Any) -> FitResult:
        validate = options.pop("validate")
        self.best.clear()

        def watched() -> float:
            nll = validate()
            if nll < self.best.get("nll", math.inf):
                named = model.adapter.named_parameters()
                state = {name: p.detach().clone() for name, p in named.items()}
                self.best.update(nll=nll, state=state)
            return nll

        return super()._train(model, guide, train, validate=watched, **options)

    def early_stopped(self, bench: Bench, fitted: Fitted) -> Predictor:
        """At the state of lowest validation NLL."""
        with torch.no_grad():
            for name, parameter in fitted.model.adapter.named_parameters().items():
                parameter.copy_(self.best["state"][name])
        return Predictor(fitted.model.adapter)


#: (bench, method, fitted) → the predictor of a further row
Derive = Callable[[Bench, Any, Fitted], Predictor]


@dataclass(frozen=True)
class Row:
    """A row of the table, and the further rows that its training runs give.

    :param trials: methods by label, two of which are at an edge of the grid.
    :param beyond: label of a trial at an edge → the label and method of one beyond it, which may be
        at an edge itself.
    :param own: further rows that choose for themselves among the trials, in this order.
    :param same: further rows of the row's own choice.
    :param subspace: where V comes from.
    """

    trials: dict[str, Method]
    beyond: dict[str, tuple[str, Method]] = field(default_factory=dict)
    own: dict[str, Derive] = field(default_factory=dict)
    same: dict[str, Derive] = field(default_factory=dict)
    subspace: str = "random"

    def method(self, label: str) -> Method:
        return (self.trials | dict(self.beyond.values()))[label]

    def predictors(self, name: str, bench: Bench, method: Method, fitted: Fitted) -> Any:
        """Name of each row → its predictor, which holds until the next one is made."""
        yield name, fitted.predictor
        for other, derive in {**self.same, **self.own}.items():
            yield other, derive(bench, method, fitted)


def watched(lr: float, steps: int = STEPS) -> Method:
    config = FitConfig(steps=steps, batch_size=BATCH, lr=lr, eval_every=50)
    return WatchedMLE(config, eval_batch_size=BATCH, progress=False)


def decayed(lr: float, decay: float) -> Method:
    config = FitConfig(steps=STEPS, batch_size=BATCH, lr=lr, weight_decay=decay)
    return MAP(config, eval_batch_size=BATCH, progress=False)


def scalabl(lr: float, weight: float, steps: int = STEPS, **settings: Any) -> Method:
    config = FitConfig(steps=steps, batch_size=BATCH, lr=lr, kl=KLSchedule(weight))
    return ScalaBL(config, eval_batch_size=BATCH, draws=DRAWS, progress=False, **settings)


def reference(lr: float) -> Method:
    config = FitConfig(steps=STEPS, batch_size=BATCH, lr=lr, lr_guide=lr, eps=1e-6)
    return Reference(config, eval_batch_size=BATCH, draws=DRAWS, progress=False)


def at_its_temperature(bench: Bench, method: Method, fitted: Fitted) -> Predictor:
    return tempered(bench, fitted)


def stopped_early(bench: Bench, method: WatchedMLE, fitted: Fitted) -> Predictor:
    return method.early_stopped(bench, fitted)


def stopped_early_at_its_temperature(bench: Bench, method: WatchedMLE, fitted: Fitted) -> Predictor:
    predictor = method.early_stopped(bench, fitted)
    return tempered(bench, replace(fitted, predictor=predictor))


def at_the_mean(bench: Bench, method: Method, fitted: Fitted) -> Predictor:
    return posterior_mean(bench, fitted)


def scalabl_row(
    name: str,
    trials: list[tuple[float, float]],
    beyond: dict[tuple[float, float], tuple[float, float]],
    subspace: str = "random",
    **settings: Any,
) -> Row:
    def label(trial: tuple[float, float]) -> str:
        return f"lr={trial[0]:g} kl_weight={trial[1]:g}"

    return Row(
        {label(t): scalabl(*t, **settings) for t in trials},
        beyond={label(at): (label(t), scalabl(*t, **settings)) for at, t in beyond.items()},
        same={f"{name}, posterior mean": at_the_mean},
        subspace=subspace,
    )


FROZEN = [(5e-3, 10), (5e-3, 3), (2e-3, 3)]
# β = 1 is the posterior itself, below which no grid goes.
FROZEN_BEYOND = {
    (5e-3, 10): (5e-3, 30),
    (5e-3, 3): (5e-3, 1),
    (5e-3, 1): (1e-2, 1),
    (1e-2, 1): (2e-2, 1),
    (2e-3, 3): (2e-3, 1),
}

ROWS: dict[str, Row] = {
    "MLE": Row(
        {f"lr={lr:g}": watched(lr) for lr in (3e-4, 1e-3, 3e-3)},
        beyond={"lr=0.0003": ("lr=0.0001", watched(1e-4)), "lr=0.003": ("lr=0.01", watched(1e-2))},
        own={
            "MLE, tempered": at_its_temperature,
            "MLE, early-stopped": stopped_early,
            "MLE, early-stopped, tempered": stopped_early_at_its_temperature,
        },
    ),
    "V frozen": scalabl_row("V frozen", FROZEN, FROZEN_BEYOND),
    "MLE, fixed recipe": Row(
        {"lr=0.001": watched(1e-3, 1000)},
        own={"MLE, fixed recipe, tempered": at_its_temperature},
    ),
    # About the best of V frozen.
    "V activations": scalabl_row(
        "V activations",
        [(5e-3, 1), (5e-3, 3), (1e-2, 1)],
        {(5e-3, 3): (5e-3, 10), (1e-2, 1): (2e-2, 1)},
        subspace="activations",
    ),
    # Runs as long as the fixed recipe, with the package's rate and weight and with others.
    "ScalaBL, 1,000 steps": Row(
        {
            "V frozen lr=0.005 kl_weight=10": scalabl(5e-3, 10, 1000),
            "V free lr=0.001 kl_weight=3": scalabl(1e-3, 3, 1000, projections="free"),
        },
        same={"ScalaBL, 1,000 steps, posterior mean": at_the_mean},
    ),
    # The first trial is the package's default.
    "V activations, 1,000 steps": Row(
        {
            "lr=0.005 kl_weight=10": scalabl(5e-3, 10, 1000),
            "lr=0.005 kl_weight=3": scalabl(5e-3, 3, 1000),
        },
        same={"V activations, 1,000 steps, posterior mean": at_the_mean},
        subspace="activations",
    ),
    "V free": scalabl_row(
        "V free",
        [(1e-3, 10), (1e-3, 3), (2e-3, 10)],
        {
            (1e-3, 3): (1e-3, 1),
            (1e-3, 1): (2e-3, 1),
            (2e-3, 1): (4e-3, 1),
            (2e-3, 10): (5e-3, 10),
            (1e-3, 10): (5e-4, 10),
        },
        projections="free",
    ),
    "full rank": scalabl_row(
        "full rank", FROZEN, FROZEN_BEYOND, guide={"name": "multivariate_normal"}
    ),
    "low rank": scalabl_row(
        "low rank", FROZEN, FROZEN_BEYOND, guide={"name": "low_rank_multivariate_normal"}
    ),
    "MAP": Row(
        {
            f"lr={lr:g} weight_decay={decay:g}": decayed(lr, decay)
            for lr, decay in ((3e-4, 0.1), (1e-3, 0.1), (1e-3, 1.0))
        }
    ),
    "reference": Row({f"lr={lr:g}": reference(lr) for lr in (3e-4, 1e-3, 2e-3)}),
}

#: what is subtracted from every row of the table
AGAINST = (
    *("MLE, tempered", "MLE, early-stopped, tempered"),
    *("MLE, fixed recipe", "MLE, fixed recipe, tempered"),
)


# ---------------------------------------------------------------------- runs


def trial(bench: Bench, name: str, label: str) -> dict[str, float]:
    """Validation NLL of each row that a training run gives."""

    def run() -> dict:
        row, method = ROWS[name], ROWS[name].method(label)
        fitted = bench.fit(method, TUNING_SEED, row.subspace)
        figures = summary(fitted) | {"kappa": kappa(bench, fitted)}
        for other, predictor in row.predictors(name, bench, method, fitted):
            figures[other] = bench.validate(predictor)
        return figures

    return bench_cached(bench, f"{name} {label} trial", run)


def tested(bench: Bench, name: str, label: str, seed: int) -> dict[str, dict[str, Tensor]]:
    """What is known of each test question, by the rows that a training run gives."""
    folder = bench.runs / bench.task
    row = ROWS[name]
    names = [name, *row.same, *row.own]
    files = {other: folder / file_name(f"{other} {label} seed {seed}") for other in names}

    def run() -> dict:
        folder.mkdir(parents=True, exist_ok=True)
        method = row.method(label)
        fitted = bench.fit(method, seed, row.subspace)
        figures = summary(fitted) | {"kappa": kappa(bench, fitted)}
        for other, predictor in row.predictors(name, bench, method, fitted):
            save_file(bench.test(predictor), files[other])
        return figures

    bench_cached(bench, f"{name} {label} seed {seed}", run)
    return {other: load_file(file) for other, file in files.items()}


def file_name(run: str) -> str:
    return run.replace(",", "").replace(" ", "_") + ".safetensors"


def untrained(bench: Bench) -> dict[str, Tensor]:
    """The same before training, at the κ of lowest NLL on training questions."""
    file = bench.runs / bench.task / file_name("zero-shot")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        adapter = make_adapter(bench.config, bench.adapter, bench.readout, svd=False)
        adapter.start_readout(bench.splits["train"])
        with whole_file(file) as part:
            save_file(bench.test(Predictor(adapter)), part)
    return load_file(file)


def bench_cached(bench: Bench, name: str, run: Callable[[], dict]) -> dict:
    return cached(bench.runs / "runs.jsonl", f"{bench.task} {name}", run)


def kappa(bench: Bench, fitted: Fitted) -> float:
    llm = fitted.model.adapter.llm
    return float(bench.readout.kappa(llm).detach())


def _best(trials: dict[str, dict[str, float]], row: str) -> str:
    return min(trials, key=lambda label: trials[label][row])


def choose(bench: Bench, name: str) -> dict[str, dict[str, float]]:
    """Label of each trial → validation NLL of each row; more while the best lies on an edge."""
    row = ROWS[name]
    if len(row.trials) == 1:
        return {}
    trials = {label: trial(bench, name, label) for label in row.trials}
    for other in (name, *row.own):
        while (best := _best(trials, other)) in row.beyond:
            label, _ = row.beyond[best]
            if label in trials:
                break
            trials[label] = trial(bench, name, label)
    return trials


# ---------------------------------------------------------------------- the table


def metrics(runs: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Figures of a row, from one run a seed, with intervals over seeds and questions."""
    each = [by_question(run) for run in runs]
    bias = {"ece": (floor_of(runs), 0.0)}
    figures: dict[str, Any] = {
        name: without_p(crossed_interval(values, bias=bias.get(name, (0.0, 0.0))))
        for name, values in stacked(each).items()
    }
    several: dict[str, list[float]] = {}
    for run in runs:
        for name, value in of_one_run(run).items():
            several.setdefault(name, []).append(value)
    for name, values in several.items():
        x = torch.tensor(values, dtype=torch.float64)
        error = float(x.std() / len(x) ** 0.5) if len(x) > 1 else math.nan
        figures[name] = {"mean": float(x.mean()), "standard_error_over_seeds": error}
    return figures


def of_one_run(run: dict[str, Tensor]) -> dict[str, float]:
    """Figures that are no means over questions."""
    probs, wrong = answers(run)
    return {
        "ece_floor": ece_floor(probs).mean,
        "confidence_minus_acc": float(probs.amax(-1).mean() - (~wrong).float().mean()),
    }


def floor_of(runs: list[dict[str, Tensor]]) -> float:
    """By up to how much the ECE of a row is too high."""
    return mean_floor([answers(run)[0] for run in runs])


def answers(run: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C) of the test questions, and whether each answer is wrong."""
    probs = run["test.log_probs"].float().softmax(-1)  # some are kept in half precision
    return probs, probs.argmax(-1) != run["test.labels"]


def by_question(run: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each question adds to a figure: the test questions, or also those of the other task."""
    probs, wrong = answers(run)
    by_name = per_question(run["test.log_probs"][None].float(), run["test.labels"])
    scores = {
        "entropy": tuple(entropy(run[f"{n}.log_probs"][None].float()) for n in ("test", "other")),
        "mutual_information": tuple(run[f"{n}.mutual_information"] for n in ("test", "other")),
        "noise_to_signal": tuple(run[f"{n}.noise_to_signal"] for n in ("test", "other")),
        "tokens": tuple(run[f"{n}.lengths"] for n in ("test", "other")),
    }
    lengths = torch.cat([run["test.lengths"], run["other.lengths"]])
    is_other = torch.arange(len(lengths)) >= len(probs)
    for name, (here, there) in scores.items():
        if not here.float().any():
            continue  # one draw
        by_name[f"auroc_wrong_{name}"] = auroc_per_question(here.float(), wrong)
        both = torch.cat([here, there]).float()
        by_name[f"auroc_other_{name}"] = auroc_per_question(both, is_other, lengths)
    return by_name


def without_p(estimate: Interval) -> dict[str, float]:
    """Of a figure, which no one expects to be 0: chance is 0.5 of an AUROC, for one."""
    return {name: value for name, value in estimate._asdict().items() if name != "p"}


def table(bench: Bench, names: list[str]) -> dict[str, Any]:
    """All figures of one task."""
    trials: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    runs = {"zero-shot": [untrained(bench)] * len(SEEDS)}
    for name in names:
        row = ROWS[name]
        trials[name] = choose(bench, name)
        for own in (name, *row.own):
            nlls = {label: each[own] for label, each in trials[name].items()}
            label = min(nlls, key=nlls.get) if nlls else next(iter(row.trials))
            chosen[own] = label
            each_seed = [tested(bench, name, label, seed) for seed in SEEDS]
            for other in (own, *(row.same if own == name else ())):
                runs[other] = [of_seed[other] for of_seed in each_seed]
    figures = {
        "trials": trials,
        "chosen": chosen,
        "test": {row: metrics(each) for row, each in runs.items()},
    }
    each_row = {row: stacked([by_question(run) for run in each]) for row, each in runs.items()}
    for other in AGAINST:
        if other in runs:
            figures[f"minus {other}"] = {
                row: {
                    key: paired_difference(
                        values[key],
                        each_row[other][key],
                        bias=(floor_of(runs[row]), floor_of(runs[other]))
                        if key == "ece"
                        else (0.0, 0.0),
                    )._asdict()
                    for key in sorted(values.keys() & each_row[other].keys())
                }
                for row, values in each_row.items()
                if row != other
            }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="folder with arc_easy/ and openbookqa/")
    parser.add_argument("--runs", default=str(RESULTS / "causal"), help="folder of finished runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--save", action="store_true", help="write results/causal.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    figures: dict[str, Any] = {}
    for task in args.tasks:
        figures[task] = table(Bench(args.model, args.data, task, args.runs), args.rows)
        print(json.dumps({task: figures[task]}, indent=1), flush=True)
    report("quality.causal", figures, save=args.save)


if __name__ == "__main__":
    main()
