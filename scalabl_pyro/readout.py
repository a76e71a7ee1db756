"""Readouts: how a record becomes rows of tokens, and a language model's output becomes C logits.

A readout owns both halves, so that what is encoded and what is read cannot drift apart:
``encode`` turns records into a :class:`~scalabl_pyro.data.Split`, and calling it on the model and
the inputs of R examples gives logits (R, C).
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import takewhile
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Batch, DataError, Example, Prompt, Record, Split

__all__ = ["READOUTS", "LabelTokens", "MultipleChoice", "Readout", "SequenceClassification"]

log = logging.getLogger(__name__)
# Some chat templates write today's date, and the same record would be another prompt tomorrow.
_DATE = "26 Jul 2024"


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


class LabelTokens(Readout):
    """The next token after the prompt, restricted to C label words (causal language models).

    The label words share one form: with a leading space if each is then a single token after the
    prompt, else without; the other way round where the prompt ends in white space.

    :param prompt: renders a record as text.
    :param label_words: the C words, for example ``("A", "B", "C", "D")``.
    :param anchor: the end of a prompt, after which the words must be single tokens.
    :param chat: put each prompt through the tokenizer's chat template.
    :param form: ``"space"`` or ``"plain"`` fixes the form, as a saved run does.
    :raises ValueError: if neither form gives single, distinct tokens; the message shows the pieces.
    """

    padding_side = "left"
    auto_class = "AutoModelForCausalLM"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        label_words: Sequence[str],
        *,
        max_length: int,
        truncate: bool = False,
        chat: bool = False,
        anchor: str = "Answer:",
        form: str | None = None,
    ) -> None:
        super().__init__(
            tokenizer, num_classes=len(label_words), max_length=max_length, truncate=truncate
        )
        if chat and tokenizer.chat_template is None:
            raise ValueError("chat=true, but the tokenizer has no chat template; set chat=false")
        self.prompt = prompt
        self.label_words = tuple(label_words)
        self.chat = chat
        self.form, ids = self._label_ids(anchor, form)
        self.label_ids = torch.tensor(ids)

    def _label_ids(self, anchor: str, form: str | None) -> tuple[str, list[int]]:
        forms = {"space": " ", "plain": ""}
        if form is not None and form not in forms:
            raise ValueError(f"form is {form!r}: expected one of {list(forms)}")
        anchor = self._templated(anchor)
        before = self._ids(anchor)
        pieces = {}
        # After a chat template that ends in a line break, an answer begins without a space.
        order = reversed(forms) if anchor[-1:].isspace() else forms
        for name in [form] if form else order:
            rows = [self._ids(anchor + forms[name] + word) for word in self.label_words]
            added = [row[len(before) :] for row in rows if row[: len(before)] == before]
            if [len(ids) for ids in added] == [1] * len(rows):
                ids = [ids[0] for ids in added]
                if len(set(ids)) == len(ids):
                    return name, ids
            pieces[name] = [self.tokenizer.convert_ids_to_tokens(row) for row in rows]
        raise ValueError(
            f"the label words {list(self.label_words)} are not single, distinct tokens after"
            f" {anchor!r}: {pieces}; choose words of one token each, as prompt=letters does"
        )

    def _tokenize(self, record: Record) -> dict[str, list[list[int]]]:
        ids = self._ids(self._templated(self.prompt.render(record)))
        return {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}

    def _truncate(self, record: Record) -> dict[str, list[list[int]]]:
        # The end stays: the answer follows it.
        return self._cut_left(self._tokenize(record))

    def _templated(self, text: str) -> str:
        if not self.chat:
            return text
        message = [{"role": "user", "content": text}]
        return str(
            self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False, date_string=_DATE
            )
        )

    def _ids(self, text: str) -> list[int]:
        # A chat template writes the special tokens itself.
        return list(self.tokenizer(text, add_special_tokens=not self.chat).input_ids)

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        logits = last_logits(llm, _left_padded(inputs), 1)[:, 0]
        return logits[:, self.label_ids.to(logits.device)].float()


class SequenceClassification(Readout):
    """A classification head on the text of the question, one class per choice."""

    padding_side = "right"
    auto_class = "AutoModelForSequenceClassification"

    def _tokenize(self, record: Record) -> dict[str, list[list[int]]]:
        return {name: [ids] for name, ids in self.tokenizer(record.question).items()}

    def _truncate(self, record: Record) -> dict[str, list[list[int]]]:
        found = self.tokenizer(record.question, truncation=True, max_length=self.max_length)
        return {name: [ids] for name, ids in found.items()}

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        return llm(**inputs).logits.float()


class MultipleChoice(Readout):
    """A score for each (question, choice) pair (``AutoModelForMultipleChoice``); rows (B, C, T)."""

    padding_side = "right"
    auto_class = "AutoModelForMultipleChoice"

    def _tokenize(self, record: Record) -> dict[str, list[list[int]]]:
        questions = [record.question] * len(record.choices)
        return dict(self.tokenizer(questions, list(record.choices)).items())

    def _truncate(self, record: Record) -> dict[str, list[list[int]]]:
        # Of a pair, the question alone: a choice that is cut is no choice.
        questions = [record.question] * len(record.choices)
        found = self.tokenizer(
            questions,
            list(record.choices),
            truncation="only_first",
            max_length=self.max_length,
        )
        return dict(found.items())

    def _pad_choices(self, rows: list[list[int]]) -> list[list[int]]:
        # A missing choice is scored as a copy of the first one and masked afterwards.
        return rows + rows[:1] * (self.num_classes - len(rows))

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        return llm(**inputs).logits.float()


READOUTS: dict[str, type[Readout]] = {
    "label_tokens": LabelTokens,
    "sequence_classification": SequenceClassification,
    "multiple_choice": MultipleChoice,
}


def last_logits(llm: PreTrainedModel, inputs: dict[str, Tensor], count: int) -> Tensor:
    """(R, count, vocabulary), the logits at the last positions of R left-padded rows."""
    # GPT-2 and others number positions from the padding unless they are told.
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    extra = {"logits_to_keep": count} if _keeps_logits(type(llm)) else {}
    return llm(**inputs, position_ids=positions, use_cache=False, **extra).logits[:, -count:]


def _keeps_logits(cls: type[PreTrainedModel]) -> bool:
    return "logits_to_keep" in inspect.signature(cls.forward).parameters


def _left_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rotate each row so that its last attended token comes last; left-padded rows stay."""
    mask = inputs["attention_mask"]  # (R, T)
    steps = torch.arange(mask.shape[-1], device=mask.device)
    last = (mask * steps).argmax(-1, keepdim=True)  # (R, 1)
    source = (steps + last + 1) % mask.shape[-1]  # (R, T)
    return {name: value.gather(-1, source) for name, value in inputs.items()}
