"""Readouts of encoders with a trained head: sequence classification and multiple choice."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import DataError, Prompt, Record
from .base import Classes, Readout
from .config import ReadoutConfig

__all__ = ["MultipleChoice", "SequenceClassification"]

#: the question as it is
_BARE = Prompt("{question}")


class _HeadReadout(Readout):
    """What both share: the text of a question, alone or in a template.

    :param prompt: how a record is put; the question alone if left out.
    """

    padding_side = "right"
    default_prompt = "classes"
    takes = ("template",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_classes: int,
        max_length: int,
        truncate: bool = False,
        prompt: Prompt = _BARE,
    ) -> None:
        super().__init__(
            tokenizer, num_classes=num_classes, max_length=max_length, truncate=truncate
        )
        self.prompt = prompt

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        classes: Classes,
        config: ReadoutConfig,
        *,
        max_length: int,
    ) -> Self:
        return cls(
            tokenizer,
            num_classes=classes.count,
            max_length=max_length,
            truncate=config.truncate,
            prompt=_BARE if config.template is None else config.make_prompt(classes.shots),
        )

    def attach(self, llm: PreTrainedModel) -> dict[str, nn.Parameter]:
        """As :meth:`Readout.attach`; heads find the last token of a row by the padding token, or
        take the last column."""
        tokenizer = getattr(self, "tokenizer", None)  # of an estimate of memory there is none
        for config in (llm.config, llm.config.get_text_config()):
            if tokenizer is not None:
                config.pad_token_id = tokenizer.pad_token_id
            if getattr(config, "summary_type", None) == "last":
                self.padding_side = "left"
        return {}

    def manifest(self, llm: PreTrainedModel) -> dict[str, Any]:
        prompt = {"template": self.prompt.template, "letters": self.prompt.letters}
        return self.llm_options() | {"prompt": prompt}

    @abstractmethod
    def _rows(
        self, record: Record, question: str | None = None, **options: Any
    ) -> dict[str, list[list[int]]]:
        """The rows of a record.

        :param question: what is left of its question, where that is cut.
        :param options: of the tokenizer.
        """

    def _tokenize(self, record: Record) -> dict[str, list[list[int]]]:
        return self._rows(record)

    def _truncate(self, record: Record) -> dict[str, list[list[int]]]:
        if self.prompt == _BARE:
            return self._rows(record, truncation="only_first", max_length=self.max_length)
        return self._cut_question(record, partial(self._rows, record), keep="start")


class SequenceClassification(_HeadReadout):
    """A classification head on the text of the question, one class per choice."""

    auto_class = "AutoModelForSequenceClassification"

    @classmethod
    def words(cls, records: Sequence[Record], *, prompt: str) -> tuple[str, ...]:
        """The class names.

        :raises DataError: if records have choices of their own, which no such head can read.
        """
        names = {record.choices for record in records}
        if len(names) > 1:
            first, second = sorted(names)[:2]
            raise DataError(
                "readout=sequence_classification needs the same choices in every record, but found"
                f" {list(first)} and {list(second)}; use readout=multiple_choice with an encoder,"
                " or readout=label_tokens or readout=choice_likelihood with a causal model"
            )
        return names.pop()

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        classes: Classes,
        config: ReadoutConfig,
        *,
        max_length: int,
    ) -> Self:
        readout = super().build(tokenizer, classes, config, max_length=max_length)
        readout.class_names = classes.words
        return readout

    def llm_options(self) -> dict[str, Any]:
        return {"num_labels": self.num_classes}

    def _rows(
        self, record: Record, question: str | None = None, **options: Any
    ) -> dict[str, list[list[int]]]:
        encoding = self.tokenizer(self.prompt.render(record, question), **options)
        return {name: [ids] for name, ids in encoding.items()}

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        return llm(**inputs).logits.float()


class MultipleChoice(_HeadReadout):
    """A score for each (question, choice) pair (``AutoModelForMultipleChoice``); rows (B, C, T)."""

    auto_class = "AutoModelForMultipleChoice"
    row_per_choice = True
    any_number = True

    def _rows(
        self, record: Record, question: str | None = None, **options: Any
    ) -> dict[str, list[list[int]]]:
        texts = [self.prompt.render(record, question)] * len(record.choices)
        return dict(self.tokenizer(texts, list(record.choices), **options).items())

    def _truncate(self, record: Record) -> dict[str, list[list[int]]]:
        # Of a pair, the question alone: a choice that is cut is no choice.
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        for choice in record.choices:
            count = len(self.tokenizer(choice, add_special_tokens=False).input_ids)
            if count >= room:
                raise DataError(
                    f"record {record.id!r}: the choice {choice[:40]!r}… has {count} tokens and"
                    f" leaves no room for a question in the context of {self.max_length}; shorten"
                    " it, or leave the record out"
                )
        return super()._truncate(record)

    def _pad_choices(self, rows: list[list[int]]) -> list[list[int]]:
        # A missing choice is scored as a copy of the first one and masked afterwards.
        return rows + rows[:1] * (self.num_classes - len(rows))

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        return llm(**inputs).logits.float()
