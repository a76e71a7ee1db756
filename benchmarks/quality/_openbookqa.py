"""The work that several benchmarks share: an encoder on 1,000 questions of OpenBookQA."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from benchmarks._runs import cached, finished, keep
from scalabl_pyro.data import Split, disjoint, read_folder
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import Classes, load_readout, make_adapter
from scalabl_pyro.methods import Fitted, Method
from scalabl_pyro.prediction.detection import auroc
from scalabl_pyro.prediction.metrics import entropy, evaluate, mutual_information
from scalabl_pyro.prediction.predictor import Predicts, predict

TRAIN, OOD = 1000, "college_physics"
#: those that finished runs have, beside which new ones stand
METRICS = ("acc", "ece", "nll", "brier", "entropy", "mutual_information")


class Bench:
    """all-MiniLM-L6-v2, multiple choice, LoRA r = 8 on query and value (M = 12).

    :param model: folder of the encoder.
    :param data: folder with ``openbookqa/`` and ``mmlu/``, JSON Lines of records.
    :param runs: JSON Lines of finished runs, which are not run again.
    :param dtype: of the frozen weights.
    """

    #: of a forward pass in prediction, before draws multiply it
    batch_size = 64

    def __init__(self, model: str, data: str, runs: str | Path, *, dtype: str = "bfloat16") -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.runs = Path(runs)
        self.config = ModelConfig(model, readout="multiple_choice", dtype=dtype, attention="eager")
        # The runs that are kept had a random V where nothing else is said.
        self.adapter = AdapterConfig(
            targets=("query", "value"), heads=("classifier",), subspace="random"
        )
        records = disjoint(read_folder(Path(data) / "openbookqa"))
        records["train"] = records["train"][:TRAIN]
        records["ood"] = read_folder(Path(data) / "mmlu" / OOD)["test"]
        self.readout = load_readout(self.config, Classes(4))
        self.splits: dict[str, Split] = {k: self.readout.encode(v) for k, v in records.items()}

    def fit(
        self, method: Method, seed: int, *, questions: slice = slice(None), **adapter: Any
    ) -> Fitted:
        """Train on the 1,000 questions, or some of them.

        :param adapter: settings of the adapter that differ.
        """
        settings = replace(self.adapter, **adapter)
        train = self.readout.encode(self.splits["train"].records[questions])
        make = partial(make_adapter, self.config, settings, self.readout, prompts=train)
        return method.fit(make, train, self.splits["validation"], seed=seed)

    def validate(self, predictor: Predicts) -> dict[str, float]:
        predictions = predict(predictor, self.splits["validation"])
        return evaluate(predictions.logits, predictions.labels)

    def test(self, predictor: Predicts) -> dict[str, float]:
        """Metrics on test, and AUROCs of the two uncertainties.

        ``wrong``: tells wrong answers from right ones; ``ood``: tells college physics from test.
        """
        test, ood = (predict(predictor, self.splits[name]) for name in ("test", "ood"))
        evaluated = evaluate(test.logits, test.labels)
        metrics = {name: evaluated[name] for name in METRICS}
        wrong = test.logits.softmax(-1).mean(0).argmax(-1) != test.labels
        for name, score in (("entropy", entropy), ("mi", mutual_information)):
            metrics[f"{name}_auroc_wrong"] = auroc(score(test.logits), wrong)
            metrics[f"{name}_auroc_ood"] = auroc_between(score(test.logits), score(ood.logits))
        return metrics

    def cached(self, name: str, run: Callable[[], dict]) -> dict:
        """The result of an earlier run, or run now."""
        return cached(self.runs, name, run)

    def finished(self) -> dict[str, Any]:
        """What is known of each run, by name."""
        return finished(self.runs)

    def keep(self, name: str, figures: dict) -> None:
        keep(self.runs, name, figures)


def auroc_between(known: torch.Tensor, other: torch.Tensor) -> float:
    """AUROC of a score for telling two samples apart, high for ``other``."""
    return auroc(torch.cat([known, other]), torch.arange(len(known) + len(other)) >= len(known))
