"""Which score tells wrong answers, and which tells other subjects? A real encoder, 5 seeds.

    python -m benchmarks.quality.unknown --model FOLDER --data FOLDER --runs FOLDER --save

The set-up of :mod:`benchmarks.quality.calibration` at 400 steps, each row at what was chosen there;
the prior's scale of s_perp has three trials, chosen by validation NLL on a seed of their own. Five
further seeds are tested. Each score is high for what it calls unknown. Positives are the wrong
answers among the test questions, or the questions of another subject beside them: chemistry and
physics of MMLU, all their splits, and ARC-Challenge. Other subjects are told apart at equal length
(``auroc``) and at any (``auroc_any_length``). ``found`` is the share of another subject's questions
whose conformal p is at most 0.05, and ``false_alarms`` that of test questions: one half of these is
what p compares with, and the other is asked. Intervals are of a bootstrap over questions and seeds;
``auroc_minus`` are paired differences, and the NLL stands beside them. Finished runs are kept in
``--runs``, a folder, and not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks._report import RESULTS, report
from benchmarks.quality._openbookqa import Bench
from benchmarks.quality.calibration import (
    SEEDS,
    STEPS,
    TUNING_SEED,
    baseline,
    mle,
    scalabl,
    tempered,
)
from scalabl_pyro.data import Split, read_folder
from scalabl_pyro.files import whole_file
from scalabl_pyro.lora.adapter import SubspaceAdapter
from scalabl_pyro.lora.loading import make_adapter
from scalabl_pyro.methods import Ensemble, Fitted, LaplaceLoRA, Method
from scalabl_pyro.models.model import ScalaBLModel
from scalabl_pyro.prediction.detection import fpr_at_tpr
from scalabl_pyro.prediction.intervals import (
    crossed_interval,
    paired_difference,
    per_question,
    stacked,
)
from scalabl_pyro.prediction.mahalanobis import feature_distances
from scalabl_pyro.prediction.metrics import (
    average,
    entropy,
    max_probability,
    mutual_information,
    noise_to_signal,
)
from scalabl_pyro.prediction.novelty import novelty, weight_novelty
from scalabl_pyro.prediction.outliers import conformal_p_values
from scalabl_pyro.prediction.predictor import Predicts, predict
from scalabl_pyro.prediction.rejection import aurc

#: other subjects, and how many of their questions at most
OTHERS = {"chemistry": "mmlu/college_chemistry", "physics": "mmlu/college_physics"}
ARC = 300
#: names of splits whose questions are not those of the training data
SUBJECTS = (*OTHERS, "arc", "openbookqa")
#: of the prior on A and B in ``weight_novelty``, weak, for a strong one leaves all near 1, where
#: float32 has few digits; and how many training questions it knows
PRECISION, KNOWN = 1.0, 250
#: k of s_perp
PERP = 64
#: what the AUROC of each score is compared with
AGAINST = ("entropy", "tokens", "alike")
#: up to this p a question is called unfamiliar
LEVEL = 0.05


def of_features(bench: Bench, fitted: Fitted) -> dict[str, Tensor]:
    """Scores that compare with the training questions."""
    train, new = bench.splits["train"], bench.splits["all"]
    adapter = fitted.model.adapter
    loc = None if fitted.guide is None else fitted.guide.median()["s"]
    by_score = {"mahalanobis": feature_distances(adapter, train, [new], loc)[0]}
    if loc is not None:
        by_score["novelty"] = novelty(cast(ScalaBLModel, fitted.model), train, new, loc=loc)
    sample = train.select(range(0, len(train), max(1, len(train) // KNOWN)))
    by_score["weight_novelty"] = weight_novelty(adapter, sample, new, precision=PRECISION, s=loc)
    return by_score


@dataclass(frozen=True)
class Row:
    """A row of the table, and the further rows that its training runs give.

    :param trials: label → method; with several, the one of lowest validation NLL.
    :param subspace: where V comes from.
    :param derive: name of a row → (bench, fitted) → what predicts.
    :param of_features: (bench, fitted) → further scores, where the adapter has one function, whose
        features and derivatives are looked at.
    """

    trials: dict[str, Method]
    subspace: str = "random"
    derive: dict[str, Callable[[Bench, Fitted], Predicts]] = field(default_factory=dict)
    of_features: Callable[[Bench, Fitted], dict[str, Tensor]] | None = of_features


def frozen_v(**settings: Any) -> Method:
    return scalabl(5e-3, 10, projections="frozen_v", **settings)(STEPS)


def noisy() -> dict[str, Method]:
    return {f"perp_scale={x:g}": frozen_v(perp=PERP, perp_scale=x) for x in (0.3, 1.0, 3.0)}


ROWS: dict[str, Row] = {
    "MLE": Row({"lr=0.0003": mle(3e-4)(STEPS)}, derive={"MLE tempered": tempered}),
    "V random": Row({"lr=0.005 kl_weight=10": frozen_v()}),
    "V activations": Row({"lr=0.005 kl_weight=10": frozen_v()}, subspace="activations"),
    "V activations, s_perp": Row(noisy(), subspace="activations"),
    "V random, s_perp": Row(noisy()),
    "V free": Row({"lr=0.002 kl_weight=30": scalabl(2e-3, 30)(STEPS)}),
    "Laplace-LoRA": Row({"lr=0.0003": baseline(LaplaceLoRA, 3e-4)(STEPS)}, of_features=None),
    "ensemble of 5": Row(
        {"lr=0.0003": baseline(Ensemble, 3e-4, members=5)(STEPS)}, of_features=None
    ),
}


# ---------------------------------------------------------------------- scores


def add_others(bench: Bench, data: str) -> None:
    """Questions of other subjects with four choices, as further splits; ``all`` has the test
    questions and these, one after another."""
    for name, place in OTHERS.items():
        splits = read_folder(Path(data) / place)
        records = [record for split in splits.values() for record in split]
        bench.splits[name] = bench.readout.encode(records)
    arc = Path(data) / "arc_challenge"
    if arc.exists():
        four = [r for r in read_folder(arc)["test"] if len(r.choices) == 4]
        bench.splits["arc"] = bench.readout.encode(four[:ARC])
    parts = [bench.splits[name].records for name in ("test", *subjects(bench))]
    bench.splits["all"] = bench.readout.encode([record for part in parts for record in part])


def subjects(bench: Bench) -> list[str]:
    return [name for name in bench.splits if name in SUBJECTS]


def scores(bench: Bench, predictor: Predicts) -> dict[str, Tensor]:
    """Scores of the questions of ``all``, (N,), and log p̄ (N, C)."""
    logits = predict(predictor, bench.splits["all"], batch_size=bench.batch_size).logits
    by_score = {
        "log_probs": average(logits).contiguous(),
        "max_probability": -max_probability(logits),
        "entropy": entropy(logits),
    }
    if len(logits) > 1:
        by_score["mutual_information"] = mutual_information(logits)
        by_score["noise_to_signal"] = noise_to_signal(logits)
    return by_score


def controls(bench: Bench) -> dict[str, Tensor]:
    """Scores that know nothing of what was trained: tokens, and how alike the choices are to the
    encoder before training."""
    adapter = make_adapter(bench.config, bench.adapter, bench.readout, svd=False)
    split = bench.splits["all"]
    return {"tokens": torch.tensor(split.lengths).float(), "alike": -contrast(adapter, split)}


@torch.no_grad()
def contrast(adapter: SubspaceAdapter, split: Split) -> Tensor:
    """(N,), the mean squared distance of a question's choices from their mean, each as the mean of
    its row's last hidden states."""
    adapter.eval()
    backbone = cast(nn.Module, adapter.llm.base_model)
    distances, hidden = [], []
    handle = backbone.register_forward_hook(lambda _, args, output: hidden.append(output[0]))
    try:
        for chunk in split.batches(32):
            batch = chunk.collate(chunk.examples)
            adapter(batch)
            mask = batch.inputs["attention_mask"][..., None].float()  # (B, C, T, 1)
            states = hidden.pop().float().view(*mask.shape[:3], -1)
            rows = (states * mask).sum(2) / mask.sum(2)  # (B, C, H)
            distances.append((rows - rows.mean(1, keepdim=True)).square().sum(-1).mean(1))
    finally:
        handle.remove()
    return torch.cat(distances)


# ---------------------------------------------------------------------- runs


def trial(bench: Bench, name: str, row: Row, label: str) -> float:
    """Validation NLL of one trial."""

    def run() -> dict:
        fitted = bench.fit(row.trials[label], TUNING_SEED, subspace=row.subspace)
        return bench.validate(fitted.predictor)

    return bench.cached(f"{name} {label} trial", run)["nll"]


def tested(bench: Bench, name: str, row: Row, label: str, seed: int) -> dict[str, dict]:
    """The scores of each question, by the rows that one training run gives."""
    files = {
        other: run_file(bench, f"{other} {label} seed {seed}") for other in (name, *row.derive)
    }
    if not all(file.exists() for file in files.values()):
        print(f"running {name} {label} seed {seed}", flush=True)
        fitted = bench.fit(row.trials[label], seed, subspace=row.subspace)
        # The row's own file is the last, so that what is there is whole.
        for other, derive in row.derive.items():
            write(bench, files[other], scores(bench, derive(bench, fitted)))
        further = row.of_features(bench, fitted) if row.of_features else {}
        write(bench, files[name], scores(bench, fitted.predictor) | further)
    return {other: load_file(file) for other, file in files.items()}


def known(bench: Bench, controls: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The controls, kept as a run is."""
    file = run_file(bench, "controls")
    if not file.exists():
        write(bench, file, controls())
    return load_file(file)


def run_file(bench: Bench, name: str) -> Path:
    return bench.runs.parent / (name.replace(",", "").replace(" ", "_") + ".safetensors")


def write(bench: Bench, file: Path, tensors: dict[str, Tensor]) -> None:
    with whole_file(file) as part:
        save_file(tensors, part, metadata={"dtype": bench.config.dtype})


def in_float32(bench: Bench) -> list[str]:
    """The finished runs in float32; the first ones, all in bfloat16, have no such note."""
    found = []
    for path in bench.runs.parent.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("dtype") == "float32":
                found.append(path.stem)
    return sorted(found)


# ---------------------------------------------------------------------- the table


def figures(
    bench: Bench, runs: Sequence[dict[str, Tensor]], fixed: dict[str, Tensor], resamples: int
) -> dict[str, Any]:
    """Score → positives → metric, from one run a seed.

    :param fixed: :func:`controls`, the same for all seeds.
    """
    labels = bench.splits["test"].labels
    assert labels is not None
    names = ("test", *subjects(bench))
    parts = [len(bench.splits[name]) for name in names]
    each = [
        {score: dict(zip(names, values.split(parts), strict=True)) for score, values in run.items()}
        for run in (run | fixed for run in runs)
    ]
    wrong = [run["log_probs"]["test"].argmax(-1) != labels for run in each]
    lengths = [torch.tensor(bench.splits[name].lengths) for name in names]
    by_score: dict[str, Any] = {}
    for score in each[0]:
        if score == "log_probs":
            continue
        here = [run[score]["test"] for run in each]
        by_score[score] = {"wrong": of_wrong(here, wrong, resamples)}
        for other, theirs in zip(names[1:], lengths[1:], strict=True):
            there = [run[score][other] for run in each]
            apart = (theirs[:, None] - lengths[0]).abs() <= 2
            by_score[score][other] = of_other(here, there, apart, resamples)
            by_score[score][other]["auroc_minus"] = {
                rival: auroc_minus(
                    (here, there),
                    ([run[rival]["test"] for run in each], [run[rival][other] for run in each]),
                    apart,
                    resamples,
                )
                for rival in AGAINST
                if rival in each[0] and rival != score
            }
    return by_score


def of_wrong(scores: Sequence[Tensor], wrong: Sequence[Tensor], resamples: int) -> dict[str, Any]:
    """How well a score finds wrong answers, of one run a seed: scores and ``wrong`` are (N,)."""
    N = len(scores[0])
    every = torch.ones(())
    return {
        "auroc": bootstrapped(
            lambda k, i: area(scores[k][i][wrong[k][i]], scores[k][i][~wrong[k][i]], every),
            len(scores),
            [N],
            resamples,
        ),
        "fpr95": bootstrapped(
            lambda k, i: fpr_at_tpr(scores[k][i], wrong[k][i]), len(scores), [N], resamples
        ),
        "aurc": bootstrapped(
            lambda k, i: aurc(scores[k][i], wrong[k][i]), len(scores), [N], resamples
        ),
    }


def of_other(
    here: Sequence[Tensor], there: Sequence[Tensor], apart: Tensor, resamples: int
) -> dict[str, Any]:
    """How well a score tells another subject from the test questions.

    :param here: scores (N,) of a seed's test questions; ``there`` (N',) of the others.
    :param apart: (N', N), the pairs of about the same length.
    """
    sizes = [len(there[0]), len(here[0])]
    every = torch.ones(())

    def fpr95(k: int, i: Tensor, j: Tensor) -> float:
        both = torch.cat([there[k][i], here[k][j]])
        return fpr_at_tpr(both, torch.arange(len(both)) < len(i))

    half = len(here[0]) // 2  # of the test questions, in an order that means nothing

    def called(k: int, asked: Tensor, known: Tensor) -> float:
        p = conformal_p_values(here[k][:half][known], asked)
        return float((p <= LEVEL).double().mean())

    return {
        "found": bootstrapped(
            lambda k, i, j: called(k, there[k][i], j), len(here), [sizes[0], half], resamples
        ),
        "false_alarms": bootstrapped(
            lambda k, i, j: called(k, here[k][half:][i], j),
            len(here),
            [sizes[1] - half, half],
            resamples,
        ),
        "auroc": bootstrapped(
            lambda k, i, j: area(there[k][i], here[k][j], apart[i][:, j]),
            len(here),
            sizes,
            resamples,
        ),
        "auroc_any_length": bootstrapped(
            lambda k, i, j: area(there[k][i], here[k][j], every), len(here), sizes, resamples
        ),
        "fpr95": bootstrapped(fpr95, len(here), sizes, resamples),
    }


def auroc_minus(
    score: tuple[Sequence[Tensor], Sequence[Tensor]],
    rival: tuple[Sequence[Tensor], Sequence[Tensor]],
    apart: Tensor,
    resamples: int,
) -> dict[str, float]:
    """The AUROC at equal length less that of another score, on the same questions and seeds.

    :param score: as ``here`` and ``there`` of :func:`of_other`, and so ``rival``.
    """
    (here, there), (here_too, there_too) = score, rival
    return bootstrapped(
        lambda k, i, j: (
            area(there[k][i], here[k][j], apart[i][:, j])
            - area(there_too[k][i], here_too[k][j], apart[i][:, j])
        ),
        len(here),
        [len(there[0]), len(here[0])],
        resamples,
    )


def area(positive: Tensor, negative: Tensor, pairs: Tensor) -> float:
    """The share of pairs in which the positive has the higher score, ties at one half: ``auroc``
    and ``auroc_at_equal_length`` of the package, as matrices, for thousands of resamples.

    :param positive: (n,); ``negative`` (m,).
    :param pairs: (n, m) or one number, which pairs count.
    """
    x, y = positive[:, None], negative
    won = (x > y).float() + 0.5 * (x == y).float()
    pairs = pairs.float().expand_as(won)
    return float((won * pairs).sum() / pairs.sum())


def bootstrapped(
    metric: Callable[..., float], seeds: int, sizes: Sequence[int], resamples: int
) -> dict[str, float]:
    """Mean over seeds, and a 95 % interval from resampled seeds and questions, the same questions
    for all seeds.

    :param metric: of a seed's number, and indices into each group of questions.
    :param sizes: of these groups.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(size: int) -> Tensor:
        return torch.randint(size, (size,), generator=generator)

    whole = [torch.arange(size) for size in sizes]
    each = torch.tensor([metric(k, *whole) for k in range(seeds)], dtype=torch.float64)
    again = []
    for _ in range(resamples):
        resampled = [drawn(size) for size in sizes]
        again.append(sum(metric(k, *resampled) for k in drawn(seeds).tolist()) / seeds)
    low, high = torch.tensor(again, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975]).double()
    )
    return {"mean": float(each.mean()), "low": float(low), "high": float(high)}


def table(
    bench: Bench,
    rows: Mapping[str, Row],
    controls: Callable[[], dict[str, Tensor]],
    seeds: int,
    resamples: int,
) -> dict[str, Any]:
    """All figures of some rows; seed by seed, so that what an interruption leaves can be
    compared."""
    trials: dict[str, dict[str, float]] = {}
    chosen: dict[str, str] = {}
    fixed = known(bench, controls)
    runs: dict[str, list[dict[str, Tensor]]] = {}
    for seed in SEEDS[:seeds]:
        for name, row in rows.items():
            labels = list(row.trials)
            if name not in chosen and len(labels) > 1:
                trials[name] = {label: trial(bench, name, row, label) for label in labels}
            if name not in chosen:
                nlls = trials.get(name, {})
                chosen[name] = min(nlls, key=nlls.__getitem__) if nlls else labels[0]
            for other, run in tested(bench, name, row, chosen[name], seed).items():
                runs.setdefault(other, []).append(run)
    return {
        "trials": trials,
        "chosen": chosen,
        "rows": {name: figures(bench, each, fixed, resamples) for name, each in runs.items()},
        "nll": likelihoods(bench, runs),
        "float32": in_float32(bench),
    }


def likelihoods(bench: Bench, runs: dict[str, list[dict[str, Tensor]]]) -> dict[str, Any]:
    """NLL of the test questions by row, and its paired differences, with 95 % intervals over
    questions and seeds."""
    labels = bench.splits["test"].labels
    assert labels is not None
    nll = {
        name: stacked([per_question(run["log_probs"][None, : len(labels)], labels) for run in each])
        for name, each in runs.items()
    }
    values = {name: each["nll"] for name, each in nll.items()}
    return {
        "rows": {name: crossed_interval(each)._asdict() for name, each in values.items()},
        "minus": {
            name: {
                other: paired_difference(each, values[other])._asdict()
                for other in values
                if other != name
            }
            for name, each in values.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with openbookqa/, mmlu/ and more")
    parser.add_argument("--runs", type=Path, default=RESULTS / "unknown", help="finished runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the first so many")
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--save", action="store_true", help="write results/unknown.json")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.model, args.data, args.runs / "runs.jsonl")
    add_others(bench, args.data)
    rows = {name: ROWS[name] for name in args.rows}
    summary = table(bench, rows, partial(controls, bench), args.seeds, args.resamples)
    print_table(summary["rows"])
    report("quality.unknown", summary, save=args.save)


def print_table(rows: dict[str, Any]) -> None:
    """AUROC of each score; rows one after another."""
    for row, by_score in rows.items():
        print(f"{row:24s}" + "".join(f"{of:>24s}" for of in next(iter(by_score.values()))))
        for score, by_positive in by_score.items():
            cells = [metrics["auroc"] for metrics in by_positive.values()]
            print(
                f"  {score:22s}"
                + "".join(f"{c['mean']:10.3f} ({c['low']:.3f}, {c['high']:.3f})" for c in cells)
            )


if __name__ == "__main__":
    main()
