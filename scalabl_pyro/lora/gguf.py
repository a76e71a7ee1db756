"""Models in GGUF files, whose blocks ``transformers`` unpacks to plain weights."""

from __future__ import annotations

import re
from pathlib import Path

from transformers.utils import is_gguf_available

__all__ = ["find_gguf"]


def find_gguf(name: str) -> tuple[str, str | None]:
    """Where a model is, and its GGUF file there; ``None`` for a checkpoint of the usual kind.

    :param name: a name on the Hub or a folder; ``<either>/<file>.gguf``; a folder with one such
        file and no config.json.
    :raises FileNotFoundError: if there is no such file in a folder.
    :raises ValueError: if a folder holds several, if the file is one part of several, or if the
        package gguf, which reads them, is not installed.
    """
    path, file = Path(name), None
    if path.suffix == ".gguf":
        file, name = path.name, str(path.parent)
        if path.parent.is_dir() and not path.is_file():
            raise FileNotFoundError(f"model {str(path)!r} not found: there is no such file")
    elif path.is_dir() and not (path / "config.json").exists():
        files = sorted(entry.name for entry in path.glob("*.gguf"))
        if len(files) > 1:
            raise ValueError(
                f"model {name!r} holds {files}: name one of them, as in"
                f" model.name={path / files[0]}"
            )
        file = files[0] if files else None
    if file is None:
        return name, None
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file):
        raise ValueError(
            f"model {file!r} is one part of several, which cannot be read: make one file of them,"
            " by llama-gguf-split --merge"
        )
    if not is_gguf_available():
        raise ValueError(f"model {file!r} is a GGUF file, which needs gguf: run pip install gguf")
    return name, file
