"""Full-rank guide: one multivariate normal across all modules."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from ..model import ScalaBLModel
from .base import JointNormal

__all__ = ["AutoSubspaceMultivariateNormal"]


class AutoSubspaceMultivariateNormal(JointNormal):
    r"""Multivariate normal over the D = M·r coordinates, D + D·(D + 1)/2 numbers.

    .. math:: q(\mathrm{vec}\, s) = \mathrm{Normal}(μ, L L^⊤), \quad
              L = \mathrm{diag}(σ) \, U, \; U \text{ unit lower triangular}

    σ and U apart, as in Pyro's ``AutoMultivariateNormal``, so that a step in scale does not
    depend on the correlations.
    """

    loc: Tensor  # (D,)
    scale: Tensor  # (D,)
    scale_tril: Tensor  # (D, D)

    def __init__(
        self, model: ScalaBLModel, *, init_loc: Tensor | None = None, init_scale: float = 0.05
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale)
        loc, scale = self._start()
        eye = torch.eye(loc.numel(), device=loc.device)
        self.loc = PyroParam(loc, constraints.real, 1)  # type: ignore[assignment]
        self.scale = PyroParam(scale, constraints.softplus_positive, 1)  # type: ignore[assignment]
        self.scale_tril = PyroParam(eye, constraints.unit_lower_cholesky, 2)  # type: ignore[assignment]

    def joint(self) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale[:, None] * self.scale_tril)
