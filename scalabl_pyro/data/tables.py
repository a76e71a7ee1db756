"""The rows of a table as records."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

from .columns import Columns, as_text, blank
from .completions import Completion, is_completion
from .labels import Labelled, decide, read_label
from .records import DataError, Record, class_set
from .text import canonical, comparable

__all__ = ["Decided", "Row", "Table", "read_tables", "to_records"]

log = logging.getLogger(__name__)


#: how other programs write that a cell holds nothing
_NOTHING = ("nan", "NaN", "null", "NULL", "None", "N/A", "<NA>", "#N/A")


class Row(NamedTuple):
    """One row of a table.

    :param place: where it stands, for messages.
    :param name: its id where no column has one.
    :param cells: column → value.
    """

    place: str
    name: str
    cells: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one split, and the columns that make them records.

    :param place: the file or data set, for messages.
    :param class_labels: column → names, for columns of numbers whose names the file itself gives
        (``ClassLabel`` of ``datasets``).
    :param own_layout: no column is named by its reader, so that they are called as our own.
    """

    place: str
    rows: Sequence[Row]
    columns: Columns
    class_labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_layout: bool = False

    @property
    def first(self) -> Mapping[str, Any]:
        """The cells of the first row; none of a table without rows."""
        return self.rows[0].cells if self.rows else {}

    @property
    def has_choices(self) -> bool:
        """Whether rows have choices of their own."""
        return self.columns.has_choices(self.first)


def to_records(tables: Mapping[str, Table], classes: Sequence[str] = ()) -> dict[str, list[Record]]:
    """The records of each split. How labels are read is decided once, by all splits together.

    :param classes: the choices of rows that have none of their own; by default the names that the
        file gives to the numbers of the label column, or else those in the column ``label`` of the
        split ``train``, sorted.
    :raises DataError: at the first bad row, with its place, value and reason; if an id occurs twice
        in a split; if labels can be read in several ways.
    """
    return read_tables(tables, classes).splits


class Decided(NamedTuple):
    """Records, and what they decided, by which files of later are read as they were.

    :param splits: the records of each split.
    :param labels: how labels are read, a key of ``READINGS``; ``None`` where nothing is decided.
    :param classes: the choices of all records, where rows have none of their own.
    """

    splits: dict[str, list[Record]]
    labels: str | None = None
    classes: tuple[str, ...] = ()


def read_tables(
    tables: Mapping[str, Table], classes: Sequence[str] = (), default: Sequence[str] = ()
) -> Decided:
    """The same, and what the data decided.

    :param default: the choices of rows that have none of their own, where the file names none.
    """
    classes, default = class_set(classes), class_set(default)
    tables = {
        name: replace(table, columns=table.columns.or_of_a_text(table.first))
        for name, table in tables.items()
    }
    train = tables.get("train")
    by_name = {
        name: list(_read(table, classes or _named(table) or default or _found(table, train)))
        for name, table in tables.items()
    }
    labelled = [row for rows in by_name.values() for row in rows if row.label]
    undecided = [row.label for row in labelled if row.label and row.reading == "auto"]
    decided = decide(undecided, list(_preferred(tables.values()))) if undecided else None
    splits = {n: _distinct(rows, decided, trains=train is not None) for n, rows in by_name.items()}
    return Decided(splits, _decided_labels(tables.values(), labelled, decided), _shared(by_name))


def _decided_labels(
    tables: Collection[Table], labelled: Sequence[_Read], decided: str | None
) -> str | None:
    if tables and all(table.columns.labels == "names" for table in tables):
        return "names"  # as a layout of the format says
    # Of numbers that have names, those were read, which from_0 does not.
    named = any((table.columns.label or "label") in table.class_labels for table in tables)
    whole = all(row.reading == "auto" for row in labelled)
    return decided if whole and not (named and decided == "from_0") else None


def _shared(by_name: Mapping[str, Sequence[_Read]]) -> tuple[str, ...]:
    """The choices of all records, if no row has some of its own."""
    rows = [row for each in by_name.values() for row in each]
    if any(row.own_choices or not isinstance(row.record, Record) for row in rows):
        return ()
    return rows[0].record.choices if rows else ()


def _preferred(tables: Iterable[Table]) -> Iterator[str]:
    """How labels are read that the data leave open."""
    for table in tables:
        if not table.has_choices:
            yield "names"  # of the classes, which may be numbers too
        if table.own_layout:
            yield "from_0"  # as a record has it


class _Read(NamedTuple):
    """A record, and the label that it gets once it is known how labels are read.

    :param own_choices: its choices stand in its row.
    """

    place: str
    record: Record
    own_choices: bool = False
    label: Labelled | None = None
    reading: str = ""


def _read(table: Table, classes: Sequence[str]) -> Iterator[_Read]:
    columns = table.columns
    for row in table.rows:
        try:
            name = columns.id_of(row.cells)
            name = row.name if name is None else name
            if columns.of_texts or (columns.none_named and is_completion(row.cells)):
                text = _text(name, columns, row.cells)
                yield _Read(row.place, cast(Record, text))
                continue
            own = columns.has_choices(row.cells)
            if not own and not classes:
                raise DataError(
                    "the classes are not known, and no column has choices; give"
                    " data.columns.label, the column of their names, or data.classes=[name,name,…],"
                    " or data.columns.choices, or of texts to go on with"
                    " data.columns.prompt, or of conversations the column messages, a list of"
                    f" {{role, content}}; found {sorted(row.cells)}"
                )
            record = Record(
                id=name,
                question=columns.question_of(row.cells),
                choices=columns.choices_of(row.cells) if own else tuple(classes),
            )
            names = table.class_labels.get(columns.label or "label", ())
            yield _Read(row.place, record, own, *_label(row, record.choices, columns, names, own))
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error


def _text(name: str, columns: Columns, cells: Mapping[str, Any]) -> Completion:
    if columns.of_texts:
        completion = columns.completion_of(cells)
        cells = {"prompt": columns.prompt_of(cells), "completion": completion}
    return Completion.from_mapping(dict(cells) | {"id": name})


def _distinct(rows: Sequence[_Read], decided: str | None, *, trains: bool) -> list[Record]:
    """:param trains: whether there is a split ``train``, whose classes can be given."""
    records, places = [], dict[str, str]()
    for place, record, own_choices, label, reading in rows:
        if label is not None:
            try:
                index = read_label(label, decided if decided and reading == "auto" else reading)
            except DataError as error:
                by_keys = tuple(label.choices) != record.choices
                if reading == "auto" or by_keys:
                    raise
                if reading == "names" and not own_choices:
                    if not trains:
                        raise
                    raise DataError(
                        f"{error}; or give data.classes, the names of all classes, and where labels"
                        " are their numbers data.columns.labels=from_0 or from_1"
                    ) from error
                raise DataError(
                    f"{error}; labels are read as {reading}, as given or as the run was trained:"
                    " data.columns.labels says otherwise"
                ) from error
            record = replace(record, label=index)
        if record.id in places:
            raise DataError(
                f"{place}: the id {record.id!r} occurs twice, first in {places[record.id]}, and ids"
                " name one record each: name another column by data.columns.id, or rename this one,"
                " and rows are numbered"
            )
        places[record.id] = place
        records.append(record)
    return records


def _label(
    row: Row, choices: tuple[str, ...], columns: Columns, names: Sequence[str], own: bool
) -> tuple[Labelled | None, str]:
    """The label, if there is one, and how it is read.

    :param names: those that the file gives to the numbers of the label column.
    :param own: the choices are those of this row.
    """
    label, column, reading = columns.label_of(row.cells), columns.label or "label", columns.labels
    if blank(label) or (names and label == -1):  # -1: how ``datasets`` writes that none is known
        return None, ""
    keys = columns.keys_of(row.cells, len(choices))
    if keys is not None:
        return Labelled(row.place, column, str(label), keys), "names"
    if names and reading != "from_0":
        if label not in range(len(names)):
            raise DataError(f"{column} is {label!r}, but it has the names {list(names)}")
        if not own and set(choices) != set(map(canonical, names)):
            raise DataError(
                f"the classes are {list(choices)}, but {column} has the names {list(names)}: give"
                " the same names in any order, or data.columns.labels=from_0, to rename them"
            )
        label, reading = names[label], reading if own else "names"
    return Labelled(row.place, column, label, choices), reading


def _named(table: Table) -> tuple[str, ...]:
    """The names that the file gives to the numbers of its labels."""
    return class_set(table.class_labels.get(table.columns.label or "label", ()))


def _found(table: Table, train: Table | None) -> tuple[str, ...]:
    """The names of the classes in the split ``train``, for rows that need them: see
    :func:`to_records`."""
    texts = table.columns.of_texts or (table.columns.none_named and is_completion(table.first))
    if train is None or table.has_choices or texts:
        return ()
    columns = train.columns
    column = columns.label or "label"
    labels = [as_text(_label_in(row, columns)) for row in train.rows]
    numbers = list(dict.fromkeys(x for x in labels if isinstance(x, bool | float)))
    if numbers:
        raise DataError(
            f"{train.place}: the column {column} holds {numbers[:8]}: expected texts or whole"
            " numbers; give data.classes=[name,name,…], the names of False and True or of the"
            " numbers in their order, or correct the file"
        )
    counts = Counter(canonical(label.strip()) for label in labels if isinstance(label, str))
    names = counts.keys() - {""}
    if not names and columns.labels != "names":
        return ()
    if len(names) < 2:
        raise DataError(
            f"{train.place}: the column {column} holds {sorted(names)}: expected two classes or"
            " more; correct the file, or give data.classes=[name,name,…]"
        )
    if table is train:
        _warn_of_missing(train.place, column, names)
        _warn_of_alike(train.place, column, {name: counts[name] for name in names})
        if columns.labels != "names" and all(map(str.isdecimal, names)):
            log.warning(
                "%s: the numbers in the column %s, %s, are taken as the names of classes: give"
                " data.classes to name them, or data.columns.choices where questions have choices",
                *(train.place, column, sorted(names)),
            )
    try:
        return class_set(sorted(names))
    except DataError as error:
        raise DataError(f"{train.place}: {error}") from error


def _label_in(row: Row, columns: Columns) -> Any:
    try:
        return columns.label_of(row.cells)
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from error


def _warn_of_missing(place: str, column: str, names: Collection[str]) -> None:
    """Tell of what other programs write into a cell that holds nothing."""
    found = sorted(name for name in names if name in _NOTHING)
    if found:
        log.warning(
            "%s: the column %s has %s, which become classes: empty these cells where the label is"
            " not known",
            *(place, column, found),
        )


def _warn_of_alike(place: str, column: str, counts: Mapping[str, int]) -> None:
    """Tell of a class with a single record, or of another case, whose name is nearly another's."""
    for name, count in sorted(counts.items()):
        others = [other for other in counts if counts[other] > count]
        near = [other for other in others if comparable(other) == comparable(name)]
        if count == 1 and not near:
            near = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
        if near:
            log.warning(
                "%s: the column %s has %r %d times, a class of its own beside %r (%d times):"
                " correct the file if it is the same",
                *(place, column, name, count, near[0], counts[near[0]]),
            )
