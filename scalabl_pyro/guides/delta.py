"""Point guide: maximum a posteriori in s."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from pyro.nn import PyroParam
from torch import Tensor

from ..models.model import ScalaBLModel
from .base import AutoSubspace, PosteriorPrior

__all__ = ["AutoSubspaceDelta"]


class AutoSubspaceDelta(AutoSubspace):
    r"""All mass at one point s, M·r numbers; −ELBO is −log p(y | x, s) − log p(s).

    A mode depends on the coordinates: this one is the mode of p(s | D) itself, not of its image on
    the real line. Further latent sites of the prior keep their normals.
    """

    loc: Tensor  # (M, r)

    def __init__(
        self, model: ScalaBLModel, *, init_loc: Tensor | None = None, init_scale: float = 0.05
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale)
        loc = self._constrained(self._init_loc).clone()
        self.loc = PyroParam(loc, model.prior.support, 2)  # type: ignore[assignment]

    def base(self) -> TorchDistribution:
        return dist.Delta(self._unconstrained(self.loc), event_dim=2)

    def marginals(self) -> dist.Normal:
        """:raises TypeError: always: a point has no spread."""
        raise TypeError("AutoSubspaceDelta is a point: it has no marginal distributions")

    def get_posterior(self) -> TorchDistribution:
        return dist.Delta(self.loc, event_dim=2)

    def as_prior(self) -> PosteriorPrior:
        """:raises ValueError: always: no other value than this point would be possible."""
        raise ValueError("AutoSubspaceDelta is a point, and no prior: nothing could move from it")

    def _quantiles(self, levels: Tensor) -> Tensor:
        return self.loc.repeat(len(levels), 1, 1)

    def kl(self, prior: TorchDistribution) -> None:
        """``None``: the divergence of a point from a density is infinite."""
