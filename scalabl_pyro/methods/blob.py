"""Bayesian low-rank adaptation by backpropagation (Wang et al. 2024, arXiv 2406.11675)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import kl_divergence

from ..data import Batch, Split
from ..infer.fit_config import FitConfig
from ..infer.kl import KLSchedule
from ..infer.svi import fit
from ..infer.training import FitResult
from ..lora.adapter import SubspaceAdapter
from ..models.model import LoRAModel
from ..prediction.weight_draws import WeightAverage
from .base import DrawsWeights, Method
from .bursts import TwoObjectives, check_bursts, in_bursts

__all__ = ["AutoNormalA", "BLoB", "BLoBModel"]


class BLoBModel(LoRAModel):
    r"""LoRA with random matrices A, stacked in one site ``"A"`` of D = r · Σ_m d_m numbers.

    .. math:: A_{mji} \sim \mathrm{Normal}(0, σ_p^2), \qquad
              y_n \mid x_n, A \sim \mathrm{Categorical}(\mathrm{softmax} f(x_n; A))

    The matrices B and heads are points. Examples of a batch see A at other signs of A − M, where M
    are the adapter's own matrices (see :class:`~scalabl_pyro.lora.SubspaceAdapter`), so that the
    guide has to be symmetric about M.

    :param prior_scale: σ_p.
    """

    def __init__(self, adapter: SubspaceAdapter, *, num_data: int, prior_scale: float) -> None:
        super().__init__(adapter, num_data=num_data)
        self.prior_scale = prior_scale

    def prior(self) -> dist.Independent:
        """p(A), with event shape (D,)."""
        zeros = torch.zeros_like(self.adapter.matrices.flat_A())
        return dist.Normal(zeros, self.prior_scale).to_event(1)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C); samples ``"A"`` and observes ``"label"`` if there are labels."""
        self.projections()
        mean = self.adapter.matrices.flat_A()
        A = pyro.sample("A", self.prior())
        return self.observe(batch, self.adapter(batch, shift=A - mean))


class AutoNormalA(PyroModule):
    r"""Independent normals about the adapter's own matrices.

    .. math:: q(A) = \mathrm{Normal}(M, \mathrm{diag}(ρ^2)^2), \qquad ρ \text{ starts at }
              U(\mathrm{init\_scale}/\sqrt2, \mathrm{init\_scale})

    :param init_scale: about the square root of the initial standard deviations.
    """

    rho: Tensor  # (D,)

    def __init__(self, model: BLoBModel, *, init_scale: float) -> None:
        super().__init__()
        self._adapter = (model.adapter,)  # a tuple: an attribute would register its parameters
        rho = torch.empty_like(model.adapter.matrices.flat_A()).uniform_(
            init_scale / 2**0.5, init_scale
        )
        self.rho = PyroParam(rho, constraints.real, 1)  # type: ignore[assignment]

    def get_posterior(self) -> dist.Independent:
        """q(A), with event shape (D,)."""
        return dist.Normal(self._adapter[0].matrices.flat_A(), self.rho.square()).to_event(1)

    def kl(self, prior: dist.Independent) -> float:
        """KL(q‖p) in nats."""
        return float(kl_divergence(self.get_posterior(), prior))

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Sample ``"A"``; the arguments are the model's and are ignored."""
        return {"A": pyro.sample("A", self.get_posterior())}


@dataclass(frozen=True)
class BLoB(DrawsWeights, Method):
    """Variational inference over every entry of the matrices A, with Flipout.

    The objective is −E_q[log p(y | x, A)] + β·KL(q‖p) with the KL in closed form; β follows this
    package's schedule, and mean and deviation are moved by its one optimizer, with ``fit.lr`` and
    ``fit.lr_guide``. A β below 1, such as the 0.01 of ``configs/``, targets a cold posterior,
    narrower than the posterior.

    With ``lr_kl`` it is trained as it was published: the NLL by AdamW; the KL apart from it, by SGD
    at that rate, in bursts whose weights add up to 1 over a round (see
    :class:`~scalabl_pyro.methods.bursts.TwoObjectives`). ``config.kl`` then has no effect. AdamW
    divides gradients by their size and SGD does not, so that this minimises no weighted sum of the
    two. The published settings are ``lr_kl`` 0.01, ``prior_scale`` 0.2, ``init_scale`` 0.05, and
    the settings of ``reference`` for AdamW and the steps. There Flipout's signs are drawn for each
    token, here for each example.

    :param lr_kl: learning rate of SGD on the KL; ``None`` trains on the one objective above.
    :param prior_scale: standard deviation of the prior on an entry of A.
    :param init_scale: see :class:`AutoNormalA`.
    :param draws: S, the draws that predictions average over.
    """

    name: ClassVar[str] = "blob"

    # Every entry of A has a KL of its own, thousands of times as many as s.
    config: FitConfig = FitConfig(kl=KLSchedule(0.01))  # noqa: RUF009  (frozen)
    prior_scale: float = 0.2
    init_scale: float = 0.05
    draws: int = 10
    lr_kl: float | None = None

    def __post_init__(self) -> None:
        for name in ("prior_scale", "init_scale", "lr_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: expected a number above 0")
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}: expected 1 or more")
        if self.config.kl_budget is not None:
            raise ValueError("kl_budget is for method scalabl: set kl.weight")
        if self.lr_kl is not None:
            check_bursts(self.config, self.name)

    def without_effect(self) -> tuple[str, ...]:
        return () if self.lr_kl is None else ("kl",)

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> BLoBModel:
        """The probabilistic model of these settings.

        :raises ValueError: if the matrices A are not trained, or wait for a vector s.
        """
        if adapter.unit or not adapter.matrices.flat_A().requires_grad:
            raise ValueError(
                "method blob trains every A as it is: make the adapter's projections free"
            )
        return BLoBModel(adapter, num_data=num_data, prior_scale=self.prior_scale)

    def make_guide(self, model: BLoBModel) -> AutoNormalA:
        """The untrained guide of these settings."""
        return AutoNormalA(model, init_scale=self.init_scale)

    @torch.no_grad()
    def make_predictor(
        self, model: BLoBModel, posterior: AutoNormalA, *, seed: int
    ) -> WeightAverage:
        """Averages over S draws."""
        q = posterior.get_posterior()
        noise = torch.randn(
            self.draws, *q.event_shape, generator=torch.Generator().manual_seed(seed)
        )
        A = q.mean + noise.to(q.mean) * q.stddev
        return WeightAverage(model.adapter, model.adapter.matrices.named_A(A))

    def _train(self, model: Any, guide: Any, train: Split, **options: Any) -> FitResult:
        config = self.config
        elbo: Any = TraceMeanField_ELBO(max_plate_nesting=1)
        if self.lr_kl is not None:
            config, elbo = in_bursts(config, len(train)), TwoObjectives(kl_divergence, self.lr_kl)
        return fit(model, guide, train, config, elbo=elbo, progress=self.progress, **options)
