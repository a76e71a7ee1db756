"""Tokenised examples, and the batches that a language model and a Pyro model consume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .records import DataError, Record

__all__ = ["Batch", "Example", "Split"]


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record: one row of tokens, or one row per choice.

    :param rows: the model's inputs by name, each a list of token lists: ``rows["input_ids"][i][t]``.
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
    """

    inputs: dict[str, Tensor]
    choices: Tensor
    labels: Tensor | None = None

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
    :raises DataError: if there is no record.
    """

    def __init__(
        self,
        records: Sequence[Record],
        examples: Sequence[Example],
        collate: Callable[[Sequence[Example]], Batch],
    ) -> None:
        if not records:
            raise DataError("the split holds no records: expected one or more")
        self.records = tuple(records)
        self.examples = tuple(examples)
        self.collate = collate

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self.examples[index]

    @property
    def labels(self) -> Tensor | None:
        """(N,) labels, or ``None`` if any record has none."""
        labels = [example.label for example in self.examples]
        return None if None in labels else torch.tensor(labels)

    def batches(self, batch_size: int) -> DataLoader[Batch]:
        """All examples once, in order, in batches of at most ``batch_size``."""
        return DataLoader(self, batch_size, collate_fn=self.collate)  # type: ignore[arg-type]

    def minibatches(self, batch_size: int, *, seed: int) -> Iterator[Batch]:
        """An endless stream of batches, reshuffled at each epoch by a generator of its own.

        The last, smaller batch of an epoch is dropped unless it is the only one, so that every
        step has the same size.

        :param seed: fixes the order, independently of the draws of s.
        """
        batch_size = min(batch_size, len(self))
        loader = DataLoader(
            self,  # type: ignore[arg-type]
            batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(seed),
        )
        while True:
            yield from loader
