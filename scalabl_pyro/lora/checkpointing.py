"""Gradient checkpointing: activations are computed again in the backward pass, with the same s."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers import PreTrainedModel

from .hooks import Hooks

__all__ = ["Checkpointing"]


class Checkpointing:
    """The blocks of a model that can recompute what they did, and whether they do.

    :param llm: the model.
    :param hooks: those of its adapter, which read s.
    """

    def __init__(self, llm: PreTrainedModel, hooks: Hooks) -> None:
        self._llm = llm
        self._hooks = hooks
        self._blocks: list[nn.Module] = [
            module for module in llm.modules() if hasattr(module, "gradient_checkpointing")
        ]
        self._on = False

    def enable(self, *, dropout: bool) -> None:
        """Recompute from now on.

        :param dropout: whether the blocks' own dropout is wanted in training.
        """
        self._on = True
        self._llm.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": self._contexts}
        )
        if dropout:
            return
        # Blocks are in training mode while they are checkpointed, and some read it themselves.
        for block in self._blocks:
            for name, value in vars(block).items():
                if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                    setattr(block, name, 0.0)

    def train(self, mode: bool) -> None:
        """Tell the blocks, if they recompute: they look at their own flag before they do."""
        for block in self._blocks if self._on else ():
            block.training = mode

    def check(self) -> None:
        """Refuse a model on which somebody else has switched it on.

        :raises ValueError: if somebody has.
        """
        if not self._on and any(block.gradient_checkpointing for block in self._blocks):
            raise ValueError(
                "gradient checkpointing was switched on from outside and would recompute with"
                " another s, silently; pass gradient_checkpointing=True to SubspaceAdapter instead"
            )

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # Recomputation must read what its own forward pass had, not what was bound last.
        return nullcontext(), self._hooks.rebound(self._hooks.bound)
