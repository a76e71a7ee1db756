"""Prediction by draws of the projections themselves, for posteriors that are not over s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Batch
from ..lora.adapter import SubspaceAdapter

__all__ = ["WeightAverage"]


@dataclass(frozen=True, slots=True, eq=False)
class WeightAverage:
    """In the place of a :class:`~scalabl_pyro.prediction.Predictor`: a forward pass for each draw.

    :param weights: draws by name, a name in ``adapter.state()`` → (S, *shape); what is not named
        stays as it is.
    """

    adapter: SubspaceAdapter
    weights: Mapping[str, Tensor]

    @property
    def num_draws(self) -> int:
        """S."""
        return len(next(iter(self.weights.values())))

    def state(self) -> dict[str, Tensor]:
        """The draws, by the names of a run folder."""
        return {f"weights.{name}": draws for name, draws in self.weights.items()}

    @classmethod
    def restored(cls, adapter: SubspaceAdapter, state: Mapping[str, Tensor]) -> WeightAverage:
        """The inverse of :meth:`state`.

        :raises ValueError: if there are no draws, or they are of other weights.
        """
        weights = {name.removeprefix("weights."): draws for name, draws in state.items()}
        stored = adapter.state()
        wrong = [
            name
            for name, draws in weights.items()
            if name not in stored or draws.shape[1:] != stored[name].shape
        ]
        if wrong or not weights:
            raise ValueError(f"expected draws of the adapter's weights, found wrong ones: {wrong}")
        return cls(adapter, weights)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """(S, B, C) in float32, −inf where a choice does not exist."""
        logits = []
        for k in range(self.num_draws):
            with self.adapter.holding({name: draws[k] for name, draws in self.weights.items()}):
                logits.append(self.adapter(batch))
        return torch.stack(logits)
