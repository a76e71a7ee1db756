"""Random in the upper blocks alone: a diagonal normal above, a point below."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroParam
from torch import Tensor

from ..models.model import ScalaBLModel
from .base import AutoSubspace, PosteriorPrior

__all__ = ["AutoSubspaceTopNormal"]


class AutoSubspaceTopNormal(AutoSubspace):
    r"""Diagonal normal over the M' modules in the upper blocks, a point in the others.

    .. math:: q(z) = \prod_{m \text{ above}} \prod_j \mathrm{Normal}(z_{mj} \mid μ_{mj}, σ_{mj})
              \prod_{m \text{ below}} \prod_j δ(z_{mj} - μ_{mj})

    M·r + M'·r numbers. Draws agree below, so that an adapter runs the blocks there once for all of
    them (see :class:`~scalabl_pyro.lora.Trunk`): S draws cost about (K - k + S·k) / K passes with k
    of K blocks random. As with a point guide, the density of the points is left out of log q, and
    their log prior stays in the objective.

    :param blocks: k, how many of the upper blocks are random. What stands above the blocks, such as
        an adapted output layer, is random too, and with 0 it alone.
    :raises ValueError: if no adapted module is so high up, or the model has no blocks.
    """

    loc: Tensor  # (M, r)
    scale: Tensor  # (M', r)
    random: Tensor  # (M,)

    def __init__(
        self,
        model: ScalaBLModel,
        *,
        init_loc: Tensor | None = None,
        init_scale: float = 0.05,
        blocks: int = 1,
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale)
        trunk = model.adapter.trunk
        if not trunk.num_blocks:
            raise ValueError(f"guide top_normal needs blocks: {trunk.why_not}")
        if not (isinstance(blocks, int) and 0 <= blocks <= trunk.num_blocks):
            raise ValueError(
                f"blocks is {blocks!r}: expected a whole number from 0 to {trunk.num_blocks}, the"
                " blocks of the model"
            )
        random = trunk.above(trunk.num_blocks - blocks)
        if not random.any():
            raise ValueError(
                f"blocks is {blocks}, but no adapted module is that high: expected"
                f" {trunk.num_blocks - max(trunk.block_of)} or more"
            )
        self.register_buffer("random", random.to(self._init_loc.device))
        self.loc = PyroParam(self._init_loc.clone(), constraints.real, 2)  # type: ignore[assignment]
        scale = torch.full_like(self._init_loc[self.random], self._init_scale)
        self.scale = PyroParam(scale, constraints.softplus_positive, 2)  # type: ignore[assignment]

    def base(self) -> TorchDistribution:
        above = dist.Normal(self.loc[self.random], self.scale).to_event(2)
        return dist.TransformedDistribution(above, [_Above(self.loc, self.random)])

    def marginals(self) -> dist.Normal:
        """Those of the random modules, (M', r)."""
        return dist.Normal(self.loc[self.random], self.scale)

    def as_prior(self) -> PosteriorPrior:
        """:raises ValueError: always: below, no other value than the point would be possible."""
        raise ValueError(
            "AutoSubspaceTopNormal is a point in the lower blocks, and no prior: nothing could move"
            " from it there"
        )

    def _quantiles(self, levels: Tensor) -> Tensor:
        z = self.loc.repeat(len(levels), 1, 1)
        z[:, self.random] = self.marginals().icdf(levels)
        return self._constrained(z)

    def entropy(self) -> Tensor:
        return self.marginals().entropy().sum()

    @torch.no_grad()
    def kl(self, prior: TorchDistribution) -> float | None:
        """KL(q‖p) of the random modules, in nats, where p is a fixed or learned normal."""
        p = getattr(prior, "base_dist", None)
        if self._latents or self._to_support is not None or not isinstance(p, dist.Normal):
            return None
        q = self.marginals()
        loc, scale = (value.expand(prior.event_shape)[self.random] for value in (p.loc, p.scale))
        return float(torch.distributions.kl_divergence(q, dist.Normal(loc, scale)).sum())


class _Above(dist.transforms.Transform):
    """Puts values (M', r) into the rows of ``loc`` (M, r) that are random."""

    domain = constraints.independent(constraints.real, 2)
    codomain = constraints.independent(constraints.real, 2)
    bijective = True  # onto what it reaches

    def __init__(self, loc: Tensor, random: Tensor) -> None:
        super().__init__()
        self._loc, self._random = loc, random

    def _call(self, x: Tensor) -> Tensor:
        places = self._random.nonzero().squeeze(-1)
        return self._loc.expand(*x.shape[:-2], -1, -1).index_copy(-2, places, x)

    def _inverse(self, y: Tensor) -> Tensor:
        return y[..., self._random, :]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-2])

    def forward_shape(self, shape: tuple[int, ...]) -> torch.Size:
        return torch.Size((*shape[:-2], *self._loc.shape))

    def inverse_shape(self, shape: tuple[int, ...]) -> torch.Size:
        return torch.Size((*shape[:-2], int(self._random.sum()), shape[-1]))
