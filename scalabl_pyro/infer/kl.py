"""The weight β of the KL term: a handler that applies it, a schedule, and a budget in nats."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message

__all__ = ["KLBudget", "KLSchedule", "is_enumerated", "kl_weight"]


def is_enumerated(msg: Message) -> bool:
    """Whether an ELBO sums a latent site out of the likelihood, so that no guide needs it."""
    return bool((msg["infer"] or {}).get("enumerate"))


class kl_weight(Messenger):
    r"""Scale every latent site by β, in model and guide alike::

        with kl_weight(0.1):
            svi.step(batch)

    Observed sites keep their scale, so ``Trace_ELBO`` and
    ``TraceMeanField_ELBO`` become

    .. math:: \sum_n E_q[\log p(y_n \mid x_n, s)] - \beta \, KL(q(s) \,\|\, p(s)).

    It works from outside, on any Pyro model and any guide; sites that an ELBO enumerates are part
    of the likelihood, and keep their scale too. At β = 1 this is the ELBO; any other
    value targets a tempered posterior, ∝ p(s)·p(y|x, s)^{1/β}.

    :param weight: β > 0.
    :raises ValueError: if β is not a finite number above 0.
    """

    def __init__(self, weight: float) -> None:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the KL weight is {weight!r}: expected a finite number above 0")
        super().__init__()
        self.weight = float(weight)

    def _pyro_sample(self, msg: Message) -> None:
        if not (msg["is_observed"] or is_enumerated(msg)):
            msg["scale"] = self.weight * msg["scale"]


@dataclass(frozen=True, slots=True)
class KLSchedule:
    """β_t over the T training steps: it rises over the first ``fraction`` of them, then stays.

    * ``constant``: β_t = β
    * ``linear``: β_t = β · u
    * ``cosine``: β_t = β · (1 − cos πu) / 2

    with u = min(1, (t + 1) / (fraction · T)).

    :param weight: the final β > 0; 1 ends at the ELBO, any other value at a tempered posterior.
    :param shape: how β rises.
    :param fraction: share of the steps during which it rises, in (0, 1].
    :raises ValueError: if a value is out of range.
    """

    weight: float = 10.0
    shape: str = "linear"
    fraction: float = 0.2

    def __post_init__(self) -> None:
        kl_weight(self.weight)
        if self.shape not in ("constant", "linear", "cosine"):
            raise ValueError(f"shape is {self.shape!r}: expected constant, linear or cosine")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction!r}: expected a number in (0, 1]")

    def __call__(self, step: int, steps: int) -> float:
        """β at 0-based ``step`` of ``steps``, above 0."""
        u = min(1.0, (step + 1) / (self.fraction * steps))
        if self.shape == "linear":
            return self.weight * u
        if self.shape == "cosine":
            return self.weight * (1 - math.cos(math.pi * u)) / 2
        return self.weight


class KLBudget:
    r"""Minimise −E_q[log p(y | x, s)] subject to KL(q‖p) = C, by adapting a factor on β.

    .. math:: \log λ_{t+1} = 3 e_t + I_{t+1}, \quad I_{t+1} = I_t + a_t e_t, \quad
              e_t = \mathrm{clip}(\log(KL_t / C), -1, 1)

    with a_t = 1/20, and 1/100 where e_t is clipped; \|I_t\| ≤ 10. The factor λ on β rises while the
    guide spends more than C nats and falls while it spends less: dual ascent on the Lagrangian
    (Rezende & Viola 2018, arXiv 1810.00597), with a proportional term that keeps it from swinging
    (Shao et al. 2020, arXiv 2004.05988). At the end the guide minimises the tempered objective
    whose weight happens to be λβ. The learning rate bounds the guide's speed, so that far from C a
    larger factor moves the KL no faster but drowns the likelihood's gradient: there the integral
    hardly winds up.

    :param nats: C > 0.
    """

    def __init__(self, nats: float) -> None:
        self.nats = nats
        self.integral = 0.0
        self.factor = 1.0

    def update(self, kl: float) -> None:
        """Take the KL(q‖p) of a step, in nats."""
        excess = min(1.0, max(-1.0, math.log(max(kl, 1e-12) / self.nats)))
        integral = self.integral + excess / (20 if abs(excess) < 1 else 100)
        self.integral = min(10.0, max(-10.0, integral))
        self.factor = math.exp(3 * excess + self.integral)
