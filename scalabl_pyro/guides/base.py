"""What every guide over s has in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor

from ..model import ScalaBLModel, require_module_local_params

__all__ = ["AutoSubspace"]


class AutoSubspace(PyroModule):
    """A guide that samples the site ``"s"`` (M, r) directly from :meth:`get_posterior`.

    Its parameters exist from the start, without a trace of the model; it keeps no reference to the
    language model, so it pickles and saves alone. A subclass defines its parameters in ``__init__``
    and the distribution in :meth:`get_posterior`.

    :param model: gives the shape and the start of s.
    :param init_loc: (M, r), the initial mean; ``model.init_loc`` if left out.
    :param init_scale: initial standard deviation of each coordinate, above 0.
    :raises ValueError: if a value is out of range or of another shape.
    """

    def __init__(
        self,
        model: ScalaBLModel,
        *,
        init_loc: Tensor | None = None,
        init_scale: float = 0.05,
    ) -> None:
        require_module_local_params()
        super().__init__()
        loc = model.init_loc if init_loc is None else init_loc
        if loc.shape != model.init_loc.shape:
            raise ValueError(
                f"init_loc has shape {tuple(loc.shape)}: expected (M, r) ="
                f" {tuple(model.init_loc.shape)}"
            )
        if not init_scale > 0:
            raise ValueError(f"init_scale is {init_scale!r}: expected a number above 0")
        self._init_loc = loc.detach().clone()
        self._init_scale = float(init_scale)

    @abstractmethod
    def get_posterior(self) -> TorchDistribution:
        """q(s), with event shape (M, r)."""

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Sample ``"s"``; the arguments are the model's and are ignored."""
        return {"s": pyro.sample("s", self.get_posterior())}

    @torch.no_grad()
    def sample(self, num_draws: int) -> Tensor:
        """(S, M, r) independent draws.

        :raises ValueError: if S < 1.
        """
        if num_draws < 1:
            raise ValueError(f"the number of draws is {num_draws}: expected 1 or more")
        return self.get_posterior().sample(torch.Size([num_draws]))

    @torch.no_grad()
    def median(self) -> dict[str, Tensor]:
        """The median of each coordinate, {"s": (M, r)}."""
        return {"s": self.quantiles([0.5])["s"][0]}

    @abstractmethod
    def quantiles(self, quantiles: Sequence[float]) -> dict[str, Tensor]:
        """Marginal quantiles of each coordinate, {"s": (len(quantiles), M, r)}."""


class JointNormal(AutoSubspace):
    """A normal over all D = M·r coordinates at once; a subclass gives :meth:`joint`."""

    @abstractmethod
    def joint(self) -> TorchDistribution:
        """q(vec s), with event shape (D,)."""

    def get_posterior(self) -> TorchDistribution:
        shape = self._init_loc.shape
        to_matrix = dist.transforms.ReshapeTransform(torch.Size([shape.numel()]), shape)
        return dist.TransformedDistribution(self.joint(), [to_matrix])

    def _start(self) -> tuple[Tensor, Tensor]:
        """Mean and scale (D,) at the start."""
        loc = self._init_loc.flatten()
        return loc, torch.full_like(loc, self._init_scale)

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float]) -> dict[str, Tensor]:
        joint = self.joint()
        levels = torch.as_tensor(quantiles, dtype=joint.mean.dtype, device=joint.mean.device)
        marginal = dist.Normal(joint.mean, joint.stddev)
        return {"s": marginal.icdf(levels[:, None]).unflatten(-1, self._init_loc.shape)}
