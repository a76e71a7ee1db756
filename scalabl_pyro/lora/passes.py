"""How often a language model is run, in rows that go through its blocks, and in what memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import world_size
from .adapter import SubspaceAdapter

__all__ = ["PassCounter", "Passes"]


@dataclass(frozen=True, slots=True)
class Passes:
    """What was run.

    :param forward: passes of one row of tokens through all blocks; ``None`` of a model whose blocks
        are not known.
    :param backward: the same of gradients.
    :param seconds: on the clock, whatever else the machine was doing.
    :param peak: the most bytes that tensors took at once on each GPU, added; ``None`` on a CPU,
        where nobody counts them, where several processes train together, and in folders that were
        written before it was counted.
    """

    forward: float | None
    backward: float | None
    seconds: float
    peak: float | None = None


class PassCounter:
    """Counts passes of adapters' language models.

    A row that goes through some of the blocks counts as their share: a trunk that all draws have
    in common counts once. Embeddings and heads are not counted.
    """

    def __init__(self) -> None:
        self._known = True
        self.reset()

    def reset(self) -> None:
        """Start from 0."""
        self._forward = self._backward = 0.0
        self._started = time.perf_counter()
        if torch.cuda.is_initialized():  # before that there is nothing to reset, nor can be
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)

    def watch(self, adapter: SubspaceAdapter) -> None:
        """Count what this adapter's language model is run for, from now on."""
        # A block that is left out has another forward for a while, but what is in it is not called.
        inner = [child for block in adapter.trunk.blocks for child in [*block.children()][:1]]
        self._known = self._known and 0 < len(inner) == adapter.trunk.num_blocks
        for module in inner:
            module.register_forward_hook(self._hook(1 / len(inner)))

    def passes(self, examples: int = 1) -> Passes:
        """Since the last reset.

        :param examples: divides passes and seconds.
        """
        seconds = (time.perf_counter() - self._started) / examples
        devices = range(torch.cuda.device_count() if world_size() == 1 else 0)
        peak = sum(map(torch.cuda.max_memory_allocated, devices)) or None
        if not self._known:
            return Passes(None, None, seconds, peak)
        forward, backward = self._forward / examples, self._backward / examples
        # Shares of blocks, such as thirds, do not add up to the bit.
        return Passes(round(forward, 6), round(backward, 6), seconds, peak)

    def _hook(self, share: float) -> Callable[..., None]:
        def passed(module: nn.Module, args: Any, output: Any) -> None:
            hidden: Tensor = output if isinstance(output, Tensor) else output[0]
            weight = share * len(hidden)
            self._forward += weight
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: self._back(weight))

        return passed

    def _back(self, weight: float) -> None:
        self._backward += weight
