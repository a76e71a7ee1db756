"""How the labels of a table name a choice: by its number, its letter, or its own text."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Sequence
from string import ascii_uppercase
from typing import NamedTuple

from .records import DataError
from .text import canonical

__all__ = ["READINGS", "Labelled", "decide", "read_label"]

log = logging.getLogger(__name__)


class Labelled(NamedTuple):
    """A label as it stands in a table, and what it may name.

    :param place: where it stands, for messages.
    :param column: its column, for messages.
    :param label: the cell.
    :param choices: the C choices of its row.
    """

    place: str
    column: str
    label: object
    choices: Sequence[str]


class Reading(NamedTuple):
    """One way to read a label.

    :param read: label and the C choices → the 0-based index, or ``None`` if it names no choice.
    :param expected: the choices → what a label should be, for messages.
    """

    read: Callable[[object, Sequence[str]], int | None]
    expected: Callable[[Sequence[str]], str]


def _number(label: object) -> int | None:
    if isinstance(label, str) and re.fullmatch(r"-?[0-9]{1,9}", label.strip()):
        return int(label)
    if isinstance(label, float) and label.is_integer():
        return int(label)
    return label if isinstance(label, int) else None


def _from_0(label: object, choices: Sequence[str]) -> int | None:
    number = _number(label)
    return None if number is None or not 0 <= number < len(choices) else int(number)


def _from_1(label: object, choices: Sequence[str]) -> int | None:
    number = _number(label)
    # True is the second of two classes, never the first of them.
    counts = number is not None and not isinstance(label, bool)
    return number - 1 if counts and 1 <= number <= len(choices) else None  # type: ignore[operator]


def _letter(label: object, choices: Sequence[str]) -> int | None:
    letters = ascii_uppercase[: len(choices)]
    known = isinstance(label, str) and len(label.strip()) == 1 and label.strip().upper() in letters
    return letters.index(label.strip().upper()) if known else None  # type: ignore[attr-defined]


def _named(label: object, choices: Sequence[str]) -> list[int]:
    """All choices whose text a label is."""
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)  # as numbers among choices become text
    if not isinstance(label, str):
        return []
    name = canonical(label.strip())
    return [i for i, choice in enumerate(choices) if canonical(choice.strip()) == name]


def _name(label: object, choices: Sequence[str]) -> int | None:
    indices = _named(label, choices)
    return indices[0] if len(indices) == 1 else None


READINGS: dict[str, Reading] = {
    "from_0": Reading(
        _from_0, lambda choices: f"the 0-based number of a choice, 0 to {len(choices) - 1}"
    ),
    "from_1": Reading(
        _from_1, lambda choices: f"the 1-based number of a choice, 1 to {len(choices)}"
    ),
    "letters": Reading(
        _letter, lambda choices: f"the letter of a choice, A to {ascii_uppercase[len(choices) - 1]}"
    ),
    "names": Reading(_name, lambda choices: f"one of {list(choices)}"),
}


def read_label(labelled: Labelled, reading: str) -> int:
    """The 0-based index of the choice that a label names.

    :param reading: a key of ``READINGS``.
    :raises DataError: if it names none, or a text that several choices share.
    """
    index = READINGS[reading].read(labelled.label, labelled.choices)
    if index is None:
        number = _number(labelled.label)
        shown = labelled.label if number is None else number
        near = []
        if reading == "names" and isinstance(labelled.label, str):
            near = difflib.get_close_matches(labelled.label.strip(), labelled.choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"{labelled.place}: {labelled.column} is {shown!r}: expected"
            f" {READINGS[reading].expected(labelled.choices)}{hint}; leave it out where it is not"
            " known, as in a hidden test set"
        )
    return index


def decide(labels: Sequence[Labelled], preferred: Sequence[str] = ()) -> str:
    """The one reading by which every label names a choice.

    Labels from 1 to 3 of four choices may count from 0 or from 1: a 0 or a 4 decides, else nobody
    can know, and a guess would make every answer wrong.

    :param preferred: readings of which the first that fits is taken, with a warning, if there are
        several that disagree.
    :returns: a key of ``READINGS``; any of those that give every label the same index.
    :raises DataError: if there is none, or several that disagree.
    """
    indices = {
        name: [reading.read(labelled.label, labelled.choices) for labelled in labels]
        for name, reading in READINGS.items()
    }
    fitting = {name: per_label for name, per_label in indices.items() if None not in per_label}
    if all(_named(labelled.label, labelled.choices) for labelled in labels):
        fitting["names"] = indices["names"]  # where some choices are alike, it contradicts others
    if not fitting:
        nearest = max(indices, key=lambda name: sum(i is not None for i in indices[name]))
        try:
            for labelled in labels:
                read_label(labelled, nearest)
        except DataError as error:
            raise DataError(
                f"{error}; or say how labels are read: data.columns.labels is one of"
                f" {list(READINGS)}, and data.columns.keys a column that names each row's choices"
            ) from error
    first = next(name for name in (*preferred, *fitting) if name in fitting)
    others = [name for name in fitting if fitting[name] != fitting[first]]
    if not others:
        return first
    values = list(dict.fromkeys(labelled.label for labelled in labels))[:8]
    several = (
        f"{labels[0].place}: {labels[0].column} holds {values}, which can be read as {first} and as"
        f" {others[0]}, with different answers"
    )
    if first in preferred:
        log.warning("%s: taken as %s; labels=%s of columns changes that", several, first, others[0])
        return first
    names = " or ".join(f"data.columns.labels={name}" for name in fitting)
    raise DataError(f"{several}: give {names}")
