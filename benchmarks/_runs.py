"""Finished runs of a benchmark: a file of JSON Lines, to which several processes may add."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["cached", "finished", "keep"]


def finished(file: Path) -> dict[str, Any]:
    """What is known of each run, by name."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {name: figures for line in lines for name, figures in json.loads(line).items()}


def keep(file: Path, name: str, figures: dict) -> None:
    """Add a run, in one write, so that processes may share the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps({name: figures}) + "\n")


def cached(file: Path, name: str, run: Callable[[], dict]) -> dict:
    """The result of a run that is finished, or that runs now and is kept."""
    known = finished(file)
    if name not in known:
        print(f"running {name}", flush=True)
        known[name] = run()
        keep(file, name, known[name])
    return known[name]
