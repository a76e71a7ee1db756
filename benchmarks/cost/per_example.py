"""Variance of the gradient: one draw of s for a minibatch against one for each example.

    python -m benchmarks.cost.per_example --save

Trains ScalaBL on the embedded model for a while, then estimates the gradient of the expected NLL
many times, with new minibatches and new draws, in both ways. Both are unbiased; the figures are the
traces of the covariance, shared over own, for the guide's mean and scale and for V and B.
"""

from __future__ import annotations

import argparse

import torch

import scalabl_pyro as sp
from benchmarks._report import report
from scalabl_pyro.data.world import COLOURS, world
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import Classes, load_readout, make_adapter


def measure(steps: int, repeats: int, batch_size: int, seed: int) -> dict[str, float]:
    config = ModelConfig("embedded", prompt="classes")
    readout = load_readout(config, Classes(4, COLOURS))
    train = readout.encode(world().splits["train"])
    torch.manual_seed(seed)
    lora = AdapterConfig(targets=("q_proj", "v_proj"))
    adapter = make_adapter(config, lora, readout, svd=True, projections="free")
    model = sp.ScalaBLModel(adapter, num_data=len(train))
    guide = sp.AutoSubspaceNormal(model)
    settings = sp.FitConfig(steps=steps, batch_size=batch_size, kl=sp.KLSchedule(3.0))
    sp.fit(model, guide, train, settings, seed=seed, progress=False)

    loc, scale = guide.loc.detach().requires_grad_(), guide.scale.detach().requires_grad_()
    groups = {
        "mean": [loc],
        "scale": [scale],
        "projections": list(adapter.named_parameters().values()),
    }
    every = [tensor for tensors in groups.values() for tensor in tensors]
    batches = train.minibatches(batch_size, seed=seed)
    variances = {}
    for way in ("shared", "own"):
        gradients = {name: [] for name in groups}
        for _ in range(repeats):
            batch = next(batches)
            draws = (len(batch),) if way == "own" else ()
            s = loc + scale * torch.randn(*draws, *adapter.shape)
            logits = adapter(batch, s, per_example=way == "own")
            nll = torch.nn.functional.cross_entropy(logits, batch.labels)
            by_id = dict(zip(map(id, every), torch.autograd.grad(nll, every), strict=True))
            for name, tensors in groups.items():
                gradients[name].append(torch.cat([by_id[id(t)].flatten() for t in tensors]))
        variances[way] = {
            name: float(torch.stack(values).var(0).sum()) for name, values in gradients.items()
        }
    return {name: variances["shared"][name] / variances["own"][name] for name in groups}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write results/per_example.json")
    args = parser.parse_args()
    runs = [measure(args.steps, args.repeats, args.batch_size, seed) for seed in range(args.seeds)]
    figures = {}
    for name in runs[0]:
        ratios = torch.tensor([run[name] for run in runs], dtype=torch.float64)
        error = float(ratios.std() / len(ratios) ** 0.5) if len(ratios) > 1 else None
        figures[f"variance_ratio_{name}"] = [float(ratios.mean()), error]
    report("cost.per_example", figures, save=args.save)


if __name__ == "__main__":
    main()
