"""Deep ensembles (Lakshminarayanan et al. 2017, arXiv 1612.01474) of LoRA adapters."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..data import Split
from ..infer.checkpoints import Checkpoints
from ..infer.training import FitResult
from ..lora.adapter import SubspaceAdapter
from ..prediction.weight_draws import WeightAverage
from .base import DrawsWeights, Fitted, LoRAMethod

__all__ = ["Ensemble"]


@dataclass(frozen=True)
class Ensemble(DrawsWeights, LoRAMethod):
    """K adapters, trained one by one from different starts in different orders of the data, whose
    probabilities are averaged. With ``weight_decay`` each is MAP, without it MLE.

    A member that starts from a trained adapter differs in the order of the data alone.

    :param members: K.
    """

    name: ClassVar[str] = "ensemble"

    members: int = 5

    def __post_init__(self) -> None:
        if self.members < 2:
            raise ValueError(f"members is {self.members}: expected 2 or more")

    def fit(
        self,
        make_adapter: Callable[..., SubspaceAdapter],
        train: Split,
        validation: Split | None,
        *,
        seed: int,
        checkpoints: Checkpoints | None = None,
    ) -> Fitted:
        """As :meth:`Method.fit`, for each member.

        :returns: with the last member's model and ``best_step``, and the history of all, in which
            ``member`` says whose a row is.
        """
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**31, (self.members,), generator=generator).tolist()
        states: list[dict[str, Tensor]] = []
        history: list[dict[str, float]] = []
        for k, own in enumerate(seeds):
            gc.collect()  # one language model in memory at a time, and they refer to themselves
            part = None if checkpoints is None else checkpoints.part(f"member-{k}")
            fitted = super().fit(make_adapter, train, validation, seed=own, checkpoints=part)
            adapter = fitted.model.adapter
            states.append({name: p.detach().clone() for name, p in adapter.state().items()})
            history += [{"member": k, **row} for row in fitted.result.history]
            if k < self.members - 1:
                del fitted, adapter
        weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        last = fitted.result
        result = FitResult(history, last.best_step, self.members * last.num_trained)
        return Fitted(WeightAverage(adapter, weights), result, fitted.model)
