"""Files that are written whole or not at all; nothing else in the package renames."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError

__all__ = [
    "check_writable",
    "json_text",
    "new_path",
    "put",
    "room_for",
    "whole_file",
    "whole_folder",
    "write_whole",
]


def json_text(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """JSON (RFC 8259), which knows no NaN and no infinity: ``null`` stands for them."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def new_path(path: Path) -> Path:
    """The path of an output, a file or a folder, which can be made, but is not there yet.

    :raises FileExistsError: if it exists.
    :raises OSError: if its name is too long.
    :raises PermissionError: if it cannot be made where it is to be.
    """
    _check_name(path)
    if path.exists():
        raise FileExistsError(f"the output {path} exists; choose another output, or remove it")
    check_writable(path)
    return path


def check_writable(path: Path) -> None:
    """Try whether ``path`` could be written, before the work that it is to hold.

    :raises OSError: if its name is too long.
    :raises PermissionError: if no file can be made in the folder that is to hold it.
    """
    _check_name(path)
    there = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PermissionError(
            f"{path} cannot be written, for {there} takes no new file: choose another output"
        ) from error


def _check_name(path: Path) -> None:
    """Names are tried with the longest ending that unfinished files and folders take."""
    for part in path.absolute().parts[1:]:
        try:
            Path(path.absolute().anchor, f"{part}.unfinished").exists()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise OSError(
                f"the name {part[:40]!r}… of {len(part)} characters is too long to be written, as"
                " unfinished files need a longer one: choose a shorter name"
            ) from error


@contextmanager
def room_for(path: Path, then: str = "") -> Iterator[None]:
    """Whatever is written in here for ``path``: if the disk is full, an error that names it, which
    that of safetensors does not, and is no ``OSError``.

    :param then: what to do about it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EDQUOT) and "os error 28" not in str(error):
            raise
        message = f"the disk is full: {path} could not be written{then}"
        raise OSError(errno.ENOSPC, message) from error


def _beside(path: Path) -> Path:
    """A name for what is not finished, which no other process takes, and nobody has taken."""
    while (part := path.with_name(f"{path.name}.{token_hex(2)}.part")).exists():
        pass
    return part


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the context ends, and is
    removed where it ends by an error.

    :raises FileExistsError: if the folder exists, or another process has made it meanwhile.
    """
    part = _beside(new_path(folder))
    part.mkdir(parents=True)
    try:
        with room_for(folder):
            yield part
        new_path(folder)
        put(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the context ends, and is removed
    where it ends by an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    try:
        with room_for(path):
            yield part
        put(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def put(part: Path, path: Path) -> None:
    """Rename a finished file or folder so that a loss of power leaves the old one or the new one.

    What is in it has to be on the disk before its name is, and the name before anybody relies on
    it: a rename alone promises neither. Who may read a file is as the umask says: safetensors 0.8
    makes files that nobody else can read, a server under another account among them
    (safetensors issue 782).
    """
    mask = os.umask(0o022)  # which cannot be asked for alone
    os.umask(mask)
    for inside in [*part.rglob("*"), part]:
        if inside.is_file():
            mode = inside.stat().st_mode
            if mode | (0o666 & ~mask) != mode:
                with suppress(OSError):  # some mounts know no modes
                    inside.chmod(mode | (0o666 & ~mask))
        _sync(inside)
    os.replace(part, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
