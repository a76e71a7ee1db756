"""What the readouts of causal language models share."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import DataError

__all__ = ["DATE", "keeps_logits", "last_logits", "left_padded", "prompt_ids", "templated"]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """The tokens of a text that goes on: without the end token that some tokenizers append.

    A model that reads ``</s>`` after the prompt is asked for another text's first token. An end
    token that is written in the text itself stays.

    :param add_special_tokens: as of the tokenizer; those that begin a text stay.
    """
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
    if not add_special_tokens or not ids or ids[-1] not in tokenizer.all_special_ids:
        return ids
    return ids[: len(ids) - _appended(tokenizer)]


def _appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a tokenizer appends to a text, seen on one."""
    probe = "a"
    bare = list(tokenizer(probe, add_special_tokens=False).input_ids)
    whole = list(tokenizer(probe).input_ids)
    begin = next((i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare), len(whole))
    return len(whole) - begin - len(bare) if begin < len(whole) else 0


#: some chat templates write today's date, and the same record would be another prompt tomorrow.
DATE = "26 Jul 2024"


def templated(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text as the user's message in the tokenizer's chat template, to be answered.

    :raises DataError: if the template leaves the text out.
    """
    # Templates of models that also see pictures take a list of parts, and leave out a text.
    contents: list[Any] = [text, [{"type": "text", "text": text}]]
    reasons = []
    for content in contents:
        try:
            found = str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=False,
                    date_string=DATE,
                )
            )
        except (TemplateError, TypeError, AttributeError, LookupError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if text.strip() in found:
            return found
        reasons.append(f"gave {found[:80]!r}")
    raise DataError(
        f"the chat template leaves the prompt {text[:40]!r} out, as a text ({reasons[0]}) and"
        f" as a list of parts ({reasons[1]}); set chat=false, or give the tokenizer a template"
        " that writes the user's message as it is"
    )


def last_logits(llm: PreTrainedModel, inputs: dict[str, Tensor], count: int) -> Tensor:
    """(R, count, vocabulary), the logits at the last positions of R left-padded rows."""
    # GPT-2 and others number positions from the padding unless they are told.
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + _first_position(llm)
    extra = {"logits_to_keep": count} if keeps_logits(type(llm)) else {}
    return llm(**inputs, position_ids=positions, use_cache=False, **extra).logits[:, -count:]


def _first_position(llm: PreTrainedModel) -> int:
    """The position of a row's first token; RoBERTa and its kin count on from the padding index."""
    embeddings = getattr(llm.base_model, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if padding is None else padding + 1


def keeps_logits(cls: type[PreTrainedModel]) -> bool:
    """Whether the model can run its output layer on some positions only."""
    return "logits_to_keep" in inspect.signature(cls.forward).parameters


def left_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rotate each row so that its last attended token comes last; left-padded rows stay."""
    mask = inputs["attention_mask"]  # (R, T)
    steps = torch.arange(mask.shape[-1], device=mask.device)
    last = (mask * steps).argmax(-1, keepdim=True)  # (R, 1)
    source = (steps + last + 1) % mask.shape[-1]  # (R, T)
    return {name: value.gather(-1, source) for name, value in inputs.items()}
