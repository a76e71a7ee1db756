"""What the readouts of causal language models share."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["keeps_logits", "last_logits", "left_padded", "templated"]

# Some chat templates write today's date, and the same record would be another prompt tomorrow.
_DATE = "26 Jul 2024"


def templated(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text as the user's message in the tokenizer's chat template, to be answered."""
    message = [{"role": "user", "content": text}]
    return str(
        tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False, date_string=_DATE
        )
    )


def last_logits(llm: PreTrainedModel, inputs: dict[str, Tensor], count: int) -> Tensor:
    """(R, count, vocabulary), the logits at the last positions of R left-padded rows."""
    # GPT-2 and others number positions from the padding unless they are told.
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    extra = {"logits_to_keep": count} if keeps_logits(type(llm)) else {}
    return llm(**inputs, position_ids=positions, use_cache=False, **extra).logits[:, -count:]


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
