"""Low-rank plus diagonal guide: the main correlations for few numbers."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from ..models.model import ScalaBLModel
from .base import JointNormal

__all__ = ["AutoSubspaceLowRankMultivariateNormal"]


class AutoSubspaceLowRankMultivariateNormal(JointNormal):
    r"""Multivariate normal, D·(2 + K) numbers over D = M·r coordinates (or M times as many with
    D = r).

    .. math:: q(\mathrm{vec}\, z) = \mathrm{Normal}\big(μ, \;
              \mathrm{diag}(σ) (W W^⊤ + I) \, \mathrm{diag}(σ) \big), \quad W ∈ R^{D × K}

    :param per_module: correlations within each module only.
    :param rank: K of the covariance, about √D if left out; not the r of LoRA.
    """

    loc: Tensor  # (*M, D)
    scale: Tensor  # (*M, D)
    cov_factor: Tensor  # (*M, D, K)

    def __init__(
        self,
        model: ScalaBLModel,
        *,
        init_loc: Tensor | None = None,
        init_scale: float = 0.05,
        per_module: bool = False,
        rank: int | None = None,
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale, per_module=per_module)
        loc, scale = self._start()
        size = loc.shape[-1]
        if rank is None:
            rank = round(size**0.5)
        if not (isinstance(rank, int) and 1 <= rank <= size):
            raise ValueError(f"rank is {rank!r}: expected a whole number from 1 to {size}")
        # σ²(E[W Wᵀ] + 1) = init_scale², with entries of W that start at variance 1 / K.
        scale = scale / 2**0.5
        factor = torch.randn(*loc.shape, rank, device=loc.device) / rank**0.5
        dims = loc.dim()
        self.loc = PyroParam(loc, constraints.real, dims)  # type: ignore[assignment]
        self.scale = PyroParam(scale, constraints.softplus_positive, dims)  # type: ignore[assignment]
        self.cov_factor = PyroParam(factor, constraints.real, dims + 1)  # type: ignore[assignment]

    def joint(self) -> dist.LowRankMultivariateNormal:
        return dist.LowRankMultivariateNormal(
            self.loc, self.scale[..., None] * self.cov_factor, self.scale**2
        )
