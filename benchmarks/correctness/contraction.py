"""Whether q(s) contracts as data come in, and depends on what they say, with projections fixed.

    python -m benchmarks.correctness.contraction --save

``scalabl`` (mean field, Trace_ELBO, KL weight 1, trained until it stays where it is) against
``reference`` (the published algorithm with its own schedule: 5,000 steps of batch 4, lr 1e-4), on
labels that some s separates without error, and on coin flips. For each, over the M·r coordinates:
the mean of σ / prior σ (the prior is Normal(0, 1), so this is σ itself), the mean of μ², and the
share of coordinates whose σ is below half the prior's; mean and standard error over seeds, each a
data set of its own.

The language model is left out, for speed. In its place stands a sum of the LoRA updates of M linear
maps, f(x; s) = (α/r) Σ_m B_m diag(s_m) V_m x_m with standard normal x_m, V from the singular value
decomposition of a fresh A as in the package, and a random B. The K seeds are trained side by side,
as one model with K·M modules, of which no two seeds share a module or an example.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from benchmarks._report import report
from scalabl_pyro import AutoSubspaceNormal, FitConfig, KLSchedule, ScalaBLModel, fit
from scalabl_pyro.data import Batch, Example, Record, Split
from scalabl_pyro.methods import Reference

SIZES = (160, 640, 4957)
LABELS = ("separable", "coin flips")
M, R, WIDTH, CLASSES = 12, 8, 64, 4
SCALE_B = 0.3  # of the entries of (α/r)·B: at s = 1 a logit has standard deviation 3
STEPS = {"scalabl": 1500, "reference": 5000}


class LinearMaps:
    """An adapter without a language model, for K data sets at once.

    ``adapter(batch, s)`` takes s (\\*draws, K·M, r) and gives logits (\\*draws, B·K, C).
    """

    device = torch.device("cpu")

    def __init__(self, seeds: int) -> None:
        self.readout_parameters: dict[str, nn.Parameter] = {}
        V, sigma = [], []
        for _ in range(seeds * M):
            A = torch.empty(R, WIDTH)
            nn.init.kaiming_uniform_(A, a=5**0.5)  # as PEFT starts A
            _, values, rows = torch.linalg.svd(A, full_matrices=False)
            sigma.append(values)
            V.append(rows)
        self.shape = (seeds * M, R)
        self.init_loc = torch.stack(sigma)
        self.V = torch.stack(V).unflatten(0, (seeds, M))  # (K, M, r, d)
        self.B = SCALE_B * torch.randn(seeds, M, CLASSES, R)

    def __call__(self, batch: Batch, s: Tensor) -> Tensor:
        s = s.unflatten(-2, self.V.shape[:2])  # (*draws, K, M, r)
        logits = torch.einsum("nkmj,kmcj,...kmj->...nkc", batch.inputs["Vx"], self.B, s)
        return logits.flatten(-3, -2)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def train(self) -> None:
        pass

    def eval(self) -> None:
        pass


def make_data(adapter: LinearMaps, count: int, labels: str) -> Split:
    """N examples of each of the K data sets; a token is the number of its example."""
    seeds = len(adapter.V)
    Vx = torch.einsum("kmjd,nkmd->nkmj", adapter.V, torch.randn(count, seeds, M, WIDTH))
    choices = torch.ones(count * seeds, CLASSES, dtype=torch.bool)
    truth = torch.randn(adapter.shape).abs()  # the reference's mean cannot be negative
    y = adapter(Batch({"Vx": Vx}, choices), truth).argmax(-1).view(count, seeds)
    if labels == "coin flips":
        y = torch.randint(CLASSES, (count, seeds))

    def collate(examples: Sequence[Example]) -> Batch:
        rows = torch.tensor([example.rows["input_ids"][0][0] for example in examples])
        return Batch({"Vx": Vx[rows]}, choices[: len(rows) * seeds], y[rows].flatten())

    records = [Record(str(i), "-", ("-", "-"), 0) for i in range(count)]
    examples = [Example({"input_ids": [[i]]}, CLASSES, 0) for i in range(count)]
    return Split(records, examples, collate)


def posterior(method: str, count: int, labels: str, seeds: int, steps: int) -> dict[str, Tensor]:
    """Figures of q(s) after training, over its M·r coordinates, for each of the K seeds."""
    pyro.set_rng_seed(0)
    adapter: Any = LinearMaps(seeds)
    train = make_data(adapter, count, labels)
    model = ScalaBLModel(adapter, num_data=count * seeds)
    if method == "scalabl":
        config = FitConfig(
            steps=steps, batch_size=256, lr_guide=0.2, kl=KLSchedule(1.0), clip_norm=float("inf")
        )
        guide = AutoSubspaceNormal(model)
        fit(model, guide, train, config, progress=False)
    else:
        config = FitConfig(
            steps=steps, batch_size=4, lr_guide=1e-4, eps=1e-6, clip_norm=float("inf")
        )
        reference = Reference(config, progress=False)
        guide = reference.make_guide(model)
        reference._train(model, guide, train, seed=0)
    with torch.no_grad():
        q = guide.marginals()
        figures = {
            "sigma": q.scale,
            "mean_squared": q.loc**2,
            "below_half": (q.scale < 0.5).float(),
        }
        return {key: value.view(seeds, -1).mean(1) for key, value in figures.items()}


def mean_and_error(values: Tensor) -> list[float]:
    return [round(float(values.mean()), 4), round(float(values.std() / len(values) ** 0.5), 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="N")
    parser.add_argument("--seeds", type=int, default=5, help="K, 2 or more")
    parser.add_argument("--steps", type=int, help=f"of both methods; {STEPS} if left out")
    parser.add_argument("--save", action="store_true", help="also write results/contraction.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, dict] = {}
    for method in STEPS:
        for labels in LABELS:
            for count in args.sizes:
                steps = args.steps or STEPS[method]
                by_seed = posterior(method, count, labels, args.seeds, steps)
                row = {key: mean_and_error(values) for key, values in by_seed.items()}
                figures.setdefault(method, {}).setdefault(labels, {})[str(count)] = row
                cells = "  ".join(
                    f"{key} {mean:.3f} ± {error:.3f}" for key, (mean, error) in row.items()
                )
                print(f"{method:10s} {labels:11s} N = {count:5d}  {cells}", flush=True)
    settings = {"steps": {m: args.steps or STEPS[m] for m in STEPS}, "seeds": args.seeds}
    report("correctness.contraction", settings | figures, save=args.save)


if __name__ == "__main__":
    main()
