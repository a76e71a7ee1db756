"""How near each guide comes to NUTS: the same posterior of s, for fixed projections.

    python -m benchmarks.correctness.ground_truth --save

Trains V and B of a small language model with LoRA in
its last block, fixes them, samples s with NUTS, and compares every guide with those draws. Two
cases: a pretrained Llama of 260,032 parameters on short questions of OpenBookQA, and the embedded
model on the embedded world. What is finished stays in ``--work``. The last line is one JSON object:

* ``mae_probs``: mean |p(y | x) − p_NUTS(y | x)| over test questions and classes;
* ``mean_error``: difference of the means of s, in standard deviations of NUTS, root mean square;
* ``sd_ratio``: standard deviation over that of NUTS, mean over coordinates, and its range;
* ``nll``: of the model average on test.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyro
import torch
import transformers
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from benchmarks._report import report, write_json
from scalabl_pyro import (
    AutoSubspaceLowRankMultivariateNormal,
    AutoSubspaceMultivariateNormal,
    AutoSubspaceNormal,
    FitConfig,
    KLSchedule,
    ScalaBLModel,
    Split,
    draw,
    fit,
)
from scalabl_pyro.data import Record, read_folder
from scalabl_pyro.data.world import world
from scalabl_pyro.guides import AutoSubspaceDelta
from scalabl_pyro.infer.chains import Chains, mcmc
from scalabl_pyro.infer.laplace_approximation import laplace
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import load_readout, make_adapter
from scalabl_pyro.prediction import average

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DRAWS = 300  # of a model average
MOMENT_DRAWS = 4000  # for mean and standard deviation of s


@dataclass(frozen=True)
class Case:
    """A model and its data.

    :param count: N, the shortest training questions, and as many of test.
    """

    model: ModelConfig
    lora: AdapterConfig
    read: Callable[[], dict[str, list[Record]]]
    count: int


def cases(model: str, data: str) -> dict[str, Case]:
    """The two cases: a Llama with D = 8, and the embedded model with D = 28."""
    return {
        "stories260k": Case(
            ModelConfig(model, attention="sdpa"),
            AdapterConfig(r=4, alpha=8, targets=("q_proj", "v_proj"), layers=(4,)),
            lambda: read_folder(Path(data) / "openbookqa"),
            count=64,
        ),
        "embedded": Case(
            ModelConfig("embedded", prompt="classes", attention="sdpa"),
            AdapterConfig(r=4, alpha=8, targets=LINEAR, layers=(4,)),
            lambda: world().splits,
            count=80,
        ),
    }


def last_query(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of the last position, in the place of all: enough for a last block."""
    last = None if mask is None else mask[:, :, -1:]
    output, _ = sdpa_attention_forward(module, query[:, :, -1:], key, value, last, **options)
    return output.expand(-1, query.shape[2], -1, -1), None


AttentionInterface.register("last_query", last_query)
AttentionMaskInterface.register("last_query", sdpa_mask)


class Bench:
    """One case: its trained adapter, whose projections are fixed, and its data.

    :param work: folder of this case.
    :param quick: sizes for a trial.
    """

    def __init__(self, case: Case, work: Path, *, quick: bool) -> None:
        self.work, self.quick = work, quick
        records = {name: case.read()[name] for name in ("train", "test")}
        classes = case.model.classes([*records["train"], *records["test"]])
        readout = load_readout(case.model, classes)
        pyro.set_rng_seed(0)
        self.adapter = make_adapter(case.model, case.lora, readout, svd=True, projections="free")
        count = 12 if quick else case.count
        self.train, self.test = (
            self.adapter.cache_trunk(shortest(readout.encode(rows), count))
            for rows in records.values()
        )
        # Only the last position is read, and the MLP of the last block needs no other.
        llm = self.adapter.llm
        llm.set_attn_implementation("last_query")
        norm = llm.model.layers[-1].post_attention_layernorm
        norm.register_forward_pre_hook(lambda _, args: (args[0][:, -1:],))
        self.loc = self._train_projections()
        for parameter in self.adapter.named_parameters().values():
            parameter.requires_grad_(False)
        self.model = ScalaBLModel(self.adapter, num_data=len(self.train))

    def _train_projections(self) -> Tensor:
        """V and B of ScalaBL, and its posterior mean of s (M, r)."""
        path = self.work / "projections.safetensors"
        state = self.adapter.state()
        if not path.exists():
            model = ScalaBLModel(self.adapter, num_data=len(self.train))
            guide = AutoSubspaceNormal(model)
            config = FitConfig(
                steps=3 if self.quick else 300,
                batch_size=len(self.train),
                lr=3e-3,
                clip_norm=10.0,
                kl=KLSchedule(1.0),
            )
            fit(model, guide, self.train, config, progress=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({**state, "loc": guide.median()["s"]}, path)
        saved = load_file(path)
        with torch.no_grad():
            for name, parameter in state.items():
                parameter.copy_(saved[name])
        return saved["loc"]

    def nuts(self) -> tuple[Chains, float]:
        """Four chains, and the seconds of one core that they took."""
        chains = [self._chain(seed) for seed in range(4)]
        seconds = sum(float(chain.pop("seconds")) for chain in chains)
        parts = {name: torch.cat([chain[name] for chain in chains]) for name in chains[0]}
        return Chains(**parts, latents={}, module_names=self.adapter.module_names), seconds

    def _chain(self, seed: int) -> dict[str, Tensor]:
        path = self.work / f"nuts_{seed}.safetensors"
        if not path.exists():
            start = time.process_time()
            chain = mcmc(
                self.model,
                self.train,
                num_samples=10 if self.quick else 400,
                warmup_steps=10 if self.quick else 200,
                num_chains=1,
                seed=seed,
                init_loc=self.loc,
                progress=False,
                max_tree_depth=6,
            )
            save_file(
                {
                    "draws": chain.draws,
                    "diverging": chain.diverging,
                    "acceptance": chain.acceptance,
                    "seconds": torch.tensor(time.process_time() - start),
                },
                path,
            )
        return load_file(path)

    @cached_property
    def mode(self) -> AutoSubspaceDelta:
        """The mode of p(s | D), which the Laplace approximations share."""
        return self._fitted("map")

    def guide(self, name: str) -> Callable[..., Any]:
        """The guide of that name, fitted."""
        if name == "map":
            return self.mode
        if name.startswith("laplace_"):
            loc, curvature = self.mode.median()["s"], name.removeprefix("laplace_")
            return laplace(self.model, self.train, loc=loc, curvature=curvature).guide
        return self._fitted(name)

    def _fitted(self, name: str) -> Any:
        guide = self._untrained(name)
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        config = FitConfig(
            steps=3 if self.quick else 600,
            batch_size=len(self.train),
            lr=0.0,
            lr_guide=0.02,
            clip_norm=10.0,
            kl=KLSchedule(1.0),
        )
        pyro.set_rng_seed(1)
        fit(self.model, guide, self.train, config, elbo=elbo, progress=False)
        return guide

    def _untrained(self, name: str) -> Callable[..., Any]:
        if name == "iaf":
            return AutoIAFNormal(self.model, [64], num_transforms=2)
        make, options = {
            "map": (AutoSubspaceDelta, {}),
            "normal": (AutoSubspaceNormal, {}),
            "low_rank": (AutoSubspaceLowRankMultivariateNormal, {}),
            "full_rank_per_module": (AutoSubspaceMultivariateNormal, {"per_module": True}),
            "full_rank": (AutoSubspaceMultivariateNormal, {}),
        }[name]
        return make(self.model, init_loc=self.loc, init_scale=0.2, **options)

    @torch.no_grad()
    def log_probs(self, draws: Tensor) -> Tensor:
        """Log-probabilities (N, C) of the model average on test."""
        batch = self.test.collate(list(self.test))
        return average(torch.cat([self.adapter(batch, s) for s in draws.split(4)]))

    def nll(self, log_probs: Tensor) -> float:
        return float(torch.nn.functional.nll_loss(log_probs, self.test.labels))


GUIDES = (
    "normal",
    "full_rank",
    "full_rank_per_module",
    "low_rank",
    "map",
    "laplace_ggn",
    "laplace_hessian",
    "iaf",
)


def compare(case: Case, work: Path, *, quick: bool) -> dict[str, Any]:
    """Every guide of one case against its chains."""
    bench = Bench(case, work, quick=quick)
    M, r = bench.adapter.shape
    chains, seconds = bench.nuts()
    print(f"{work.name}: NUTS {seconds:.0f} s, {chains.diagnostics()}", flush=True)
    every = chains.draws.flatten(0, 1)
    truth = bench.log_probs(chains.thin(min(DRAWS, len(every))))

    def run(name: str) -> dict[str, Any]:
        start = time.process_time()
        guide = bench.guide(name)
        spent = time.process_time() - start
        batch = bench.train.collate(list(bench.train))
        draws = draw(guide, 40 if quick else MOMENT_DRAWS, seed=0, batch=batch).detach()
        log_probs = bench.log_probs(draws[:DRAWS])
        return {
            **difference(draws, every, log_probs, truth),
            "nll": bench.nll(log_probs),
            "seconds": round(spent, 1),
        }

    guides = {}
    for name in GUIDES:
        path = work / f"{name}.json"
        if not path.exists():
            write_json(path, run(name))
        guides[name] = json.loads(path.read_text())
        print(f"{work.name}: {name} {guides[name]}", flush=True)
    halves = [chains.draws[:2].flatten(0, 1), chains.draws[2:].flatten(0, 1)]
    predicted = [bench.log_probs(half[:DRAWS]) for half in halves]
    correlation = torch.corrcoef(every.flatten(1).T).fill_diagonal_(0).abs()
    return {
        "guides": guides,
        "nuts": {
            **chains.diagnostics(),
            "seconds": round(seconds),
            "chains": len(chains.draws),
            "draws": len(every),
            "nll": bench.nll(truth),
            "sd": [
                float(every.std(0).min()),
                float(every.std(0).mean()),
                float(every.std(0).max()),
            ],
            "correlation_max": float(correlation.max()),
            "correlation_rms": float(correlation.square().sum() / (M * r * (M * r - 1))) ** 0.5,
            # What sampling alone leaves between two banks of draws of the same posterior.
            "half_against_half": difference(*halves, *predicted),
        },
        "nll_prior": bench.nll(bench.log_probs(torch.randn(20 if quick else DRAWS, M, r))),
        "N": len(bench.train),
        "D": M * r,
        "modules": list(bench.adapter.module_names),
    }


def difference(
    draws: Tensor, reference: Tensor, log_probs: Tensor, truth: Tensor
) -> dict[str, Any]:
    """The first three figures, of draws (S, M, r) and what they predict (N, C) against others."""
    sd = reference.std(0)
    ratio = draws.std(0) / sd
    return {
        "mae_probs": float((log_probs.exp() - truth.exp()).abs().mean()),
        "mean_error": float(((draws.mean(0) - reference.mean(0)) / sd).square().mean() ** 0.5),
        "sd_ratio": float(ratio.mean()),
        "sd_ratio_range": [float(ratio.min()), float(ratio.max())],
    }


def shortest(split: Split, count: int) -> Split:
    """The ``count`` examples with the fewest tokens."""
    order = sorted(range(len(split)), key=split.lengths.__getitem__)[:count]
    rows = [(split.records[index], split[index]) for index in order]
    return Split(*zip(*rows, strict=True), split.collate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="../shared/models/stories260k", help="folder of a Llama")
    parser.add_argument("--data", default="../shared/data", help="folder with openbookqa/")
    parser.add_argument("--work", default="runs/ground_truth", help="where finished parts are kept")
    parser.add_argument("--cases", nargs="*", default=["stories260k", "embedded"])
    parser.add_argument("--quick", action="store_true", help="a trial that says nothing")
    parser.add_argument("--save", action="store_true", help="also write results/ground_truth.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = cases(arguments.model, arguments.data)
    figures = {
        name: compare(known[name], Path(arguments.work) / name, quick=arguments.quick)
        for name in arguments.cases
    }
    report("correctness.ground_truth", figures, save=arguments.save)


if __name__ == "__main__":
    main()
