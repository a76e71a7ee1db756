"""Low-rank plus diagonal guide: correlations across all modules for few numbers."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from ..model import ScalaBLModel
from .base import JointNormal

__all__ = ["AutoSubspaceLowRankMultivariateNormal"]


class AutoSubspaceLowRankMultivariateNormal(JointNormal):
    r"""Multivariate normal over the D = M·r coordinates, D·(2 + K) numbers.

    .. math:: q(\mathrm{vec}\, s) = \mathrm{Normal}\big(μ, \;
              \mathrm{diag}(σ) (W W^⊤ + I) \, \mathrm{diag}(σ) \big), \quad W ∈ R^{D × K}

    :param rank: K of the covariance, about √D if left out; not the r of LoRA.
    """

    loc: Tensor  # (D,)
    scale: Tensor  # (D,)
    cov_factor: Tensor  # (D, K)

    def __init__(
        self,
        model: ScalaBLModel,
        *,
        init_loc: Tensor | None = None,
        init_scale: float = 0.05,
        rank: int | None = None,
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale)
        loc, scale = self._start()
        if rank is None:
            rank = round(loc.numel() ** 0.5)
        if not 1 <= rank <= loc.numel():
            raise ValueError(f"rank is {rank}: expected 1 to M·r = {loc.numel()}")
        # σ²(E[W Wᵀ] + 1) = init_scale², with entries of W that start at variance 1 / K.
        scale = scale / 2**0.5
        factor = torch.randn(loc.numel(), rank, device=loc.device) / rank**0.5
        self.loc = PyroParam(loc, constraints.real, 1)  # type: ignore[assignment]
        self.scale = PyroParam(scale, constraints.softplus_positive, 1)  # type: ignore[assignment]
        self.cov_factor = PyroParam(factor, constraints.real, 2)  # type: ignore[assignment]

    def joint(self) -> dist.LowRankMultivariateNormal:
        return dist.LowRankMultivariateNormal(
            self.loc, self.scale[:, None] * self.cov_factor, self.scale**2
        )
