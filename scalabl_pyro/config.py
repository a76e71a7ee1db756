"""The configuration of a run: plain mappings to frozen dataclasses, unknown keys refused."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from .data import DataError, Record, check_split, hold_out, read_folder, read_jsonl, without_overlap
from .loading import AdapterConfig, ModelConfig
from .methods import METHODS, Method
from .svi import FitConfig

__all__ = ["ConfigError", "DataConfig", "RunConfig", "build"]

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration key that does not exist, or a value of the wrong kind."""


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the records come from; exactly one of ``path`` and ``root``.

    :param path: one JSON Lines file to train on.
    :param root: a folder with ``train.jsonl`` and, where there are, ``validation.jsonl`` and
        ``test.jsonl``.
    :param limit: train on the first so many records.
    :param validation_fraction: share of the training records held out where there is no validation
        split.
    """

    path: str | None = None
    root: str | None = None
    limit: int | None = None
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        if (self.path is None) == (self.root is None):
            raise ConfigError(
                f"data.path is {self.path!r} and data.root is {self.root!r}: give exactly one"
            )
        if self.limit is not None and self.limit < 2:
            raise ConfigError(f"data.limit is {self.limit}: expected 2 or more")

    def splits(self, *, seed: int) -> dict[str, list[Record]]:
        """The records by split; training questions that occur in another split are left out.

        :raises DataError: if a file is missing or bad.
        """
        if self.root is not None:
            splits = read_folder(self.root)
        else:
            splits = {"train": read_jsonl(str(self.path))}
        train = check_split(splits, "train")
        for name, records in splits.items():
            if name != "train":
                train = without_overlap(train, records, name=name)
        train = train[: self.limit]
        if "validation" not in splits:
            train, splits["validation"] = hold_out(train, self.validation_fraction, seed=seed)
        splits["train"] = train
        for name, records in splits.items():
            if any(record.label is None for record in records):
                raise DataError(f"the split {name} holds records without a label")
        return splits


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that defines a training run.

    :param method: ``name``, a key of ``METHODS``, and that method's own fields.
    :param run_dir: the folder to write, which must not exist.
    """

    model: ModelConfig
    lora: AdapterConfig
    data: DataConfig
    run_dir: str
    method: dict[str, Any] = field(default_factory=lambda: {"name": "scalabl"})
    fit: FitConfig = field(default_factory=FitConfig)
    eval_batch_size: int = 64
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.eval_batch_size < 1:
            raise ConfigError(f"eval_batch_size is {self.eval_batch_size}: expected 1 or more")
        self.make_method()

    def make_method(self) -> Method:
        """The method with its settings.

        :raises ConfigError: if there is no such method, or it has no such setting.
        """
        settings = dict(self.method)
        name = settings.pop("name", None)
        if name not in METHODS:
            raise ConfigError(f"method.name is {name!r}: expected one of {sorted(METHODS)}")
        shared = {
            "config": self.fit,
            "eval_batch_size": self.eval_batch_size,
            "progress": self.progress,
        }
        return build(METHODS[name], settings | shared)

    def check_run_dir(self) -> Path:
        """:raises FileExistsError: if the run folder exists."""
        folder = Path(self.run_dir)
        if folder.exists():
            raise FileExistsError(
                f"the run folder {folder} exists; choose another run_dir, or remove it"
            )
        return folder


def build(cls: type[T], values: Any) -> T:
    """An instance of a dataclass from a mapping, nested dataclasses included.

    :raises ConfigError: if a key is unknown (the nearest one is suggested), a needed one is
        missing, or a value has the wrong type or is out of range.
    """
    _check_keys(cls, values)
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        found = [
            e["msg"].removeprefix("Value error, ")
            if e["type"] == "value_error"
            else f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}"
            for e in error.errors()
        ]
        raise ConfigError("; ".join(found)) from error


def _check_keys(cls: type, values: Mapping[str, Any], place: str = "") -> None:
    hints = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {place}{near[0]}?" if near else f"; expected one of {known}"
            raise ConfigError(f"there is no setting {place}{key}{hint}")
        if value == "???":
            raise ConfigError(f"the setting {place}{key} is needed: give {place}{key}=…")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            _check_keys(hints[key], value, f"{place}{key}.")
