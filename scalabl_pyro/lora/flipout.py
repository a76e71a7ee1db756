"""Flipout (Wen et al. 2018, arXiv 1803.04386): one noise, at other signs for each example."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Shift", "flipped"]


class Shift(NamedTuple):
    """What is added to a matrix W (d_out, d_in), as R rows see it: row i has ΔW ∘ v_i u_iᵀ.

    :param delta: ΔW (d_out, d_in).
    :param u: (R, d_in) signs.
    :param v: (R, d_out) signs.
    """

    delta: Tensor
    u: Tensor
    v: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to W·x, (R, ..., d_out) from (R, ..., d_in)."""
        u, v = (sign.view(len(sign), *[1] * (x.dim() - 2), -1) for sign in (self.u, self.v))
        return nn.functional.linear(x * u, self.delta) * v


def flipped(delta: Tensor, examples: int, rows_each: int) -> Shift:
    """ΔW at signs drawn for each example, the same for all its rows.

    If ΔW is distributed symmetrically about 0, every example has that distribution, and two
    examples are uncorrelated, which lowers the variance of a batch's gradient.
    """
    u, v = (
        torch.randint(2, (examples, size), device=delta.device, dtype=delta.dtype)
        .mul_(2)
        .sub_(1)
        .repeat_interleave(rows_each, 0)
        for size in reversed(delta.shape)
    )
    return Shift(delta, u, v)
