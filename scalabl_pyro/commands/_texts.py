"""What generate and predict write of a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..data import Completion
from ..prediction.texts import ScoredText
from ._jsonl import significant

__all__ = ["given", "scored"]


def given(record: Completion) -> dict[str, Any]:
    """The prompt or the messages, as they were read."""
    if isinstance(record.prompt, str):
        return {"id": record.id, "prompt": record.prompt}
    return {"id": record.id, "messages": [message._asdict() for message in record.prompt]}


def scored(text: ScoredText) -> dict[str, Any]:
    """The text that follows, with its tokens; of a generated one, what ended it."""
    ended = {} if text.finish_reason is None else {"finish_reason": text.finish_reason}
    return {
        "completion": text.text,
        **ended,
        "tokens": list(_tokens(text)),
        "log_prob": significant(text.log_prob),
        "spread": significant(text.spread),
        "token_mutual_information": significant(text.token_mutual_information),
        "token_epkl": significant(text.token_epkl),
    }


def _tokens(text: ScoredText) -> Iterator[dict[str, Any]]:
    columns = (text.log_probs.exp(), text.entropy, text.mutual_information)
    for token, *values in zip(text.tokens, *(c.tolist() for c in columns), strict=True):
        names = ("probability", "entropy", "mutual_information")
        yield {"token": token} | {n: significant(v) for n, v in zip(names, values, strict=True)}
