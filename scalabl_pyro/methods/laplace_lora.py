"""Laplace-LoRA (Yang et al. 2024, arXiv 2308.13111): a Laplace approximation after training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..data import Batch, Split
from ..infer.evidence import precision_by_evidence
from ..infer.kfac import Kronecker, kfac, logit_moments
from ..lora.adapter import SubspaceAdapter
from .base import Fitted, LoRAMethod, check_modules, check_plain, random_modules

__all__ = ["LaplaceAverage", "LaplaceLoRA", "logit_draws"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LaplaceAverage:
    r"""In the place of a :class:`~scalabl_pyro.prediction.Predictor`: draws of logits.

    .. math:: f_k(x) = f(x) + \big(J(x) (H + λI)^{-1} J(x)^⊤\big)^{1/2} ε_k,
              \qquad ε_k \sim \mathrm{Normal}(0, I)

    with the same ε_k for all x.

    :param factors: H, a block for each matrix that is random, by name.
    :param precision: λ, by the same names.
    :param num_draws: S.
    :param seed: of ε.
    """

    adapter: SubspaceAdapter
    factors: Mapping[str, Kronecker]
    precision: Mapping[str, float]
    num_draws: int
    seed: int = 0

    def state(self) -> dict[str, Tensor]:
        """The factors and λ, by the names of a run folder."""
        tensors: dict[str, Tensor] = {}
        for name, factor in self.factors.items():
            precision = torch.tensor(self.precision[name], dtype=torch.float64)
            tensors |= {
                f"x.{name}": factor.x,
                f"g.{name}": factor.g,
                f"precision.{name}": precision,
            }
        return tensors

    def logits(self, batch: Batch) -> Tensor:
        """(S, B, C) in float32, −inf where a choice does not exist."""
        f, covariance = logit_moments(self.adapter, batch, self.factors, self.precision)
        return logit_draws(f, covariance, self.num_draws, seed=self.seed)


def logit_draws(f: Tensor, covariance: Tensor, num_draws: int, *, seed: int) -> Tensor:
    """(S, B, C) draws of normal logits, with the same standard normals for all examples.

    :param f: (B, C), the means.
    :param covariance: (B, C, C).
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT  # (B, C, C)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_draws, f.shape[1], generator=generator, dtype=torch.float64)
    return f + torch.einsum("bce,se->sbc", root, noise.to(f.device)).float()


@dataclass(frozen=True)
class LaplaceLoRA(LoRAMethod):
    r"""MLE or, with ``weight_decay``, MAP, then a normal over all entries of A and B around it.

    .. math:: q(θ) = \mathrm{Normal}\big(θ^*, (H + λI)^{-1}\big)

    H is the KFAC approximation of the curvature over the training data (see
    :func:`~scalabl_pyro.infer.kfac.kfac`), and the logits are linear in θ. Heads stay points.
    Published settings: ``rank`` 10, λ by evidence, and in LLLA ``modules`` last, where that is the
    output layer.

    :param rank: most eigenvectors of a Kronecker factor.
    :param prior_precision: λ; the one that maximises the evidence if ``None``.
    :param per_matrix: choose a λ for each A and B by itself, in the place of one for all.
    :param modules: whose A and B are random: ``all`` adapted modules, or the ``last`` one alone.
    :param draws: S, of the logits; they cost next to nothing.
    """

    name: ClassVar[str] = "laplace_lora"
    reads_texts: ClassVar[bool] = False

    rank: int = 10
    prior_precision: float | None = None
    per_matrix: bool = False
    modules: Literal["all", "last"] = "all"
    draws: int = 100

    def __post_init__(self) -> None:
        if self.projections != "free":
            raise ValueError(
                f"projections is {self.projections!r}: method laplace_lora needs free, for its"
                " posterior is over A and B, at a mode of both"
            )
        check_modules(self.modules)
        for name in ("rank", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        if self.prior_precision is not None and not self.prior_precision > 0:
            raise ValueError(
                f"prior_precision is {self.prior_precision}: expected a number above 0, or null"
            )
        if self.prior_precision is not None and self.per_matrix:
            raise ValueError(
                f"per_matrix is true, and prior_precision {self.prior_precision} leaves nothing to"
                " choose: expected one of them"
            )

    def finish(
        self, fitted: Fitted, train: Split, validation: Split | None, *, seed: int
    ) -> Fitted:
        """The same trained model with a normal around it.

        :param seed: of the draws.
        :raises ValueError: if it is over s.
        """
        check_plain(fitted, self.name)
        adapter = fitted.model.adapter
        factors = kfac(adapter, train, rank=self.rank, batch_size=self.config.batch_size)
        factors = {name: factors[name] for name in self._random(adapter)}
        parts = [{name: factor} for name, factor in factors.items()]
        precision: dict[str, float] = {}
        for group in parts if self.per_matrix else [factors]:
            group_precision = self.prior_precision or _by_evidence(adapter, group)
            precision |= dict.fromkeys(group, group_precision)
        log.info("the prior precision is %s", sorted({float(f"{x:g}") for x in precision.values()}))
        predictor = LaplaceAverage(adapter, factors, precision, self.draws, seed)
        return replace(fitted, predictor=predictor)

    def restore(
        self, adapter: SubspaceAdapter, state: Mapping[str, Tensor], *, seed: int, **_: Any
    ) -> LaplaceAverage:
        names = self._random(adapter)
        expected = {f"{part}.{name}" for name in names for part in ("x", "g", "precision")}
        if expected != state.keys():
            raise ValueError(f"these factors are missing or unknown: {expected ^ state.keys()}")
        factors = {name: Kronecker(state[f"x.{name}"], state[f"g.{name}"]) for name in names}
        precision = {name: float(state[f"precision.{name}"]) for name in names}
        return LaplaceAverage(adapter, factors, precision, self.draws, seed)

    def _random(self, adapter: SubspaceAdapter) -> list[str]:
        """The names of the matrices that are random."""
        pairs = [*zip(adapter.matrices.A, adapter.matrices.B, strict=True)]
        return [name for pair in random_modules(pairs, self.modules) for name in pair]


def _by_evidence(adapter: SubspaceAdapter, factors: Mapping[str, Kronecker]) -> float:
    """The λ of the highest evidence, with the matrices of these factors for θ*."""
    weights = [adapter.matrices.linears[name].weight.detach() for name in factors]
    return precision_by_evidence(
        lambda precision: float(sum(factor.log_det(precision) for factor in factors.values())),
        sum(weight.numel() for weight in weights),
        float(sum(weight.double().square().sum() for weight in weights)),
    )
