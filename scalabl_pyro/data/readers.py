"""Read records from files: JSON Lines, CSV or Parquet; one, or a folder with one per split."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .columns import Columns, blank
from .completions import Completion, check_known, is_completion
from .csv_rows import DELIMITERS, csv_columns, csv_rows
from .parquet_rows import class_labels, parquet_class_labels, parquet_rows
from .records import DataError, Record
from .tables import Row, Table, to_records

__all__ = [
    "FORMATS",
    "read_completions",
    "read_folder",
    "read_folder_tables",
    "read_records",
    "read_rows",
    "read_table",
]


def jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and decoded objects of a UTF-8 JSON Lines file, one a line.

    :raises DataError: if a line is no JSON, or an object of it has a key twice.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # Some editors begin a file with a byte order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text, object_pairs_hook=_without_repeats)
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            # RecursionError: brackets within brackets; ValueError: a number of thousands of digits.
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not UTF-8 JSON ({error})") from error
            yield number, row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """:raises DataError: if a key occurs twice, of which JSON's readers keep one."""
    by_key: dict[str, Any] = {}
    for key, value in pairs:
        if key in by_key:
            raise DataError(
                f"the key {key!r} occurs twice, with {by_key[key]!r} and {value!r}: expected one"
            )
        by_key[key] = value
    return by_key


class Format(NamedTuple):
    """A kind of file.

    :param rows: file → numbers and cells of its rows.
    :param columns: file → the columns of the layout that this format has of its own.
    :param class_labels: file → column → the names that it gives to numbers.
    :param unit: what the numbers count, for messages.
    """

    rows: Callable[[Path], Iterator[tuple[int, Any]]]
    columns: Callable[[Path], Columns] = lambda path: Columns()
    class_labels: Callable[[Path], Mapping[str, tuple[str, ...]]] = lambda path: {}
    unit: str = "line"


FORMATS = {
    ".jsonl": Format(jsonl_rows),
    **dict.fromkeys(DELIMITERS, Format(csv_rows, csv_columns)),
    ".parquet": Format(parquet_rows, class_labels=parquet_class_labels, unit="row"),
}


#: how a JSON array is written as lines
_ONE_A_LINE = (
    "JSON Lines hold one object a line, as pandas writes them by to_json(path, orient='records',"
    " lines=True)"
)
#: files by which ``datasets`` tells what it saved by ``save_to_disk``: splits, and one table
SAVED_TO_DISK = ("dataset_dict.json", "state.json")


def read_table(
    path: str | Path, columns: Columns | None = None, trained: Columns | None = None
) -> Table:
    """The rows of one file.

    :param columns: which columns make a record; by default those called as the fields of a record
        or a text, or the layouts of CSV. Other columns are passed over.
    :param trained: those that a run was trained by, which are taken where ``columns`` names none
        and the first row has them.
    :raises DataError: if there is no such file, or it is of another kind, damaged or empty.
    """
    path = Path(path)
    if str(path) == "-":
        raise DataError("-: records are read from files alone, not from standard input")
    if path.is_dir():
        raise DataError(
            f"{path} is a folder: expected one file; data.root is for a folder of splits"
        )
    if not path.is_file():
        pipe = "is no regular file: records are read more than once, so write them to one first"
        raise DataError(f"{path}: {pipe if path.exists() else 'no such file'}")
    ending = path.suffix.lower()
    if ending not in FORMATS:
        hint = f"; {_ONE_A_LINE}" if ending == ".json" else ""
        raise DataError(f"{path}: expected a file that ends in {', '.join(FORMATS)}{hint}")
    kind = FORMATS[ending]
    columns = columns or Columns()
    asked = columns.labels
    if trained is not None:
        first = next(iter(kind.rows(path)), (1, None))
        columns = columns.or_those_of(trained, first[1])
    own_layout = columns.none_named
    if own_layout:
        layout = kind.columns(path)
        # How a run read other files says nothing of a layout that names classes.
        labels = asked if layout.labels != "auto" else columns.labels
        columns = layout if labels == "auto" else replace(layout, labels=labels)
    rows = []
    for count, (number, cells) in enumerate(kind.rows(path), start=1):
        place = f"{path}, {kind.unit} {number}"
        if not isinstance(cells, Mapping):
            raise DataError(
                f"{place}: found {type(cells).__name__}: expected an object; {_ONE_A_LINE}"
            )
        if ending in DELIMITERS and is_completion(cells) and blank(cells.get("completion")):
            cells = {name: cell for name, cell in cells.items() if name != "completion"}
        rows.append(Row(place, str(count), cells))
    if not rows:
        raise DataError(f"{path}: holds no records")
    return Table(str(path), rows, columns, kind.class_labels(path), own_layout)


def read_records(
    path: str | Path, classes: Sequence[str] = (), columns: Columns | None = None
) -> list[Record]:
    """The records of one file. Rows with ``prompt`` or ``messages`` become :class:`Completion`.

    :param classes: the choices of rows that have none of their own, as of a CSV file of texts.
    :param columns: as for :func:`read_table`.
    :raises DataError: at the first bad row or repeated id, with file, line, value and reason; if
        there is no record.
    """
    return to_records({"": read_table(path, columns)}, classes)[""]


def read_rows(
    rows: Iterable[Mapping[str, Any]],
    classes: Sequence[str] = (),
    columns: Columns | None = None,
) -> list[Record]:
    """The records of rows in memory: dictionaries, or a split of a data set of ``datasets``.

    :param classes: as for :func:`read_records`.
    :param columns: which columns make a record; by default those called as its fields.
    :raises DataError: at the first bad row or repeated id, with its number, value and reason; if
        there is none.
    """
    columns = columns or Columns()
    listed = []
    for number, cells in enumerate(rows, start=1):
        if not isinstance(cells, Mapping):
            raise DataError(f"row {number}: found {type(cells).__name__}: expected a dictionary")
        listed.append(Row(f"row {number}", str(number), cells))
    if not listed:
        raise DataError("there are no rows")
    features = getattr(rows, "features", None)
    names = class_labels(features) if features else {}
    return to_records({"": Table("rows", listed, columns, names, columns.none_named)}, classes)[""]


def read_completions(
    path: str | Path,
    columns: Columns | None = None,
    trained: Columns | None = None,
    *,
    known: bool = False,
) -> list[Completion]:
    """The texts of one file: prompts or conversations, with or without what follows them.

    :param columns: as for :func:`read_table`, and so ``trained``.
    :param known: what follows is needed.
    :raises DataError: as :func:`read_records`, and if a row is a question with choices, or lacks
        what is needed.
    """
    table = read_table(path, columns, trained)
    records: list[Any] = to_records({"": table})[""]
    for row, record in zip(table.rows, records, strict=True):
        if not isinstance(record, Completion):
            raise DataError(
                f"{path}: record {record.id!r} is a question with choices: expected prompts or"
                " messages"
            )
        if known:
            check_known([record], row.place)
    return records


def read_folder(
    root: str | Path,
    classes: Sequence[str] = (),
    columns: Columns | None = None,
    split_names: Mapping[str, str] | None = None,
) -> dict[str, list[Record]]:
    """The splits of a folder, ``<split>.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` each.

    :param classes: the choices of rows that have none of their own; by default as for
        :func:`~scalabl_pyro.data.to_records`.
    :param columns: as for :func:`read_table`.
    :param split_names: split → the file's name without its ending; by default all files, under
        their own names.
    :raises DataError: if the folder does not exist, holds no such file, or two for one split.
    """
    return to_records(read_folder_tables(root, columns, split_names), classes)


def read_folder_tables(
    root: str | Path,
    columns: Columns | None = None,
    split_names: Mapping[str, str] | None = None,
    trained: Columns | None = None,
) -> dict[str, Table]:
    """The rows of the same splits.

    :param trained: as for :func:`read_table`.
    :raises DataError: as :func:`read_folder`.
    """
    root = Path(root)
    paths = sorted(path for path in root.glob("*") if path.suffix.lower() in FORMATS)
    if not paths and (saved := [n for n in SAVED_TO_DISK if (root / n).exists()]):
        raise DataError(
            f"{root} holds {saved[0]}, a data set saved by save_to_disk: give data.hub={root} if it"
            " has splits, or write each split by dataset.to_parquet('train.parquet')"
        )
    if not paths:
        raise DataError(
            f"{root}: expected a folder with files such as train.jsonl and test.jsonl, or train.csv"
            " or train.parquet"
        )
    by_name: dict[str, Path] = {}
    for path in paths:
        if path.stem in by_name:
            raise DataError(f"{by_name[path.stem]} and {path}: expected one file for each split")
        by_name[path.stem] = path
    stems = split_names or {name: name for name in by_name}
    absent = sorted(set(stems.values()) - by_name.keys())
    if absent:
        raise DataError(f"{root} lacks the splits {absent}: found {sorted(by_name)}")
    return {ours: read_table(by_name[theirs], columns, trained) for ours, theirs in stems.items()}
