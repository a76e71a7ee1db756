"""Conversations as a tokenizer's chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..data import Completion, DataError, Message
from .causal import in_template, prompt_ids

__all__ = ["answer_text", "given_text", "turn_end_ids"]


def given_text(tokenizer: PreTrainedTokenizerBase, record: Completion, *, chat: bool) -> str:
    """What a model reads before it answers: a prompt as it is, or in the chat template, where the
    assistant's turn has just begun.

    :param chat: put it in the chat template, a prompt as the user's message.
    :raises DataError: if messages are given without a template, or the template does not take them.
    """
    if chat:
        return _rendered(tokenizer, record.messages, answered=False)
    if not isinstance(record.prompt, str):
        raise DataError(
            "messages are given, and no chat template is applied: expected a prompt, or a model"
            " trained with model.chat=true"
        )
    return record.prompt


def answer_text(
    tokenizer: PreTrainedTokenizerBase, record: Completion, *, chat: bool, end: bool
) -> str:
    """The completion as it follows :func:`given_text`.

    In the chat template it is what the template adds for the assistant's last turn: the whole
    conversation without what was given, and without white space at its end.

    :param end: with what the template ends the turn.
    :raises DataError: if the completion is not known, or the template writes what was given
        otherwise once it is answered, or leaves the answer out.
    """
    answer = record.known()
    if not chat:
        return answer
    prompt = given_text(tokenizer, record, chat=True)
    turns = (*record.messages, Message("assistant", answer))
    whole = _rendered(tokenizer, turns, answered=True)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template writes a conversation that is answered in another way than before"
            f" the answer, {prompt[-60:]!r} at the end; give prompts and completions as texts, with"
            " chat=false"
        )
    rest = whole[len(prompt) :]
    return rest.rstrip() if end else rest[: rest.rindex(answer.strip()) + len(answer.strip())]


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token by which the chat template ends an answer; none if it ends in another way.

    It need not be the tokenizer's end token: base models that learn a chat template have another.
    """
    probe = Completion("probe", "Why?", "So.")
    texts = [answer_text(tokenizer, probe, chat=True, end=end) for end in (False, True)]
    answer, whole = (prompt_ids(tokenizer, text, add_special_tokens=False) for text in texts)
    special = [i for i in whole[len(answer) :] if i in tokenizer.all_special_ids]
    return special[:1]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answered: bool
) -> str:
    """:raises DataError: if the template refuses the messages, or leaves one out."""
    rendered, reasons = in_template(tokenizer, messages, answered=answered)
    if rendered is not None:
        return rendered
    raise DataError(
        f"the chat template does not take messages of the roles"
        f" {[role for role, _ in messages]}, as texts ({reasons[0]}) or as lists of parts"
        f" ({reasons[1]}); change their order, or give the tokenizer a template that takes them"
    )
