"""As much at once as memory allows: where it runs out, half as much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

__all__ = ["halving"]

T = TypeVar("T")


def halving(
    total: int,
    size: Callable[[], int],
    run: Callable[[slice], T],
    shrink: Callable[[int, int], None],
) -> Iterator[T]:
    """What ``run`` gives of parts of a sequence, one after another.

    :param total: the length of the sequence.
    :param size: the most that may run at once, asked before each part.
    :param run: of the part of the sequence that a slice says.
    :param shrink: told how many ran out of memory, and half of them, before these are run; what
        ``size`` says from then on should be no more.
    :raises torch.OutOfMemoryError: if a single one does not fit.
    """
    done = 0
    while done < total:
        part = slice(done, min(done + size(), total))
        count = part.stop - part.start
        try:
            result = run(part)
        except torch.OutOfMemoryError:
            if count == 1:
                raise
        else:
            yield result
            done = part.stop
            continue
        # Outside the handler, whose traceback keeps the failed pass in memory.
        shrink(count, count // 2)
