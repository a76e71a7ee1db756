"""What the likelihood of the choices costs over answer letters, on a real model.

    python -m benchmarks.cost.choices --model FOLDER --save

A pass and a training step (forward and backward) of the same questions with C = 4 choices, at two
lengths of the prompt: ``packed``, one row with the prompt once; ``separate``, a row for each
choice, as evaluation harnesses run it; ``letters``, the same question read by answer letters, one
row and four label words. The three alternate in one process, on the GPU if there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks._report import report
from benchmarks.cost._steps import ratio, seconds
from scalabl_pyro import Record, SubspaceAdapter
from scalabl_pyro.data import PROMPTS, Batch
from scalabl_pyro.lora.config import AdapterConfig
from scalabl_pyro.readouts import ChoiceLikelihood, LabelTokens

CHOICES = (
    "the light of a distant star",
    "a stone that rolls down a hill",
    "the song of a small bird",
    "a storm over the open sea",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = ("packed", "separate", "letters")


def question_of(tokenizer, tokens: int) -> str:
    """A question whose prompt has about so many tokens."""
    text = "Which of these did people see, when they looked up at the sky of that night?"
    while len(tokenizer(text).input_ids) < tokens:
        text = "It was late, and nobody in the old town had gone to bed yet. " + text
    return tokenizer.decode(tokenizer(text).input_ids[-tokens:])


class Reader:
    """The questions as one readout reads them, on a model of its own."""

    def __init__(self, way: str, args: argparse.Namespace, records: list[Record]) -> None:
        llm = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=getattr(torch, args.dtype), attn_implementation=args.attention
        ).to(DEVICE)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        if way == "letters":
            readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=1024)
        else:
            readout = ChoiceLikelihood(
                tokenizer, PROMPTS["question"], num_classes=4, max_length=1024
            )
        self.adapter = SubspaceAdapter(llm, AdapterConfig(targets=args.targets).lora(), readout)
        if way == "separate":
            readout.packed = False
        split = readout.encode(records)
        self.batch: Batch = split.collate(list(split)).to(DEVICE)
        self.tokens = self.batch.inputs["input_ids"].numel() // len(records)

    @torch.no_grad()
    def run_pass(self) -> None:
        self.adapter(self.batch, self.adapter.init_loc)

    def run_step(self) -> None:
        s = self.adapter.init_loc.clone().requires_grad_()
        torch.nn.functional.cross_entropy(self.adapter(self.batch, s), self.batch.labels).backward()


def interleaved(runs: Mapping[str, Callable[[], None]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each run, in turn; the first round is left out."""
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(pairs + 1):
        for way, run in runs.items():
            times[way].append(seconds(run))
    return {way: taken[1:] for way, taken in times.items()}


def measure(args: argparse.Namespace, tokens: int) -> dict[str, object]:
    """Medians in milliseconds, and ratios with their intervals."""
    question = question_of(AutoTokenizer.from_pretrained(args.model), tokens)
    records = [Record(str(n), question, CHOICES, n % 4) for n in range(args.batch)]
    readers = {way: Reader(way, args, records) for way in WAYS}
    figures: dict[str, object] = {"tokens a question": {w: r.tokens for w, r in readers.items()}}
    for name in ("pass", "step"):
        runs = {way: getattr(reader, f"run_{name}") for way, reader in readers.items()}
        times = interleaved(runs, args.pairs)
        row: dict[str, object] = {
            f"{way}_ms": 1e3 * sorted(values)[len(values) // 2] for way, values in times.items()
        }
        for other in ("letters", "separate"):
            row[f"packed / {other}"], row[f"packed / {other}, 95 %"] = ratio(
                times["packed"], times[other]
            )
        figures[name] = row
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a causal model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[40, 400])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="write results/choices.json")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    report("cost.choices", {str(n): measure(args, n) for n in args.tokens}, save=args.save)


if __name__ == "__main__":
    main()
