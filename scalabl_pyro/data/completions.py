"""Completions: a prompt, or the turns of a conversation, and the text that follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .prompts import PROMPTS
from .records import DataError, Record, is_text

__all__ = ["Completion", "Message", "check_known", "is_completion"]

_EXPECTED = (
    "expected prompt and maybe completion, or messages; and maybe id; other fields are named by"
    " data.columns.prompt and data.columns.completion"
)


class Message(NamedTuple):
    """A turn of a conversation.

    :param role: such as ``system``, ``user`` and ``assistant``; the chat template knows which.
    :param content: its text.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, and the text that follows it where it is known.

    :param id: a name unique within its file.
    :param prompt: the text that is given; or the messages that are, as :class:`Message` or mappings
        with ``role`` and ``content``.
    :param completion: the text that follows at once, any space between them included, or the
        assistant's answer to the messages; ``None`` if it is to be generated.
    :raises DataError: if a field is empty or no text, or a message is none.
    """

    id: str
    prompt: str | tuple[Message, ...]
    completion: str | None = None

    def __post_init__(self) -> None:
        texts = {"id": self.id}
        if isinstance(self.prompt, list | tuple) and self.prompt:
            object.__setattr__(self, "prompt", _messages("prompt", self.prompt))
        else:
            texts["prompt"] = self.prompt  # type: ignore[assignment]  # of any type, as found
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

    @classmethod
    def from_mapping(cls, row: Mapping[str, Any]) -> Completion:
        """Build one from a decoded JSON object, in one of the forms of ``datasets`` for text:

        * ``{"prompt": "…", "completion": "…"}``; the completion may be left out
        * ``{"prompt": [message, …], "completion": [message]}``
        * ``{"messages": [message, …]}``; of these the last is the completion if it is the
          assistant's

        with messages ``{"role": "…", "content": "…"}``, whose content may be a list of parts
        ``{"type": "text", "text": "…"}``. Other fields are passed over.

        :raises DataError: if a field is missing or invalid, there are two of these forms, or no
            message is the assistant's where there is more than one.
        """
        two = "messages" in row and not row.keys().isdisjoint({"prompt", "completion"})
        if two or row.keys().isdisjoint({"prompt", "messages"}) or "id" not in row:
            raise DataError(f"found the fields {sorted(row)}: {_EXPECTED}")
        if "messages" in row:
            prompt, answer = _parted(_messages("messages", row["messages"]))
            return cls(row["id"], prompt, answer)
        answer = row.get("completion")
        if isinstance(answer, list):
            turns = _messages("completion", answer)
            if len(turns) != 1 or turns[0].role != "assistant":
                raise DataError(
                    f"completion has the roles {[turn.role for turn in turns]}: expected one"
                    " message of the assistant; the turns before it belong to the prompt"
                )
            answer = turns[0].content
        return cls(row["id"], row["prompt"], answer)

    @property
    def messages(self) -> tuple[Message, ...]:
        """What is given as turns: a text is the user's."""
        return (Message("user", self.prompt),) if isinstance(self.prompt, str) else self.prompt

    @property
    def question(self) -> str:
        """What is given, as one text: by it and the completion two splits are kept apart."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{role}: {content}" for role, content in self.prompt)

    @property
    def choices(self) -> tuple[str, ...]:
        """Of all texts, the only one that a readout is shown."""
        return () if self.completion is None else (self.completion,)

    def known(self) -> str:
        """The completion.

        :raises DataError: if it is not known.
        """
        if self.completion is not None:
            return self.completion
        if isinstance(self.prompt, str):
            raise DataError(f"record {self.id!r} has no completion, and its tokens are needed")
        raise DataError(
            f"record {self.id!r} has no answer: its last message is of the role"
            f" {self.prompt[-1].role!r}; expected the assistant's, whose tokens are needed"
        )

    @property
    def label(self) -> int | None:
        """Which of :attr:`choices` is right."""
        return None if self.completion is None else 0


def is_completion(row: object) -> bool:
    """Whether a decoded JSON object is meant as one, and not as a question with choices."""
    if not isinstance(row, Mapping) or "choices" in row:
        return False
    return "prompt" in row or "messages" in row


def check_known(records: Iterable[object], place: str) -> None:
    """Refuse texts without a completion.

    :param records: of which those that are questions are passed over.
    :param place: where they are.
    :raises DataError: at the first such text.
    """
    for record in records:
        if isinstance(record, Completion):
            try:
                record.known()
            except DataError as error:
                raise DataError(f"{place}: {error}") from error


def _messages(name: str, values: Any) -> tuple[Message, ...]:
    """:raises DataError: if they are no messages."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise DataError(f"{name} is {values!r}: expected a list of messages, one or more")
    return tuple(_message(f"{name}[{n}]", value) for n, value in enumerate(values))


def _message(place: str, value: Any) -> Message:
    fields = value._asdict() if isinstance(value, Message) else value
    if not isinstance(fields, Mapping) or fields.keys() != {"role", "content"}:
        raise DataError(f"{place} is {value!r}: expected an object with role and content alone")
    if isinstance(fields["content"], list):
        content = "".join(_part(f"the content of {place}", part) for part in fields["content"])
        fields = dict(fields) | {"content": content}
    for name, text in fields.items():
        if not is_text(text):
            raise DataError(
                f"the {name} of {place} is {text!r}: expected a text that is not empty, of whole"
                " characters"
            )
    return Message(**fields)


def _part(place: str, part: Any) -> str:
    """The text of a part of a message's content.

    :raises DataError: if it is something else than text, such as an image.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(
            f"{place} holds a part of type {kind!r}, {repr(part)[:60]}: expected texts alone, as in"
            ' {"type": "text", "text": "…"}'
        )
    return str(part["text"])


def _parted(turns: Iterable[Message]) -> tuple[tuple[Message, ...], str | None]:
    """The messages that are given, and the assistant's answer if it comes last."""
    *prompt, last = turns
    if last.role != "assistant":
        return (*prompt, last), None
    if not prompt:
        raise DataError("messages holds the assistant's alone: expected a question before it")
    return tuple(prompt), last.content
