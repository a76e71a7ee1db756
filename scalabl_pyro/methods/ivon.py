"""IVON (Shen et al. 2024, arXiv 2402.17641), whose state is the posterior, on LoRA (2411.04421)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ..data import Batch, Split
from ..infer.fit_config import FitConfig
from ..infer.training import FitResult
from ..lora.adapter import SubspaceAdapter
from ..models.model import LoRAModel
from ..prediction.predictor import Predictor, RunPredictor
from ..prediction.weight_draws import WeightAverage
from .base import LoRAMethod

__all__ = ["IVON", "VariationalOnlineNewton"]


class VariationalOnlineNewton(torch.optim.Optimizer):
    r"""q(θ) = Normal(m, diag(σ²)), where m are the parameters themselves and σ² = 1 / λ(h + δ).

    .. math::
        θ &= m + σ ε, \quad \hat g = ∇\bar{\ell}(θ), \quad \hat h = \hat g \, ε / σ \\
        g &← β_1 g + (1 - β_1) \hat g \\
        h &← β_2 h + (1 - β_2) \hat h + \tfrac12 (1 - β_2)^2 (h - \hat h)^2 / (h + δ) \\
        m &← m - α \, \big( g / (1 - β_1^t) + δ m \big) / (h + δ)

    It minimises :math:`λ E_q[\bar{\ell}(θ)] + KL(q ‖ p)` with p = Normal(0, 1 / λδ), where
    :math:`\bar{\ell}` is the mean loss: with λ = N that is the negative ELBO. Gradients are taken
    within :meth:`drawn`::

        with optimizer.drawn():
            loss().backward()
        optimizer.step()

    :param lr: α.
    :param ess: λ.
    :param hess_init: h at the start.
    :param weight_decay: δ.
    :param clip_radius: bound on each number of the Newton step (…) / (h + δ), which α multiplies.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        ess: float,
        hess_init: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.99999),
        clip_radius: float = math.inf,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})
        self._ess, self._clip_radius = ess, clip_radius
        self._noise: dict[Tensor, Tensor] = {}
        for parameter in self._parameters():
            self.state[parameter] = {
                "step": torch.zeros(()),
                "momentum": torch.zeros_like(parameter),
                "hess": torch.full_like(parameter, hess_init),
            }

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def scale(self, parameter: Tensor) -> Tensor:
        """σ of a parameter's numbers."""
        (delta,) = {group["weight_decay"] for group in self.param_groups}
        sigma: Tensor = (self._ess * (self.state[parameter]["hess"] + delta)).rsqrt()
        return sigma

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """The parameters at a draw of q, until the context ends."""
        with torch.no_grad():
            means = {p: p.detach().clone() for p in self._parameters()}
            self._noise = {p: torch.randn_like(p) for p in means}
            for p, epsilon in self._noise.items():
                p.addcmul_(self.scale(p), epsilon)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, mean in means.items():
                    p.copy_(mean)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move m and h by the gradients that were taken at the last draw."""
        for group in self.param_groups:
            delta, (beta1, beta2) = group["weight_decay"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                h, g = state["hess"], state["momentum"]
                estimate = p.grad * self._noise[p] / self.scale(p)
                g.lerp_(p.grad, 1 - beta1)
                correction = 0.5 * (1 - beta2) ** 2 * (h - estimate) ** 2 / (h + delta)
                h.lerp_(estimate, 1 - beta2).add_(correction)
                newton = (g / (1 - beta1 ** float(state["step"])) + delta * p) / (h + delta)
                p.sub_(group["lr"] * newton.clamp(-self._clip_radius, self._clip_radius))


class _AtADraw:
    """An ELBO whose gradients are taken at a draw of the optimizer's q."""

    def __init__(self, optimizer: VariationalOnlineNewton) -> None:
        self._optimizer = optimizer
        self._elbo = Trace_ELBO(max_plate_nesting=1)

    def loss_and_grads(self, model: Any, guide: Any, batch: Batch) -> float:
        with self._optimizer.drawn():
            return float(self._elbo.loss_and_grads(model, guide, batch))


@dataclass(frozen=True)
class IVON(LoRAMethod):
    r"""Variational inference over every entry of A, B and heads, by its own optimizer.

    See :class:`VariationalOnlineNewton`. What a readout trains, such as log κ, is random too. The
    published settings for Llama-2-7B have λ far above N, which is a cold posterior, and
    β₂ = 0.99999, with which h stays near its start in a short run.

    :param ess: λ; N, with which it is the ELBO, if ``None``.
    :param prior_scale: standard deviation of the prior, (λδ)^(−1/2).
    :param hess_init: h at the start, which sets σ as long as h has not moved far.
    :param beta2: β₂.
    :param clip_radius: bound on each number of the Newton step.
    :param draws: S, the draws that predictions average over; 0 predicts at the mean m.
    """

    name: ClassVar[str] = "ivon"
    ignores: ClassVar[tuple[str, ...]] = (*LoRAMethod.ignores, "lr_guide", "eps")

    config: FitConfig = FitConfig(lr=0.1, clip_norm=math.inf)  # noqa: RUF009  (frozen)
    ess: float | None = None
    prior_scale: float = 0.2
    hess_init: float = 1.0
    beta2: float = 0.999
    clip_radius: float = 0.1
    draws: int = 10

    def __post_init__(self) -> None:
        for name in ("ess", "prior_scale", "hess_init", "clip_radius"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: expected a number above 0")
        if not 0 < self.beta2 < 1:
            raise ValueError(f"beta2 is {self.beta2}: expected a number between 0 and 1")
        if self.draws < 0:
            raise ValueError(f"draws is {self.draws}: expected 1 or more, or 0 for the mean")
        if self.config.accumulation != 1:
            raise ValueError(
                f"accumulation is {self.config.accumulation}, but a step of ivon has one draw: set"
                " a larger batch_size instead"
            )
        if self.config.weight_decay:
            raise ValueError(
                f"weight_decay is {self.config.weight_decay}: method ivon has a prior instead, set"
                " prior_scale"
            )
        if self.config.keep == "best":
            raise ValueError("keep is 'best', but h is the last one's: expected last")
        if math.isfinite(self.config.clip_norm):
            raise ValueError(
                f"clip_norm is {self.config.clip_norm}, which would shrink the estimate of h, and"
                " with it σ, too: method ivon has clip_radius, set clip_norm=inf"
            )

    def make_optimizer(self, model: LoRAModel) -> VariationalOnlineNewton:
        """q(θ)."""
        ess = float(model.num_data) if self.ess is None else self.ess
        return VariationalOnlineNewton(
            model.adapter.named_parameters().values(),
            lr=self.config.lr,
            ess=ess,
            hess_init=self.hess_init,
            weight_decay=1 / (ess * self.prior_scale**2),
            betas=(0.9, self.beta2),
            clip_radius=self.clip_radius,
        )

    @torch.no_grad()
    def make_predictor(
        self, model: LoRAModel, posterior: VariationalOnlineNewton, *, seed: int
    ) -> RunPredictor:
        """Averages over S draws, or is at the mean."""
        if not self.draws:
            return Predictor(model.adapter)
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, mean in model.adapter.named_parameters().items():
            noise = torch.randn(self.draws, *mean.shape, generator=generator).to(mean)
            weights[name] = mean + posterior.scale(mean) * noise
        return WeightAverage(model.adapter, weights)

    def restore(
        self, adapter: SubspaceAdapter, state: Mapping[str, Tensor], **_: Any
    ) -> RunPredictor:
        return WeightAverage.restored(adapter, state) if state else Predictor(adapter)

    def _train(self, model: Any, guide: Any, train: Split, **options: Any) -> FitResult:
        return super()._train(model, guide, train, elbo=_AtADraw(options["optimizer"]), **options)
