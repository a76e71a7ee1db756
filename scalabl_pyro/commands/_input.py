"""The records that a run is to answer, and those that it had."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..data import (
    Columns,
    Completion,
    DataError,
    Record,
    asked,
    check_split,
    fingerprint,
    read_completions,
)
from ..data.readers import read_table
from ..data.tables import to_records
from ..runs.config import RunConfig
from ..runs.folder import Run
from ..runs.reading import (
    find_run,
    read_fingerprints,
    read_settings,
    read_trained_on,
    weights_fingerprint,
)

__all__ = ["begun_for", "own_records", "read_input", "read_texts", "warn_of_trained"]

log = logging.getLogger(__name__)


class ReadsRecords(Protocol):
    """What is to be known of a run to read records for it; its weights are not."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> RunConfig: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...


def read_input(path: str, run: ReadsRecords, columns: Columns) -> list[Record]:
    """The records of a file.

    :param columns: which columns make a record. Where none is named they are those that the run
        was trained by, if the file has them; else as :func:`~scalabl_pyro.data.read_records` takes
        them.
    :raises DataError: as ``read_records``.
    """
    try:
        table = read_table(path, columns, run.config.data.columns)
        return to_records({"": table}, run.class_names)[""]
    except DataError as error:
        # Of training it is a part of data, here a setting of its own.
        raise DataError(str(error).replace("data.columns", "columns")) from error


def read_texts(
    path: str, folder: str | Path, columns: Columns, *, known: bool = False
) -> list[Completion]:
    """The texts of a file for a run that reads such, and need not be loaded yet.

    :param folder: of the run, or ``owner/name`` on the Hub.
    :param columns: as for :func:`read_input`.
    :param known: what follows the prompts is needed.
    :raises DataError: as :func:`~scalabl_pyro.data.read_completions`.
    """
    trained = read_settings(find_run(folder)).data.columns
    try:
        return read_completions(path, columns, trained, known=known)
    except DataError as error:
        raise DataError(str(error).replace("data.columns", "columns")) from error


def own_records(run: ReadsRecords, split: str) -> list[Record]:
    """The records of a split that the run was trained or chosen on, read again.

    :raises DataError: if they cannot be read, or are others now.
    """
    try:
        records = check_split(run.config.data.splits(seed=run.config.seed), split)
    except (DataError, OSError) as error:
        raise DataError(f"the {split} split of the run cannot be read: {error}") from error
    known = read_fingerprints(run.folder).get(split)
    if known is not None and fingerprint({split: records}) != known:
        raise DataError(
            f"the {split} split of the run cannot be read: its data settings lead to {len(records)}"
            " other records than it had; put them back, or set data in its config.yaml to where"
            " they are"
        )
    return records


def warn_of_trained(run: Run, records: Sequence[Record], consequence: str) -> None:
    """Tell of labelled records whose questions trained the run.

    :param consequence: what is not to be had from them.
    """
    known = read_trained_on(run.folder)
    count = sum(key in known for key in asked(records))
    if count:
        log.warning("%d of %d records trained the run: %s", count, len(records), consequence)


def begun_for(run: Run, records: Sequence[Record] | Sequence[Completion]) -> dict[str, Any]:
    """What the lines of an output depend on beside the settings, for one that is gone on with."""
    return {
        "records": fingerprint({"input": records}),  # type: ignore[dict-item]  # of texts too
        "weights": weights_fingerprint(run.folder),
    }
