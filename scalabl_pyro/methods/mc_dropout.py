"""Monte Carlo dropout (Gal & Ghahramani 2016, arXiv 1506.02142) in LoRA layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data import Batch
from ..lora.adapter import SubspaceAdapter
from ..models.model import LoRAModel
from ..rng import forked_rng
from .base import LoRAMethod

__all__ = ["DropoutAverage", "MCDropout"]


@dataclass(frozen=True, slots=True, eq=False)
class DropoutAverage:
    """In the place of a :class:`~scalabl_pyro.prediction.Predictor`: passes with dropout left on.

    :param num_draws: S, passes; the kth has the same masks in every batch of one shape.
    :param seed: of the masks.
    """

    adapter: SubspaceAdapter
    num_draws: int
    seed: int = 0

    def state(self) -> dict[str, Tensor]:
        """Nothing: the masks follow from the seed."""
        return {}

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """(S, B, C) in float32, −inf where a choice does not exist."""
        logits = []
        with forked_rng(self.seed):
            self.adapter.train()
            try:
                for _ in range(self.num_draws):
                    logits.append(self.adapter(batch))
            finally:
                self.adapter.eval()
        return torch.stack(logits)


@dataclass(frozen=True)
class MCDropout(LoRAMethod):
    """MLE or, with ``weight_decay``, MAP, trained with dropout that stays on in prediction.

    With ``lora.base_dropout`` the base model's own dropout acts too.

    :param dropout: probability of dropping an input of A; takes the place of ``lora.dropout``.
    :param draws: S, the passes that are averaged.
    """

    name: ClassVar[str] = "mc_dropout"

    dropout: float = 0.1
    draws: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: expected a probability between 0 and 1")
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}: expected 1 or more")

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> LoRAModel:
        """The likelihood, given a mask."""
        adapter.set_dropout(self.dropout)
        return super().make_model(adapter, num_data=num_data)

    def make_predictor(self, model: LoRAModel, posterior: None, *, seed: int) -> DropoutAverage:
        return DropoutAverage(model.adapter, self.draws, seed)

    def restore(
        self, adapter: SubspaceAdapter, state: Mapping[str, Tensor], *, seed: int, **_: Any
    ) -> DropoutAverage:
        return DropoutAverage(adapter, self.draws, seed)
