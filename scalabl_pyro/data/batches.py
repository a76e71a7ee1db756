"""Tokenised examples, and the batches that a language model and a Pyro model consume."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .records import DataError, Record

__all__ = ["Batch", "Example", "Split"]


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record: one row of tokens, or one row per choice.

    :param rows: the model's inputs by name, token t of row i at ``rows["input_ids"][i][t]``.
    :param num_choices: how many of the C classes this record offers.
    :param label: index of the right choice, or ``None``.
    """

    rows: dict[str, list[list[int]]]
    num_choices: int
    label: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B examples as tensors.

    :param inputs: the model's inputs by name, each (B, T), or (B, C, T) with a row per choice.
    :param choices: (B, C), true where the choice exists.
    :param labels: (B,), or ``None`` if not known.
    :param row_per_choice: whether each choice is a row of its own, on which alone its logit
        depends.
    """

    inputs: dict[str, Tensor]
    choices: Tensor
    labels: Tensor | None = None
    row_per_choice: bool = False

    def __len__(self) -> int:
        return self.choices.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return replace(
            self,
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            choices=self.choices.to(device),
            labels=None if self.labels is None else self.labels.to(device),
        )


class Split(Sequence[Example]):
    """The N records of one split, tokenised, with the function that stacks them.

    :param records: the records, in order.
    :param examples: the same records tokenised.
    :param collate: stacks B examples to a :class:`Batch`.
    :raises DataError: if there is no record, or another number of examples.
    """

    def __init__(
        self,
        records: Sequence[Record],
        examples: Sequence[Example],
        collate: Callable[[Sequence[Example]], Batch],
    ) -> None:
        if not records:
            raise DataError("the split holds no records: expected one or more")
        if len(examples) != len(records):
            raise DataError(
                f"the split holds {len(records)} records and {len(examples)} examples: expected as"
                " many, in the same order"
            )
        self.records = tuple(records)
        self.examples = tuple(examples)
        self.collate = collate
        self._lengths = [max(map(len, example.rows["input_ids"])) for example in examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self.examples[index]

    @property
    def labels(self) -> Tensor | None:
        """(N,) labels, or ``None`` if any record has none."""
        labels = [example.label for example in self.examples]
        return None if None in labels else torch.tensor(labels)

    @property
    def lengths(self) -> list[int]:
        """(N,) tokens of each example's longest row."""
        return self._lengths

    def select(self, indices: Sequence[int]) -> Split:
        """A split of these examples, in this order.

        :raises DataError: if there are none.
        """
        return Split(
            [self.records[index] for index in indices],
            [self.examples[index] for index in indices],
            self.collate,
        )

    def by_length(self) -> tuple[Split, Tensor]:
        """The examples in the order of their length, so that little is padded when they are
        batched, and (N,) where each of these stands among those."""
        order = sorted(range(len(self)), key=self.lengths.__getitem__)
        return self.select(order), torch.tensor(order).argsort()

    def relabelled(self, labels: Sequence[int]) -> Split:
        """The same examples with other labels.

        :param labels: N of them.
        :raises ValueError: if there are more or fewer.
        """
        records = zip(self.records, labels, strict=True)
        examples = zip(self.examples, labels, strict=True)
        return Split(
            [replace(record, label=label) for record, label in records],
            [replace(example, label=label) for example, label in examples],
            self.collate,
        )

    def batches(self, batch_size: int, *, start: int = 0) -> list[Split]:
        """The examples in their order, B at a time; the last part may be smaller.

        :param start: leave out the first so many examples.
        :raises ValueError: if ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: expected 1 or more")
        return [
            self.select(range(first, min(first + batch_size, len(self))))
            for first in range(start, len(self), batch_size)
        ]

    def minibatches(
        self, batch_size: int, *, seed: int, skip: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """An endless stream of batches, reshuffled at each epoch by a generator of its own.

        Examples of similar length go together, so that little is padded. What does not fill a batch
        is left out of its epoch (unless it is all there is), so that every step has the same size.

        :param seed: fixes the order, independently of the draws of s.
        :param skip: leave out the first so many batches, as of an interrupted run.
        :param rank: of this process among ``world_size`` that share each batch; it gets every
            ``world_size``-th example of it.
        :raises ValueError: if a batch cannot be shared evenly.
        """
        batch_size = min(batch_size, len(self))
        if batch_size % world_size:
            raise ValueError(
                f"a batch of {batch_size} examples cannot be shared evenly by {world_size}"
                " processes: set a batch_size that is a multiple"
            )
        sampler = _LengthGroups(self.lengths, batch_size, seed)
        epochs = (indices for _ in count() for indices in sampler)
        for indices in islice(epochs, skip, None):
            yield self.collate([self.examples[index] for index in indices[rank::world_size]])


class _LengthGroups(Sampler[list[int]]):
    """Batches of similar length: shuffle, sort within windows of 8 batches, shuffle the batches."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.generator = random.Random(seed)

    def __iter__(self) -> Iterator[list[int]]:
        size, window = self.batch_size, 8 * self.batch_size
        # What fills no batch is left out before sorting: at random, not the longest.
        count = len(self.lengths) // size * size
        order = self.generator.sample(range(len(self.lengths)), count)
        batches = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=self.lengths.__getitem__)
            batches += [near[i : i + size] for i in range(0, len(near), size)]
        self.generator.shuffle(batches)
        return iter(batches)
