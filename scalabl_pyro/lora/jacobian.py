"""Derivatives of the logits with respect to s, for each example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import grad

from ..data import Batch

__all__ = ["derivatives", "jacobian"]


def jacobian(logits: Callable[..., Tensor], batch: Batch, loc: Tensor) -> tuple[Tensor, Tensor]:
    r"""Logits f (B, C), and :math:`J_{nc} = ∂ f_c(x_n; s) / ∂ s` at ``loc``, (B, C, M, r).

    C backward passes. One, where each choice is a row of its own: every f_nc then has a copy of s
    of its own, and the gradient of their sum keeps them apart.

    :param logits: an adapter.
    :param loc: (M, r).
    """
    copies = batch.choices.shape if batch.row_per_choice else batch.choices.shape[:1]
    s = loc.detach().repeat(*copies, 1, 1).requires_grad_()  # (B, M, r) or (B, C, M, r)
    with torch.enable_grad():
        f = logits(batch, s, per_example=True).flatten(1)
        J = grad(f.sum(), s)[0] if batch.row_per_choice else derivatives(f, s)
    return f.detach(), J


def derivatives(outputs: Tensor, inputs: Tensor) -> Tensor:
    """∂ outputs[b, i] / ∂ inputs[b] as (B, I, \\*inputs.shape[1:]), a backward pass for each i.

    :param outputs: (B, I), of which row b depends on row b of the inputs alone.
    """
    columns = outputs.unbind(1)
    return torch.stack([grad(c.sum(), inputs, retain_graph=True)[0] for c in columns], dim=1)
