"""An ensemble of the iterates of one run (Chen et al. 2017, arXiv 1710.03282)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..models.model import LoRAModel
from ..prediction.predictor import Predictor, RunPredictor
from ..prediction.weight_draws import WeightAverage
from .iterates import IterateAveraging, Iterates

__all__ = ["CheckpointEnsemble"]


@dataclass(frozen=True)
class CheckpointEnsemble(IterateAveraging):
    """MLE or, with ``weight_decay``, MAP, whose probabilities are averaged over its last iterates.

    The published ensemble takes those that are best on validation data instead.
    """

    name: ClassVar[str] = "checkpoint_ensemble"

    def make_predictor(self, model: LoRAModel, posterior: Iterates, *, seed: int) -> RunPredictor:
        """Averages over the iterates so far, or is at the present one before the first."""
        iterates = posterior.iterates()
        return WeightAverage(model.adapter, iterates) if iterates else Predictor(model.adapter)
