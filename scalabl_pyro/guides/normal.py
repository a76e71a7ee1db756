"""Mean-field guide: an independent normal for each coordinate."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from ..models.model import ScalaBLModel
from .base import AutoSubspace

__all__ = ["AutoSubspaceNormal"]


class AutoSubspaceNormal(AutoSubspace):
    r"""Diagonal normal, 2·M·r numbers.

    .. math:: q(z) = \prod_{m, j} \mathrm{Normal}(z_{mj} \mid μ_{mj}, σ_{mj})

    The KL divergence to a normal prior is exact under ``TraceMeanField_ELBO``.
    """

    loc: Tensor  # (M, r)
    scale: Tensor  # (M, r)
    scale_constraint = constraints.softplus_positive

    def __init__(
        self, model: ScalaBLModel, *, init_loc: Tensor | None = None, init_scale: float = 0.05
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale)
        self.loc = PyroParam(self._init_loc.clone(), constraints.real, 2)  # type: ignore[assignment]
        scale = torch.full_like(self._init_loc, self._init_scale)
        self.scale = PyroParam(scale, self.scale_constraint, 2)  # type: ignore[assignment]

    def base(self) -> dist.Independent:
        return self.marginals().to_event(2)

    def marginals(self) -> dist.Normal:
        return dist.Normal(self.loc, self.scale)
