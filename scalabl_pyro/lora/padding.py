"""Which rows of a layer's inputs and outputs are tokens, and no padding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import Batch

__all__ = ["real_tokens", "token_mask"]


def token_mask(batch: Batch) -> Tensor:
    """(R, T), where the rows that the model reads have a token of a choice that exists."""
    return _of_choices(batch.inputs["attention_mask"].bool(), batch).flatten(0, -2)


def _of_choices(mask: Tensor, batch: Batch) -> Tensor:
    """Without the rows of missing choices, where a row is a choice's: (B, C, T), or (B, 2C, T) of
    choices behind their prompts and then alone."""
    if mask.dim() == 2:
        return mask
    there = batch.choices.repeat(1, mask.shape[1] // batch.choices.shape[1])
    return mask & there[..., None].to(mask.device)


def real_tokens(values: Tensor, batch: Batch) -> Tensor:
    """(n, d), the rows of a layer's inputs or outputs that are no padding.

    :param values: (R, T, d); or (R·T, d) of an expert; or (R, K, d) of an output layer, which sees
        the last columns, or those before K of which some are scored: then those alone count that
        are read. All of them are tokens where a layer sees another number.
    """
    mask = token_mask(batch).to(values.device)
    width = mask.shape[1]
    if values.dim() > 3 and values.shape[1] == 1:  # (R, 1, T, d), of a layer inside attention
        values = values.flatten(1, -2)
    if values.dim() == 2:
        return values[mask.flatten()] if len(values) == mask.numel() else values
    if len(values) != len(mask) or values.shape[1] > width:
        return values.flatten(0, -2)
    scored = batch.inputs.get("scored")
    if scored is not None and values.shape[1] == scored.shape[-1] < width:
        mask = _of_choices(scored, batch).flatten(0, -2).to(mask.device)
        if "segment" in batch.inputs:
            # The first token of a choice is read at the prompt's end, not at the end of the choice
            # before.
            begins = batch.inputs["segment"].diff(dim=1).to(mask.device) != 0
            mask = torch.cat([mask[:, :1], mask[:, 1:] & ~begins], 1)
    return values[mask[:, -values.shape[1] :]]
