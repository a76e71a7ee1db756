"""The records that a run is to answer, of a file."""

from __future__ import annotations

from collections.abc import Mapping

from ..data import Columns, DataError, Record, read_records
from ..data.readers import read_table
from ..runs.folder import Run

__all__ = ["read_input"]


def read_input(path: str, run: Run, columns: Columns) -> list[Record]:
    """The records of a file.

    :param columns: which columns make a record. Where none is given they are those that the run
        was trained by, if the file has them; else as :func:`~scalabl_pyro.data.read_records` takes
        them.
    :raises DataError: as ``read_records``.
    """
    try:
        trained = run.config.data.columns
        if columns == Columns() and trained != Columns():
            first = read_table(path, trained).rows[0].cells
            if isinstance(first, Mapping):
                columns = trained.within(first) or columns
        return read_records(path, run.class_names, columns)
    except DataError as error:
        # Of training it is a part of data, here a setting of its own.
        raise DataError(str(error).replace("data.columns", "columns")) from error
