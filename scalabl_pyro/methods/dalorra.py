"""Random gates on the rank (DALorRA; Zhang et al. 2026, arXiv 2607.02182)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..infer.fit_config import FitConfig
from ..infer.kl import KLSchedule
from ..lora.adapter import ProjectionMode
from .scalabl import ScalaBL

__all__ = ["DALorRA"]


@dataclass(frozen=True)
class DALorRA(ScalaBL):
    r"""ΔW = (α/r)·B·diag(z)·A with gates z: an ELBO with KL weight 1 over M·r probabilities.

    A pair of prior and guide for :class:`ScalaBL`: both are relaxed Bernoulli variables, A and B
    are free points. It is written from a description of the method. The KL here is that of the
    relaxed variables, estimated from the draw, and prediction draws relaxed gates too; the prior's
    probability of ½ and the temperatures are choices of this package.
    """

    name: ClassVar[str] = "dalorra"

    config: FitConfig = FitConfig(kl=KLSchedule(1.0))  # noqa: RUF009  (frozen)
    projections: ProjectionMode = "free"
    guide: dict[str, Any] = field(
        default_factory=lambda: {"name": "relaxed_bernoulli", "temperature": 0.5}
    )
    prior: dict[str, Any] = field(
        default_factory=lambda: {"name": "relaxed_bernoulli", "probs": 0.5, "temperature": 0.5}
    )
