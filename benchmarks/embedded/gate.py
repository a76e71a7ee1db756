"""Gate of the embedded world and model: what plain LoRA does on them by maximum likelihood.

    python -m benchmarks.embedded.gate --save

Fine-tunes the embedded model for a fixed budget with
PEFT alone, 5 seeds, and prints one JSON object as its last line. The gate: at least 60 % of the
known facts right, and the unseen ones at chance. The learning rate is the one with the best
accuracy on validation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks._report import report
from scalabl_pyro.data.records import Record
from scalabl_pyro.data.world import COLOURS, prompt, world, world_hash
from scalabl_pyro.embedded import model_hash, model_path

SEEDS = range(5)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
STEPS, BATCH = 500, 16
BINS = 15

Encoded = dict[str, torch.Tensor]


def encode(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> Encoded:
    """Left-padded prompts with explicit positions, and the labels."""
    texts = [prompt(record.question) for record in records]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    mask = encoded["attention_mask"]
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": torch.tensor([record.label for record in records]),
    }


def answer_logits(model: PreTrainedModel, batch: Encoded, answers: torch.Tensor) -> torch.Tensor:
    """Logits (B, C) of the answers behind the prompts."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, answers].float()


def load() -> PreTrainedModel:
    """The embedded model in float32."""
    return AutoModelForCausalLM.from_pretrained(
        model_path(), dtype=torch.float32, attn_implementation="eager"
    )


def fine_tune(data: Encoded, answers: torch.Tensor, learning_rate: float, seed: int) -> PeftModel:
    """Plain LoRA by maximum likelihood for a fixed number of steps; linear decay, no early stop."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(load(), config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(STEPS):
        if len(order) < BATCH:
            order = torch.randperm(len(data["labels"]))
        rows, order = order[:BATCH], order[BATCH:]
        batch = {name: value[rows] for name, value in data.items()}
        loss = cross_entropy(answer_logits(model, batch, answers), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: PreTrainedModel, data: Encoded, answers: torch.Tensor) -> dict[str, float]:
    """Accuracy, expected calibration error, and the mean NLL, confidence and entropy (in nats)."""
    starts = range(0, len(data["labels"]), 100)
    chunks = ({name: value[i : i + 100] for name, value in data.items()} for i in starts)
    logits = torch.cat([answer_logits(model, chunk, answers) for chunk in chunks])
    logp = logits.log_softmax(-1)
    confidence, predicted = logp.exp().max(-1)
    right = (predicted == data["labels"]).float()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add_(0, bins, right - confidence)
    return {
        "acc": right.mean().item(),
        "ece": gaps.abs().sum().item() / len(right),
        "nll": cross_entropy(logits, data["labels"]).item(),
        "confidence": confidence.mean().item(),
        "entropy": -(logp.exp() * logp).sum(-1).mean().item(),
    }


def summarise(runs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and standard error over seeds of each figure."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    root = len(runs) ** 0.5
    return {
        name: [round(statistics.mean(column), 4), round(statistics.stdev(column) / root, 4)]
        for name, column in columns.items()
    }


def rounded(splits: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The figures of one run, to four digits."""
    return {
        split: {name: round(figure, 4) for name, figure in row.items()}
        for split, row in splits.items()
    }


def gate() -> dict[str, object]:
    """Choose the learning rate on validation, train the seeds, and judge."""
    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    answers = torch.tensor([tokenizer.encode(f" {colour}") for colour in COLOURS]).squeeze(1)
    data = {name: encode(tokenizer, records) for name, records in world().splits.items()}

    base = load().eval()
    before = {name: evaluate(base, data[name], answers) for name in ("test", "unseen", "shifted")}
    rates: dict[float, dict[str, dict[str, float]]] = {}
    for rate in LEARNING_RATES:
        model = fine_tune(data["train"], answers, rate, seed=0)
        rates[rate] = {
            name: evaluate(model, data[name], answers) for name in ("validation", "test", "unseen")
        }
        accuracy = rates[rate]["validation"]["acc"]
        print(f"learning rate {rate:g}: validation accuracy {accuracy:.3f}", flush=True)
    rate = max(rates, key=lambda rate: rates[rate]["validation"]["acc"])

    splits = ("train", "test", "unseen", "shifted")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in splits}
    for seed in SEEDS:
        model = fine_tune(data["train"], answers, rate, seed)
        for name, results in runs.items():
            results.append(evaluate(model, data[name], answers))
        accuracies = ", ".join(f"{name} {results[-1]['acc']:.3f}" for name, results in runs.items())
        print(f"seed {seed}: accuracy on {accuracies}", flush=True)
    after = {name: summarise(results) for name, results in runs.items()}
    chance, (unseen, over_seeds) = 1 / len(COLOURS), after["unseen"]["acc"]
    error = (chance * (1 - chance) / len(data["unseen"]["labels"]) + over_seeds**2) ** 0.5
    known = after["test"]["acc"][0]
    return {
        "gate": {
            "known_acc": known,
            "unseen_acc": unseen,
            "unseen_standard_error": round(error, 4),
            "passed": known >= 0.60 and abs(unseen - chance) <= 2 * error,
        },
        "mle_mean_and_standard_error": after,
        "before_fine_tuning": rounded(before),
        "learning_rate": rate,
        "by_learning_rate_seed_0": {f"{r:g}": rounded(row) for r, row in rates.items()},
        "budget": {"steps": STEPS, "batch": BATCH, "seeds": list(SEEDS)},
        "world_sha256": world_hash(),
        "model_sha256": model_hash(),
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="also write results/gate.json")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    report("embedded.gate", gate(), save=arguments.save)


if __name__ == "__main__":
    main()
