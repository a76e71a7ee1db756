"""What the benchmarks of a training step share: a readout, a data set of one batch, a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from scalabl_pyro.data import Batch, Example, Record, Split
from scalabl_pyro.readouts.base import Readout


class LastToken(Readout):
    """The first C entries of the vocabulary at the last position: a readout without a tokenizer."""

    padding_side = "left"
    auto_class = "AutoModelForCausalLM"

    def __init__(self, num_classes: int = 4) -> None:
        self.num_classes = num_classes

    def _tokenize(self, record: Record) -> dict[str, list[list[int]]]:
        raise NotImplementedError("this readout is given tokens")

    def _truncate(self, record: Record) -> dict[str, list[list[int]]]:
        raise NotImplementedError("this readout is given tokens")

    def __call__(self, llm: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = llm(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits[:, : self.num_classes].float()


class OneBatch(Split):
    """The same batch for ever."""

    def __init__(self, batch: Batch) -> None:
        records = [Record(str(i), "q", ("a", "b"), 0) for i in range(len(batch))]
        examples = [Example({"input_ids": [[0]]}, 2, 0) for _ in records]
        super().__init__(records, examples, lambda _: batch)

    def minibatches(self, batch_size: int, **order: int) -> Iterator[Batch]:
        while True:
            yield self.collate([])


class Clock:
    """Splits ``fit`` at its steps: the loop calls back, so that the loop itself is measured.

    :param other: the other side's step, run between two of ours; returns its seconds.
    """

    def __init__(self, other: Callable[[], float] | None) -> None:
        self.other = other
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.start = 0.0

    def validate(self) -> float:
        """Called at the end of every step of ``fit``; runs the other side outside the clock."""
        synchronize()
        self.ours.append(time.perf_counter() - self.start)
        if self.other is not None:
            self.theirs.append(self.other())
        self.start = time.perf_counter()
        return 0.0


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def plain_step(
    readout: Readout,
    llm: nn.Module,
    batch: Batch,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """A step of maximum likelihood, as one writes it by hand on a plain PEFT model."""
    loss = nn.functional.cross_entropy(readout(llm, batch.inputs), batch.labels)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    if not (loss.item() < float("inf") and norm < float("inf")):
        raise RuntimeError("the loss is not finite")
    optimizer.step()
    optimizer.zero_grad()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, list[float]]:
    """The ratio of the medians of paired times, and a 95 % interval over resampled pairs."""
    first, second = np.array(ours), np.array(theirs)
    draws = np.random.default_rng(0).integers(0, len(first), (2000, len(first)))
    medians = np.median(first[draws], 1) / np.median(second[draws], 1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(first) / np.median(second)), [float(low), float(high)]
