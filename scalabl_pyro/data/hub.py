"""Read a data set of the Hub, or a downloaded copy of it, through ``datasets``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .columns import Columns
from .parquet_rows import class_labels
from .records import DataError, Record
from .tables import Row, Table, to_records

__all__ = ["Task"]


@dataclass(frozen=True, slots=True)
class Task:
    """A data set on the Hub, and which of its columns make a record.

    :param path: the repository's name.
    :param name: the configuration's name; ``None`` where there is one alone.
    :param columns: a record without an id of its own is called ``<split>-<row>``.
    :param splits: our split → the Hub's, for the splits whose labels are public; if empty, all,
        under their own names.
    :param classes: the choices that all rows share, where rows have none of their own.
    :param revision: branch, tag or commit.
    """

    path: str
    name: str | None = None
    columns: Columns = field(default_factory=Columns)
    splits: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    revision: str | None = None

    def read(self, hub_path: str | None = None) -> dict[str, list[Record]]:
        """The splits by our names.

        :param hub_path: a folder with a copy of the repository, instead of the Hub and its cache.
        :raises DataError: if it can be had from nowhere, or has not these columns and splits.
        """
        return to_records(self.tables(hub_path), self.classes)

    def tables(self, hub_path: str | None = None) -> dict[str, Table]:
        """The rows of the same splits.

        :raises DataError: if it can be had from nowhere, or lacks a split.
        """
        # Slow to import, and needed for data of the Hub alone.
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        if hub_path is not None and not Path(hub_path).is_dir():
            raise DataError(f"data.hub_path: there is no folder {hub_path}")
        # A whole path, because names such as csv mean a file format to datasets.
        place = str(Path(hub_path).resolve()) if hub_path is not None else self.path
        revision = self.revision if hub_path is None else None
        if (Path(place) / "state.json").exists():
            raise DataError(
                f"{place} holds one table saved by save_to_disk, without splits: write it by"
                " dataset.to_parquet('data/train.parquet'), and give data.root=data"
            )
        try:
            # The cache does not notice when a copy's files change; streaming goes without it.
            dataset = load_dataset(
                place, self.name, revision=revision, streaming=hub_path is not None
            )
            splits = self.splits or {name: name for name in dataset}
            tables = {
                ours: Table(
                    self.path,
                    [
                        Row(f"{self.path}, row {theirs}-{i}", f"{theirs}-{i}", cells)
                        for i, cells in enumerate(dataset[theirs])
                    ],
                    self.columns,
                    class_labels(dataset[theirs].features),
                )
                for ours, theirs in splits.items()
                if theirs in dataset
            }
        # RuntimeError: the repository holds a loading script, which is never run.
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            named = f"{self.name} of {place}" if self.name else place
            raise DataError(
                f"cannot read {named} ({error}). Fetch a copy where there is a network, with: hf"
                f" download --repo-type dataset {self.path} --local-dir COPY, and give"
                " data.hub_path=COPY; or give data.root=, a folder with train.jsonl,"
                " validation.jsonl and test.jsonl"
            ) from error
        absent = sorted(set(splits.values()) - set(dataset))
        if absent:
            raise DataError(f"{place} lacks the splits {absent}: found {sorted(dataset)}")
        return tables
