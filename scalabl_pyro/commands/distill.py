"""``scalabl distill``: a run's model average in one plain PEFT adapter."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import Columns, Split
from ..files import new_path, whole_folder
from ..infer.fit_config import FitConfig
from ..lora.loading import make_adapter
from ..lora.saving import write_adapter
from ..prediction.distillation import distill, divergence
from ..prediction.metrics import average
from ..prediction.predictor import Predictor, predict
from ..readouts.choice_likelihood import ChoiceLikelihood
from ..runs.folder import load_run
from ._input import read_input

__all__ = ["DistillConfig", "distill_run"]

#: nats by which two equal divergences in float32 may differ
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """Settings of ``scalabl distill``, described in configs/distill.yaml."""

    run: str
    input: str
    output: str
    columns: Columns = field(default_factory=Columns)
    fit: FitConfig = field(default_factory=FitConfig)
    batch_size: int = 64
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: expected 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: expected 0 to 2^32 − 1")


def distill_run(config: DistillConfig) -> dict[str, Any]:
    """Teach a plain LoRA adapter the average on a file's records, from the posterior's median on.

    :returns: the mean KL(average ‖ student) in nats on these records, before and after.
    :raises ValueError: if a record is bad, or the run is a point estimate.
    :raises RuntimeError: if the student is no nearer to the average than the posterior's median.
    :raises FileExistsError: if the output exists.
    """
    output = new_path(Path(config.output))
    run = load_run(config.run)
    if run.readout.reads_texts:
        raise ValueError(
            f"{config.run} reads texts: expected a run that answers among choices; export its"
            " draws, or its median, instead"
        )
    if run.predictor.num_draws == 1:
        raise ValueError(f"{config.run} is a point estimate: there is no average to distill")
    split = run.encode(read_input(config.input, run, config.columns))
    log_probs = average(predict(run.predictor, split, batch_size=config.batch_size).logits)
    start = str(run.folder / "adapter")
    lora = replace(run.config.lora, start=start, subspace="random")
    settings, readout = run.config.model, run.readout
    own = run.predictor.adapter.readout_parameters  # of which no PEFT adapter knows
    del run  # one language model at a time
    gc.collect()
    student = make_adapter(settings, lora, readout, svd=False)
    for name, parameter in student.readout_parameters.items():
        parameter.data.copy_(own[name])
    predictor = Predictor(student)
    before = _divergence(predictor, split, log_probs, config)
    distill(student, split, log_probs, config.fit, seed=config.seed, progress=config.progress)
    after = _divergence(predictor, split, log_probs, config)
    if not after <= before + ROUNDING:
        raise RuntimeError(
            f"after {config.fit.steps} steps the student is further from the average than the"
            f" posterior's median, where it began: KL {after:.3g} against {before:.3g} nats on"
            f" {config.input}; nothing is written. Lower fit.lr, which is {config.fit.lr:g}, or"
            f" give it more fit.steps. The posterior's median itself is the adapter in {start}"
        )
    summary: dict[str, Any] = {"output": str(output), "kl_before": before, "kl_after": after}
    if isinstance(readout, ChoiceLikelihood):
        summary["kappa"] = float(readout.kappa(student.llm).detach())
    with whole_folder(output) as part:
        write_adapter(student, student.identity(), part)
        about = {"run": config.run, "input": config.input, "records": len(split)} | summary
        (part / "distilled.json").write_text(json.dumps(about, indent=2) + "\n")
    return summary


def _divergence(
    student: Predictor, split: Split, log_probs: Tensor, config: DistillConfig
) -> float:
    log_q = average(predict(student, split, batch_size=config.batch_size).logits)
    # In float32 they add up to 1 but for rounding, which a small divergence would be lost in.
    p, q = (each.double().log_softmax(-1) for each in (log_probs, log_q))
    return float(divergence(p, q).mean())
