"""ScalaBL: variational inference over the subspace vectors s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist

from ..adapter import SubspaceAdapter
from ..data import Split
from ..guides import GUIDES, AutoSubspace
from ..model import ScalaBLModel
from ..predict import Predictor, draw
from ..svi import fit
from .base import Fitted, Method

__all__ = ["ScalaBL"]


@dataclass(frozen=True)
class ScalaBL(Method):
    """Samplawski et al. 2025 (arXiv 2506.21408), with one correct objective.

    :param guide: name of the guide in ``GUIDES``.
    :param init_scale: initial standard deviation of q(s).
    :param prior_scale: standard deviation of the prior, Normal(0, prior_scale²).
    :param draws: S of the bank that predicts; 0 predicts at the posterior's median.
    """

    name: ClassVar[str] = "scalabl"
    svd: ClassVar[bool] = True

    guide: str = "normal"
    init_scale: float = 0.05
    prior_scale: float = 1.0
    draws: int = 10

    def __post_init__(self) -> None:
        if self.guide not in GUIDES:
            raise ValueError(f"guide is {self.guide!r}: expected one of {sorted(GUIDES)}")
        if self.draws < 0:
            raise ValueError(f"draws is {self.draws}: expected 1 or more, or 0 for the median")
        if not self.prior_scale > 0:
            raise ValueError(f"prior_scale is {self.prior_scale}: expected a number above 0")

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> ScalaBLModel:
        """The probabilistic model of these settings."""
        return ScalaBLModel(adapter, num_data=num_data, prior=dist.Normal(0.0, self.prior_scale))

    def make_guide(self, model: ScalaBLModel) -> AutoSubspace:
        """The untrained guide of these settings."""
        return GUIDES[self.guide](model, init_scale=self.init_scale)

    def _fit(
        self, adapter: SubspaceAdapter, train: Split, validation: Split | None, *, seed: int
    ) -> Fitted:
        model = self.make_model(adapter, num_data=len(train))
        guide = self.make_guide(model)

        def predictor() -> Predictor:
            if not self.draws:
                return Predictor(adapter, guide.median()["s"][None])
            return Predictor(adapter, draw(guide, self.draws, seed=seed))

        result = fit(
            model,
            guide,
            train,
            self.config,
            seed=seed,
            validate=self._validate(predictor, validation),
            progress=self.progress,
        )
        return Fitted(predictor(), result, model, guide)
