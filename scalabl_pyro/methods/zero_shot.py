"""Zero-shot: the model as training would find it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..data import Split
from ..infer.fit_config import FitConfig
from ..infer.training import FitResult
from ..lora.adapter import SubspaceAdapter
from ..models.model import LoRAModel
from ..prediction.predictor import Predictor
from .base import Method

__all__ = ["ZeroShot"]


@dataclass(frozen=True)
class ZeroShot(Method):
    """p(y | x) of the base model, or of the adapter that training would start from; no weight is
    trained.

    What a readout has of its own starts as for every other method: κ of choice likelihood is fitted
    to training examples.
    """

    name: ClassVar[str] = "zero_shot"
    ignores: ClassVar[tuple[str, ...]] = tuple(field.name for field in fields(FitConfig))

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> LoRAModel:
        """The likelihood.

        :raises ValueError: if the adapter has a head that waits for training.
        """
        own = {id(parameter) for parameter in adapter.readout_parameters.values()}
        rest = {n: p for n, p in adapter.state().items() if id(p) not in own}
        heads = sorted(name for name in rest if ".lora_" not in name)
        if heads and not adapter.warm_start:
            raise ValueError(
                f"method zero_shot trains nothing, and the heads {heads} are untrained: choose"
                " another method, or leave lora.heads empty for a checkpoint that has a trained"
                " head"
            )
        return super().make_model(adapter, num_data=num_data)

    def make_predictor(self, model: LoRAModel, posterior: None, *, seed: int) -> Predictor:
        return Predictor(model.adapter)

    def _train(self, model: Any, guide: Any, train: Split, **options: Any) -> FitResult:
        return FitResult([], 0)
