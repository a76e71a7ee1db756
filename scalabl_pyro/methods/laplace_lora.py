"""Laplace-LoRA (Yang et al. 2024, arXiv 2308.13111): a Laplace approximation after training."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data import Batch, Split
from ..infer.kfac import Kronecker, kfac, logit_moments
from ..lora.adapter import SubspaceAdapter
from .base import Fitted, PointMethod

__all__ = ["LaplaceAverage", "LaplaceLoRA", "best_precision"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LaplaceAverage:
    r"""In the place of a :class:`~scalabl_pyro.prediction.Predictor`: draws of logits.

    .. math:: f_k(x) = f(x) + \big(J(x) (H + λI)^{-1} J(x)^⊤\big)^{1/2} ε_k,
              \qquad ε_k \sim \mathrm{Normal}(0, I)

    with the same ε_k for all x.

    :param factors: H, a block for each matrix.
    :param precision: λ.
    :param num_draws: S.
    :param seed: of ε.
    """

    adapter: SubspaceAdapter
    factors: Mapping[str, Kronecker]
    precision: float
    num_draws: int
    seed: int = 0

    def state(self) -> dict[str, Tensor]:
        """The factors and λ, by the names of a run folder."""
        found = {"precision": torch.tensor(self.precision, dtype=torch.float64)}
        for name, factor in self.factors.items():
            found |= {f"x.{name}": factor.x, f"g.{name}": factor.g}
        return found

    def logits(self, batch: Batch) -> Tensor:
        """(S, B, C) in float32, −inf where a choice does not exist."""
        f, covariance = logit_moments(self.adapter, batch, self.factors, self.precision)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT  # (B, C, C)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.num_draws, f.shape[1], generator=generator, dtype=torch.float64)
        return f + torch.einsum("bce,se->sbc", root, noise.to(f.device)).float()


@dataclass(frozen=True)
class LaplaceLoRA(PointMethod):
    r"""MLE or, with ``weight_decay``, MAP, then a normal over all entries of A and B around it.

    .. math:: q(θ) = \mathrm{Normal}\big(θ^*, (H + λI)^{-1}\big)

    H is the KFAC approximation of the curvature over the training data (see
    :func:`~scalabl_pyro.infer.kfac.kfac`), and the logits are linear in θ. Heads stay points.
    Published settings: ``rank`` 10, λ by evidence.

    :param rank: most eigenvectors of a Kronecker factor.
    :param prior_precision: λ; the one that maximises the evidence if ``None``.
    :param draws: S, of the logits; they cost next to nothing.
    """

    name: ClassVar[str] = "laplace_lora"
    reads_texts: ClassVar[bool] = False

    rank: int = 10
    prior_precision: float | None = None
    draws: int = 100

    def __post_init__(self) -> None:
        if self.projections != "free":
            raise ValueError(
                f"projections is {self.projections!r}: method laplace_lora needs free, for its"
                " posterior is over A and B, at a mode of both"
            )
        for name in ("rank", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        if self.prior_precision is not None and not self.prior_precision > 0:
            raise ValueError(
                f"prior_precision is {self.prior_precision}: expected a number above 0, or null"
            )

    def finish(
        self, fitted: Fitted, train: Split, validation: Split | None, *, seed: int
    ) -> Fitted:
        """The same trained model with a normal around it.

        :param seed: of the draws.
        """
        adapter = fitted.model.adapter
        factors = kfac(adapter, train, rank=self.rank, batch_size=self.config.batch_size)
        precision = self.prior_precision
        if precision is None:
            precision = best_precision(adapter, factors)
            log.info("the prior precision is %g", precision)
        predictor = LaplaceAverage(adapter, factors, precision, self.draws, seed)
        return replace(fitted, predictor=predictor)

    def restore(
        self, adapter: SubspaceAdapter, state: Mapping[str, Tensor], *, seed: int, **_: Any
    ) -> LaplaceAverage:
        names = list(adapter.matrices.linears)
        expected = {"precision", *(f"{part}.{name}" for name in names for part in "xg")}
        if expected != state.keys():
            raise ValueError(f"these factors are missing or unknown: {expected ^ state.keys()}")
        factors = {name: Kronecker(state[f"x.{name}"], state[f"g.{name}"]) for name in names}
        return LaplaceAverage(adapter, factors, float(state["precision"]), self.draws, seed)


def best_precision(adapter: SubspaceAdapter, factors: Mapping[str, Kronecker]) -> float:
    r"""The λ from 1e-4 to 1e6 that maximises the evidence at a fixed θ*, to 6 %.

    .. math:: \log p(D \mid λ) = \mathrm{const} - \tfrac{λ}{2} ‖θ^*‖^2 + \tfrac{P}{2} \log λ
              - \tfrac{1}{2} \log\det(H + λI)
    """
    weights = [module.weight.detach() for module in adapter.matrices.linears.values()]
    norm = float(sum(w.double().square().sum() for w in weights))
    P = sum(w.numel() for w in weights)
    grid = torch.logspace(-4, 6, 401, dtype=torch.float64)

    def log_evidence(precision: float) -> float:
        log_det = sum(factor.log_det(precision) for factor in factors.values())
        return 0.5 * (P * math.log(precision) - precision * norm - log_det)

    return max(grid.tolist(), key=log_evidence)
