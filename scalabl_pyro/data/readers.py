"""Read records from files: JSON Lines or CSV, one file, or a folder with a file per split."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from .completions import Completion, is_completion
from .csv_rows import class_names, csv_rows
from .records import DataError, Record

__all__ = ["FORMATS", "iter_records", "read_completions", "read_folder", "read_records"]


def jsonl_rows(path: Path, classes: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Line numbers and decoded objects of a UTF-8 JSON Lines file, one a line.

    :param classes: not needed here: every record spells out its choices.
    :raises DataError: if a line is no JSON, or an object of it has a key twice.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # Some editors begin a file with a byte order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                found = json.loads(text, object_pairs_hook=_without_repeats)
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            # RecursionError: brackets within brackets; ValueError: a number of thousands of digits.
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not UTF-8 JSON ({error})") from error
            yield number, found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """:raises DataError: if a key occurs twice, of which JSON's readers keep one."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DataError(
                f"the key {key!r} occurs twice, with {found[key]!r} and {value!r}: expected one"
            )
        found[key] = value
    return found


FORMATS = {".jsonl": jsonl_rows, ".csv": csv_rows}


def iter_records(path: str | Path, classes: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of a ``.jsonl`` or ``.csv`` file as they are read.

    Rows with ``prompt`` or ``messages`` are texts, and become :class:`Completion`; the id of such a
    row is its line's number if it has none.

    :param classes: the class names that a CSV file of texts needs.
    :raises DataError: at the first bad line or repeated id, with file, line, value and reason.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in FORMATS:
        raise DataError(f"{path}: expected a file that ends in {' or '.join(FORMATS)}")
    first: dict[str, int] = {}
    for line, fields in FORMATS[path.suffix](path, classes):
        try:
            record = _record(fields, line)
        except DataError as error:
            raise DataError(f"{path}, line {line}: {error}") from error
        if record.id in first:
            raise DataError(
                f"{path}, line {line}: the id {record.id!r} occurs twice, first on line"
                f" {first[record.id]}; ids name one record each"
            )
        first[record.id] = line
        yield record


def _record(fields: Any, line: int) -> Record:
    if is_completion(fields):
        return cast(Record, Completion.from_mapping({"id": str(line)} | fields))
    return Record.from_mapping(fields)


def read_completions(path: str | Path) -> list[Completion]:
    """Read texts: prompts or conversations, with or without what follows them.

    :raises DataError: as :func:`read_records`, and if a row is a question with choices.
    """
    records: list[Any] = read_records(path)
    for record in records:
        if not isinstance(record, Completion):
            raise DataError(
                f"{path}: record {record.id!r} is a question with choices: expected prompts or"
                " messages"
            )
    return records


def read_records(path: str | Path, classes: Sequence[str] = ()) -> list[Record]:
    """All records of one file.

    :param classes: as for :func:`iter_records`.
    :raises DataError: if a line is bad, or there is no record.
    """
    records = list(iter_records(path, classes))
    if not records:
        raise DataError(f"{path}: holds no records")
    return records


def read_folder(root: str | Path, classes: Sequence[str] = ()) -> dict[str, list[Record]]:
    """The splits of a folder, ``<split>.jsonl`` or ``<split>.csv`` each, by name.

    :param classes: class names for CSV files of texts; by default those in ``train.csv``.
    :raises DataError: if the folder does not exist, holds no such file, or two for one split.
    """
    root = Path(root)
    paths = sorted(path for path in root.glob("*") if path.suffix in FORMATS)
    if not paths:
        raise DataError(
            f"{root}: expected a folder with files such as train.jsonl and test.jsonl, or train.csv"
        )
    by_split: dict[str, Path] = {}
    for path in paths:
        if path.stem in by_split:
            raise DataError(f"{by_split[path.stem]} and {path}: expected one file for each split")
        by_split[path.stem] = path
    classes = classes or class_names(root / "train.csv")
    return {name: read_records(path, classes) for name, path in by_split.items()}
