"""The published ScalaBL algorithm, written anew; nothing else in the package builds on it.

It is written from the published settings and from descriptions of the algorithm, not from anybody's
code. What differs from :class:`~scalabl_pyro.methods.ScalaBL`: the divergence is KL(p‖q), which is
no part of an ELBO; it is minimised apart from the likelihood, by an optimizer and a schedule of its
own; and the mean of q is positive. Where the descriptions say nothing, this is what was chosen:

* The start U(0.05/√2, 0.05) is one of σ, not of ρ with σ = ρ²: so says the known value of KL(p‖q)
  at the start.
* The KL is the sum over all M·r coordinates.
* In each step the gradients of the likelihood and of the KL are taken at the same values. The
  first is clipped as ``config`` says, the second is not.
* i runs from 0 to M_KL and starts again; over one such round the weights add up to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import kl_divergence

from ..data import Split
from ..guides import AutoSubspace
from ..infer.fit_config import FitConfig
from ..infer.svi import fit
from ..infer.training import FitResult
from ..lora.adapter import SubspaceAdapter
from ..models.model import ScalaBLModel
from ..prediction.draws import draw
from ..prediction.predictor import Predictor
from .base import Method
from .bursts import TwoObjectives, check_bursts, in_bursts

__all__ = ["AutoSubspacePositiveNormal", "Reference"]


class AutoSubspacePositiveNormal(AutoSubspace):
    r"""Diagonal normal whose mean is positive, with logarithms of mean and deviation as parameters.

    .. math:: q(s) = \prod_{m, j} \mathrm{Normal}(s_{mj} \mid \exp λ_{mj}, \exp(ς_{mj})^2)

    λ starts where the mean is ``init_loc`` (the singular values of the fresh A), and exp ς at
    U(init_scale/√2, init_scale), from Pyro's random state.

    :raises ValueError: if an initial mean is not above 0.
    """

    log_loc: Tensor  # λ (M, r)
    log_scale: Tensor  # ς (M, r)

    def __init__(
        self, model: ScalaBLModel, *, init_loc: Tensor | None = None, init_scale: float = 0.05
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale)
        if not (self._init_loc > 0).all():
            raise ValueError(
                f"init_loc has the value {float(self._init_loc.min())}: expected numbers above 0,"
                " for this guide's mean is the exponential of its parameter"
            )
        scale = torch.empty_like(self._init_loc).uniform_(init_scale / 2**0.5, init_scale)
        self.log_loc = PyroParam(self._init_loc.log(), constraints.real, 2)  # type: ignore[assignment]
        self.log_scale = PyroParam(scale.log(), constraints.real, 2)  # type: ignore[assignment]

    def base(self) -> dist.Independent:
        return self.marginals().to_event(2)

    def marginals(self) -> dist.Normal:
        return dist.Normal(self.log_loc.exp(), self.log_scale.exp())


def reversed_kl(q: TorchDistribution, p: TorchDistribution) -> Tensor:
    """KL(p‖q)."""
    return kl_divergence(p, q)


@dataclass(frozen=True)
class Reference(Method):
    r"""The published algorithm of Samplawski et al. 2025 (arXiv 2506.21408), only to compare with.

    .. math::
        \text{AdamW:} \quad & -\tfrac{1}{B} \sum_n \log p(y_n \mid x_n, s), \quad s \sim q \\
        \text{SGD:} \quad & \frac{2^i}{2^{M_{KL} + 1} - 1} \, KL(p(s) \,\|\, q(s)), \quad
        i = t \bmod (M_{KL} + 1), \quad M_{KL} = \lfloor 100 \, N^{π/8} / B \rfloor

    with one draw of s for a batch. AdamW moves everything that is trained, SGD only q, in bursts:
    all but a few of the weights are close to 0. Both rates warm up and decay alike. A
    re-implementation: see the choices in :mod:`scalabl_pyro.methods.reference`. It does not
    maximise an ELBO, and its q(s) is no posterior. The published settings are 5,000 steps, batch
    size 4, ``lr`` and ``lr_guide`` 1e-4, ``eps`` 1e-6, ``warmup`` 0.06 and linear decay.
    ``config.kl`` has no effect here. In ``history`` ``loss`` and ``nll`` are both the first
    objective, ``kl`` is the KL(q‖p) that every method reports, and ``kl_weight`` is SGD's weight at
    its rate's factor.

    :param init_scale: initial σ, drawn from U(init_scale/√2, init_scale).
    :param prior_scale: standard deviation of the prior, Normal(0, prior_scale²).
    :param lr_kl: learning rate of the KL, before its weights.
    :param draws: S, the draws that predictions average over.
    """

    name: ClassVar[str] = "reference"
    reads_texts: ClassVar[bool] = False
    svd: ClassVar[bool] = True
    ignores: ClassVar[tuple[str, ...]] = ("kl",)

    config: FitConfig = FitConfig(  # noqa: RUF009  (frozen)
        steps=5000, batch_size=4, lr=1e-4, lr_guide=1e-4, eps=1e-6, clip_norm=math.inf
    )
    init_scale: float = 0.05
    prior_scale: float = 1.0
    lr_kl: float = 0.2
    draws: int = 10

    def __post_init__(self) -> None:
        for name in ("init_scale", "prior_scale", "lr_kl"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a number above 0")
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}: expected 1 or more")
        check_bursts(self.config, self.name)

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> ScalaBLModel:
        """The probabilistic model of these settings."""
        return ScalaBLModel(adapter, num_data=num_data, prior=dist.Normal(0.0, self.prior_scale))

    def make_guide(self, model: ScalaBLModel) -> AutoSubspacePositiveNormal:
        """The untrained guide of these settings."""
        return AutoSubspacePositiveNormal(model, init_scale=self.init_scale)

    def make_predictor(
        self, model: ScalaBLModel, posterior: AutoSubspace, *, seed: int
    ) -> Predictor:
        """Averages over S draws."""
        return Predictor(model.adapter, draw(posterior, self.draws, seed=seed))

    def _train(self, model: Any, guide: Any, train: Split, **options: Any) -> FitResult:
        return fit(
            model,
            guide,
            train,
            in_bursts(self.config, len(train)),
            elbo=TwoObjectives(reversed_kl, self.lr_kl),
            progress=self.progress,
            **options,
        )
