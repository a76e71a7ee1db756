"""Mean-field guide: an independent normal for each coordinate."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from ..model import ScalaBLModel
from .base import AutoSubspace

__all__ = ["AutoSubspaceNormal"]


class AutoSubspaceNormal(AutoSubspace):
    r"""Diagonal normal, 2·M·r numbers.

    .. math:: q(s) = \prod_{m, j} \mathrm{Normal}(s_{mj} \mid μ_{mj}, σ_{mj})

    The KL divergence to a normal prior is exact under ``TraceMeanField_ELBO``.
    """

    loc: Tensor  # (M, r)
    scale: Tensor  # (M, r)
    scale_constraint = constraints.softplus_positive

    def __init__(
        self, model: ScalaBLModel, *, init_loc: Tensor | None = None, init_scale: float = 0.05
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale)
        self.loc = PyroParam(self._init_loc, constraints.real, 2)  # type: ignore[assignment]
        scale = torch.full_like(self._init_loc, self._init_scale)
        self.scale = PyroParam(scale, self.scale_constraint, 2)  # type: ignore[assignment]

    def get_posterior(self) -> dist.Independent:
        return dist.Normal(self.loc, self.scale).to_event(2)

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float]) -> dict[str, Tensor]:
        levels = torch.as_tensor(quantiles, dtype=self.loc.dtype, device=self.loc.device)
        return {"s": self.get_posterior().base_dist.icdf(levels[:, None, None])}
