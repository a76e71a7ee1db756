"""The linearised predictive: any number of draws for one forward pass and some backward ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Batch
from ..lora.adapter import SubspaceAdapter
from ..lora.jacobian import jacobian

__all__ = ["Linearised"]


@dataclass(frozen=True, slots=True, eq=False)
class Linearised:
    r"""Logits that are linear in s, in the place of a :class:`~scalabl_pyro.prediction.Predictor`.

    .. math:: f(x; s) ≈ f(x; μ) + J(x) \, (s - μ), \qquad J(x) = ∂f(x; s) / ∂s \text{ at } s = μ

    (Immer et al. 2021, arXiv 2008.08400). With s ~ Normal(μ, Σ) the logits are
    Normal(f(x; μ), J Σ Jᵀ), and these are S draws from it. A forward pass and C backward passes
    (one where each choice is a row of its own), of the blocks from the first adapted one on, are
    paid once; a draw more costs C·M·r products.

    :param loc: μ (M, r), about which: the median of q.
    :param draws: (S, M, r), of any posterior, or (S, M, r + k) with s_perp, whose mean is 0.
    :param temperature: divides the logits.
    """

    adapter: SubspaceAdapter
    loc: Tensor
    draws: Tensor
    temperature: float = 1.0

    @property
    def num_draws(self) -> int:
        """S."""
        return len(self.draws)

    def logits(self, batch: Batch) -> Tensor:
        """(S, B, C) in float32, −inf where a choice does not exist."""
        loc, draws = self.adapter.with_perp(self.loc), self.adapter.with_perp(self.draws)
        f, J = jacobian(self.adapter, batch, loc)
        steps = (draws - loc).flatten(1)  # (S, D)
        return (f + torch.einsum("bcd,sd->sbc", J.flatten(2), steps)) / self.temperature
