"""Readouts of encoders with a trained head: sequence classification and multiple choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import DataError, Record
from .base import Classes, Readout

__all__ = ["MultipleChoice", "SequenceClassification"]


class SequenceClassification(Readout):
    """A classification head on the text of the question, one class per choice."""

    padding_side = "right"
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
    def build(cls, tokenizer: PreTrainedTokenizerBase, classes: Classes, **settings: Any) -> Self:
        readout = super().build(tokenizer, classes, **settings)
        readout.class_names = classes.words
        return readout

    def llm_options(self) -> dict[str, Any]:
        return {"num_labels": self.num_classes}

    def manifest(self, llm: PreTrainedModel) -> dict[str, Any]:
        return self.llm_options()

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
    row_per_choice = True

    def _tokenize(self, record: Record) -> dict[str, list[list[int]]]:
        questions = [record.question] * len(record.choices)
        return dict(self.tokenizer(questions, list(record.choices)).items())

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
