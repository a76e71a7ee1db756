"""Zero-shot likelihoods of choices, ours and those of lm-evaluation-harness's own model ``hf``.

    python -m benchmarks.correctness.harness --model FOLDER --data FOLDER --save

The same model, prompt ("Question: …\\nAnswer:") and number format on both sides, on the first
questions of a test split. Ours reads the choices of a question as one packed row, ``hf`` each as a
row of its own. Its ``acc`` and ``acc_norm`` divide log p by nothing and by the choice's characters,
which is ``normalise=none`` and ``normalise=characters`` here. Needs the extra ``harness``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from benchmarks._report import report
from scalabl_pyro.data import Record, read_folder
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import load_readout, make_adapter
from scalabl_pyro.prediction.predictor import Predictor, predict

#: our name for what log p is divided by → the harness's metric
METRICS = {"none": "acc", "characters": "acc_norm"}


def ours(model: str, records: list[Record], dtype: str, batch_size: int) -> Tensor:
    """log p of each choice, (N, C), −inf where there is none."""
    config = ModelConfig(
        model,
        readout="choice_likelihood",
        dtype=dtype,
        device="cpu",
        normalise="none",
        temperature="none",
    )
    readout = load_readout(config, config.classes(records))
    untrained = AdapterConfig(targets=("q_proj",), layers=(0,))
    predictor = Predictor(make_adapter(config, untrained, readout, svd=False))
    return predict(predictor, records, batch_size=batch_size).logits[0]


def theirs(
    model: str, records: list[Record], dtype: str, batch_size: int
) -> tuple[Tensor, dict[str, float]]:
    """The same by ``hf``, and its own metrics."""
    lm = HFLM(model, device="cpu", dtype=dtype, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.jsonl"
        file.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
        task = {
            "task": "questions",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "metric_list": [{"metric": metric} for metric in METRICS.values()],
        }
        evaluation = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)
    samples = sorted(evaluation["samples"]["questions"], key=lambda sample: sample["doc_id"])
    most = max(len(record.choices) for record in records)
    log_probs = torch.full((len(records), most), float("-inf"))
    for n, sample in enumerate(samples):
        for c, ((log_prob, _),) in enumerate(sample["resps"]):
            log_probs[n, c] = log_prob
    results = evaluation["results"]["questions"]
    return log_probs, {metric: results[f"{metric},none"] for metric in METRICS.values()}


def compared(
    records: list[Record], mine: Tensor, other: Tensor, metrics: dict[str, float]
) -> dict[str, Any]:
    """How many predictions are equal, and the accuracies with their standard errors."""
    labels = torch.tensor([record.label for record in records])
    characters = torch.ones_like(mine)
    for n, record in enumerate(records):
        for c, choice in enumerate(record.choices):
            characters[n, c] = len(choice.strip())
    there = mine.isfinite()
    figures: dict[str, Any] = {
        "n": len(records),
        "largest_difference_of_log_p": float((mine - other)[there].abs().max()),
    }
    for normalise, metric in METRICS.items():
        size = characters if normalise == "characters" else torch.ones_like(mine)
        predictions, those = ((log_probs / size).argmax(-1) for log_probs in (mine, other))
        acc = float((predictions == labels).double().mean())
        figures[metric] = {
            "ours": acc,
            "hf": metrics[metric],
            "standard_error": (acc * (1 - acc) / len(records)) ** 0.5,
            "predictions_equal": int((predictions == those).sum()),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a folder with test.jsonl")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--save", action="store_true", help="also write results/harness.json")
    args = parser.parse_args()
    records = read_folder(Path(args.data))["test"][: args.questions]
    options = (args.model, records, args.dtype, args.batch_size)
    figures = {"dtype": args.dtype, "lm_eval": lm_eval.__version__}
    figures |= compared(records, ours(*options), *theirs(*options))
    report("correctness.harness", figures, save=args.save)


if __name__ == "__main__":
    main()
