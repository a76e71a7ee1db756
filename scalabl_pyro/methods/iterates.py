"""AdamW that remembers where it has been, and the methods that average over that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..infer.fit_config import FitConfig
from ..infer.parameters import parameter_groups
from ..infer.training import no_guide
from ..models.model import LoRAModel
from .base import DrawsWeights, LoRAMethod

__all__ = ["IterateAveraging", "Iterates"]


class Iterates(torch.optim.AdamW):
    """AdamW that keeps K copies of its parameters from the last steps, evenly spaced, up to the
    end. They are part of its state, so that a checkpoint holds them.

    :param model: whose parameters are trained, with the rates and decay that ``fit`` gives them.
    :param config: of the training.
    :param count: K, 2 or more.
    :param share: of the steps, at the end, over which the K are spread.
    :raises ValueError: if these are fewer steps than K.
    """

    def __init__(self, model: LoRAModel, config: FitConfig, *, count: int, share: float) -> None:
        spread = torch.linspace(config.steps * (1 - share), config.steps, count).round().int()
        self._due = set(spread.clamp(min=1).tolist())
        if len(self._due) < count:
            raise ValueError(
                f"there are no {count} different iterates in the last {share:g} of {config.steps}"
                " steps: take fewer, of a larger share, or train longer"
            )
        self._named = model.adapter.named_parameters()
        super().__init__(parameter_groups(model, no_guide, **config.rates), eps=config.eps)

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """AdamW's step, and a copy if one is due."""
        result = super().step(closure)
        for parameter, state in self.state.items():
            if int(state["step"]) in self._due:
                copy = parameter.detach()[None]
                state["iterates"] = torch.cat([state.get("iterates", copy[:0]), copy])
        return result

    def iterates(self) -> dict[str, Tensor]:
        """(≤ K, *shape) by the names of ``adapter.state()``, the oldest first; nothing before the
        first is due."""
        states = {name: self.state.get(p, {}) for name, p in self._named.items()}
        return {name: state["iterates"] for name, state in states.items() if "iterates" in state}


@dataclass(frozen=True)
class IterateAveraging(DrawsWeights, LoRAMethod):
    """What methods that average over the iterates of one run of MLE or MAP share.

    :param members: K, the iterates kept.
    :param share: of the steps, at the end, over which these are spread.
    """

    members: int = 5
    share: float = 0.25

    def __post_init__(self) -> None:
        if self.members < 2:
            raise ValueError(f"members is {self.members}: expected 2 or more")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}: expected a number above 0, up to 1")
        if self.config.patience:
            raise ValueError(
                f"patience is {self.config.patience}, but method {self.name} averages over the last"
                " iterates of all steps: expected 0"
            )
        if self.config.keep == "best":
            raise ValueError(
                f"keep is 'best', but method {self.name} averages over the last iterates: expected"
                " last"
            )

    def make_optimizer(self, model: LoRAModel) -> Iterates:
        """AdamW, in whose state the iterates are."""
        return Iterates(model, self.config, count=self.members, share=self.share)
