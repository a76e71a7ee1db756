"""A linear model with Gaussian noise in the place of a language model: its posterior is known."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from scalabl_pyro import Record, ScalaBLModel, Split
from scalabl_pyro.data import Batch, Example


class LinearAdapter:
    """``adapter(batch, s) → logits``: f(x; s) = W_x · vec(s), with nothing to train beside s.

    :param shape: (M, r).
    """

    device = torch.device("cpu")

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.rank = shape[1]
        self.init_loc = torch.zeros(shape)
        self.readout_parameters: dict[str, nn.Parameter] = {}
        self.module_names = tuple(f"module {m}" for m in range(shape[0]))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def train(self) -> None: ...

    def eval(self) -> None: ...

    def __call__(self, batch: Batch, s: Tensor, *, per_example: bool = False) -> Tensor:
        """(\\*draws, B, C), or (B, C) with a row of s for each example."""
        features = batch.inputs["features"]  # (B, C, D)
        vec = s.flatten(-2)
        if per_example:
            return torch.einsum("bcd,bd->bc", features, vec)
        return torch.einsum("bcd,...d->...bc", features, vec)


class LinearGaussian(ScalaBLModel):
    """y_n ~ Normal(W_n vec(s), noise²), C numbers each; the prior is Normal(0, 1).

    :param noise: standard deviation.
    """

    def __init__(self, adapter: LinearAdapter, *, num_data: int, noise: float) -> None:
        super().__init__(adapter, num_data=num_data)
        self.noise = noise

    def observe(self, batch: Batch, logits: Tensor) -> Tensor:
        rows = torch.arange(len(batch))
        with pyro.plate("data", self.num_data, subsample=rows, dim=-1):
            pyro.sample("label", dist.Normal(logits, self.noise).to_event(1), obs=batch.labels)
        return logits

    def posterior(self, split: Split) -> dist.MultivariateNormal:
        """p(vec(s) | D): precision I + Σ W_nᵀ W_n / noise², mean by its normal equations."""
        batch = split.collate(list(split))
        W, y = batch.inputs["features"].flatten(0, 1), batch.labels.flatten()
        precision = torch.eye(W.shape[1]) + W.T @ W / self.noise**2
        loc = torch.linalg.solve(precision, W.T @ y / self.noise**2)
        return dist.MultivariateNormal(loc, precision_matrix=precision)


def make_split(features: Tensor, labels: Tensor) -> Split:
    """A split of N examples.

    :param features: W (N, C, D).
    :param labels: (N,) classes, or (N, C) numbers.
    """

    def collate(examples: Sequence[Example]) -> Batch:
        rows = torch.tensor([example.rows["input_ids"][0][0] for example in examples])
        choices = torch.ones(len(rows), features.shape[1], dtype=torch.bool)
        return Batch({"features": features[rows]}, choices, labels[rows])

    record = Record("row", "a row of features", ("one", "other"), 0)
    examples = [Example({"input_ids": [[n]]}, 2, y) for n, y in enumerate(labels.tolist())]
    return Split([record] * len(examples), examples, collate)
