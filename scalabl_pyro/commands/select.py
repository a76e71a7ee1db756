"""``scalabl select``: the records of a file that are most worth a label."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data import Columns, Split
from ..files import json_text, write_whole
from ..models.model import ScalaBLModel
from ..prediction.selection import check_selection, select
from ..runs.folder import Run, load_run
from ..runs.predictors import PredictionConfig, make_predictor
from ._input import read_input
from ._jsonl import new_jsonl
from ._unfamiliar import trained_on

__all__ = ["SelectConfig", "select_records"]


@dataclass(frozen=True, slots=True)
class SelectConfig:
    """Settings of ``scalabl select``, described in configs/select.yaml."""

    run: str
    input: str
    output: str
    count: int
    by: str = "bald"
    columns: Columns = field(default_factory=Columns)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_selection(self.count, self.by)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: expected 1 or more")
        if self.prediction.tolerance is not None:
            raise ValueError(
                f"prediction.tolerance is {self.prediction.tolerance}: leave it out, for records"
                " are compared by the same number of draws"
            )
        self.prediction.check_seed()


def select_records(config: SelectConfig) -> dict[str, Any]:
    """Write the chosen records, the first first, as JSON Lines that take a ``label`` each.

    :returns: how many were chosen, and the highest and the lowest of their scores.
    :raises FileExistsError: if the output exists.
    :raises ValueError: if a record is bad, or too few have no label; or ``novelty`` is asked of a
        run without a posterior over s, or whose training data cannot be read.
    """
    output = new_jsonl(Path(config.output))
    run = load_run(config.run)
    if run.readout.reads_texts:
        raise ValueError(f"{config.run} reads texts: expected a run that answers among choices")
    posterior: dict[str, Any] = {}
    if config.by == "novelty":
        posterior = {"model": run.model, "guide": run.guide, "train": _train(run)}
    selection = select(
        make_predictor(run, config.prediction),
        read_input(config.input, run, config.columns),
        config.count,
        by=config.by,
        seed=config.seed,
        batch_size=config.batch_size,
        **posterior,
    )
    rows = [asdict(record) for record in selection.records]
    lines = [
        json_text({k: v for k, v in row.items() if k != "label"}, ensure_ascii=False)
        for row in rows
    ]
    write_whole(output, "".join(line + "\n" for line in lines))
    return {
        "output": str(output),
        "records": len(selection.records),
        "by": config.by,
        "highest": float(selection.scores[0]),
        "lowest": float(selection.scores[-1]),
    }


def _train(run: Run) -> Split:
    """What the run was trained on."""
    if not isinstance(run.model, ScalaBLModel):
        raise ValueError(
            f"by is 'novelty', but method {run.config.method['name']} has no posterior over s: use"
            " by=entropy"
        )
    return trained_on(run, "by is 'novelty'", "use by=entropy")
