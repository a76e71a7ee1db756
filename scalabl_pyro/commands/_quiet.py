"""What other libraries print while a command runs."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import torch
import transformers

__all__ = ["data_log_muted", "quiet_libraries", "quiet_worker"]

_DATA = logging.getLogger("scalabl_pyro.data")


def quiet_libraries() -> None:
    """Leave the terminal to our own output: no loading bars, and errors alone of what it logs."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def data_log_muted() -> Iterator[None]:
    """Say nothing of the data in here, of which all has been said."""
    before = _DATA.level
    _DATA.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _DATA.setLevel(before)


def quiet_worker(threads: int) -> None:
    """The same in a process of a pool, with its share of the threads.

    Processes that share cores and spin for each other's threads are many times slower. What there
    is to say of the data has been said by the process that started them, which read the same.
    """
    quiet_libraries()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    _DATA.setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """A worker whose pool was killed would go on, and keep the lock of its run."""
    parent.join()
    os._exit(1)
