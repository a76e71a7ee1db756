"""Plain LoRA fine-tuning with weight decay, which stands for maximum a posteriori."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..infer.fit_config import FitConfig
from .base import LoRAMethod

__all__ = ["MAP"]


@dataclass(frozen=True)
class MAP(LoRAMethod):
    """As MLE, with AdamW's decoupled weight decay on A, B and heads.

    The decay shrinks weights by a share of lr·weight_decay in each step, whatever N and Adam's
    scaling of the gradient. So the result is not exactly the mode under a Gaussian prior.
    """

    name: ClassVar[str] = "map"

    config: FitConfig = FitConfig(weight_decay=0.1)  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        if not self.config.weight_decay:
            raise ValueError("method map needs a weight_decay above 0; without one it is mle")
