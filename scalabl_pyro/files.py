"""Files that are written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["new_folder", "whole_folder", "write_whole"]


def new_folder(folder: Path) -> Path:
    """:raises FileExistsError: if the folder exists."""
    if folder.exists():
        raise FileExistsError(f"the folder {folder} exists; choose another, or remove it")
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the context ends.

    :raises FileExistsError: if the folder exists.
    """
    part = new_folder(folder).with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(folder)


def write_whole(path: Path, text: str) -> None:
    """Write a text to a temporary file beside ``path``, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
