"""Simulation-based calibration (Talts et al. 2018, arXiv 1804.06788) on a linear-Gaussian model.

    python -m benchmarks.correctness.sbc --save

Draws s from the prior and data from the model, again and
again, and ranks s among draws of each posterior. If the posterior is right, ranks are uniform. The
features are correlated, and so is the posterior, which mean field cannot be: its draws spread too
little, and s ends at the lowest or the highest rank too often. The last line is one JSON object,
for each method:

* ``p_values``: of a chi-square test of uniform ranks, for each coordinate;
* ``uniform``: whether all are above 0.01 / D (Bonferroni);
* ``outer``: share of ranks in the lowest and highest tenth; 0.2 if uniform;
* ``mean_error`` and ``sd_ratio`` against the posterior in closed form, as in ground_truth.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from scipy.stats import chisquare
from torch import Tensor
from tqdm import trange

from benchmarks._report import report
from benchmarks.correctness._linear import LinearAdapter, LinearGaussian, make_split
from scalabl_pyro import (
    AutoSubspaceMultivariateNormal,
    AutoSubspaceNormal,
    FitConfig,
    KLSchedule,
    Split,
    draw,
    fit,
)
from scalabl_pyro.guides import AutoSubspace
from scalabl_pyro.infer.chains import mcmc

D = 4  # coordinates of s in one replicate: two modules of rank 2
N, NOISE = 20, 1.0
JOINT = 10  # replicates in one model, whose posterior is the product of theirs
RANKS = 20  # ranks 0 … 19 among 19 draws

Draws = tuple[Tensor, Tensor, Tensor]


def simulate(seed: int) -> tuple[LinearGaussian, Split, Tensor]:
    """A model of ten replicates, which share nothing, its data, and the s (M, r) behind them."""
    pyro.set_rng_seed(seed)
    own = 0.2**0.5 * torch.randn(N, JOINT, D) + 0.8**0.5 * torch.randn(N, JOINT, 1)
    features = torch.einsum("nkd,kl->nkld", own, torch.eye(JOINT)).flatten(2)  # (N, K, K·D)
    model = LinearGaussian(LinearAdapter((JOINT * D // 2, 2)), num_data=N, noise=NOISE)
    s = model.prior().sample()
    labels = features @ s.flatten() + NOISE * torch.randn(N, JOINT)
    return model, make_split(features, labels), s


def by_nuts(model: LinearGaussian, split: Split, seed: int) -> Draws:
    """19 thinned draws (S, M, r), mean and standard deviation of all (M, r)."""
    chains = mcmc(
        model,
        split,
        num_samples=3 * (RANKS - 1),
        warmup_steps=60,
        num_chains=1,
        seed=seed,
        progress=False,
    )
    draws = chains.draws[0]
    return draws[2::3], draws.mean(0), draws.std(0)


def by_guide(
    guide_class: type[AutoSubspace],
) -> Callable[[LinearGaussian, Split, int], Draws]:
    """The same for a guide, fitted by SVI on all the data."""

    def run(model: LinearGaussian, split: Split, seed: int) -> Draws:
        guide = guide_class(model, init_scale=0.3)
        elbo = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
        config = FitConfig(
            steps=400, batch_size=N, lr_guide=0.1, clip_norm=100.0, kl=KLSchedule(1.0)
        )
        fit(model, guide, split, config, elbo=elbo, progress=False)
        marginals = guide.marginals()
        return draw(guide, RANKS - 1, seed=seed), marginals.loc.detach(), marginals.scale.detach()

    return run


METHODS = {
    "nuts": by_nuts,
    "full_rank": by_guide(AutoSubspaceMultivariateNormal),
    "mean_field": by_guide(AutoSubspaceNormal),
}


def calibrate(name: str, replicates: int) -> dict[str, Any]:
    """Ranks of one method over all replicates, and what they say."""
    ranks, errors, ratios = [], [], []
    for seed in trange(replicates // JOINT, desc=name, mininterval=10):
        model, split, truth = simulate(seed)
        exact = model.posterior(split)
        draws, mean, sd = METHODS[name](model, split, replicates + seed)
        ranks.append((draws < truth).sum(0).view(JOINT, D))
        errors.append((mean.flatten() - exact.mean) / exact.stddev)
        ratios.append(sd.flatten() / exact.stddev)
    table = torch.cat(ranks)  # (replicates, D)
    counts = torch.nn.functional.one_hot(table, RANKS).sum(0)  # (D, RANKS)
    p_values = [float(chisquare(row.numpy()).pvalue) for row in counts]
    return {
        "p_values": p_values,
        "uniform": min(p_values) > 0.01 / D,
        "outer": float(((table < 2) | (table >= RANKS - 2)).float().mean()),
        "mean_error": float(torch.stack(errors).square().mean() ** 0.5),
        "sd_ratio": float(torch.stack(ratios).mean()),
        "rank_counts": counts.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=200, help=f"a multiple of {JOINT}")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--save", action="store_true", help="also write results/sbc.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {name: calibrate(name, arguments.replicates) for name in arguments.methods}
    report("correctness.sbc", {"replicates": arguments.replicates, **figures}, save=arguments.save)


if __name__ == "__main__":
    main()
