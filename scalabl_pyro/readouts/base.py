"""Readouts: how a record becomes rows of tokens, and a language model's output becomes C logits.

A readout owns both halves, so that what is encoded and what is read cannot drift apart:
``encode`` turns records into a :class:`~scalabl_pyro.data.Split`, and calling it on the model and
the inputs of R examples gives logits (R, C).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, Completion, DataError, Example, Record, Split

__all__ = ["Classes", "Readout"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Classes:
    """The C classes of a run: what its data fixes about the readout.

    :param count: C; 0 where it is the model's vocabulary.
    :param words: the word of each class for label tokens, its name for sequence classification.
    :param form: for label tokens, whether a space leads the words; found when the readout is built.
    """

    count: int
    words: tuple[str, ...] = ()
    form: str | None = None


class Readout(ABC):
    """Shared part: length check, padding and stacking.

    A subclass and its entry in ``READOUTS`` are a new readout. It has a padding side and a class of
    models, tokenises records and reads logits. The other methods it may leave as they are here.

    :param tokenizer: the model's tokenizer; one without a padding token pads with its end token.
    :param num_classes: C.
    :param max_length: the longest row in tokens that the model can read.
    :param truncate: cut rows that are too long instead of refusing them.
    """

    padding_side: ClassVar[str]
    #: the ``transformers`` class that loads a model for this readout
    auto_class: ClassVar[str]
    #: whether an example is a row of tokens for each of its choices, instead of one row
    row_per_choice: ClassVar[bool] = False
    #: whether it reads texts, each token of which is one of C, instead of one answer of C
    reads_texts: ClassVar[bool] = False
    #: whether prompts are put through the tokenizer's chat template
    chat: bool = False
    #: what was found when the readout was built, and a saved run gives back by ``Classes.form``
    form: str | None = None
    #: the choices that all records share, where the readout knows them
    class_names: tuple[str, ...] = ()

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

    @classmethod
    def words(cls, records: Sequence[Record], *, prompt: str) -> tuple[str, ...]:
        """A word for each class, where the readout needs some.

        :param records: those of all splits that will be read.
        :param prompt: a name in ``PROMPTS``.
        :raises DataError: if the records do not fix them.
        """
        return ()

    @classmethod
    def classes(cls, records: Sequence[Record], *, prompt: str) -> Classes:
        """The classes that these records need: those of all splits that will be read.

        :raises DataError: if there are no records, or see :meth:`words`.
        """
        if not records:
            raise DataError("records is empty: expected one or more, which fix the classes")
        for record in records:
            if isinstance(record, Completion):
                raise DataError(
                    f"record {record.id!r} is a text without choices, and {cls.__name__} reads"
                    " questions with choices: set model.readout=completion_tokens"
                )
        count = max(len(record.choices) for record in records)
        return Classes(count, cls.words(records, prompt=prompt))

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        classes: Classes,
        *,
        prompt: str,
        chat: bool,
        max_length: int,
        truncate: bool,
        normalise: str,
        temperature: str,
    ) -> Self:
        """The readout for these classes, which takes what it needs of the settings.

        :param prompt: a name in ``PROMPTS``; the others too are those of
            :class:`~scalabl_pyro.lora.ModelConfig`.
        """
        return cls(tokenizer, num_classes=classes.count, max_length=max_length, truncate=truncate)

    @classmethod
    def untokenized(cls, num_classes: int) -> Self:
        """The readout without its tokenizer, which a forward pass does not need."""
        readout = cls.__new__(cls)
        readout.num_classes = num_classes
        return readout

    @property
    def fitted(self) -> bool:
        """Whether :meth:`start` needs labelled examples."""
        return False

    def llm_options(self) -> dict[str, Any]:
        """Entries of config.json that the model is loaded with."""
        return {}

    def check_head(self, name: str, llm_config: Any) -> None:
        """Check a model whose head is trained.

        :param name: of the model, for the message.
        :param llm_config: what its config.json holds.
        :raises ValueError: if it differs from :meth:`llm_options`.
        """
        for key, value in self.llm_options().items():
            found = getattr(llm_config, key, None)
            if found != value:
                raise ValueError(
                    f"{name!r} has a head with {key} {found}, but the data needs {value}: use its"
                    " base model without a head"
                )

    def manifest(self, llm: PreTrainedModel) -> dict[str, Any]:
        """What other programs need to read the classes from the model's output.

        :param llm: the trained model.
        """
        return {}

    @classmethod
    def blank_inputs(cls, size: int, num_classes: int, tokens: int) -> dict[str, Tensor]:
        """Inputs of B examples without content, of which the shapes are right.

        :param tokens: T, of a row.
        """
        choices = (num_classes,) if cls.row_per_choice else ()
        ids = torch.zeros(size, *choices, tokens, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

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

        :raises DataError: if a record has more than C choices, or others than
            :attr:`class_names` or those in another order, or becomes no token, or rows exceed
            ``max_length`` and ``truncate`` is off (the message says how many and how long).
        """
        examples, too_long, longest = [], 0, 0
        tokenizer = self.tokenizer
        # Unknown words are words.
        nothing = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        for record in records:
            # In another order, labels would silently mean other classes.
            if self.class_names and record.choices != self.class_names:
                raise DataError(
                    f"record {record.id!r} has the choices {list(record.choices)}, but the classes"
                    f" are {list(self.class_names)}, in this order: give it these choices, and the"
                    " label that goes with them"
                )
            if len(record.choices) > self.num_classes:
                raise DataError(
                    f"record {record.id!r} has {len(record.choices)} choices, but the readout has"
                    f" {self.num_classes} classes"
                )
            rows = self._tokenize(record)
            if any(nothing.issuperset(row) for row in rows["input_ids"]):
                raise DataError(
                    f"record {record.id!r} becomes {rows['input_ids']}, no token but special ones:"
                    " expected a text that the tokenizer knows; leave the record out"
                )
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
