"""What the output layer costs a causal model in bfloat16, before and after, interleaved.

    python -m benchmarks.cost.output_layer --model FOLDER --save

A step of training (forward and backward) and a pass without gradients, of one draw and of S at
once, on one adapter: with the model's own output layer on the slice of positions that it keeps
(``own``), with the same on a copy without gaps (``contiguous``), and with the rows of the label
words alone, in float32 (``rows``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._report import report
from scalabl_pyro import Record, SubspaceAdapter
from scalabl_pyro.data import PROMPTS, Batch
from scalabl_pyro.lora.config import AdapterConfig
from scalabl_pyro.readouts import LabelTokens


def measure(adapter: SubspaceAdapter, batch: Batch, pairs: int, draws: int) -> dict:
    """Median milliseconds of each way, and the ratio to the first."""
    llm = adapter.llm
    head = llm.get_output_embeddings()
    hooks, rows = dict(head._forward_pre_hooks), adapter._output_rows

    def choose(way: str) -> None:
        adapter._output_rows = rows if way == "rows" else None
        head._forward_pre_hooks.clear()
        if way != "own":
            head._forward_pre_hooks.update(hooks)

    one = adapter.init_loc
    many = one * (1 + 0.05 * torch.randn(draws, *adapter.shape))

    def step() -> None:
        s = one.clone().requires_grad_()
        torch.nn.functional.cross_entropy(adapter(batch, s), batch.labels).backward()

    def passes(s: torch.Tensor) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            adapter(batch, s)

        return run

    figures: dict[str, dict] = {}
    for name, run in (
        ("step", step),
        ("pass", passes(one)),
        (f"pass of {draws} draws", passes(many)),
    ):
        times: dict[str, list[float]] = {"own": [], "contiguous": [], "rows": []}
        for _ in range(pairs + 1):
            for way, taken in times.items():
                choose(way)
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
        medians = {way: 1e3 * float(np.median(taken[1:])) for way, taken in times.items()}
        speedup = {way: medians["own"] / medians[way] for way in ("contiguous", "rows")}
        figures[name] = {"ms": medians, "times_faster": speedup}
    return figures


def in_dtype(args: argparse.Namespace, dtype: str) -> dict:
    llm = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=512)
    lora = AdapterConfig(targets=("q_proj", "v_proj")).lora()
    adapter = SubspaceAdapter(llm, lora, readout)
    choices = ("a star", "a stone", "a song", "a storm")
    records = [
        Record(str(n), f"Which of these is number {n}?", choices, n % 4) for n in range(args.batch)
    ]
    split = readout.encode(records)
    figures = measure(adapter, split.collate(list(split)), args.pairs, args.draws)
    return figures | {"tokens": max(split.lengths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="write results/output_layer.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    report(
        "cost.output_layer", {dtype: in_dtype(args, dtype) for dtype in args.dtype}, save=args.save
    )


if __name__ == "__main__":
    main()
