"""The published training of BLoB and ScalaBL: the NLL by AdamW, and beside it the KL by SGD.

(Wang et al. 2024, arXiv 2406.11675; Samplawski et al. 2025, arXiv 2506.21408.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..data import Batch
from ..infer.fit_config import FitConfig
from ..infer.kl import KLSchedule

__all__ = ["Bursts", "TwoObjectives", "burst_steps", "burst_weight", "check_bursts", "in_bursts"]


def burst_steps(num_data: int, batch_size: int) -> int:
    """M_KL = ⌊100 · N^{π/8} / B⌋; a burst of the KL comes every M_KL + 1 steps."""
    return int(100 * num_data ** (math.pi / 8) / batch_size)


def burst_weight(step: int, steps: int) -> float:
    """2^i / (2^{M_KL + 1} − 1) with i = step mod (M_KL + 1): half of it in the last step of each.

    :param step: 0-based.
    :param steps: M_KL.
    """
    i = step % (steps + 1)
    return 2.0 ** (i - steps) / (2 - 2.0**-steps)  # the same, without a number that overflows


@dataclass(frozen=True, slots=True)
class Bursts(KLSchedule):
    """β_t = ``rate(t)`` · :func:`burst_weight`: over a round of M_KL + 1 steps the latter sum to 1.

    :param between: M_KL.
    :param rate: the factor on SGD's learning rate at a 0-based step.
    """

    weight: float = 1.0
    between: int = 0
    rate: Callable[[int], float] = FitConfig().lr_factor

    def __call__(self, step: int, steps: int) -> float:
        """β at 0-based ``step``, above 0."""
        # A handler takes no weight of 0, which the start of a long round rounds to.
        return max(self.rate(step) * burst_weight(step, self.between), sys.float_info.min)


def check_bursts(config: FitConfig, method: str) -> None:
    """Refuse settings that have no meaning for a KL with an optimizer of its own.

    :raises ValueError: if ``accumulation`` or ``kl_budget`` is set.
    """
    if config.accumulation != 1:
        raise ValueError(
            f"accumulation is {config.accumulation}: method {method} steps after every minibatch;"
            " set a larger batch_size instead"
        )
    if config.kl_budget is not None:
        raise ValueError(
            f"kl_budget is {config.kl_budget}, but the KL of method {method} has a schedule of its"
            " own: expected null"
        )


def in_bursts(config: FitConfig, num_data: int) -> FitConfig:
    """The same settings with :class:`Bursts` for the KL weight, at the learning rates' factor.

    :param num_data: N.
    """
    between = burst_steps(num_data, min(config.batch_size, num_data))
    return replace(config, kl=Bursts(between=between, rate=config.lr_factor))


class TwoObjectives:
    r"""In the place of an ELBO in :func:`~scalabl_pyro.infer.fit`: two objectives, on one draw.

    .. math::
        \text{the optimizer of } \texttt{fit:} \quad &
            -\tfrac{1}{B} \sum_n \log p(y_n \mid x_n, z), \quad z \sim q \\
        \text{SGD:} \quad & β_t \, D(q, p)

    Both gradients are taken at the same values, and SGD moves first, so that the ``kl`` in a row of
    the history is that of after its step. It moves whatever D depends on, without clipping.

    :param divergence: D, a function of q and p of a latent site.
    :param lr: SGD's learning rate, which β_t multiplies.
    """

    def __init__(
        self, divergence: Callable[[TorchDistribution, TorchDistribution], Tensor], lr: float
    ) -> None:
        self._divergence = divergence
        self._lr = lr

    def loss_and_grads(self, model: Any, guide: Any, batch: Batch) -> float:
        """The NLL of all N examples; its gradient is left in the parameters after SGD's step."""
        drawn = poutine.trace(guide).get_trace(batch)
        trace = poutine.trace(poutine.replay(model, drawn)).get_trace(batch)
        trace.compute_log_prob(lambda name, site: site["is_observed"])
        sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
        nll = -sum(site["log_prob_sum"] for site in sites if site["is_observed"])
        latent = [site for site in sites if site["name"] in drawn.nodes and not site["is_observed"]]
        # The scale is β, which the handler kl_weight gives latent sites.
        divergence = sum(
            site["scale"] * self._divergence(drawn.nodes[site["name"]]["fn"], site["fn"])
            for site in latent
        )
        parameters = [p for p in {*model.parameters(), *guide.parameters()} if p.requires_grad]
        slopes = torch.autograd.grad(divergence, parameters, retain_graph=True, allow_unused=True)
        nll.backward()
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                if slope is not None:
                    parameter.sub_(self._lr * slope)
        return float(nll.detach())
