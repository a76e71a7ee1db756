"""Readouts: how a record becomes rows of tokens, and a language model's output becomes C logits.

A readout owns both halves, so that what is encoded and what is read cannot drift apart:
``encode`` turns records into a :class:`~scalabl_pyro.data.Split`, and calling it on the model and
the inputs of R examples gives logits (R, C).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, DataError, Example, Record, Split

__all__ = ["Readout"]

log = logging.getLogger(__name__)


class Readout(ABC):
    """Shared part: length check, padding and stacking.

    :param tokenizer: the model's tokenizer; one without a padding token pads with its end token.
    :param num_classes: C.
    :param max_length: the longest row in tokens that the model can read.
    :param truncate: cut rows that are too long instead of refusing them.
    """

    padding_side: ClassVar[str]
    #: the ``transformers`` class that loads a model for this readout
    auto_class: ClassVar[str]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_classes: int,
        max_length: int,
        truncate: bool = False,
    ) -> None:
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise ValueError("the tokenizer has neither a padding nor an end token: set one")
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.num_classes = num_classes
        self.max_length = max_length
        self.truncate = truncate

    @abstractmethod
    def _tokenize(self, record: Record) -> dict[str, list[list[int]]]:
        """The rows of one record, by input name."""

    def attach(self, llm: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Prepare a model for this readout, once for each adapter, after its LoRA layers are there.

        :returns: what the readout itself trains, by name, at its start. It belongs to this model:
            a readout may serve several adapters.
        """
        return {}

    def start(
        self, llm: PreTrainedModel, logits: Callable[[Batch], Tensor], train: Split
    ) -> dict[str, float]:
        """Where what :meth:`attach` gave this model starts in training on ``train``, by name; as it
        is if left out.

        :param logits: of a batch, (B, C), by the untrained adapter.
        """
        return {}

    @abstractmethod
    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (R, C) of the R examples in ``inputs``, unmasked, in float32."""

    def encode(self, records: Sequence[Record]) -> Split:
        """Tokenise records.

        :raises DataError: if a record has more than C choices, or rows exceed ``max_length`` and
            ``truncate`` is off (the message says how many and how long).
        """
        examples, too_long, longest = [], 0, 0
        for record in records:
            if len(record.choices) > self.num_classes:
                raise DataError(
                    f"record {record.id!r} has {len(record.choices)} choices, but the readout has"
                    f" {self.num_classes} classes"
                )
            rows = self._tokenize(record)
            length = max(map(len, rows["input_ids"]))
            if length > self.max_length:
                too_long, longest = too_long + 1, max(longest, length)
                rows = self._truncate(record)
            examples.append(Example(rows, len(record.choices), record.label))
        if too_long:
            found = (
                f"{too_long} of {len(examples)} prompts exceed the context of {self.max_length}"
                f" tokens (longest: {longest})"
            )
            if not self.truncate:
                raise DataError(
                    f"{found}; shorten them, or train with model.truncate=true, which cuts them"
                )
            log.warning("%s; they were cut", found)
        return Split(records, examples, self.collate)

    def _leading(self, row: Sequence[int]) -> int:
        """How many special tokens a row begins with."""
        special = set(self.tokenizer.all_special_ids)
        return min(len(list(takewhile(special.__contains__, row))), self.max_length - 1)

    def _cut_left(self, rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        """One row that is too long: the special tokens that it begins with, and its end."""
        begin = self._leading(rows["input_ids"][0])
        rest = self.max_length - begin
        return {
            name: [[*row[:begin], *row[-rest:]] for row in value] for name, value in rows.items()
        }

    @abstractmethod
    def _truncate(self, record: Record) -> dict[str, list[list[int]]]:
        """The rows of a record that is too long, cut to ``max_length``."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack B examples, padded to the longest."""
        rows: dict[str, list[list[int]]] = {
            name: [row for example in examples for row in self._pad_choices(example.rows[name])]
            for name in examples[0].rows
        }
        padded = self.tokenizer.pad(rows, padding_side=self.padding_side, return_tensors="pt")
        per_example = len(rows["input_ids"]) // len(examples)
        inputs = {
            name: value if per_example == 1 else value.unflatten(0, (-1, per_example))  # (B, C, T)
            for name, value in padded.items()
        }
        counts = torch.tensor([example.num_choices for example in examples])
        labels = [example.label for example in examples]
        return Batch(
            inputs,
            choices=torch.arange(self.num_classes) < counts[:, None],  # (B, C)
            labels=None if None in labels else torch.tensor(labels),
        )

    def _pad_choices(self, rows: list[list[int]]) -> list[list[int]]:
        return rows
