"""SWA-Gaussian (Maddox et al. 2019, arXiv 1902.02476) over A, B and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..infer.fit_config import FitConfig
from ..models.model import LoRAModel
from ..prediction.predictor import Predictor, RunPredictor
from ..prediction.weight_draws import WeightAverage
from .iterates import IterateAveraging, Iterates

__all__ = ["SWAG", "swag_draws"]


def swag_draws(iterates: Tensor, num_draws: int, *, seed: int) -> Tensor:
    r"""S draws of a normal with the moments of K iterates, (S, D).

    .. math::
        q(θ) = \mathrm{Normal}\Big(\barθ, \; \tfrac12 \mathrm{diag}(\overline{θ^2} - \barθ^2)
               + \tfrac{1}{2 (K - 1)} D D^⊤ \Big), \quad D_k = θ_k - \tfrac1k \sum_{i ≤ k} θ_i

    :param iterates: (K, D), the oldest first.
    """
    K = len(iterates)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.arange(1, K + 1, device=iterates.device)[:, None]
    deviations = iterates - iterates.cumsum(0) / counts  # D, (K, D)
    spread = iterates.var(0, unbiased=False).sqrt()
    diagonal = torch.randn(num_draws, iterates.shape[1], generator=generator).to(iterates)
    low_rank = torch.randn(num_draws, K, generator=generator).to(iterates)
    noise = diagonal * spread / 2**0.5 + low_rank @ deviations / (2 * (K - 1)) ** 0.5
    return iterates.mean(0) + noise


@dataclass(frozen=True)
class SWAG(IterateAveraging):
    """MLE or, with ``weight_decay``, MAP, at a constant rate in the end, and a normal with the
    moments of its iterates (see :func:`swag_draws`).

    As published, but for AdamW in the place of SGD, and iterates a few steps apart in the place of
    an epoch: fine-tuning has few epochs. Both deviations are as published, those of the diagonal
    from all K iterates.

    :param draws: S, the draws that predictions average over.
    """

    name: ClassVar[str] = "swag"

    config: FitConfig = FitConfig(decay="constant")  # noqa: RUF009  (frozen)
    members: int = 20
    share: float = 0.25
    draws: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}: expected 1 or more")

    def make_predictor(self, model: LoRAModel, posterior: Iterates, *, seed: int) -> RunPredictor:
        """Averages over S draws, or is at the present iterate while there are none."""
        iterates = posterior.iterates()
        if not iterates or len(next(iter(iterates.values()))) < 2:
            return Predictor(model.adapter)
        device = model.adapter.device  # of the first layer; the others may be elsewhere
        rows = [value.reshape(len(value), -1).to(device) for value in iterates.values()]
        flat = torch.cat(rows, 1)
        draws = swag_draws(flat, self.draws, seed=seed)
        parts = draws.split([value[0].numel() for value in iterates.values()], 1)
        weights = {
            name: part.reshape(-1, *value.shape[1:])
            for (name, value), part in zip(iterates.items(), parts, strict=True)
        }
        return WeightAverage(model.adapter, weights)
