"""Quality of prediction against its cost: a real encoder and questions, 5 seeds, and a Llama.

    python -m benchmarks.cost.predict --model FOLDER --data FOLDER --work FOLDER --save

Costs are those of one deterministic pass of plain LoRA on the same batch, both in turn in one
process. Quality is on OpenBookQA's test questions and, out of distribution, on college physics,
with posteriors trained as in ``calibration.py`` (tempered ELBO, KL weight 30). What the draws of a
sampling method should reach is the model average of the same posterior over 50 independent draws.

``trunk k``: the draws of modules below block k are held at their mean, so that these blocks run
once. ``from block k``: a posterior trained with the blocks from k on adapted, and no others.

Trained models and logits are kept in ``--work``, and the figures of finished seeds in ``--runs``,
so that a run that was stopped goes on. Costs want an idle machine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks._report import IMAGES, RESULTS, report
from benchmarks.cost.train_step import TARGETS, LastToken, llama
from benchmarks.quality._openbookqa import Bench
from scalabl_pyro import SubspaceAdapter
from scalabl_pyro.data import Batch, Split
from scalabl_pyro.files import whole_file
from scalabl_pyro.guides import AutoSubspace
from scalabl_pyro.infer import FitConfig
from scalabl_pyro.infer.kl import KLSchedule
from scalabl_pyro.lora.loading import make_adapter
from scalabl_pyro.methods import ScalaBL
from scalabl_pyro.prediction.distillation import distill, fold_into
from scalabl_pyro.prediction.draws import draw, hold
from scalabl_pyro.prediction.linearised import Linearised
from scalabl_pyro.prediction.metrics import average, evaluate, half_width
from scalabl_pyro.prediction.predictor import Predictor, Predicts, predict

SHARES = (0.25, 0.5, 0.75)
TOLERANCES = (0.1, 0.05)
#: numbers of draws at which the error of a bank is looked at
GRID = (2, 4, 6, 8, 10, 12)


@dataclass(frozen=True)
class Size:
    """How much is run.

    :param draws: S of each sampling method; the last is the truth.
    :param further: S of what needs draws of its own.
    :param pool: draws that early stopping may take, with many divisors.
    :param teacher: draws whose average is distilled.
    :param tested: questions of the test split, the first ones.
    :param replicates: banks of a kind whose variance tells its error, on ``few`` questions.
    :param batch: questions in the batch that is timed, so many ``repeats``; ``questions`` are
        those on which early stopping is.
    :param llama: hidden size and blocks.
    """

    steps: int = 400
    draws: tuple[int, ...] = (3, 5, 10, 20, 50)
    further: tuple[int, ...] = (3, 5, 10)
    pool: int = 48
    teacher: int = 10
    tested: int = 200
    replicates: int = 40
    few: int = 16
    questions: int = 48
    batch: int = 8
    repeats: int = 3
    llama: tuple[int, int] = (512, 8)


DRY = Size(2, (2, 4), (2, 4), 4, 2, 6, 2, 2, 4, 2, 1, (64, 4))


class Seed:
    """One trained posterior, and the logits of everything that is compared on it.

    :param work: folder of the files that are kept.
    """

    def __init__(self, bench: Bench, size: Size, seed: int, work: Path) -> None:
        self.bench, self.size, self.seed, self.work = bench, size, seed, work
        self.method = ScalaBL(
            FitConfig(steps=size.steps, batch_size=16, lr=2e-3, kl=KLSchedule(30.0)),
            draws=1,
            progress=False,
            projections="free",
        )
        self.adapter, self.guide = self.trained()
        self.loc = self.guide.median()["s"]

    def _cached(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of an earlier run, or made now."""
        path = self.work / f"seed_{self.seed}_{name}.safetensors".replace(" ", "_")
        if not path.exists():
            start = time.perf_counter()
            tensors = {n: t.detach().contiguous() for n, t in make().items()}
            with whole_file(path) as part:
                save_file(tensors, part)
            took = time.perf_counter() - start
            print(f"seed {self.seed}: {name}, {took:.0f} s", flush=True)
        return load_file(path)

    def fresh(self, *, svd: bool, layers: tuple[int, ...] = ()) -> SubspaceAdapter:
        settings = replace(self.bench.adapter, layers=layers)
        return make_adapter(
            self.bench.config, settings, self.bench.readout, svd=svd, projections="free"
        )

    def trained(self, layers: tuple[int, ...] = ()) -> tuple[SubspaceAdapter, AutoSubspace]:
        """With all blocks adapted, or some."""

        def train() -> dict[str, Tensor]:
            fitted = self.bench.fit(self.method, self.seed, layers=layers)
            guide = {f"guide.{n}": t for n, t in fitted.guide.state_dict().items()}
            return guide | dict(fitted.model.adapter.state())

        saved = self._cached(f"model from block {layers[0]}" if layers else "model", train)
        adapter = self.fresh(svd=True, layers=layers)
        guide = self.method.make_guide(self.method.make_model(adapter, num_data=1))
        _fill(adapter.state() | {f"guide.{n}": t for n, t in guide.state_dict().items()}, saved)
        return adapter, guide

    def logits(self, name: str, predictor: Callable[[], Predicts], split: str) -> Tensor:
        """(S, N, C)."""

        def run() -> dict[str, Tensor]:
            return {"logits": predict(predictor(), self.bench.splits[split]).logits}

        return self._cached(f"{name} {split}", run)["logits"]

    def bank(self, kind: str, num_draws: int) -> Tensor:
        return draw(self.guide, num_draws, seed=self.seed, kind=kind)

    def sampled(self, draws: Tensor) -> Callable[[], Predictor]:
        return lambda: Predictor(self.adapter, draws)

    def distilled(self) -> Predictor:
        def teach() -> dict[str, Tensor]:
            teacher = Predictor(self.adapter, self.bank("independent", self.size.teacher))
            train = self.bench.splits["train"]
            return {"log_probs": average(predict(teacher, train).logits)}

        log_probs = self._cached("teacher", teach)["log_probs"]
        torch.manual_seed(self.seed)
        student = self.fresh(svd=False)

        def train() -> dict[str, Tensor]:
            fold_into(self.adapter, self.loc, student)
            config = FitConfig(steps=self.size.steps, batch_size=16, lr=1e-3)
            train = self.bench.splits["train"]
            distill(student, train, log_probs, config, seed=self.seed, progress=False)
            return dict(student.state())

        _fill(student.state(), self._cached("student", train))
        return Predictor(student)

    def run(self) -> dict[str, dict[str, Any]]:
        """All figures of this seed."""
        figures: dict[str, dict[str, Any]] = {
            split: self.quality(split) for split in ("test", "ood")
        }
        return figures | {"draws": self.draws_needed()}

    def quality(self, split: str) -> dict[str, dict[str, float]]:
        """Metrics by method, and the error of its averaged probabilities against the truth's."""
        size = self.size
        labels = self.bench.splits[split].labels
        many = self.bank("independent", size.draws[-1])
        every = self.logits("independent", self.sampled(many), split)
        truth = average(every).exp()
        metrics: dict[str, dict[str, float]] = {}

        def note(name: str, logits: Tensor, **more: float) -> None:
            error = (average(logits).exp() - truth).square().mean().sqrt()
            metrics[name] = evaluate(logits, labels) | {"error": float(error)} | more

        note("posterior mean", self.logits("mean", self.sampled(self.loc[None]), split))
        for S in size.draws:
            note(f"batched S={S}", every[:S])
        for kind in ("sobol", "antithetic"):
            own = self.sampled(self.bank(kind, size.further[-1]))
            logits = self.logits(kind, own, split)
            for S in size.further:
                note(f"{kind} S={S}", logits[:S])
        for depth in depths(self.adapter):
            held = hold(many[: size.further[-1]], self.loc, self.adapter.trunk.above(depth))
            logits = self.logits(f"trunk {depth}", self.sampled(held), split)
            for S in size.further:
                note(f"trunk {depth} S={S}", logits[:S])
        # Trained with the upper half of the blocks alone adapted: a posterior of its own.
        depth = depths(self.adapter)[1]
        top, guide = self.trained(tuple(range(depth, self.adapter.trunk.num_blocks)))
        own = Predictor(top, draw(guide, size.further[-1], seed=self.seed))

        def from_the_trunk() -> dict[str, Tensor]:
            return {"logits": predict(own, top.cache_trunk(self.bench.splits[split])).logits}

        logits = self._cached(f"from block {depth} {split}", from_the_trunk)["logits"]
        for S in size.further:
            metrics[f"from block {depth} S={S}"] = evaluate(logits[:S], labels)
        for tolerance in TOLERANCES:
            logits, used = stopped(every[: size.pool], tolerance)
            note(f"early stop {tolerance:g}", logits, draws=float(used.double().mean()))
        linear = Linearised(self.adapter, self.loc, many)
        note("linearised", self.logits("linearised", lambda: linear, split))
        note("distilled", self.logits("distilled", self.distilled, split))
        return metrics

    def draws_needed(self) -> dict[str, float]:
        """How many draws have the squared error of 10 independent ones, which is σ²/10.

        The averages have no bias, so that their error is the variance between banks. A draw's error
        is shared by all questions: many banks on few questions tell more than the reverse.
        """
        size = self.size
        questions = _first(self.bench.splits["test"], size.few)
        many = self.sampled(self.bank("independent", size.draws[-1]))
        every = self.logits("independent", many, "test")[:, : size.few].softmax(-1)
        one = every.var(0).mean()  # σ² of a single draw

        def banks(kind: str) -> Tensor:
            """Probabilities (banks, S, N, C)."""

            def run() -> dict[str, Tensor]:
                seeds = [1000 * (self.seed + 1) + i for i in range(size.replicates)]
                draws = [draw(self.guide, GRID[-1], seed=seed, kind=kind) for seed in seeds]
                # In one bank, for the sake of fuller batches.
                logits = predict(Predictor(self.adapter, torch.cat(draws)), questions).logits
                return {"logits": logits.unflatten(0, (size.replicates, -1))}

            return self._cached(f"{kind} banks", run)["logits"].softmax(-1)

        return {
            kind: _crossing(
                GRID, [float(probs[:, :S].mean(1).var(0).mean() / one) for S in GRID], 0.1
            )
            for kind in ("sobol", "antithetic")
            for probs in [banks(kind)]
        }


def stopped(logits: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """What ``predict(tolerance=…)`` gives, from logits (S, N, C) that are at hand."""
    S, stopped_logits = len(logits), logits.clone()
    used = torch.full(logits.shape[1:2], S)
    for n in reversed([n for n in range(4, S) if S % n == 0]):
        settled = half_width(logits[:n]) <= tolerance
        stopped_logits[:, settled] = logits[:n, settled].repeat(S // n, 1, 1)
        used[settled] = n
    return stopped_logits, used


def depths(adapter: SubspaceAdapter) -> list[int]:
    """Blocks in a trunk of about a quarter, a half and three quarters of the depth."""
    return [int(share * adapter.trunk.num_blocks + 0.5) for share in SHARES]


def costs(adapter: SubspaceAdapter, plain: SubspaceAdapter, batch: Batch, size: Size) -> dict:
    """Seconds of each method on one batch over those of one deterministic pass, in turn.

    ``overhead``: over the arithmetic that the method must do, the trunk once and the rest S times.
    """
    loc = adapter.init_loc
    bank = loc + 0.1 * torch.randn(size.draws[-1], *adapter.shape)

    def one_pass() -> float:
        return _timed(lambda: Predictor(plain).logits(batch))

    def sampling(draws: Tensor) -> Callable[[], float]:
        return lambda: _timed(lambda: Predictor(adapter, draws).logits(batch))

    def loop(draws: Tensor) -> Callable[[], float]:
        return lambda: _timed(lambda: [Predictor(adapter, s[None]).logits(batch) for s in draws])

    runs: dict[str, Callable[[], float]] = {
        "distilled": one_pass,
        "linearised": lambda: _timed(lambda: Linearised(adapter, loc, bank).logits(batch)),
    }
    for depth in depths(adapter):
        runs[f"trunk {depth} alone"] = lambda depth=depth: _trunk_seconds(plain, batch, depth)
    for S in size.draws:
        runs[f"loop S={S}"] = loop(bank[:S])
        runs[f"batched S={S}"] = sampling(bank[:S])
        for depth in depths(adapter):
            held = hold(bank[:S], loc, adapter.trunk.above(depth))
            runs[f"trunk {depth} S={S}"] = sampling(held)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(size.repeats + 1):
        for name, run in runs.items():
            before = one_pass()
            took = run()
            ratios[name].append(2 * took / (before + one_pass()))
    # The first round warms up.
    median = {name: float(torch.tensor(r[1:]).median()) for name, r in ratios.items()}
    figures = {name: {"cost_ratio": ratio} for name, ratio in median.items()}
    for S in size.draws:
        figures[f"batched S={S}"]["overhead"] = median[f"batched S={S}"] / S
        for depth in depths(adapter):
            trunk = median[f"trunk {depth} alone"]
            name = f"trunk {depth} S={S}"
            figures[name]["overhead"] = median[name] / (trunk + S * (1 - trunk))
    return figures


def stopping_costs(seed: Seed) -> dict[str, dict[str, float]]:
    """Early stopping against one pass, both over the same questions, in batches as they come."""
    size = seed.size
    questions = _first(seed.bench.splits["test"], size.questions)
    plain = Predictor(seed.fresh(svd=False))
    sampling = Predictor(seed.adapter, seed.bank("independent", size.pool))
    figures = {}
    for tolerance in TOLERANCES:
        ratios = []
        for _ in range(size.repeats):
            before = _timed(lambda: predict(plain, questions))
            took = _timed(lambda t=tolerance: predict(sampling, questions, tolerance=t))
            ratios.append(2 * took / (before + _timed(lambda: predict(plain, questions))))
        figures[f"early stop {tolerance:g}"] = {"cost_ratio": float(torch.tensor(ratios).median())}
    return figures


def encoder_costs(seed: Seed) -> dict[str, dict[str, float]]:
    test = seed.bench.splits["test"]
    batch = test.collate(test.examples[: seed.size.batch])
    return costs(seed.adapter, seed.fresh(svd=False), batch, seed.size) | stopping_costs(seed)


def llama_costs(size: Size) -> dict[str, dict[str, float]]:
    """Random weights: what is answered does not matter, only for how long."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    adapter, plain = (
        SubspaceAdapter(llama(*size.llama), lora, LastToken(), svd=svd, projections="free")
        for svd in (True, False)
    )
    ids = torch.randint(0, 2048, (4, 64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return costs(adapter, plain, Batch(inputs, torch.ones(4, 4, dtype=torch.bool)), size)


def summarise(runs: list[dict[str, dict[str, float]]], cost: dict) -> dict[str, dict[str, Any]]:
    """Mean and standard error over seeds of each metric, and paired differences from S = 10."""
    reference = "batched S=10" if "batched S=10" in runs[0] else "batched S=4"
    rows: dict[str, dict[str, Any]] = {}
    for name in runs[0]:
        row: dict[str, Any] = {
            metric: mean_and_error([run[name][metric] for run in runs])
            for metric in runs[0][name]
            if metric not in ("entropy", "mutual_information")
        }
        row["nll_minus_reference"] = mean_and_error(
            [run[name]["nll"] - run[reference]["nll"] for run in runs]
        )
        row["cost_ratio"] = cost_of(name, cost)
        rows[name] = row
    return rows


def cost_of(name: str, cost: dict[str, dict[str, float]]) -> float:
    """Draws of any kind cost the same, and the posterior mean is one pass."""
    if name == "posterior mean":
        name = "distilled"
    same = name.replace("sobol", "batched").replace("antithetic", "batched")
    same = same.replace("from block", "trunk")
    return cost[same]["cost_ratio"]


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else None


#: what the picture calls the methods
LABELS = {
    "batched": "independent draws",
    "sobol": "Sobol draws",
    "antithetic": "antithetic draws",
    "trunk 2": "2 of 6 blocks at the mean",
    "trunk 3": "3 of 6 blocks at the mean",
    "trunk 5": "5 of 6 blocks at the mean",
    "from block 3": "trained on the upper 3 blocks",
    "early stop 0.1": "stop at ± 0.1",
    "early stop 0.05": "stop at ± 0.05",
}


def plot(figures: dict, path: Path) -> None:
    """NLL and ECE against cost, in and out of distribution."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained", sharex=True)
    for column, split in enumerate(("test", "ood")):
        rows = figures["quality"][split]
        methods: dict[str, list[str]] = {}
        for name in rows:
            methods.setdefault(name.split(" S=")[0], []).append(name)
        for line, (metric, label) in enumerate((("nll", "NLL (nats)"), ("ece", "ECE"))):
            axis = axes[line, column]
            for index, (method, names) in enumerate(methods.items()):
                points = [(rows[n]["cost_ratio"], *rows[n][metric]) for n in names]
                x, y, error = zip(*points, strict=True)
                axis.errorbar(
                    x,
                    y,
                    yerr=None if None in error else error,
                    marker="os^vD*PX<>"[index % 10],
                    ms=5,
                    lw=1,
                    elinewidth=0.5,
                    color=f"C{index}" if index < 10 else "black",
                    label=LABELS.get(method, method),
                )
            axis.set_xscale("log")
            axis.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_ylabel(label)
        axes[0, column].set_title({"test": "OpenBookQA", "ood": "college physics"}[split])
        axes[1, column].set_xlabel("cost, in deterministic passes")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with openbookqa/ and mmlu/")
    parser.add_argument("--work", required=True, help="folder where finished pieces are kept")
    parser.add_argument(
        "--runs", default=str(RESULTS / "predict_runs.jsonl"), help="figures of finished seeds"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--save", action="store_true", help="write results/predict.json")
    args = parser.parse_args()
    size = DRY if args.dry_run else Size()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.model, args.data, work / "runs.jsonl" if args.dry_run else args.runs)
    bench.splits["test"] = _first(bench.splits["test"], size.tested)
    runs = [
        bench.cached(f"seed {number}", lambda number=number: Seed(bench, size, number, work).run())
        for number in args.seeds
    ]
    cost = bench.cached("encoder", lambda: encoder_costs(Seed(bench, size, args.seeds[0], work)))
    llama_cost = bench.cached("llama", lambda: llama_costs(size))
    figures = {
        "seeds": args.seeds,
        "cost": {"encoder": cost, "llama": llama_cost},
        "quality": {
            split: summarise([run[split] for run in runs], cost) for split in ("test", "ood")
        },
        "draws_for_the_error_of_10": {
            kind: mean_and_error([run["draws"][kind] for run in runs]) for kind in runs[0]["draws"]
        },
    }
    for split, rows in figures["quality"].items():
        print_table(split, rows)
    plot(figures, (IMAGES if args.save else work) / "predict.png")
    report("cost.predict", figures, save=args.save)


def print_table(split: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"{split:18s}{'cost':>8s}{'NLL':>9s}{'ECE %':>8s}{'ACC %':>8s}{'error':>8s}")
    for name, row in rows.items():
        nll, ece, acc = (row[k][0] for k in ("nll", "ece", "acc"))
        error = row["error"][0] if "error" in row else math.nan
        cost = row["cost_ratio"]
        print(f"{name:18s}{cost:8.2f}{nll:9.4f}{100 * ece:8.1f}{100 * acc:8.1f}{error:8.4f}")


def _fill(targets: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in saved.items():
            targets[name].copy_(value)


def _first(split: Split, count: int) -> Split:
    return Split(split.records[:count], split.examples[:count], split.collate)


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _trunk_seconds(adapter: SubspaceAdapter, batch: Batch, depth: int) -> float:
    """From the start of a pass to the end of its first ``depth`` blocks."""
    llm = adapter.llm
    blocks = next(m for m in llm.modules() if isinstance(m, nn.ModuleList))
    ends: list[float] = []
    with blocks[depth - 1].register_forward_hook(lambda *_: ends.append(time.perf_counter())):
        start = time.perf_counter()
        Predictor(adapter).logits(batch)
    return ends[0] - start


def _crossing(draws: tuple[int, ...], errors: list[float], level: float) -> float:
    """Where errors, log-linear between the numbers of draws, first come down to the level."""
    for i, error in enumerate(errors):
        if error <= level:
            if i == 0:
                return float(draws[0])
            (a, b), (high, low) = draws[i - 1 : i + 1], errors[i - 1 : i + 1]
            share = math.log(high / level) / math.log(high / low)
            return math.exp(math.log(a) + share * math.log(b / a))
    return math.inf


if __name__ == "__main__":
    main()
