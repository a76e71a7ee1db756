"""JSON Lines that are written line by line and survive a crash."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..files import json_text, new_path, put, room_for, write_whole

__all__ = ["ResumableJsonl", "new_jsonl", "significant"]


def new_jsonl(path: Path) -> Path:
    """The path of an output of JSON Lines that is not there yet.

    :raises ValueError: if its name is that of a table.
    :raises OSError: as :func:`~scalabl_pyro.files.new_path`.
    """
    if str(path) == "-":
        raise ValueError("output is '-', and what is written goes to files alone: name a file")
    if path.suffix in (".csv", ".tsv", ".parquet"):
        raise ValueError(
            f"output is {str(path)!r}, and what is written are JSON Lines: expected a name such as"
            f" {path.with_suffix('.jsonl').name}"
        )
    return new_path(path)


def significant(value: float) -> float:
    """The number with six digits from the first that is not 0 on: scores may be small, and order
    is what they are for."""
    return float(f"{value:.6g}")


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


class ResumableJsonl:
    """A JSON Lines file with a line for each record, in their order, that can be written in parts::

        with ResumableJsonl(output, ids, settings) as file:
            for start in range(file.done, len(ids), 64):
                file.write(answer(records[start : start + 64]))

    Lines go to ``<path>.part``, and to the disk itself before :meth:`write` returns. When all are
    there, the file gets its name. After a crash the same call goes on behind the last whole line.
    A lock on ``<path>.part.lock`` keeps other processes out while the context lasts.

    :param path: the file to write.
    :param ids: the N records' ids; line n is an object with ``"id"`` equal to the nth.
    :param settings: what the lines depend on beside the records, as JSON values; kept in
        ``<path>.part.json`` until the file is complete, so that no file mixes two settings.
    :raises FileExistsError: from the context, if the file is there already.
    :raises RuntimeError: from the context, if another process writes it.
    :raises ValueError: from the context, if a part was written with other settings or for other
        records.
    """

    def __init__(self, path: str | Path, ids: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.ids = tuple(ids)
        self.done = 0
        """How many lines are written."""
        self._part = self.path.with_name(self.path.name + ".part")
        self._settings_path = self.path.with_name(self.path.name + ".part.json")
        self._settings = dict(settings)
        self._file: BinaryIO | None = None  # opened by the first line
        self._lock = FileLock(self.path.with_name(self.path.name + ".part.lock"))

    def _check_settings(self) -> None:
        known = self._settings_path.exists()
        begun = json.loads(self._settings_path.read_text(encoding="utf-8")) if known else {}
        asked = json.loads(json.dumps(self._settings))
        differ = [
            f"other {name}" if _is_hash(then) and _is_hash(now) else f"{name} {then!r}, now {now!r}"
            for name in sorted(begun.keys() | asked.keys())
            if (then := begun.get(name)) != (now := asked.get(name))
        ]
        if differ:
            raise ValueError(
                f"{self._part} was begun with other settings: {'; '.join(differ)}: go on with"
                " those, or remove it to start again"
            )

    def _take_up(self) -> None:
        """Count the whole lines, and cut off a torn one at the end."""
        whole = 0
        with self._part.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record_id = json.loads(line)["id"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self._part}, line {number} is not an object with an id; remove the file"
                        " to start again"
                    ) from error
                expected = self.ids[self.done] if self.done < len(self.ids) else None
                if record_id != expected:
                    raise ValueError(
                        f"{self._part}, line {number} answers {record_id!r}, but record {number} of"
                        f" the input is {expected!r}: it was written for another input; remove it"
                        " to start again"
                    )
                self.done += 1
                whole += len(line)
        os.truncate(self._part, whole)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the lines of the next records; they are on the disk when this returns.

        :raises OSError: if the disk is full.
        """
        with room_for(self.path, "; make room, and the same command goes on behind what is there"):
            if self._file is None:
                self._file = self._open()
            for row in rows:
                assert row["id"] == self.ids[self.done], "rows come in the order of the records"
                self._file.write(json_text(row, ensure_ascii=False).encode() + b"\n")
                self.done += 1
            self._file.flush()
            os.fsync(self._file.fileno())

    def _open(self) -> BinaryIO:
        if not self._part.exists():
            write_whole(self._settings_path, json.dumps(self._settings, indent=1) + "\n")
        return self._part.open("ab")

    def __enter__(self) -> ResumableJsonl:
        new_jsonl(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"another process writes {self.path}: wait for it, or choose another output"
            ) from error
        try:
            new_path(self.path)  # again: it may have been finished just before
            if self._part.exists():
                self._check_settings()
                self._take_up()
        except BaseException:
            self._unlock()
            raise
        return self

    def _unlock(self) -> None:
        if not self._part.exists():  # complete, or never begun: nothing is left behind
            Path(self._lock.lock_file).unlink()
        self._lock.release()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None and self.done == len(self.ids):
            put(self._part, self.path)
            self._settings_path.unlink()
        self._unlock()
