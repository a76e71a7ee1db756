"""Prompts: how a record is put to a causal language model, and which words label its choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from .records import DataError, Record

__all__ = ["GAP", "PROMPTS", "Prompt"]

#: where a choice goes in a text with a gap, as in WinoGrande
GAP = "_"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text for the model, whose next token is the answer.

    :param render: record → text; the label word follows it.
    :param label_words: the records of all splits → the C label words, in the order of ``choices``.
    :param shares_choices: the label words are the choices, which all records share.
    :param gap: the text has a gap ``GAP`` that each choice fills, and goes on behind it.
    """

    render: Callable[[Record], str]
    label_words: Callable[[Sequence[Record]], tuple[str, ...]]
    shares_choices: bool = False
    gap: bool = False


def _render_letters(record: Record) -> str:
    options = zip(ascii_uppercase, record.choices, strict=False)
    lines = [record.question, *(f"{letter}. {choice}" for letter, choice in options), "Answer:"]
    return "\n".join(lines)


def _letters(records: Sequence[Record]) -> tuple[str, ...]:
    count = max(len(record.choices) for record in records)
    if count > len(ascii_uppercase):
        raise DataError(f"{count} choices cannot be labelled by letters; use prompt=classes")
    return tuple(ascii_uppercase[:count])


def _render_classes(record: Record) -> str:
    return f"{record.question}\nAnswer:"


def _class_names(records: Sequence[Record]) -> tuple[str, ...]:
    names = {record.choices for record in records}
    if len(names) > 1:
        first, second = sorted(names)[:2]
        raise DataError(
            f"prompt=classes needs the same choices in every record, but found {list(first)} and"
            f" {list(second)}; use prompt=letters"
        )
    return names.pop()


def _render_question(record: Record) -> str:
    return f"Question: {record.question}\nAnswer:"


def _render_gap(record: Record) -> str:
    if record.question.count(GAP) != 1 or not record.question.partition(GAP)[2].strip():
        raise DataError(
            f"the question of record {record.id!r} is {record.question!r}: expected one {GAP!r} and"
            " text behind it; use prompt=question"
        )
    return record.question


PROMPTS: dict[str, Prompt] = {
    "letters": Prompt(_render_letters, _letters),
    "classes": Prompt(_render_classes, _class_names, shares_choices=True),
    "question": Prompt(_render_question, _class_names),
    "gap": Prompt(_render_gap, _class_names, gap=True),
}
