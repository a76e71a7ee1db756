"""How good the likelihood of the choices is before any training.

    python -m benchmarks.quality.zero_shot --model FOLDER --data FOLDER --save

Accuracy, NLL, ECE and Brier score of SmolLM2-135M-Instruct (see ``--model``) on the whole test
splits of ARC-Easy and OpenBookQA, for each way to score a choice (``model.normalise``), at the κ of
lowest NLL on training questions. Finished ones are kept in ``--runs``, a folder, and not run again.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor

from benchmarks._report import RESULTS, report
from benchmarks._runs import cached
from benchmarks.quality.causal import TASKS, read_task, spread
from scalabl_pyro.data import Record
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import load_readout, make_adapter
from scalabl_pyro.prediction.metrics import evaluate
from scalabl_pyro.prediction.predictor import Predictor, predict
from scalabl_pyro.readouts import Readout
from scalabl_pyro.readouts.kappa import fit_kappa

#: training questions that choose κ
KAPPA = 200
#: what log p of a choice is divided by, of one pass over the questions
SIZES = ("characters", "tokens", "none")
#: accuracies in % that are published, from model cards and lm-evaluation-harness
PUBLISHED = {
    "arc_easy": {
        "SmolLM2-135M-Instruct, ARC-Easy, lm-evaluation-harness": 54.1,
        "SmolLM2-135M-Instruct, mean of ARC-Easy and ARC-Challenge, model card": 37.3,
    },
    "openbookqa": {"SmolLM2-135M (base model), model card": 34.6},
}


def scores(
    model: str, records: dict[str, list[Record]], normalise: str
) -> tuple[Readout, dict[str, Tensor]]:
    """The readout, and the scores (N, C) of each split's choices at κ = 1, before training."""
    config = ModelConfig(
        model,
        readout="choice_likelihood",
        dtype="bfloat16",
        attention="eager",
        normalise=normalise,
        temperature="none",
    )
    readout = load_readout(config, config.classes([r for each in records.values() for r in each]))
    settings = AdapterConfig(targets=("q_proj",), layers=(0,))  # untrained: the model as it is
    predictor = Predictor(make_adapter(config, settings, readout, svd=False))
    splits = {name: readout.encode(each) for name, each in records.items()}
    return readout, {
        name: predict(predictor, split, batch_size=8).logits[0] for name, split in splits.items()
    }


def divided(
    readout: Readout, records: dict[str, list[Record]], scored: dict[str, Tensor], normalise: str
) -> dict[str, Tensor]:
    """log p of each choice, divided by its size."""
    readout.normalise = normalise
    sizes = {name: readout.encode(each) for name, each in records.items()}
    return {
        name: scored[name] / split.collate(list(split)).inputs["sizes"]
        for name, split in sizes.items()
    }


def at_best_kappa(scored: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    """Metrics on test at the κ of lowest NLL on train."""
    kappa = fit_kappa(scored["train"], labels["train"])
    metrics = evaluate(kappa * scored["test"][None], labels["test"])
    error = (metrics["acc"] * (1 - metrics["acc"]) / len(labels["test"])) ** 0.5
    figures = {key: metrics[key] for key in ("acc", "nll", "ece", "brier")}
    return figures | {"kappa": kappa, "acc_standard_error": error}


def zero_shot(model: str, data: str, task: str) -> dict[str, Any]:
    """Figures of each way to score a choice."""
    all_records = read_task(data, task)
    records = {"train": spread(all_records["train"], KAPPA), "test": all_records["test"]}
    labels = {name: torch.tensor([r.label for r in each]) for name, each in records.items()}
    readout, scored = scores(model, records, "none")
    of_each = {size: divided(readout, records, scored, size) for size in SIZES}
    _, of_each["unconditional"] = scores(model, records, "unconditional")
    return {"n": len(records["test"]), "n_kappa": len(records["train"])} | {
        normalise: at_best_kappa(each, labels) for normalise, each in of_each.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="folder with arc_easy/ and openbookqa/")
    parser.add_argument("--runs", default=str(RESULTS / "causal"), help="folder of finished runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--save", action="store_true", help="write results/causal_zero_shot.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    figures = {}
    for task in args.tasks:
        run = partial(zero_shot, args.model, args.data, task)
        measured = cached(Path(args.runs) / "runs.jsonl", f"{task} scores before training", run)
        figures[task] = measured | {"published": PUBLISHED[task]}
    report("quality.zero_shot", figures, save=args.save, name="causal_zero_shot")


if __name__ == "__main__":
    main()
