"""What a training step costs on a real model, against the step that a PEFT user writes.

    python -m benchmarks.cost.real_step --model FOLDER --save

The user's step runs ``llm(**inputs, logits_to_keep=1).logits[:, -1, label_ids]``, cross-entropy and
one AdamW on a plain PEFT model; ours is a step of ``fit`` (ScalaBL, V frozen or free) on the same
questions, weights and batch. Both alternate in one process. ``cached``: the same with only the
upper blocks adapted, a step on what leaves the trunk against a step through all blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from pyro.infer import Trace_ELBO
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks._report import report
from benchmarks.cost._steps import Clock, OneBatch, ratio, seconds
from scalabl_pyro import AutoSubspaceNormal, FitConfig, Record, ScalaBLModel, SubspaceAdapter, fit
from scalabl_pyro.data import PROMPTS, Split
from scalabl_pyro.lora.config import AdapterConfig
from scalabl_pyro.readouts import LabelTokens

CHOICES = ("a star", "a stone", "a song", "a storm")


class Work:
    """Questions with four choices, and a model to read them by answer letters."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=512)
        records = [
            Record(str(n), f"Which of these is number {n}?", CHOICES, n % 4)
            for n in range(args.batch)
        ]
        self.split = self.readout.encode(records)

    def llm(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.args.model,
            dtype=getattr(torch, self.args.dtype),
            attn_implementation=self.args.attention,
        ).eval()

    def adapter(self, projections: str, layers: tuple[int, ...] = ()) -> SubspaceAdapter:
        lora = AdapterConfig(targets=("q_proj", "v_proj"), layers=layers).lora()
        return SubspaceAdapter(self.llm(), lora, self.readout, projections=projections)


def users_step(work: Work) -> Callable[[], float]:
    """Seconds of a step, as one writes it with PEFT alone."""
    llm = get_peft_model(work.llm(), AdapterConfig(targets=("q_proj", "v_proj")).lora())
    parameters = [p for p in llm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    batch = work.split.collate(list(work.split))
    label_ids = work.readout.label_ids

    def step() -> None:
        logits = llm(**batch.inputs, logits_to_keep=1).logits[:, -1, label_ids]
        nn.functional.cross_entropy(logits.float(), batch.labels).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: seconds(step)


def steps_of_fit(
    adapter: SubspaceAdapter, split: Split, pairs: int, other: Callable[[], float]
) -> Clock:
    """Seconds of each step of ``fit``, and of the other side's, in turn."""
    model = ScalaBLModel(adapter, num_data=len(split))
    clock = Clock(other)
    config = FitConfig(steps=pairs + 2, lr=1e-4, eval_every=1)
    batch = split.collate(list(split))
    guide = AutoSubspaceNormal(model)
    fit(model, guide, OneBatch(batch), config, validate=clock.validate, progress=False)
    return clock


def elbo_step(adapter: SubspaceAdapter, split: Split) -> Callable[[], float]:
    """Seconds of a step on the ELBO, by hand, so that two adapters can take theirs in turn."""
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    elbo = Trace_ELBO(max_plate_nesting=1)
    parameters = [*adapter.named_parameters().values(), *guide.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    batch = split.collate(list(split))

    def step() -> None:
        elbo.loss_and_grads(model, guide, batch)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: seconds(step)


def summary(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    median, interval = ratio(ours, theirs)
    medians = {"ours_ms": 1e3 * float(np.median(ours)), "theirs_ms": 1e3 * float(np.median(theirs))}
    return {"ratio": median, "ratio_95": interval} | medians


def measure(work: Work, pairs: int, upper: int) -> dict[str, Any]:
    other = users_step(work)
    figures: dict[str, Any] = {"tokens": max(work.split.lengths)}
    for projections in ("frozen_v", "free"):
        clock = steps_of_fit(work.adapter(projections), work.split, pairs, other)
        figures[projections] = summary(clock.ours[2:], clock.theirs[2:])
    blocks = work.llm().config.num_hidden_layers
    layers = tuple(range(blocks - upper, blocks))
    cached, full = work.adapter("frozen_v", layers), work.adapter("frozen_v", layers)
    split = cached.cache_trunk(work.split, batch_size=len(work.split))
    steps = elbo_step(cached, split), elbo_step(full, work.split)
    times = np.array([[step() for step in steps] for _ in range(pairs + 2)])[2:]
    figures[f"cached, {upper} upper blocks"] = summary(*times.T.tolist())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a causal model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--upper", type=int, default=8, help="blocks above the cached trunk")
    parser.add_argument("--save", action="store_true", help="write results/real_step.json")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    report("cost.real_step", measure(Work(args), args.pairs, args.upper), save=args.save)


if __name__ == "__main__":
    main()
