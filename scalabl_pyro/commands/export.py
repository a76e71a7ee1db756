"""``scalabl export``: a run as plain PEFT adapters, one a draw, and as a merged model."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import new_path
from ..runs.card import Figure, with_intervals
from ..runs.exports import check_output_layer, export, merge, push_to_hub
from ..runs.folder import load_run
from ..runs.reading import read_json, read_predictions

__all__ = ["ExportConfig", "export_run"]


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Settings of ``scalabl export``, described in configs/export.yaml."""

    run: str
    output: str
    draws: int | None = None
    output_layer: str = "keep"
    merged: bool = False
    push_to_hub: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        check_output_layer(self.output_layer)
        if self.draws is not None and self.draws < 0:
            raise ValueError(f"draws is {self.draws}: expected 0 or more, or null for all")


def export_run(config: ExportConfig) -> dict[str, Any]:
    """Export a run folder; what is uploaded has been written first."""
    output = new_path(Path(config.output))
    run = load_run(config.run)
    metrics = _figures(run.folder)
    settings, readout = run.config, run.readout
    export(run, output, draws=config.draws, output_layer=config.output_layer, metrics=metrics)
    summary: dict[str, Any] = {"output": str(output)}
    if config.merged:
        del run  # one model at a time
        gc.collect()
        merge(settings.model, readout, output / "median", output / "merged")
        summary["merged"] = str(output / "merged")
    if config.push_to_hub is not None:
        summary["url"] = push_to_hub(output, config.push_to_hub, private=config.private)
    return summary


def _figures(folder: Path) -> dict[str, dict[str, Figure]]:
    return with_intervals(read_json(folder / "metrics.json"), read_predictions(folder))
