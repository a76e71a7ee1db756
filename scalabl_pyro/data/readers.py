"""Read records from JSON Lines: one file, or a folder with a file per split."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from .records import DataError, Record

__all__ = ["check_split", "hold_out", "iter_jsonl", "read_folder", "read_jsonl", "without_overlap"]

log = logging.getLogger(__name__)


def iter_jsonl(path: str | Path) -> Iterator[Record]:
    """Yield the records of a UTF-8 JSON Lines file, one object a line, as they are read.

    :raises DataError: at the first bad line, with the file, the line's number and the reason.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield Record.from_mapping(json.loads(line.decode("utf-8")))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path}, line {number}: not UTF-8 JSON ({error})") from error
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error}") from error


def read_jsonl(path: str | Path) -> list[Record]:
    """All records of one file.

    :raises DataError: if a line is bad, an id occurs twice, or there is no record.
    """
    records = list(iter_jsonl(path))
    if not records:
        raise DataError(f"{path}: holds no records")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise DataError(f"{path}: the id {record.id!r} occurs twice; ids name one record each")
        seen.add(record.id)
    return records


def read_folder(root: str | Path) -> dict[str, list[Record]]:
    """The splits of a folder, ``<split>.jsonl`` each, by name.

    :raises DataError: if the folder does not exist or holds no ``.jsonl`` file.
    """
    root = Path(root)
    paths = sorted(root.glob("*.jsonl"))
    if not paths:
        raise DataError(f"{root}: expected a folder with files such as train.jsonl and test.jsonl")
    return {path.stem: read_jsonl(path) for path in paths}


def check_split(splits: dict[str, list[Record]], name: str) -> list[Record]:
    """The split called ``name``.

    :raises DataError: if it does not exist; the message lists those that do.
    """
    if name not in splits:
        raise DataError(f"there is no split {name!r}; the data set has {sorted(splits)}")
    return splits[name]


def hold_out(
    records: Sequence[Record], fraction: float, *, seed: int
) -> tuple[list[Record], list[Record]]:
    """Split off a random fraction, for data sets without a validation split.

    :param fraction: share of the records to hold out, between 0 and 1; at least one is.
    :returns: the remaining records and those held out, each in the original order.
    :raises DataError: if nothing would remain on either side.
    """
    count = max(1, round(fraction * len(records)))
    if not 0 < fraction < 1 or count >= len(records):
        raise DataError(f"cannot hold out {fraction} of {len(records)} records")
    held = set(random.Random(seed).sample(range(len(records)), count))
    rest = [record for index, record in enumerate(records) if index not in held]
    return rest, [records[index] for index in sorted(held)]


def without_overlap(
    records: Sequence[Record], others: Sequence[Record], *, name: str
) -> list[Record]:
    """The records whose question and set of choices do not occur in ``others``.

    :param name: what ``others`` is called in the log, where the number left out is reported.
    """

    def key(record: Record) -> tuple[str, frozenset[str]]:
        return record.question.casefold(), frozenset(choice.casefold() for choice in record.choices)

    taken = {key(record) for record in others}
    kept = [record for record in records if key(record) not in taken]
    if len(kept) < len(records):
        log.warning(
            "left out %d training questions that are also in %s", len(records) - len(kept), name
        )
    return kept
