"""Rows of a Parquet file, and the names that it gives to numbered classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .records import DataError

__all__ = [
    "class_labels",
    "parquet_class_labels",
    "parquet_rows",
]


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers from 1, and column → value, lists and what is nested included.

    :raises DataError: if the file is damaged.
    """
    # Slow to import, and needed for Parquet alone; so below.
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            yield from enumerate((row for rows in batches for row in rows), start=1)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not Parquet ({error})") from error


def class_labels(features: Mapping[str, Any] | None) -> dict[str, tuple[str, ...]]:
    """Column → names, for each column of class labels.

    :param features: the columns' types as ``datasets`` knows them.
    """
    from datasets import ClassLabel

    return {
        column: tuple(feature.names)
        for column, feature in (features or {}).items()
        if isinstance(feature, ClassLabel)
    }


def parquet_class_labels(path: Path) -> dict[str, tuple[str, ...]]:
    """The same of a file that ``datasets`` wrote.

    :raises DataError: if the file is damaged.
    """
    import pyarrow
    from datasets import Features
    from pyarrow import parquet

    try:
        return class_labels(Features.from_arrow_schema(parquet.read_schema(path)))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not Parquet ({error})") from error
