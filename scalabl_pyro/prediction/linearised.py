"""The linearised predictive: any number of draws for one forward pass and C backward ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Batch
from ..lora.adapter import SubspaceAdapter

__all__ = ["Linearised"]


@dataclass(frozen=True, slots=True, eq=False)
class Linearised:
    r"""Logits that are linear in s, in the place of a :class:`~scalabl_pyro.prediction.Predictor`.

    .. math:: f(x; s) ≈ f(x; μ) + J(x) \, (s - μ), \qquad J(x) = ∂f(x; s) / ∂s \text{ at } s = μ

    (Immer et al. 2021, arXiv 2008.08400). With s ~ Normal(μ, Σ) the logits are
    Normal(f(x; μ), J Σ Jᵀ), and these are S draws from it. A forward pass and C backward passes, of
    the blocks from the first adapted one on, are paid once; a draw more costs C·M·r products.

    :param loc: μ (M, r), the posterior's mean.
    :param draws: (S, M, r), of any posterior.
    """

    adapter: SubspaceAdapter
    loc: Tensor
    draws: Tensor

    @property
    def num_draws(self) -> int:
        """S."""
        return len(self.draws)

    def logits(self, batch: Batch) -> Tensor:
        """(S, B, C) in float32, −inf where a choice does not exist."""
        s = self.loc.repeat(len(batch), 1, 1).requires_grad_()  # (B, M, r)
        with torch.enable_grad():
            f = self.adapter(batch, s, per_example=True)  # (B, C)
            # An example's logits depend on its own s alone, so a sum keeps the examples apart.
            rows = [torch.autograd.grad(f_c.sum(), s, retain_graph=True)[0] for f_c in f.unbind(-1)]
        J = torch.stack(rows, 1).flatten(2)  # (B, C, M·r)
        return f.detach() + torch.einsum("bcd,sd->sbc", J, (self.draws - self.loc).flatten(1))
