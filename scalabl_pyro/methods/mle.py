"""Maximum likelihood: plain LoRA fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import LoRAMethod

__all__ = ["MLE"]


@dataclass(frozen=True)
class MLE(LoRAMethod):
    """argmax Σ_n log p(y_n | x_n) over A, B and heads; no weight decay."""

    name: ClassVar[str] = "mle"

    def __post_init__(self) -> None:
        if self.config.weight_decay:
            raise ValueError(
                f"method mle with weight_decay {self.config.weight_decay}: use method map for that"
            )
