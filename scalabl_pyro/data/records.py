"""One labelled question: the unit of data that every reader produces and every readout consumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from .text import canonical, comparable, visible

__all__ = ["DataError", "Record", "class_set", "is_text", "question_key"]


class DataError(ValueError):
    """Bad input data; the message names the place, the value, what was expected and the fix."""


def is_text(value: object) -> bool:
    """Whether a value is a text in which something is seen, of whole characters: JSON may hold half
    of one, such as ``"\\ud83d"``, which no tokenizer reads."""
    if not isinstance(value, str) or not visible(value):
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def class_set(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in Unicode's normal form C, in their order.

    :raises DataError: if two of them are the same or only look so.
    """
    classes = tuple(canonical(name) for name in names)
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(visible(name), name)
        if other is not name:
            raise DataError(
                f"the classes {other!a} and {name!a} look the same: expected two"
                " different names; write one of them everywhere"
            )
    return classes


@dataclass(frozen=True, slots=True)
class Record:
    """A question with C choices, and the index of the right one where it is known.

    :param id: a name unique within its split.
    :param question: the text that is asked or classified.
    :param choices: the C ≥ 2 answers, or the class names; kept in Unicode's normal form C, so that
        a name is one name however it was typed.
    :param label: 0-based index into ``choices``; ``None`` if unlabelled.
    :raises DataError: if a field is empty, of the wrong type or out of range.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    label: int | None = None

    def __post_init__(self) -> None:
        for name in ("id", "question"):
            value = getattr(self, name)
            if not is_text(value):
                raise DataError(
                    f"{name} is {value!r}: expected a text that is not empty, of whole characters"
                )
        # A mapping would give its keys, a set an order that changes from process to process.
        unordered = str | bytes | bytearray | Mapping | Set
        if isinstance(self.choices, unordered) or not isinstance(self.choices, Iterable):
            raise DataError(
                f"choices is {self.choices!r}, a {type(self.choices).__name__}: expected a list of"
                " texts, in their order"
            )
        object.__setattr__(self, "choices", tuple(self.choices))
        if len(self.choices) < 2:
            raise DataError(f"choices is {list(self.choices)!r}: expected two choices or more")
        for choice in self.choices:
            if not is_text(choice):
                raise DataError(
                    f"choices holds {choice!r}: expected texts that are not empty, of whole"
                    " characters"
                )
        object.__setattr__(self, "choices", tuple(map(canonical, self.choices)))
        if self.label is not None:
            if isinstance(self.label, bool) or not isinstance(self.label, int):
                raise DataError(f"label is {self.label!r}: expected a 0-based index into choices")
            if not 0 <= self.label < len(self.choices):
                raise DataError(
                    f"label is {self.label}, but the choices are numbered 0 to"
                    f" {len(self.choices) - 1} (labels are 0-based); leave it out where it is not"
                    " known, as in a hidden test set"
                )


def question_key(record: Record) -> tuple[str, frozenset[str]]:
    """The same for records that ask the same: question and set of choices.

    Texts are the same that differ in spelling alone: letter case, white space, invisible characters
    and forms of one character (Unicode's NFKC).
    """
    return comparable(record.question), frozenset(map(comparable, record.choices))
