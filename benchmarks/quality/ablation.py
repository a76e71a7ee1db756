"""One part of the program changed at a time: guides, priors, KL weights, initial σ, rank, data.

    python -m benchmarks.quality.ablation --model FOLDER --data FOLDER --save

An encoder (made for all-MiniLM-L6-v2) for multiple choice with LoRA on query and value of its two
highest blocks, on 500 training questions in 150 steps of 16. The blocks below are run once for all
runs. Learning rate and KL weight are those of the diagonal normal guide with the lowest validation
NLL among four, on a seed of its own; every row uses them, so a row says what its change does, not
what it could do if tuned; rows that change nothing are one run. Finished runs are kept in
``--runs`` and not run again.

Every row has ``acc``, ``ece``, ``nll`` and ``brier`` on 500 test questions, CPU ``seconds`` of
training, and the ``numbers`` that its guide holds (a triangular factor is held as a square). A row
with a density q(s) also has

* ``correlation``: the largest |correlation| between two of the D coordinates of s;
* ``entropy_gain``: −½ log det of the correlation matrix C, in nats: the entropy that a product of
  the same marginals has above a normal q;
* ``diagonal_gap``: ½ (Σ log (C⁻¹)_ii + log det C), in nats: KL(q_d ‖ q) of the diagonal normal q_d
  nearest to a normal q, which is the ELBO that a diagonal guide would lose if q were the posterior.

Sampling puts both at D² / 4S = 0.01 where there is no correlation.

Rows of guides have figures of the training set too, at KL weight 1 whatever the weight in training:
``kl`` and ``elbo`` in nats, ``elpd_loo`` by PSIS-LOO, the share ``bad_k`` of examples whose Pareto
k says that it is not to be trusted, and ``k_hat`` of the guide as a whole, from ``--train-draws``
draws. The projections of each row are its own, so ELBOs compare fits, not guides on one posterior.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import arviz as az
import pyro.distributions as dist
import torch
import transformers
from pyro.distributions.transforms import AffineTransform, ComposeTransformModule
from pyro.distributions.transforms import affine_autoregressive as autoregressive
from pyro.infer.autoguide import AutoIAFNormal, AutoNormalizingFlow
from torch import Tensor

from benchmarks._report import RESULTS, report
from benchmarks.quality._openbookqa import Bench
from scalabl_pyro import (
    AutoSubspaceDelta,
    FitConfig,
    KLSchedule,
    Predictor,
    ScalaBLModel,
    Split,
    SubspaceAdapter,
    draw,
    evaluate,
    laplace,
    loo,
    pareto_k,
    predict,
    to_inference_data,
)
from scalabl_pyro.data import disjoint, read_folder
from scalabl_pyro.guides import AutoSubspace
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import Classes, load_readout, make_adapter
from scalabl_pyro.methods import Fitted, ScalaBL

BATCH, DRAWS, MOMENT_DRAWS = 16, 10, 20_000
TUNING_SEED, TEST_QUESTIONS = 100, 500


class LaplaceAfterPoint(ScalaBL):
    """A point in s, and the normal from the curvature (GGN) there, at KL weight 1."""

    def fit(
        self, make_adapter: Callable[..., SubspaceAdapter], train: Split, *args: Any, **options: Any
    ) -> Fitted:
        fitted = super().fit(make_adapter, train, *args, **options)
        assert isinstance(fitted.model, ScalaBLModel)
        assert fitted.guide is not None
        guide = laplace(fitted.model, train, loc=fitted.guide.median()["s"]).guide
        draws = draw(guide, DRAWS, seed=options["seed"])
        return replace(fitted, guide=guide, predictor=Predictor(fitted.model.adapter, draws))


class PyroIAF(ScalaBL):
    """Pyro's own inverse autoregressive flow, which starts near Normal(0, 1) in each coordinate."""

    def make_guide(self, model: ScalaBLModel) -> Any:
        return AutoIAFNormal(model)


class MovedIAF(ScalaBL):
    """The same flow, moved to where the other guides start."""

    def make_guide(self, model: ScalaBLModel) -> Any:
        def transform(size: int) -> ComposeTransformModule:
            move = AffineTransform(model.init_loc.flatten(), self.guide["init_scale"])
            return ComposeTransformModule([autoregressive(size), move])

        return AutoNormalizingFlow(model, transform)


@dataclass(frozen=True)
class Row:
    """What differs from the diagonal normal guide with a standard normal prior.

    :param settings: fields of the method.
    :param kl: fields of the KL schedule.
    :param kl_budget: in nats, beside it.
    :param adapter: fields of the adapter's configuration.
    :param data: folder of the questions.
    """

    method: type[ScalaBL] = ScalaBL
    settings: dict[str, Any] = field(default_factory=dict)
    kl: dict[str, Any] = field(default_factory=dict)
    kl_budget: float | None = None
    adapter: dict[str, Any] = field(default_factory=dict)
    data: str = "openbookqa"


@dataclass(frozen=True)
class Group:
    """Rows of one table.

    :param posterior: whether to also compute figures of the training set.
    """

    seeds: int
    rows: dict[str, Row]
    posterior: bool = False


def guide(name: str, **options: Any) -> dict[str, Any]:
    return {"guide": {"name": name, "init_scale": 0.05, **options}}


def prior(name: str, **options: Any) -> dict[str, Any]:
    return {"prior": {"name": name, **options}}


def low_rank(rank: int) -> Row:
    return Row(settings=guide("low_rank_multivariate_normal", rank=rank))


GROUPS: dict[str, Group] = {
    "guides": Group(
        5,
        {
            "normal": Row(),
            "full rank": Row(settings=guide("multivariate_normal")),
            "full rank per module": Row(settings=guide("multivariate_normal", per_module=True)),
            "low rank 1": low_rank(1),
            "low rank 4": low_rank(4),
            "low rank 16": low_rank(16),
            "delta": Row(settings=guide("delta")),
            "Laplace": Row(LaplaceAfterPoint, guide("delta")),
            "AutoIAFNormal": Row(PyroIAF),
            "IAF, moved": Row(MovedIAF),
        },
        posterior=True,
    ),
    "priors": Group(
        3,
        {
            "normal 0.1": Row(settings=prior("normal", scale=0.1)),
            "normal 1": Row(),
            "normal 10": Row(settings=prior("normal", scale=10.0)),
            "learned normal": Row(settings=prior("learned_normal")),
            "hierarchical normal": Row(settings=prior("hierarchical_normal")),
            "Laplace": Row(settings=prior("laplace")),
            "horseshoe": Row(settings=prior("horseshoe")),
            "log-normal": Row(settings=prior("log_normal")),
            "relaxed Bernoulli": Row(settings=prior("relaxed_bernoulli")),
        },
    ),
    "kl": Group(
        3,
        {
            **{f"weight {weight:g}": Row(kl={"weight": weight}) for weight in (0.1, 1, 10, 100)},
            **{shape: Row(kl={"shape": shape}) for shape in ("constant", "linear", "cosine")},
            **{f"budget {nats:g}": Row(kl_budget=nats) for nats in (3, 10, 30)},
        },
    ),
    "scale": Group(
        3,
        {
            f"initial σ {scale:g}": Row(settings=guide("normal", init_scale=scale))
            for scale in (0.01, 0.05, 0.2, 0.5)
        },
    ),
    "rank": Group(3, {f"r = {r}": Row(adapter={"r": r, "alpha": 2 * r}) for r in (4, 8, 16)}),
    "arc": Group(
        3,
        {
            "normal": Row(data="arc_challenge"),
            "full rank": Row(settings=guide("multivariate_normal"), data="arc_challenge"),
        },
    ),
}


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    lr: float
    kl_weight: float

    def __str__(self) -> str:
        return f"lr={self.lr:g} kl_weight={self.kl_weight:g}"


# lr = 1e-3, tried first, is in the file of runs; its lowest NLL is above the one chosen here.
SETTINGS = [Setting(lr, weight) for lr in (3e-3, 1e-2) for weight in (1.0, 10.0)]


@dataclass(frozen=True)
class Work:
    """The questions of one data set, past the blocks that no row changes.

    :param questions: N of training.
    """

    model: ModelConfig
    folder: Path
    questions: int

    @cached_property
    def lora(self) -> AdapterConfig:
        """LoRA in the two highest blocks."""
        blocks = transformers.AutoConfig.from_pretrained(self.model.name).num_hidden_layers
        layers = (blocks - 2, blocks - 1)
        return AdapterConfig(targets=("query", "value"), heads=("classifier",), layers=layers)

    @cached_property
    def splits(self) -> dict[str, Split]:
        records = disjoint(read_folder(self.folder))
        readout = self.readout
        adapter = make_adapter(self.model, self.lora, readout, svd=True, projections="free")
        limits = {"train": self.questions, "validation": None, "test": TEST_QUESTIONS}
        return {
            name: adapter.cache_trunk(readout.encode(records[name][:limit]), batch_size=16)
            for name, limit in limits.items()
        }

    @cached_property
    def readout(self) -> Any:
        records = read_folder(self.folder)
        most = max(len(record.choices) for split in records.values() for record in split)
        return load_readout(self.model, Classes(most))

    def program(self, row: Row, setting: Setting, steps: int) -> tuple[ScalaBL, AdapterConfig]:
        """All that a row trains with."""
        kl = KLSchedule(**({"weight": setting.kl_weight} | row.kl))
        config = FitConfig(
            steps=steps, batch_size=BATCH, lr=setting.lr, kl=kl, kl_budget=row.kl_budget
        )
        method = row.method(config, progress=False, projections="free", **row.settings)
        return method, replace(self.lora, **row.adapter)

    def fit(self, row: Row, setting: Setting, seed: int, steps: int) -> tuple[Fitted, float]:
        """A trained row, and its CPU seconds of training."""
        method, lora = self.program(row, setting, steps)
        started = 0.0

        def make(**form: Any) -> SubspaceAdapter:
            nonlocal started
            adapter = make_adapter(self.model, lora, self.readout, **form)
            started = time.process_time()
            return adapter

        fitted = method.fit(make, self.splits["train"], None, seed=seed)
        return fitted, time.process_time() - started

    def metrics(self, predictor: Predictor, split: str) -> dict[str, float]:
        # Few examples at a time keep ten draws of them in the processor's cache.
        predictions = predict(predictor, self.splits[split], batch_size=4)
        return evaluate(predictions.logits, predictions.labels)


def density(fitted: Fitted) -> Any:
    """q(s), with event shape (M, r), of a guide of this package or of Pyro."""
    q: Any = fitted.guide
    if isinstance(q, AutoSubspace):
        return q.get_posterior()
    flow = q.get_posterior()
    shape = torch.Size(fitted.predictor.adapter.shape)
    return dist.TransformedDistribution(
        flow, [dist.transforms.ReshapeTransform(flow.event_shape, shape)]
    )


@torch.no_grad()
def correlations(draws: Tensor) -> dict[str, float]:
    """Of the D coordinates, from draws (S, M, r)."""
    matrix = torch.corrcoef(draws.flatten(1).double().mT)
    off_diagonal = matrix - torch.eye(len(matrix))
    return {
        "correlation": float(off_diagonal.abs().max()),
        "entropy_gain": float(-0.5 * torch.logdet(matrix)),
        "diagonal_gap": float(0.5 * (matrix.inverse().diagonal().log().sum() + matrix.logdet())),
    }


@torch.no_grad()
def training_figures(fitted: Fitted, train: Split, num_draws: int) -> dict[str, float]:
    """ELBO, PSIS-LOO and Pareto k of a posterior, at KL weight 1."""
    assert isinstance(fitted.model, ScalaBLModel)
    q, p = density(fitted), fitted.model.prior()
    many = q.sample(torch.Size([MOMENT_DRAWS]))
    kl = float((q.log_prob(many) - p.log_prob(many)).mean())
    bank = many[:num_draws]
    predictor = Predictor(fitted.predictor.adapter, bank)
    data = to_inference_data(predictor, train, model=fitted.model, batch_size=4)
    data.add_groups(
        log_prior=az.dict_to_dataset({"s": p.log_prob(bank)[None].numpy()}),
        sample_stats=az.dict_to_dataset({"log_q": q.log_prob(bank)[None].numpy()}),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of high k, which is among the figures
        estimate = loo(data)
        k_hat = pareto_k(data)
    log_likelihood = data["log_likelihood"]["label"].sum("example")
    return {
        "kl": kl,
        "elbo": float(log_likelihood.mean()) - kl,
        "elpd_loo": float(estimate.elpd_loo),
        "bad_k": float((estimate.pareto_k > estimate.good_k).mean()),
        "k_hat": k_hat,
    }


class Ablation(Bench):
    """All runs of the given sizes, of which finished ones are kept.

    :param steps: T of each training run.
    :param questions: N of training.
    :param train_draws: S of the figures of the training set, 25 or more.
    """

    def __init__(
        self, model: str, data: str, runs: str, *, steps: int, questions: int, train_draws: int
    ) -> None:
        super().__init__(model, data, runs)
        self.steps, self.train_draws = steps, train_draws
        self.sizes = f"N={questions} T={steps}"
        self.works = {
            name: Work(self.config, Path(data) / name, questions)
            for name in ("openbookqa", "arc_challenge")
        }

    def trial(self, setting: Setting) -> float:
        """Validation NLL of the diagonal normal guide."""

        def run() -> dict[str, float]:
            work = self.works["openbookqa"]
            fitted, _ = work.fit(Row(), setting, TUNING_SEED, self.steps)
            return work.metrics(fitted.predictor, "validation")

        return self.cached(f"{self.sizes} {setting} trial", run)["nll"]

    def tested(
        self, row: Row, setting: Setting, seed: int, *, name: str, posterior: bool
    ) -> dict[str, float]:
        """Figures of one run.

        :param name: of the row, in the file of finished runs.
        :param posterior: whether to add the figures of the training set.
        """

        def run() -> dict[str, float]:
            work = self.works[row.data]
            fitted, seconds = work.fit(row, setting, seed, self.steps)
            assert fitted.guide is not None
            figures = work.metrics(fitted.predictor, "test")
            figures["seconds"] = seconds
            figures["numbers"] = sum(p.numel() for p in fitted.guide.parameters())
            if isinstance(fitted.guide, AutoSubspaceDelta):
                return figures
            figures |= correlations(density(fitted).sample(torch.Size([MOMENT_DRAWS])))
            if posterior:
                figures |= training_figures(fitted, work.splits["train"], self.train_draws)
            return figures

        draws = f" S={self.train_draws}" if posterior else ""
        return self.cached(f"{self.sizes}{draws} {setting} {name} seed {seed}", run)

    def table(self, group: str, setting: Setting, seeds: int | None) -> dict[str, dict]:
        """Mean and standard error of each row's figures.

        :param seeds: at most so many.
        """
        rows = {}
        count = min(GROUPS[group].seeds, seeds or GROUPS[group].seeds)
        for name, row in GROUPS[group].rows.items():
            place, posterior = f"{group} {name}", GROUPS[group].posterior
            if self._changes_nothing(row, setting):  # run once for all groups
                place, posterior = "guides normal", True
            runs = [
                self.tested(row, setting, seed, name=place, posterior=posterior)
                for seed in range(count)
            ]
            rows[name] = {key: mean_and_error([run[key] for run in runs]) for key in runs[0]}
        return rows

    def _changes_nothing(self, row: Row, setting: Setting) -> bool:
        work, first = self.works["openbookqa"], Row()
        programs = [work.program(r, setting, self.steps) for r in (row, first)]
        return row.data == first.data and programs[0] == programs[1]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The standard error of one value is 0."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std(correction=min(1, len(x) - 1)) / len(x) ** 0.5)


def print_table(group: str, rows: dict[str, dict]) -> None:
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"{group:22s}" + "".join(f"{key:>18s}" for key in keys))
    for name, row in rows.items():
        cells = ("{:.4g} ± {:.2g}".format(*row[key]) if key in row else "" for key in keys)
        print(f"{name:22s}" + "".join(f"{cell:>18s}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with openbookqa/ and arc_challenge/")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--runs", default=str(RESULTS / "ablation_runs.jsonl"), help="finished runs"
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--questions", type=int, default=500, help="N of training")
    parser.add_argument("--train-draws", type=int, default=50, help="S on the training set")
    parser.add_argument("--seeds", type=int, help="at most so many")
    parser.add_argument("--save", action="store_true", help="write results/ablation.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Ablation(
        args.model,
        args.data,
        args.runs,
        steps=args.steps,
        questions=args.questions,
        train_draws=args.train_draws,
    )
    trials = {setting: bench.trial(setting) for setting in SETTINGS}
    chosen = min(trials, key=trials.__getitem__)
    figures: dict[str, Any] = {
        "chosen": str(chosen),
        "trials": {str(setting): nll for setting, nll in trials.items()},
    }
    print(f"{chosen}, by validation NLL: {figures['trials']}", flush=True)
    for group in args.groups:
        figures[group] = bench.table(group, chosen, args.seeds)
        print_table(group, figures[group])
    report("quality.ablation", figures, save=args.save)


if __name__ == "__main__":
    main()
