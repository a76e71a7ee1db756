"""``scalabl memory``: how much memory a run needs, before anything is downloaded."""

from __future__ import annotations

from typing import Any

from ..runs.memory import MemoryConfig, estimate

__all__ = ["MemoryConfig", "estimate_memory"]


def estimate_memory(config: MemoryConfig) -> dict[str, Any]:
    """GiB by what takes them."""
    return estimate(config).gib()
