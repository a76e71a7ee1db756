"""Prediction: a fixed bank of draws of s, and the average of the probabilities over it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .adapter import SubspaceAdapter
from .data import Batch, Split
from .guides import AutoSubspace

__all__ = ["Predictions", "Predictor", "average", "draw", "predict"]


def draw(
    guide: Callable[..., Any], num_draws: int, *, seed: int, batch: Batch | None = None
) -> Tensor:
    """A bank of S draws of s, (S, M, r), independent of the global random state.

    :param guide: any guide that samples ``"s"``, ours or Pyro's.
    :param seed: fixes the bank.
    :param batch: what Pyro's own guides are called with; ours need none.
    :raises ValueError: if S < 1.
    """
    if num_draws < 1:
        raise ValueError(f"the number of draws is {num_draws}: expected 1 or more")
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        if isinstance(guide, AutoSubspace):
            return guide.sample(num_draws)
        return torch.stack([guide(batch)["s"] for _ in range(num_draws)])


@dataclass(frozen=True, slots=True)
class Predictor:
    """What every method ends as: logits for a batch, one set per draw.

    :param adapter: the trained model.
    :param draws: (S, M, r), or ``None`` for a deterministic plain LoRA.
    :param temperature: divides the logits.
    :param max_rows: most sequences in one forward pass; more draws than fit run in chunks.
    """

    adapter: SubspaceAdapter
    draws: Tensor | None = None
    temperature: float = 1.0
    max_rows: int = 256

    @property
    def num_draws(self) -> int:
        """S; 1 if deterministic."""
        return 1 if self.draws is None else len(self.draws)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """(S, B, C) in float32, −inf where a choice does not exist."""
        if self.draws is None:
            return self.adapter(batch)[None] / self.temperature
        rows = math.prod(batch.inputs["input_ids"].shape[:-1])
        chunks = self.draws.split(max(1, self.max_rows // rows))
        return torch.cat([self.adapter(batch, s) for s in chunks]) / self.temperature


class Predictions(NamedTuple):
    """Logits of a whole split.

    :param logits: (S, N, C) on the CPU, −inf where a choice does not exist.
    :param labels: (N,), or ``None``.
    """

    logits: Tensor
    labels: Tensor | None


def average(logits: Tensor) -> Tensor:
    r"""Log-probabilities of the Bayesian model average, (N, C) from (S, N, C), in log space.

    .. math:: \log p(y \mid x) = \mathrm{logsumexp}_k \log\mathrm{softmax} f(x; s_k) - \log S
    """
    # Rounding may leave a sure answer just above probability 1.
    return (logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))).clamp(max=0)


def predict(
    predictor: Predictor, split: Split, *, batch_size: int = 64, progress: bool = False
) -> Predictions:
    """Predict all N examples of a split, with the same draws for every batch.

    Examples run in the order of their length, so that little is padded, and come back in their own.

    :param batch_size: B of a forward pass before draws multiply it.
    """
    predictor.adapter.eval()
    order = sorted(range(len(split)), key=split.lengths.__getitem__)
    found = []
    for start in tqdm(range(0, len(order), batch_size), disable=not progress):
        batch = split.collate([split[index] for index in order[start : start + batch_size]])
        found.append(predictor.logits(batch).cpu())
    logits = torch.cat(found, dim=1)[:, torch.tensor(order).argsort()]
    return Predictions(logits, split.labels)
