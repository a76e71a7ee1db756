"""Rows of CSV and TSV files, and the columns of their layouts: questions, texts, or prompts."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from .columns import Columns
from .records import DataError

__all__ = ["DELIMITERS", "csv_columns", "csv_rows"]

#: characters, the most that csv takes on every platform
_LONGEST_CELL = 2**31 - 1
#: what stands between two columns, and its name
DELIMITERS = {".csv": (",", "comma"), ".tsv": ("\t", "tab")}

_QUOTES = "a double quote at the beginning of a cell encloses it: put it in quotes, and double it"

EXPECTED = (
    "expected id, question, choice_1, choice_2, …, label, or id, text, class (its name), or id,"
    " prompt, completion; id may be left out, and label, class or completion where it is not known;"
    " commas separate the columns, and tabs in .tsv; other columns are named by data.columns"
)


#: names of the layouts' columns
_OWN = re.compile(r"id|question|choice_[0-9]+|label|text|class|prompt|completion")


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers, and column → cell.

    :raises DataError: if the header, a row's length or the encoding is not as it should be.
    """
    rows = _cells(path)
    line, header = next(rows, (1, None))
    if header is None:
        raise DataError(f"{path}: holds no header; {EXPECTED}")
    double = sorted({name for name in header if header.count(name) > 1})
    if double:
        raise DataError(f"{path}, line {line}: columns double: {double}; found {header}")
    for line, cells in rows:
        yield line, dict(zip(header, cells, strict=True))


def csv_columns(path: Path) -> Columns:
    """The columns of a file that has one of the layouts, whatever other columns it has beside.

    :raises DataError: if it has none of them.
    """
    line, header = next(_cells(path), (1, None))
    if header is None:
        raise DataError(f"{path}: holds no header; {EXPECTED}")
    _check_header(path, line, header)
    numbered = [name for name in header if re.fullmatch(r"choice_[0-9]+", name)]
    if not numbered and "prompt" in header:
        return Columns()
    if not numbered and "text" in header:
        return Columns("text", label="class" if "class" in header else None, labels="names")
    required = ["question", *(f"choice_{i}" for i in range(1, max(2, len(numbered)) + 1))]
    missing = [name for name in required if name not in header]
    if missing:
        raise DataError(
            f"{path}, line {line}: columns missing: {missing}; found {header}; {EXPECTED}"
        )
    if numbered != required[1:]:
        raise DataError(f"{path}, line {line}: found {numbered}: expected the choices in order")
    return Columns(choices=tuple(numbered))


def _check_header(path: Path, line: int, header: list[str]) -> None:
    """:raises DataError: if something else separates the columns, as in what Excel writes where
    commas stand in numbers, or there are spaces behind what does."""
    other = next((mark for mark in ";\t," if mark in header[0]), None)
    if other is not None and len(header) == 1:
        raise DataError(
            f"{path}, line {line}: {other!r} separates the columns: commas do in .csv, and tabs in"
            " .tsv; save it so"
        )
    spaced = [n for n in header if n != n.strip() and _OWN.fullmatch(n.strip())]
    if spaced:
        raise DataError(f"{path}, line {line}: spaces around the columns {spaced}: leave them out")


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and the cells of rows that are not blank, all as many as the header's."""
    delimiter, name = DELIMITERS[path.suffix.lower()]
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    width, line = 0, 1
    try:
        while (cells := _next(reader)) is not None:
            width = width or len(cells)
            if cells and len(cells) != width:
                raise DataError(
                    f"{path}, line {line}: {len(cells)} cells, but the header has {width}; put"
                    f" cells that hold a {name} in double quotes"
                )
            swallowed = next((c for c in cells if delimiter == "\t" and {*"\t\n"} <= {*c}), None)
            if swallowed is not None:
                raise DataError(
                    f"{path}, line {line}: a quote begins a cell that holds lines and tabs,"
                    f" {swallowed[:40]!r}…; {_QUOTES}"
                )
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        kind = path.suffix[1:].upper()
        raise DataError(f"{path}, line {line}: not {kind} ({error}); {_QUOTES}") from error


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
                    f"{path}, line {number}: not UTF-8 ({error}); save the file as UTF-8,"
                    " in Excel as CSV UTF-8"
                ) from error
