"""Read a data set of the Hub, or a downloaded copy of it, through ``datasets``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import DataError, Record

__all__ = ["Row", "Task"]

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A data set on the Hub.

    :param path: the repository's name.
    :param name: the configuration's name.
    :param fields: one row → ``question``, ``choices``, ``label`` and, if it has one, ``id``; else
        the record is called ``<split>-<row>``.
    :param splits: our split → the Hub's, for the splits whose labels are public.
    """

    path: str
    name: str
    fields: Callable[[Row], dict[str, Any]]
    splits: Mapping[str, str]

    def read(self, hub_path: str | None = None) -> dict[str, list[Record]]:
        """The splits by our names.

        :param hub_path: a folder with a copy of the repository, instead of the Hub and its cache.
        :raises DataError: if it can be had from nowhere, or is not laid out as this class says.
        """
        rows = self._load(hub_path)
        return {
            ours: [self._record(row, f"{theirs}-{i}") for i, row in enumerate(rows[theirs])]
            for ours, theirs in self.splits.items()
        }

    def _record(self, row: Row, name: str) -> Record:
        try:
            return Record.from_mapping({"id": name, **self.fields(row)})
        except KeyError as error:
            raise DataError(
                f"{self.path}, row {name}: no column {error}; found {sorted(row)}"
            ) from error
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.path}, row {name}: {error}") from error

    def _load(self, hub_path: str | None) -> dict[str, list[Row]]:
        # Slow to import, and needed for data of the Hub alone.
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        if hub_path is not None and not Path(hub_path).is_dir():
            raise DataError(f"data.hub_path: there is no folder {hub_path}")
        # A whole path, because names such as csv mean a file format to datasets.
        place = str(Path(hub_path).resolve()) if hub_path is not None else self.path
        try:
            # The cache does not notice when a copy's files change; streaming goes without it.
            found = load_dataset(place, self.name, streaming=hub_path is not None)
            rows = {name: list(found[name]) for name in self.splits.values() if name in found}
        # RuntimeError: the repository holds a loading script, which is never run.
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise DataError(
                f"cannot read {self.name} of {place} ({error}). Fetch a copy where there is a"
                f" network, with: hf download --repo-type dataset {self.path} --local-dir COPY, and"
                " give data.hub_path=COPY; or give data.root=, a folder with train.jsonl,"
                " validation.jsonl and test.jsonl"
            ) from error
        absent = sorted(set(self.splits.values()) - rows.keys())
        if absent:
            raise DataError(f"{place} lacks the splits {absent}: found {sorted(found)}")
        return rows
