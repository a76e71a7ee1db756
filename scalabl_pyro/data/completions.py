"""Completions: a prompt, and the text that follows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .prompts import PROMPTS
from .readers import jsonl_rows
from .records import DataError, Record, is_text

__all__ = ["Completion", "read_completions"]


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, and the text that follows it where it is known.

    :param id: a name unique within its file.
    :param prompt: the text that is given.
    :param completion: the text that follows at once, any space between them included; ``None`` if
        it is to be generated.
    :raises DataError: if a field is empty or no text.
    """

    id: str
    prompt: str
    completion: str | None = None

    def __post_init__(self) -> None:
        texts = {"id": self.id, "prompt": self.prompt}
        if self.completion is not None:
            texts["completion"] = self.completion
        for name, value in texts.items():
            if not is_text(value):
                raise DataError(
                    f"{name} is {value!r}: expected a text that is not empty, of whole characters"
                )

    @classmethod
    def of(cls, record: Record) -> Completion:
        """A multiple-choice question as a text: the question, then the right choice in words."""
        answer = None if record.label is None else f" {record.choices[record.label]}"
        return cls(record.id, PROMPTS["classes"].render(record), answer)

    @property
    def choices(self) -> tuple[str, ...]:
        """Of all texts, the only one that a readout is shown."""
        return () if self.completion is None else (self.completion,)

    @property
    def label(self) -> int | None:
        """Which of :attr:`choices` is right."""
        return None if self.completion is None else 0


def read_completions(path: str | Path) -> list[Completion]:
    """Read JSON Lines: ``prompt``, and if known ``completion``; ``id`` is else the line's number.

    :raises DataError: at the first bad line or repeated id, with file, line, value and reason; if
        there is no such file, or no line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found: dict[str, Completion] = {}
    for line, fields in jsonl_rows(path):
        place = f"{path}, line {line}"
        if not isinstance(fields, dict) or not {"prompt"} <= fields.keys() <= {
            "id",
            "prompt",
            "completion",
        }:
            raise DataError(
                f"{place}: found {fields!r}: expected an object with 'prompt', and maybe 'id' and"
                " 'completion'"
            )
        try:
            record = Completion(**{"id": str(line)} | fields)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if record.id in found:
            raise DataError(f"{place}: the id {record.id!r} occurs twice; ids name one record each")
        found[record.id] = record
    if not found:
        raise DataError(f"{path}: holds no prompts")
    return list(found.values())
