"""``scalabl show-prompts``: records as the model of a run reads them, before training and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from ..data import Columns, DataSource, Record, check_split
from ..lora.config import ModelConfig
from ..lora.loading import load_readout
from ..readouts import Classes, Readout
from ..runs.config import RunConfig
from ..runs.data import DataConfig
from ..runs.folder import read_posterior_info
from ..runs.reading import find_run, read_settings_placed
from ..runs.settings import ConfigError, build
from ..runs.training_data import read_data
from ._input import own_records, read_input, read_texts

__all__ = ["ShowPromptsConfig", "show_prompts"]


def _sourced(value: Any) -> Any:
    """The settings of data; ``None`` if they name no source.

    :raises ValueError: if they name none, but say something about it.
    """
    sources = ("path", "root", "task", "hub")
    if not isinstance(value, Mapping) or any(value.get(name) is not None for name in sources):
        return value
    if build(DataConfig, {**value, "task": "embedded"}, "data.") != DataConfig(task="embedded"):
        raise ConfigError(
            "settings of data are given without a source: give data.path, data.root, data.task or"
            " data.hub too"
        )
    return None


_Data = Annotated[DataConfig | None, BeforeValidator(_sourced)]


@dataclass(frozen=True, slots=True)
class ShowPromptsConfig(RunConfig):
    """Settings of ``scalabl show-prompts``: those of ``train``, or a run; and what to show.

    :param model: without a name, that of the run.
    :param data: the run's own if left out.
    :param split: of data.
    :param run: a run folder, or ``owner/name`` on the Hub, whose prompts to show.
    :param input: a file of records as ``scalabl predict`` takes it, for a run.
    :param columns: of ``input``, as for ``scalabl predict``.
    :raises ConfigError: if not exactly one of a model and a run is given, or what goes with the
        other one.
    """

    data: _Data = None  # type: ignore[assignment]  # a run has its own
    run_dir: str = ""
    split: str = "train"
    run: str | None = None
    input: str | None = None
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        if self.run is None:
            if not self.model.name:
                raise ConfigError("the setting model.name is needed, or run: give one of them")
            if self.input is not None:
                raise ConfigError(
                    f"input is {self.input!r}, a file for a run: give run too, or data.path"
                )
            if self.columns != Columns():
                raise ConfigError("columns is given, and no run: give data.columns")
            if self.data is None:
                DataConfig()  # which says what is needed
            RunConfig.__post_init__(self)
        elif self.model != ModelConfig(""):
            raise ConfigError(
                f"settings of model are given, and run is {self.run!r}, which keeps its own: leave"
                " one of them out"
            )
        elif self.input is not None and self.data is not None:
            raise ConfigError(f"input is {self.input!r}, and data is given too: give one of them")
        elif self.input is None and self.columns != Columns():
            raise ConfigError("columns is given, and no input, whose columns they are: give both")


@dataclass(frozen=True, slots=True)
class _Reader:
    """How a run puts records, known without its weights.

    :param folder: of a finished run.
    :param count: of its training records.
    """

    config: RunConfig
    classes: Classes
    readout: Readout
    count: int
    folder: Path = Path()

    @classmethod
    def of_run(cls, run: str) -> _Reader:
        folder = find_run(run)
        info, config = read_posterior_info(folder), read_settings_placed(folder)
        readout = load_readout(config.model, info.classes)
        return cls(config, info.classes, readout, info.num_data, folder)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.config.data.classes or self.readout.class_names


def show_prompts(config: ShowPromptsConfig) -> str:
    """The first two records, and the one with the longest question; no weight is loaded.

    :raises DataError: if the data cannot be read, have no such split, or cannot be put.
    :raises RunFolderError: if there is no such run.
    """
    if config.run is not None:
        reader = _Reader.of_run(config.run)
        records = _records(config, reader)
    else:
        splits, classes, _ = read_data(config)
        records = check_split(splits, config.split)
        readout = load_readout(config.model, classes)
        reader = _Reader(config, classes, readout, len(splits["train"]))
    longest = max(records, key=lambda record: len(record.question))
    chosen = dict.fromkeys([*records[:2], longest, *records[2:3]])
    place = config.input or config.split
    shown = [_lines(place, record, reader.readout) for record in list(chosen)[:3]]
    return "\n\n".join("\n".join(lines) for lines in [_heading(reader), *shown])


def _records(config: ShowPromptsConfig, reader: _Reader) -> Sequence[Record]:
    """What a run is to read: of a file as predict takes it, of data as evaluate does, or its own.

    Where no columns are named they are the run's, but for a task, whose columns are known.
    """
    if config.input is not None:
        if reader.readout.reads_texts:
            return read_texts(config.input, reader.folder, config.columns)  # type: ignore[return-value]
        return read_input(config.input, reader, config.columns)
    if config.data is None:
        return own_records(reader, config.split)
    classes = config.data.classes or reader.readout.class_names
    source: DataSource = replace(config.data, classes=classes)
    trained = reader.config.data
    return source.read_split(config.split, trained.columns, trained.classes)


def _heading(reader: _Reader) -> Iterator[str]:
    model, readout, shots = reader.config.model, reader.readout, reader.classes.shots
    yield f"model    {model.name}, {model.readout}, a context of {readout.max_length} tokens"
    if model.template or "shots" in readout.takes:
        template = repr(model.template) if model.template else model.prompt
        yield f"prompt   {template}{', through the chat template' if model.chat else ''}"
    if shots:
        names = ", ".join(shot.id for shot in shots)
        yield f"shots    {len(shots)} of the {reader.count} records of train: {names}"


def _lines(place: str, record: Record, readout: Readout) -> Iterator[str]:
    reading = readout.reading(record)
    yield f"--- {place}, record {record.id!r}: {reading.tokens} tokens"
    yield from (f"  | {line}" for line in reading.prompt.split("\n"))
    yield f"  scored: {readout.scoring()}"
    for number, (context, scored) in enumerate(reading.answers):
        behind = f"{context!r} and then " if context else ""
        yield f"    {behind}{scored!r}{'  (right)' if number == record.label else ''}"
    if reading.cut_tokens:
        yield f"  cut: {reading.cut_tokens} tokens, {reading.cut!r}"
    elif reading.tokens > readout.max_length:
        yield (
            f"  too long by {reading.tokens - readout.max_length} tokens: refused, unless"
            " model.truncate=true cuts the question"
        )
    else:
        yield "  cut: nothing"
