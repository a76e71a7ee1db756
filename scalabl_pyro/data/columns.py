"""Which columns of a table make a record: its question, choices, label and id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .labels import READINGS
from .records import DataError

__all__ = ["Columns", "as_text", "blank"]

Cells = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns make a record. ``choices.text`` is what ``choices`` holds by the name ``text``.

    :param question: a column, or a text with columns in braces, ``"{passage} {question}"``.
    :param choices: one column of lists, or several with a choice each, of which the last may be
        empty; none is needed where all rows share the classes.
    :param label: a column.
    :param id: a column.
    :param keys: a column of lists that name the row's choices as labels do, as in ARC, where some
        questions have A to D and some 1 to 4.
    :param prompt: of texts, instead of the question: a column of texts or of messages, or a text
        with columns in braces.
    :param completion: of texts: a column; where it is empty, the completion is not known.
    :param labels: how a label names a choice: its number ``from_0`` or ``from_1``, ``letters``,
        ``names`` (its text), or ``auto``: as the data decides, if it does.
    :raises ValueError: if ``labels`` is none of these, or contradicts ``keys``; or columns of texts
        and of questions are given.

    What is left out is in the column called as the field, and but for the question it may be
    missing: rows are then numbered, or not labelled.
    """

    question: str | None = None
    choices: str | tuple[str, ...] | None = None
    label: str | None = None
    id: str | None = None
    keys: str | None = None
    labels: str = "auto"
    prompt: str | None = None
    completion: str | None = None

    def __post_init__(self) -> None:
        if self.labels not in ("auto", *READINGS):
            raise ValueError(
                f"labels is {self.labels!r}: expected one of {['auto', *READINGS]}, how"
                " labels name choices"
            )
        if self.keys is not None and self.labels != "auto":
            raise ValueError(
                f"labels is {self.labels!r}, but keys is {self.keys!r}, by which labels are read:"
                " give one of them"
            )
        questions = ("question", "choices", "label", "keys")
        given = [name for name in questions if getattr(self, name) is not None]
        if self.of_texts and given:
            raise ValueError(
                f"{given[0]} is {getattr(self, given[0])!r}, but prompt is {self.prompt!r} and"
                f" completion {self.completion!r}: give the columns of questions or those of texts"
            )
        if not isinstance(self.choices, str | None):
            object.__setattr__(self, "choices", tuple(self.choices))

    @property
    def none_named(self) -> bool:
        """Whether no column is named, so that a file's own layout holds; ``labels`` may be."""
        return replace(self, labels="auto") == Columns()

    def question_of(self, cells: Cells) -> Any:
        """The text of a row that is asked or classified.

        :raises DataError: as for the other fields, if a column is missing; if there is no text for
            a brace.
        """
        return _filled(self.question, cells, "question")

    def prompt_of(self, cells: Cells) -> Any:
        """The text, or the messages, of a row that are given."""
        return _filled(self.prompt, cells, "prompt")

    def completion_of(self, cells: Cells) -> Any:
        """What follows the prompt; ``None`` without it."""
        completion = as_text(_optional(cells, "completion", self.completion))
        return None if blank(completion) else completion

    @property
    def of_texts(self) -> bool:
        """Whether the columns of texts are named, and not those of questions with choices."""
        return self.prompt is not None or self.completion is not None

    def or_those_of(self, trained: Columns, cells: object) -> Columns:
        """These columns; where none is named, those that a run was trained by, if the row has them.

        How labels are read is the run's too, but where it is given.
        """
        if not self.none_named or not isinstance(cells, Mapping):
            return self
        columns = trained if trained.none_named else trained._within(cells)
        if columns is None or self.labels == "auto":
            return columns or self
        return replace(columns, labels=self.labels, keys=None)

    def or_of_a_text(self, cells: Cells) -> Columns:
        """These columns; where none is named, and a row has a text and no question, that text and
        its class: the layout of most data sets for classification."""
        fields = ("question", "choices", "prompt", "messages")
        if not self.none_named or "text" not in cells or any(name in cells for name in fields):
            return self
        return replace(self, question="text", label="class" if "class" in cells else None)

    def _within(self, cells: Cells) -> Columns | None:
        """These columns for a row that may lack those of the label, of its keys, of the completion
        and of the id; ``None`` if it lacks another of them."""
        missing: dict[str, Any] = {
            name: None
            for name in ("label", "keys", "id", "completion")
            if (column := getattr(self, name)) is not None and not _has(cells, column)
        }
        try:
            if self.of_texts:
                self.prompt_of(cells)
                return replace(self, **missing)
            self.question_of(cells)
            if self.choices:
                self.choices_of(cells)
        except DataError:
            return None
        return replace(self, **missing)

    def has_choices(self, cells: Cells) -> bool:
        """Whether rows have choices of their own."""
        return bool(self.choices) or "choices" in cells

    def choices_of(self, cells: Cells) -> Any:
        """The choices of a row that has some."""
        columns = self.choices or "choices"
        if isinstance(columns, str):
            cell = _cell(cells, columns, "choices")
            if isinstance(cell, list) and cell and all(isinstance(v, Mapping) for v in cell):
                inside = " or ".join(f"{columns}.{name}" for name in cell[0])
                raise DataError(
                    f"{columns} holds {cell[0]}: name the part of it that is the choice's text, as"
                    f" by data.columns.choices={inside}"
                )
            return tuple(map(as_text, cell)) if isinstance(cell, list | tuple) else cell
        texts = [as_text(_cell(cells, column, "choices")) for column in columns]
        count = max((i for i, text in enumerate(texts, start=1) if not blank(text)), default=0)
        return tuple(texts[:count])

    def label_of(self, cells: Cells) -> Any:
        """The label as it stands in a row; ``None`` without one."""
        return _optional(cells, "label", self.label)

    def id_of(self, cells: Cells) -> Any:
        """The id of a row; ``None`` without one."""
        return as_text(_optional(cells, "id", self.id))

    def keys_of(self, cells: Cells, count: int) -> tuple[str, ...] | None:
        """What labels call the choices of a row, of which there are ``count``, if a column says."""
        if self.keys is None:
            return None
        keys = _cell(cells, self.keys, "keys")
        if not isinstance(keys, list | tuple) or len(keys) != count:
            raise DataError(
                f"{self.keys} is {keys!r}: expected a list of {count} names, one for each choice"
            )
        return tuple(map(str, keys))


def _filled(template: str | None, cells: Cells, name: str) -> Any:
    """What a column holds, or a text with columns in braces.

    :param name: the field that it is for, whose column it is without a template.
    """
    template = template or name
    if "{" not in template:
        return as_text(_cell(cells, template, name))

    def fill(match: re.Match[str]) -> str:
        value = as_text(_cell(cells, match[1], name))
        if not isinstance(value, str):
            raise DataError(f"{match[1]} is {value!r}: expected a text")
        return value

    return re.sub(r"\{([^{}]+)\}", fill, template)


def _optional(cells: Cells, name: str, column: str | None) -> Any:
    """The cell of a column; ``None`` where the one called as its field is missing."""
    return cells.get(name) if column is None else _cell(cells, column, name)


def _has(cells: Cells, column: str) -> bool:
    try:
        _cell(cells, column, "")
    except DataError:
        return False
    return True


def _cell(cells: Cells, column: str, name: str) -> Any:
    """What a column holds, or what is in it by a name behind a dot, list for list.

    :param name: the field that it is for.
    """
    if column in cells:
        return cells[column]
    value: Any = cells
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and all(isinstance(v, Mapping) and part in v for v in value):
            value = [v[part] for v in value]
        else:
            raise DataError(
                f"no column {column!r}; found {sorted(cells)}; data.columns.{name} says which it is"
            )
    return value


def as_text(value: Any) -> Any:
    """Whole numbers as texts, such as ids; anything else as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def blank(value: object) -> bool:
    """Whether a cell holds nothing."""
    return value is None or (isinstance(value, str) and not value.strip())
