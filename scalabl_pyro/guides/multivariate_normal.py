"""Full-rank guide: all correlations, across all modules or within each."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from ..models.model import ScalaBLModel
from .base import JointNormal

__all__ = ["AutoSubspaceMultivariateNormal"]


class AutoSubspaceMultivariateNormal(JointNormal):
    r"""Multivariate normal, D + D·(D + 1)/2 numbers over D = M·r coordinates (or M times as many
    with D = r).

    .. math:: q(\mathrm{vec}\, z) = \mathrm{Normal}(μ, L L^⊤), \quad
              L = \mathrm{diag}(σ) \, U, \; U \text{ unit lower triangular}

    σ and U apart, as in Pyro's ``AutoMultivariateNormal``, so that a step in scale does not
    depend on the correlations.

    :param per_module: correlations within each module only.
    """

    loc: Tensor  # (*M, D)
    scale: Tensor  # (*M, D)
    scale_tril: Tensor  # (*M, D, D)

    def __init__(
        self,
        model: ScalaBLModel,
        *,
        init_loc: Tensor | None = None,
        init_scale: float = 0.05,
        per_module: bool = False,
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale, per_module=per_module)
        loc, scale = self._start()
        eye = torch.eye(loc.shape[-1], device=loc.device).expand(*loc.shape, -1).contiguous()
        dims = loc.dim()
        self.loc = PyroParam(loc, constraints.real, dims)  # type: ignore[assignment]
        self.scale = PyroParam(scale, constraints.softplus_positive, dims)  # type: ignore[assignment]
        self.scale_tril = PyroParam(eye, constraints.unit_lower_cholesky, dims + 1)  # type: ignore[assignment]

    def joint(self) -> dist.MultivariateNormal:
        tril = self.scale[..., None] * self.scale_tril
        return dist.MultivariateNormal(self.loc, scale_tril=tril)
