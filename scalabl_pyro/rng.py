"""Torch's random state, put back after use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["forked_rng"]


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """When the context ends, torch's random state is what it was, on the CPU and on every GPU, for
    seeding touches them all.

    :param seed: of the state inside; as it was if left out.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        if seed is not None:
            torch.manual_seed(seed)
        yield
