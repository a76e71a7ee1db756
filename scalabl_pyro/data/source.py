"""Where records come from: one file, a folder, or a data set of the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .csv_rows import class_names
from .readers import read_folder, read_records
from .records import DataError, Record, class_set
from .splits import check_split
from .tasks import find_task

__all__ = ["DataSource"]


@dataclass(frozen=True, slots=True)
class DataSource:
    """Exactly one of ``path``, ``root`` and ``task``.

    :param path: one file, ``.jsonl`` or ``.csv``.
    :param root: a folder with a file per split, ``train.jsonl`` or ``train.csv`` and so on.
    :param task: a data set of the Hub or the embedded one, a key of ``TASKS``.
    :param hub_path: a folder with a downloaded copy of that data set's repository.
    :param classes: the choices that every record offers, in this order; for a CSV file of texts,
        by default the sorted class names of the training file.
    :raises ValueError: if not exactly one is given, or ``task`` is unknown.
    """

    path: str | None = None
    root: str | None = None
    task: str | None = None
    hub_path: str | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.classes) == 1 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"data.classes is {list(self.classes)}: expected two different names")
        try:
            object.__setattr__(self, "classes", class_set(self.classes))
        except DataError as error:
            raise ValueError(f"data.classes: {error}") from error
        given = {name: getattr(self, name) for name in ("path", "root", "task")}
        if sum(value is not None for value in given.values()) != 1:
            shown = ", ".join(f"data.{name} is {value!r}" for name, value in given.items())
            raise ValueError(f"{shown}: give exactly one")
        if self.task is not None:
            find_task(self.task)
        elif self.hub_path is not None:
            raise ValueError("data.hub_path is a copy of a data set of the Hub: give data.task too")

    def read(self) -> dict[str, list[Record]]:
        """All splits as they are stored; the records of ``path`` are all called ``train``.

        :raises DataError: if a file is missing or bad.
        """
        if self.task is not None:
            splits = find_task(self.task).read(self.hub_path)
        elif self.root is not None:
            splits = read_folder(self.root, self.classes)
        else:
            path = Path(str(self.path))
            splits = {"train": read_records(path, self.classes or class_names(path))}
        for name, records in splits.items():
            self._check_choices(records, name)
        return splits

    def read_split(self, name: str) -> list[Record]:
        """The records to evaluate on: all of ``path``, or the split ``name``.

        The class names of a file of texts must be given: those it holds may be some of them.

        :raises DataError: if a file is missing or bad, or there is no such split.
        """
        if self.path is None:
            return check_split(self.read(), name)
        records = read_records(self.path, self.classes)
        self._check_choices(records, self.path)
        return records

    def _check_choices(self, records: list[Record], place: str) -> None:
        for record in records:
            if self.classes and record.choices != self.classes:
                raise DataError(
                    f"{place}: record {record.id!r} has the choices {list(record.choices)}, but the"
                    f" classes are {list(self.classes)}"
                )
