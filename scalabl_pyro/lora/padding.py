"""Which rows of a layer's inputs and outputs are tokens, and no padding."""

from __future__ import annotations

from torch import Tensor

from ..data import Batch

__all__ = ["real_tokens", "token_mask"]


def token_mask(batch: Batch) -> Tensor:
    """(R, T), where the rows that the model reads have a token of a choice that exists."""
    mask = batch.inputs["attention_mask"].bool()  # (B, [C,] T)
    if mask.dim() == 3:
        mask = mask & batch.choices[..., None].to(mask.device)
    return mask.flatten(0, -2)


def real_tokens(values: Tensor, batch: Batch) -> Tensor:
    """(n, d), the rows of a layer's inputs or outputs that are no padding.

    :param values: (R, T, d); or (R·T, d) of an expert; or (R, K, d) of an output layer, which sees
        the last columns, or those before K of which some are scored: then these alone count. All of
        them are tokens where a layer sees another number.
    """
    mask = token_mask(batch).to(values.device)
    width = mask.shape[1]
    if values.dim() == 2:
        return values[mask.flatten()] if len(values) == mask.numel() else values
    if len(values) != len(mask) or values.shape[1] > width:
        return values.flatten(0, -2)
    scored = batch.inputs.get("scored")
    if scored is not None and values.shape[1] == scored.shape[-1] < width:
        mask = scored.to(mask.device)
        if mask.dim() == 3:  # a row for each choice
            mask = mask & batch.choices[..., None].to(mask.device)
        mask = mask.flatten(0, -2)
    return values[mask[:, -values.shape[1] :]]
