"""Guide of gates: independent Bernoulli variables, relaxed."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroParam
from torch import Tensor

from ..models.model import ScalaBLModel
from .base import AutoSubspace

__all__ = ["AutoSubspaceRelaxedBernoulli"]


class AutoSubspaceRelaxedBernoulli(AutoSubspace):
    r"""A gate in (0, 1) for each coordinate, M·r numbers (Maddison et al. 2017, arXiv 1611.00712).

    .. math:: s_{mj} = \mathrm{sigmoid}\big((α_{mj} + \log u - \log(1 - u)) / τ\big), \quad
              u \sim U(0, 1)

    so that s > ½ with probability sigmoid(α), and s goes to 0 or 1 as τ goes to 0. The prior has to
    lie on (0, 1), such as ``relaxed_bernoulli``, and the KL has no closed form. The start has the
    median ``init_loc``; ``init_scale`` has no effect.

    :param temperature: τ.
    :raises ValueError: if the prior has another support, or the temperature is not above 0.
    """

    logits: Tensor  # α (M, r)

    def __init__(
        self,
        model: ScalaBLModel,
        *,
        init_loc: Tensor | None = None,
        init_scale: float = 0.05,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale)
        support = model.prior.support
        if not (
            support.check(torch.tensor(0.5)) and not support.check(torch.tensor([-0.1, 1.1])).any()
        ):
            raise ValueError(
                f"the prior lies on {support}, and this guide on (0, 1): expected prior.name"
                " relaxed_bernoulli"
            )
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature!r}: expected a number above 0")
        tau = torch.tensor(float(temperature), device=self._init_loc.device)
        self.register_buffer("_temperature", tau, persistent=False)
        logits = self._temperature * self._constrained(self._init_loc).logit()
        self.logits = PyroParam(logits, constraints.real, 2)  # type: ignore[assignment]

    def get_posterior(self) -> TorchDistribution:
        return dist.RelaxedBernoulli(self._temperature, logits=self.logits).to_event(2)

    def base(self) -> TorchDistribution:
        to_line = dist.transforms.SigmoidTransform().inv
        return dist.TransformedDistribution(self.get_posterior(), [to_line])

    def _quantiles(self, levels: Tensor) -> Tensor:
        return ((self.logits + levels.logit()) / self._temperature).sigmoid()

    def kl(self, prior: TorchDistribution) -> None:
        """``None``: there is no closed form."""
