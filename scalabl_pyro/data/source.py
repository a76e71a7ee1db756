"""Where records come from: one file, a folder, a data set known by a name, or any of the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from .columns import Columns, as_text
from .completions import check_known
from .hub import Task
from .readers import read_folder_tables, read_table
from .records import DataError, Record, class_set
from .splits import check_split, subsample
from .tables import Decided, Table, read_tables
from .tasks import find_task

__all__ = ["DataSource"]


def _texts(names: Any) -> Any:
    """Names of classes that are numbers, as texts; anything else as it is."""
    return tuple(map(as_text, names)) if isinstance(names, list | tuple) else names


class _Numbers:
    """Lets pydantic take numbers for texts. Records are read without it too, as by a benchmark."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import BeforeValidator

        return BeforeValidator(_texts).__get_pydantic_core_schema__(source, handler)


@dataclass(frozen=True, slots=True)
class DataSource:
    """Exactly one of ``path``, ``root``, ``task`` and ``hub``.

    :param path: one file, ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet``.
    :param root: a folder with a file per split, ``train.jsonl`` or ``train.csv`` and so on.
    :param task: a data set of the Hub or the embedded one, a key of ``TASKS``.
    :param hub: any data set of the Hub, ``owner/name``.
    :param name: its configuration (subset), where it has several.
    :param revision: its branch, tag or commit.
    :param hub_path: a folder with a downloaded copy of the data set that ``task`` or ``hub`` names.
    :param split_names: our split → its name in ``hub`` or ``root``; by default all splits under
        their own names. Of a data set whose test labels are hidden, ``test`` may be
        ``validation``; there is then a part of ``train`` to validate on.
    :param columns: which columns make a record; of a ``task`` they are known.
    :param classes: the choices that every record offers, in this order; for texts by default the
        names that a column of class labels has, or the sorted names in the training split.
    :param limit: split → how many of its records to take, at random and always the same ones.
    :raises ValueError: if not exactly one is given, ``task`` is unknown, or a setting says nothing
        about what is given.

    Where a mapping has ``None``, the split is as if it were not in it; ``limit`` is kept as a
    mapping.
    """

    path: str | None = None
    root: str | None = None
    task: str | None = None
    hub: str | None = None
    name: str | None = None
    revision: str | None = None
    hub_path: str | None = None
    split_names: Mapping[str, str | None] = field(default_factory=dict)
    columns: Columns = field(default_factory=Columns)
    classes: Annotated[tuple[str, ...], _Numbers()] = ()
    limit: Mapping[str, int | None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", _texts(self.classes))
        if len(self.classes) == 1 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"data.classes is {list(self.classes)}: expected two different names")
        try:
            object.__setattr__(self, "classes", class_set(self.classes))
        except DataError as error:
            raise ValueError(f"data.classes: {error}") from error
        sources = {name: getattr(self, name) for name in ("path", "root", "task", "hub")}
        if sum(value is not None for value in sources.values()) != 1:
            shown = ", ".join(f"data.{name} is {value!r}" for name, value in sources.items())
            one_too_many = self.task is not None and any((self.path, self.root, self.hub))
            fix = ", and data.task=null takes a default task away" if one_too_many else ""
            raise ValueError(f"{shown}: give exactly one{fix}")
        if self.task is not None:
            find_task(self.task)
        for name in ("split_names", "limit"):
            setting = getattr(self, name) or {}
            if not isinstance(setting, Mapping):
                raise ValueError(
                    f"data.{name} is {setting!r}: expected a value for each split that has one, as"
                    f" in data.{name}.train={setting}"
                )
            per_split = {split: value for split, value in setting.items() if value is not None}
            object.__setattr__(self, name, per_split)
        for split, count in (self.limit or {}).items():
            least = 2 if split == "train" else 1
            if count is not None and count < least:
                raise ValueError(f"data.limit.{split} is {count}: expected {least} or more")
        self._check_use()

    def _check_use(self) -> None:
        """:raises ValueError: at a setting that says nothing about what is given."""
        used = {
            "hub_path": ("task", "hub"),
            "name": ("hub",),
            "revision": ("hub",),
            "split_names": ("hub", "root"),
            "columns": ("path", "root", "hub"),
        }
        for name, sources in used.items():
            value = getattr(self, name)
            nothing = value in (None, {}, Columns())
            if not nothing and all(getattr(self, source) is None for source in sources):
                alternatives = " or ".join(f"data.{source}" for source in sources)
                raise ValueError(
                    f"data.{name} is {value!r}, which says something about {alternatives} alone:"
                    f" give that, or leave data.{name} out"
                )

    def read(self) -> dict[str, list[Record]]:
        """All splits as they are stored, whole; the records of ``path`` are all called ``train``.

        :raises DataError: if a file is missing or bad.
        """
        return self.read_decided().splits

    def read_decided(self, trained: Columns | None = None, default: Sequence[str] = ()) -> Decided:
        """The same, and what the data decided, of a ``task`` nothing.

        :param trained: as for :func:`~scalabl_pyro.data.read_table`.
        :param default: the choices of rows that have none, where neither ``classes`` nor the file
            names them.
        :raises DataError: as :meth:`read`.
        """
        if self.task is not None:
            decided = Decided(find_task(self.task).read(self.hub_path))
        else:
            decided = read_tables(self._tables("train", trained), self.classes, default)
        for name, records in decided.splits.items():
            self._check_choices(records, name)
        return decided

    def read_split(
        self, name: str, trained: Columns | None = None, default: Sequence[str] = ()
    ) -> list[Record]:
        """The records to evaluate on, no more than their limit: of ``path``, or the split ``name``.

        The class names of a file of texts must be given: those it holds may be some of them.

        :param trained: as for :func:`~scalabl_pyro.data.read_table`.
        :param default: as for :meth:`read_decided`.
        :raises DataError: if a file is missing or bad, or there is no such split.
        :raises ValueError: if a split that ``path`` has not has a limit.
        """
        limits = self.limit or {}
        other = next((split for split in limits if split != name), None)
        if self.path is not None and other is not None:
            raise ValueError(
                f"data.limit.{other} is {limits[other]}, and {self.path} is one split, {name}: give"
                f" data.limit.{name}"
            )
        if self.path is None:
            records = check_split(self.read_decided(trained, default).splits, name)
        else:
            tables = self._tables(self.path, trained)
            (records,) = read_tables(tables, self.classes, default).splits.values()
            self._check_choices(records, self.path)
        self.check_known(records, name)
        count = (self.limit or {}).get(name)
        return records if count is None else subsample(records, count)

    def check_known(self, records: Sequence[Record], split: str) -> None:
        """:raises DataError: at a text among them without a completion, with where they are."""
        place = self.path or f"the split {split} of {self.root or self.task or self.hub}"
        check_known(records, place)

    def limited(self, splits: Mapping[str, list[Record]]) -> dict[str, list[Record]]:
        """The same splits, of each no more than its limit.

        :raises DataError: if a split that has a limit does not exist.
        """
        by_name = dict(splits)
        for name, count in (self.limit or {}).items():
            if count is not None:
                by_name[name] = subsample(check_split(by_name, name), count)
        return by_name

    def _names(self) -> dict[str, str]:
        return {ours: theirs for ours, theirs in self.split_names.items() if theirs is not None}

    def _tables(self, whole: str, trained: Columns | None) -> dict[str, Table]:
        """The rows of each split, where ``task`` is not given.

        :param whole: what the rows of ``path`` are called.
        """
        if self.path is not None:
            return {whole: read_table(self.path, self.columns, trained)}
        if self.root is not None:
            return read_folder_tables(self.root, self.columns, self._names(), trained)
        task = Task(str(self.hub), self.name, self.columns, self._names(), revision=self.revision)
        tables = task.tables(self.hub_path)
        if trained is None:
            return tables
        return {
            name: replace(table, columns=self.columns.or_those_of(trained, table.first))
            for name, table in tables.items()
        }

    def _check_choices(self, records: list[Record], place: str) -> None:
        for record in records:
            if self.classes and record.choices != self.classes:
                raise DataError(
                    f"{place}: record {record.id!r} has the choices {list(record.choices)}, but the"
                    f" classes are {list(self.classes)}"
                )
