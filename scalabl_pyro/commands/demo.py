"""Over-confidence and its cure on real questions, in minutes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import embedded
from ._formats import format_table
from ._report import written
from .compare import CompareConfig, compare

__all__ = ["demonstrate"]


def demonstrate(config: CompareConfig) -> str:
    """``scalabl demo``: the table of the seeds that run now, and that of five seeds, as text."""
    table = compare(config)
    five_seeds = json.loads((files(embedded) / "demo.json").read_text())["figures"]
    return "\n".join(
        [
            *(f"  {line}" for line in confidence(table)),
            "",
            format_table(table),
            "",
            written(Path(config.out)),
            "",
            "The same with five seeds, run before (benchmarks/quality/demo.py):",
            "",
            *(f"  {line}" for line in confidence(five_seeds)),
            "",
            format_table(five_seeds),
        ]
    )


def confidence(table: Mapping[str, Any]) -> list[str]:
    """For each row of a table, how sure it says to be on test, and how often it is right."""
    lines = []
    for name, row in table["metrics"].items():
        sure = 100 * table["confidence"][name]["test"]["mean"]
        right = 100 * row["test"]["acc"]["mean"]
        lines.append(f"{name:10s} says {sure:3.0f} % on average and is right in {right:3.0f} %")
    return lines
