"""The settings of training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral

import torch

from .kl import KLSchedule

__all__ = ["FitConfig"]


@dataclass(frozen=True, slots=True)
class FitConfig:
    """Settings of :func:`fit`, with the defaults of configs/base.yaml.

    :param steps: T, the optimizer's steps.
    :param batch_size: B of a minibatch.
    :param lr: learning rate of the projections and heads.
    :param lr_guide: learning rate of the guide, and of what a readout trains of its own.
    :param weight_decay: AdamW's decoupled decay of the projections and heads. It is no Gaussian
        prior: the share it takes depends neither on N nor on the gradient's scaling.
    :param eps: AdamW's ε, beside the root of the second moment.
    :param warmup: share of the steps over which learning rates rise linearly from 0.
    :param decay: how they fall afterwards: to 0 (``linear``, ``cosine``) or not (``constant``).
    :param clip_norm: largest norm of the gradient of −ELBO/N.
    :param accumulation: minibatches in a step.
    :param kl: schedule of the KL weight.
    :param kl_budget: C > 0 in nats: :class:`~scalabl_pyro.infer.KLBudget` adapts the weight on top
        of its schedule, so that KL(q‖p) goes to C, and ends the nearer the more steps there are.
        No budget if left out.
    :param eval_every: steps between two validations, of which the last is at the end; 0 validates
        never.
    :param keep: which state to end with: the last, or the one with the best validation NLL.
    :param patience: end after so many validations in a row without a lower NLL; 0 never does. The
        schedules are those of all steps.
    :raises ValueError: if a value is out of range.
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 1e-3
    lr_guide: float = 1e-2
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup: float = 0.06
    decay: str = "linear"
    clip_norm: float = 1.0
    accumulation: int = 1
    kl: KLSchedule = field(default_factory=KLSchedule)
    kl_budget: float | None = None
    eval_every: int = 0
    keep: str = "last"
    patience: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "steps": (1, math.inf),
            "batch_size": (1, math.inf),
            "lr": (0, torch.finfo(torch.float32).max),
            "lr_guide": (0, torch.finfo(torch.float32).max),
            "weight_decay": (0, torch.finfo(torch.float32).max),
            "eps": (0, torch.finfo(torch.float32).max),
            "warmup": (0, 1),
            "accumulation": (1, math.inf),
            "eval_every": (0, math.inf),
            "patience": (0, math.inf),
        }
        if not isinstance(self.kl, KLSchedule):
            raise ValueError(f"kl is {self.kl!r}: expected a KLSchedule, such as KLSchedule(10.0)")
        for name in ("steps", "batch_size", "accumulation", "eval_every", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} is {value!r}: expected a whole number")
            object.__setattr__(self, name, int(value))  # of NumPy's, which JSON does not know
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                expected = f"{low} to {high}" if high == 1 else f"a finite number from {low} on"
                raise ValueError(f"{name} is {getattr(self, name)}: expected {expected}")
        if not self.clip_norm > 0:
            raise ValueError(
                f"clip_norm is {self.clip_norm}: expected a number above 0; inf is off"
            )
        if self.kl_budget is not None and not 0 < self.kl_budget < math.inf:
            raise ValueError(
                f"kl_budget is {self.kl_budget!r}: expected a finite number of nats above 0"
            )
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"decay is {self.decay!r}: expected constant, linear or cosine")
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep is {self.keep!r}: expected last or best")
        if self.keep == "best" and not self.eval_every:
            raise ValueError("keep is 'best', but eval_every is 0: set how often to validate")
        if self.patience and not self.eval_every:
            raise ValueError(
                f"patience is {self.patience}, but eval_every is 0: set how often to validate"
            )

    def lr_factor(self, step: int) -> float:
        """The factor on both learning rates at 0-based ``step``."""
        warmup = self.warmup * self.steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.decay == "constant":
            return 1.0
        left = (self.steps - step) / max(self.steps - warmup, 1.0)
        return left if self.decay == "linear" else (1 - math.cos(math.pi * left)) / 2

    @property
    def rates(self) -> dict[str, float]:
        """Those of AdamW's two groups of parameters."""
        return {"lr": self.lr, "lr_guide": self.lr_guide, "weight_decay": self.weight_decay}

    @property
    def reach(self) -> float:
        r"""About the furthest that a parameter of the guide can get, lr_guide · Σ_t factor_t.

        A step of Adam moves a parameter by about its learning rate at most. With σ = softplus(u),
        \|Δ log σ\| ≤ \|Δu\|: below 1, σ cannot change by a factor e.
        """
        return self.lr_guide * sum(map(self.lr_factor, range(self.steps)))
