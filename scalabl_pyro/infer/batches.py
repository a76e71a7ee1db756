"""All the data, for inference without a minibatch's noise."""

from __future__ import annotations

from ..data import Batch, Split
from ..models.model import ScalaBLModel

__all__ = ["whole_split"]


def whole_split(model: ScalaBLModel, split: Split, batch_size: int | None) -> list[Batch]:
    """All N examples in batches, or in one, for a likelihood without a minibatch's noise.

    :raises ValueError: if a label is missing, N is not ``model.num_data``, or ``batch_size`` is
        below 1.
    """
    if split.labels is None:
        raise ValueError("a posterior needs a label in every record")
    if len(split) != model.num_data:
        raise ValueError(
            f"the split holds {len(split)} examples, but the model's num_data is"
            f" {model.num_data}: the posterior is that of all the data, so give all of it"
        )
    size = len(split) if batch_size is None else batch_size
    return [chunk.collate(chunk.examples) for chunk in split.batches(size)]
