"""Readouts: how a record becomes rows of tokens, and a language model's output becomes C logits.

A readout owns both halves, so that what is encoded and what is read cannot drift apart:
``encode`` turns records into a :class:`~scalabl_pyro.data.Split`, and calling it on the model and
the inputs of R examples gives logits (R, C).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, Completion, DataError, Example, Record, Split
from ..data.records import is_text
from .config import ReadoutConfig

__all__ = ["Classes", "Reading", "Readout", "check_records", "common"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Classes:
    """The C classes of a run: what its data fixes about the readout.

    :param count: C; 0 where it is the model's vocabulary.
    :param words: the word of each class for label tokens, its name for sequence classification.
    :param form: for label tokens, whether a space leads the words; found when the readout is built.
    :param shots: the records that prompts show with their answers.
    """

    count: int
    words: tuple[str, ...] = ()
    form: str | None = None
    shots: tuple[Record, ...] = ()


class Reading(NamedTuple):
    """What a model reads of one record, as texts that show special tokens too.

    :param prompt: what is given, whichever choice.
    :param answers: for each choice what else is given, and what is scored behind that.
    :param tokens: how many the longest row has.
    :param cut: what was cut out of it, or ``""``.
    :param cut_tokens: how many those were.
    """

    prompt: str
    answers: list[tuple[str, str]]
    tokens: int
    cut: str = ""
    cut_tokens: int = 0


class Readout(ABC):
    """Shared part: length check, padding and stacking.

    A subclass and its entry in ``READOUTS`` are a new readout. It has a padding side and a class of
    models, tokenises records and reads logits. The other methods it may leave as they are here.

    :param tokenizer: the model's tokenizer; one without a padding token pads with its end token.
    :param num_classes: C.
    :param max_length: the longest row in tokens that the model can read.
    :param truncate: cut rows that are too long instead of refusing them.
    """

    padding_side: str
    #: the ``transformers`` class that loads a model for this readout
    auto_class: ClassVar[str]
    #: the prompt that ``auto`` means
    default_prompt: ClassVar[str] = "letters"
    #: which of the settings template, shots, system, chat, normalise and temperature it uses
    takes: ClassVar[tuple[str, ...]] = ()
    #: whether an example is a row of tokens for each of its choices, of which each gives one logit,
    #: instead of one row
    row_per_choice: ClassVar[bool] = False
    #: whether no weight depends on C, so that records may have more choices than C
    any_number: ClassVar[bool] = False
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
        config: ReadoutConfig,
        *,
        max_length: int,
    ) -> Self:
        """The readout for these classes, which takes what it needs of the settings."""
        return cls(
            tokenizer, num_classes=classes.count, max_length=max_length, truncate=config.truncate
        )

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
            actual = getattr(llm_config, key, None)
            if actual != value:
                raise ValueError(
                    f"{name!r} has a head with {key} {actual}, but the data needs {value}: use its"
                    " base model without a head"
                )

    def manifest(self, llm: PreTrainedModel) -> dict[str, Any]:
        """What other programs need to read the classes from the model's output.

        :param llm: the trained model.
        """
        return {}

    @classmethod
    def blank_inputs(
        cls, size: int, num_classes: int, tokens: int, config: ReadoutConfig
    ) -> dict[str, Tensor]:
        """Inputs of B examples without content, of which the shapes are right.

        :param tokens: T, of a row.
        :param config: the readout's settings, on which the shapes may depend.
        """
        choices = (num_classes,) if cls.row_per_choice else ()
        ids = torch.zeros(size, *choices, tokens, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @abstractmethod
    def _tokenize(self, record: Record) -> dict[str, list[list[int]]]:
        """The rows of one record, by input name."""

    def attach(self, llm: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Prepare a model for this readout, once for each adapter, after its LoRA layers are there.

        :returns: what the readout itself trains, by name, at its start: parameters that it has
            registered on the model, as ``llm.register_parameter(name, parameter)`` does. They
            belong to this model: a readout may serve several adapters.
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

        :raises TypeError: if they are something else than a list of records.
        :raises DataError: if a record has more than C choices, or others than
            :attr:`class_names` or those in another order, or becomes no token, or rows exceed
            ``max_length`` and ``truncate`` is off (the message says how many and how long).
        """
        check_records(records)
        examples, too_long, longest, longest_id = [], 0, 0, ""
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
            if len(record.choices) > self.num_classes and not self.any_number:
                raise DataError(
                    f"record {record.id!r} has {len(record.choices)} choices, but the readout has"
                    f" {self.num_classes} classes: train on records that have as many"
                )
            rows = self._tokenize(record)
            if any(nothing.issuperset(row) for row in rows["input_ids"]):
                raise DataError(
                    f"record {record.id!r} becomes {rows['input_ids']}, no token but special ones:"
                    " expected a text that the tokenizer knows; leave the record out"
                )
            length = max(map(len, rows["input_ids"]))
            if length > self.max_length:
                too_long += 1
                if length > longest:
                    longest, longest_id = length, record.id
                if self.truncate:
                    rows = self._truncate(record)
            examples.append(Example(rows, len(record.choices), record.label))
        if too_long:
            problem = (
                f"{too_long} of {len(examples)} prompts exceed the context of {self.max_length}"
                f" tokens (longest: {longest}, of record {longest_id!r})"
            )
            if not self.truncate:
                raise DataError(
                    f"{problem}; shorten them, or have them cut: train with model.truncate=true, or"
                    " of a finished run set truncate in its config.yaml to true"
                )
            log.warning("%s; they were cut", problem)
        most = max((example.num_choices for example in examples), default=0)
        more = most > self.num_classes
        return Split(records, examples, partial(self._collate, most) if more else self.collate)

    def reading(self, record: Record) -> Reading:
        """What the model reads of a record, whole where it is too long and ``truncate`` is off.

        :raises DataError: if the record does not fit the readout.
        """
        whole = rows = self._tokenize(record)
        lengths = [len(row) for row in whole["input_ids"]]
        if max(lengths) > self.max_length and self.truncate:
            rows = self._truncate(record)
        longest = lengths.index(max(lengths))
        before, after = whole["input_ids"][longest], rows["input_ids"][longest]
        start = common(before, after)
        end = len(before) - common(before[start:][::-1], after[start:][::-1])
        prompt, answers = self._prompt_and_answers(record, rows)
        cut = self._decode(before[start:end])
        return Reading(prompt, answers, len(after), cut, len(before) - len(after))

    def scoring(self) -> str:
        """What is compared of the choices, in words."""
        return "the model's output for each"

    def _prompt_and_answers(
        self, record: Record, rows: dict[str, list[list[int]]]
    ) -> tuple[str, list[tuple[str, str]]]:
        """Of a :class:`Reading`: the ends of rows that differ, or of a single one the choices."""
        each = rows["input_ids"]
        if not self.row_per_choice:
            return self._decode(each[0]), [("", choice) for choice in record.choices]
        shared = min(common(each[0], row) for row in each)
        ends = [self._decode(row[shared:], behind=row[:shared]) for row in each]
        return self._decode(each[0][:shared]), [("", end) for end in ends]

    def _decode(self, ids: Sequence[int], *, behind: Sequence[int] = ()) -> str:
        """Tokens as text.

        :param behind: what they follow, on which a space may depend.
        """
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        before, text = (
            str(self.tokenizer.decode([*part], **options)) for part in (behind, [*behind, *ids])
        )
        return text.removeprefix(before)

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

    def _cut_question(
        self,
        record: Record,
        tokenize: Callable[[str], dict[str, list[list[int]]]],
        *,
        keep: str = "end",
        holding: str = "",
    ) -> dict[str, list[list[int]]]:
        """The rows with as much of a record's question as fits: all else stays whole.

        :param tokenize: the rows with what is left of the question.
        :param keep: its ``end`` or its ``start``.
        :param holding: what of the question has to be left.
        :raises DataError: if not even its last character fits.
        """
        question = record.question.rstrip() if keep == "end" else record.question.lstrip()

        def part(length: int) -> str:
            return question[-length:] if keep == "end" else question[:length]

        def fits(length: int) -> bool:
            return max(map(len, tokenize(part(length))["input_ids"])) <= self.max_length

        lengths = range(1, len(question) + 1)
        lengths = lengths[next(n for n in lengths if holding in part(n) and is_text(part(n))) - 1 :]
        # The more characters, the more tokens, but for a few at the cut.
        most = bisect_left(lengths, True, key=lambda n: not fits(n))
        while most and not fits(lengths[most - 1]):
            most -= 1
        if not most:
            raise DataError(
                f"record {record.id!r}: what stands beside the question leaves no room for it in"
                f" the context of {self.max_length} tokens: shorten the template or the choices,"
                " show fewer shots, or leave the record out"
            )
        return tokenize(part(lengths[most - 1]))

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
            row_per_choice=self.row_per_choice,
        )

    def _collate(self, num_classes: int, examples: Sequence[Example]) -> Batch:
        """The same with more choices than the readout's own C."""
        readout = copy(self)  # of the readout as it is now: a model that is attached changes it
        readout.num_classes = num_classes
        return readout.collate(examples)

    def _pad_choices(self, rows: list[list[int]]) -> list[list[int]]:
        return rows


def check_records(records: Any) -> None:
    """:raises TypeError: if these are something else than a list of records."""
    listed = isinstance(records, Sequence) and not isinstance(records, str)
    for record in records if listed else [records]:
        if not (listed and isinstance(record, (Record, Completion))):
            raise TypeError(
                f"found {str(record)[:60]!r} in the place of"
                f" {'a record' if listed else 'a list of records'}: expected a list of Record, such"
                " as Record('1', question, choices, label), or of Completion; of dictionaries and"
                " data sets scalabl_pyro.data.read_rows makes them"
            )


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    pairs = zip(first, second, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
