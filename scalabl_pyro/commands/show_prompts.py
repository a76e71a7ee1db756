"""``scalabl show-prompts``: records as the model of a training run would read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..data import Record, check_split
from ..lora.loading import load_readout
from ..readouts import Readout
from ..runs.config import RunConfig
from ..runs.prior import read_data

__all__ = ["ShowPromptsConfig", "show_prompts"]


@dataclass(frozen=True, slots=True)
class ShowPromptsConfig(RunConfig):
    """Settings of ``scalabl show-prompts``: those of ``train``, and the split to show."""

    split: str = "train"


def show_prompts(config: ShowPromptsConfig) -> str:
    """The first two records of a split, and the one with the longest question; no weight is loaded.

    :raises DataError: if the data cannot be read, have no such split, or cannot be put.
    """
    splits, classes, _ = read_data(config)
    records = check_split(splits, config.split)
    readout = load_readout(config.model, classes)
    longest = max(records, key=lambda record: len(record.question))
    chosen = dict.fromkeys([*records[:2], longest, *records[2:3]])
    heading = _heading(config, readout, classes.shots, len(splits["train"]))
    shown = [_lines(config.split, record, readout) for record in list(chosen)[:3]]
    return "\n\n".join("\n".join(lines) for lines in [heading, *shown])


def _heading(
    config: ShowPromptsConfig, readout: Readout, shots: Sequence[Record], count: int
) -> Iterator[str]:
    model = config.model
    yield f"model    {model.name}, {model.readout}, a context of {readout.max_length} tokens"
    if model.template or "shots" in readout.takes:
        template = repr(model.template) if model.template else model.prompt
        yield f"prompt   {template}{', through the chat template' if model.chat else ''}"
    if shots:
        names = ", ".join(shot.id for shot in shots)
        yield f"shots    {len(shots)} of the {count} records of train: {names}"


def _lines(split: str, record: Record, readout: Readout) -> Iterator[str]:
    reading = readout.reading(record)
    yield f"--- {split}, record {record.id!r}: {reading.tokens} tokens"
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
