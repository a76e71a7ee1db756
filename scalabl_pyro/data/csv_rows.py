"""Rows of a CSV file: questions with choices, texts with the names of their classes, or prompts."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .records import DataError, class_set
from .text import canonical

__all__ = ["class_names", "csv_rows"]

#: characters, the most that csv takes on every platform
_LONGEST_CELL = 2**31 - 1

EXPECTED = (
    "expected id, question, choice_1, choice_2, …, label (0-based), or id, text, class (its name),"
    " or id, prompt, completion; id may be left out, and label, class or completion where it is not"
    " known; commas separate the columns"
)


def csv_rows(path: Path, classes: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and the fields of a record, as they are read.

    :param classes: for texts, the names that ``class`` may hold; they become the choices.
    :raises DataError: if a column, a cell or the encoding is not as it should be.
    """
    classes = class_set(classes)
    rows = _cells(path)
    columns = _columns(path, rows)
    if "text" in columns and not classes:
        raise DataError(
            f"{path}: the classes are not known; give data.classes=[name,name,…], or a file with"
            " the columns question, choice_1, choice_2, …"
        )
    for count, (line, cells) in enumerate(rows, start=1):
        row = dict(zip(columns, cells, strict=True))
        try:
            if "prompt" in columns:
                fields = _prompt(row)
            else:
                fields = _text(row, classes) if "text" in columns else _question(row)
        except DataError as error:
            raise DataError(f"{path}, line {line}: {error}") from error
        yield line, {"id": row.get("id", str(count)), **fields}


def class_names(path: Path) -> tuple[str, ...]:
    """The sorted names in the column ``class`` of a file of texts; of any other file, none.

    :raises DataError: if there are fewer than two, two that look the same, or the file is bad.
    """
    if path.suffix != ".csv" or not path.is_file():
        return ()
    rows = _cells(path)
    columns = _columns(path, rows)
    if "class" not in columns:
        return ()
    names = {canonical(cells[columns.index("class")].strip()) for _, cells in rows} - {""}
    if len(names) < 2:
        raise DataError(
            f"{path}: the column class holds {sorted(names)}: expected two classes or more; correct"
            " the file, or give data.classes=[name,name,…]"
        )
    try:
        return class_set(sorted(names))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _question(row: dict[str, str]) -> dict[str, Any]:
    cells = [value for name, value in row.items() if name.startswith("choice_")]
    count = max((i for i, cell in enumerate(cells, start=1) if cell.strip()), default=0)
    fields: dict[str, Any] = {"question": row["question"], "choices": cells[:count]}
    label = row.get("label", "").strip()
    if label:
        if not re.fullmatch(r"-?[0-9]+", label):
            raise DataError(f"label is {label!r}: expected the 0-based number of a choice")
        fields["label"] = int(label)
    return fields


def _prompt(row: dict[str, str]) -> dict[str, Any]:
    completion = row.get("completion", "")
    known = {"completion": completion} if completion.strip() else {}
    return {"prompt": row["prompt"], **known}


def _text(row: dict[str, str], classes: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"question": row["text"], "choices": list(classes)}
    name = canonical(row.get("class", "").strip())
    if name:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"class is {name!r}: expected one of {list(classes)}{hint}")
        fields["label"] = list(classes).index(name)
    return fields


def _columns(path: Path, rows: Iterator[tuple[int, list[str]]]) -> list[str]:
    header = next(rows, None)
    if header is None:
        raise DataError(f"{path}: holds no header; {EXPECTED}")
    line, found = header
    numbered = [name for name in found if re.fullmatch(r"choice_[0-9]+", name)]
    if "prompt" in found:
        required, optional = ["prompt"], ["id", "completion"]
    elif "text" in found:
        required, optional = ["text"], ["id", "class"]
    else:
        required = ["question", *(f"choice_{i}" for i in range(1, max(2, len(numbered)) + 1))]
        optional = ["id", "label"]
    missing = [name for name in required if name not in found]
    unknown = [name for name in found if name not in [*required, *optional]]
    double = sorted({name for name in found if found.count(name) > 1})
    if missing or unknown or double:
        raise DataError(
            f"{path}, line {line}: columns missing: {missing}; unknown: {unknown}; double:"
            f" {double}; found {found}; {EXPECTED}"
        )
    if numbered != [name for name in required if name in numbered]:
        raise DataError(f"{path}, line {line}: found {numbered}: expected the choices in order")
    return found


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and the cells of rows that are not blank, all as many as the header's."""
    reader = csv.reader(_lines(path), strict=True)
    width, line = 0, 1
    try:
        while (cells := _next(reader)) is not None:
            width = width or len(cells)
            if cells and len(cells) != width:
                raise DataError(
                    f"{path}, line {line}: {len(cells)} cells, but the header has {width}; put"
                    " cells that hold a comma in double quotes"
                )
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not CSV ({error})") from error


def _next(rows: Iterator[list[str]]) -> list[str] | None:
    # The limit of 131,072 characters a cell is one of the whole process, and so put back.
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        return next(rows, None)
    finally:
        csv.field_size_limit(before)


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # Spreadsheets begin a file with a byte order mark.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8 ({error}); save the file as CSV UTF-8"
                ) from error
