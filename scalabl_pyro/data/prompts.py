"""Prompts: how a record is put to a language model, and which words label its choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter, ascii_uppercase

from .records import DataError, Record, is_text, question_key

__all__ = ["GAP", "PROMPTS", "Prompt", "read_template"]

#: where a choice goes in a text with a gap, as in WinoGrande
GAP = "_"
#: what of a record a template may ask for: all but the answer
FIELDS = ("question", "choices")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text for the model, which its answer follows.

    :param template: the text, with ``{question}`` and maybe ``{choices}`` where these go; ``{{``
        and ``}}`` are braces.
    :param letters: label the choices by letters: ``{choices}`` is ``A. …``, ``B. …``, one a line,
        and the label words are the letters. Else ``{choices}`` are the choices with commas between
        them, and the label words are the choices, which all records must share.
    :param gap: the text has a gap ``GAP`` that each choice fills, and goes on behind it.
    :param system: a message that stands before all others, for a chat template.
    :param shots: labelled records that are shown with their answers before the question.
    :raises ValueError: if the template lacks a field, or has one that records do not have; if the
        system message is no text, or a shot has no label.
    """

    template: str
    letters: bool = False
    gap: bool = False
    system: str | None = None
    shots: tuple[Record, ...] = ()

    def __post_init__(self) -> None:
        _check_template(self.template, letters=self.letters)
        if self.system is not None and not is_text(self.system):
            raise ValueError(
                f"system is {self.system!r}: expected a text that is not empty, or null for none"
            )
        for shot in self.shots:
            if shot.label is None:
                raise ValueError(f"the shot {shot.id!r} has no label: expected records with one")

    @property
    def anchor(self) -> str:
        """How every text ends: with this, or where it ends with a field, with some word."""
        end = ""
        for text, field, *_ in Formatter().parse(self.template):
            end = end + text if field is None else ""
        return end.lstrip() or f"?{end}"

    def label_words(self, records: Sequence[Record]) -> tuple[str, ...]:
        """The C label words for the records of all splits, in the order of ``choices``.

        :raises DataError: if there are more choices than letters, or records differ in them.
        """
        if self.letters:
            count = max(len(record.choices) for record in records)
            if count > len(ascii_uppercase):
                raise DataError(
                    f"{count} choices cannot be labelled by letters; use model.prompt=classes"
                )
            return tuple(ascii_uppercase[:count])
        names = {record.choices for record in records}
        if len(names) > 1:
            first, second = sorted(names)[:2]
            raise DataError(
                "prompt=classes needs the same choices in every record, but found"
                f" {list(first)} and {list(second)}; use model.prompt=letters"
            )
        return names.pop()

    def render(self, record: Record, question: str | None = None) -> str:
        """The text for a record.

        :param question: what is left of the record's question, where that is cut.
        :raises DataError: if there is to be a gap, and is not.
        """
        choices = ", ".join(record.choices)
        if self.letters:
            lines = zip(ascii_uppercase, record.choices, strict=False)
            choices = "\n".join(f"{letter}. {choice}" for letter, choice in lines)
        asked = record.question if question is None else question
        text = self.template.format(question=asked, choices=choices)
        if self.gap and (text.count(GAP) != 1 or not text.partition(GAP)[2].strip()):
            raise DataError(
                f"the prompt of record {record.id!r} is {text!r}: expected one {GAP!r} and text"
                " behind it; use prompt=question"
            )
        return text

    def shots_for(self, record: Record) -> list[Record]:
        """The shots but for the record's own question, in whatever spelling."""
        asked = question_key(record)
        return [shot for shot in self.shots if question_key(shot) != asked]


def _check_template(template: str, *, letters: bool) -> None:
    shown = repr(template if len(template) <= 80 else f"{template[:80]}…")
    expected = " and ".join(f"{{{field}}}" for field in FIELDS)
    if not is_text(template):
        raise ValueError(f"template is {shown}: expected a text with {{question}} in it")
    try:
        placeholders = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"template is {shown}: {error}; a brace itself is {{{{ or }}}}") from error
    for _, field, form, conversion in placeholders:
        if field not in FIELDS or form or conversion:
            whole = f"{field}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}"
            raise ValueError(
                f"template is {shown}, but there is no field {{{whole}}}: a record gives {expected}"
            )
    fields = {field for _, field, *_ in placeholders}
    if "question" not in fields:
        raise ValueError(f"template is {shown}, without {{question}}: put it where that goes")
    if letters and "choices" not in fields:
        raise ValueError(
            f"template is {shown}, without {{choices}}, but the answers are their letters: put"
            " {choices} in, or set prompt=classes"
        )


def read_template(value: str) -> str:
    """A template, from the text itself or from a file that holds it.

    :param value: the text, or a path; a line break that ends the file counts for nothing.
    :raises ValueError: if it is neither, or the file is not UTF-8.
    """
    if "{" in value:
        return value
    path = Path(value)
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"template is the file {value!r}, which is not UTF-8: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"template is {value!r}: expected a text with {{question}} in it, or a file with such a"
            " text"
        ) from error


PROMPTS: dict[str, Prompt] = {
    "letters": Prompt("{question}\n{choices}\nAnswer:", letters=True),
    "classes": Prompt("{question}\nAnswer:"),
    "question": Prompt("Question: {question}\nAnswer:"),
    "gap": Prompt("{question}", gap=True),
}
