"""What the readouts of causal language models share."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import GAP, DataError, Prompt, Record
from .base import Readout

__all__ = [
    "CausalReadout",
    "check_chat",
    "check_left_padding",
    "dated",
    "in_template",
    "keeps_logits",
    "last_logits",
    "left_padded",
    "prompt_ids",
    "templated",
]


class CausalReadout(Readout):
    """What the readouts share that put a record as a prompt: its text, and its tokens.

    :param prompt: how a record is put, with what is shown before it.
    :param chat: put it through the tokenizer's chat template, shots as earlier turns. Else shots
        stand before the question, with an empty line between two.
    :raises ValueError: if a chat template is missing, or leaves the system message out.
    """

    padding_side = "left"
    auto_class = "AutoModelForCausalLM"
    takes: ClassVar[tuple[str, ...]] = ("template", "shots", "system", "chat")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        *,
        num_classes: int,
        max_length: int,
        truncate: bool,
        chat: bool,
    ) -> None:
        super().__init__(
            tokenizer, num_classes=num_classes, max_length=max_length, truncate=truncate
        )
        if chat:
            check_chat(tokenizer)
        if prompt.system is not None:
            _check_system(tokenizer, prompt.system, chat=chat)
        self.prompt = prompt
        self.chat = chat

    @abstractmethod
    def _answer(self, shot: Record) -> str:
        """What answers a record that is shown."""

    @abstractmethod
    def _between(self, text: str) -> str:
        """What stands between a text and its answer: a space, or nothing."""

    @abstractmethod
    def _rows(self, record: Record, question: str) -> dict[str, list[list[int]]]:
        """The rows of a record, with what is left of its question."""

    def _text(self, record: Record, question: str) -> str:
        """The whole prompt of a record, with what is left of its question."""
        text = self.prompt.render(record, question)
        shots = [(shot, self.prompt.render(shot)) for shot in self.prompt.shots_for(record)]
        if not self.chat:
            return "\n\n".join([*(self._solved(*shot) for shot in shots), text])
        system = [] if self.prompt.system is None else [("system", self.prompt.system)]
        turns = [
            turn
            for shot, asked in shots
            for turn in (("user", asked), ("assistant", self._answer(shot)))
        ]
        return templated(self.tokenizer, [*system, *turns, ("user", text)])

    def _solved(self, shot: Record, text: str) -> str:
        """A record that is shown, with its answer."""
        if self.prompt.gap:
            return text.replace(GAP, self._answer(shot))
        return text + self._between(text) + self._answer(shot)

    def _ids(self, text: str) -> list[int]:
        # A chat template writes the special tokens itself.
        return prompt_ids(self.tokenizer, text, add_special_tokens=not self.chat)

    def _tokenize(self, record: Record) -> dict[str, list[list[int]]]:
        return self._rows(record, record.question)

    def _truncate(self, record: Record) -> dict[str, list[list[int]]]:
        holding = GAP if self.prompt.gap and GAP in record.question else ""
        return self._cut_question(record, partial(self._rows, record), holding=holding)

    def manifest(self, llm: PreTrainedModel) -> dict[str, Any]:
        """How prompts are written: the template, and what stands before the question."""
        prompt = self.prompt
        texts = [(shot, prompt.render(shot)) for shot in prompt.shots]
        if self.chat:
            shots = [{"user": text, "assistant": self._answer(shot)} for shot, text in texts]
            before: Any = {"system": prompt.system, "shots": shots}
        else:
            before = {"shots": [self._solved(*each) for each in texts]}
        return {
            "prompt": {
                "template": prompt.template,
                "letters": prompt.letters,
                "gap": prompt.gap,
                "chat": self.chat,
                "add_special_tokens": not self.chat,
                **before,
            }
        }


def _check_system(tokenizer: PreTrainedTokenizerBase, system: str, *, chat: bool) -> None:
    """:raises ValueError: if the message would not be read."""
    if not chat:
        raise ValueError(
            f"system is {system!r}, but chat is false: a system message is part of a chat template;"
            " set chat=true, or write it into the template"
        )
    rendered, reasons = in_template(tokenizer, [("system", system), ("user", "Why?")])
    if rendered is None and in_template(tokenizer, [("user", "Why?")])[0] is not None:
        raise ValueError(
            f"system is {system!r}, but the tokenizer's chat template does not write it"
            f" ({reasons[0]}): leave system out, or write it into the template"
        )


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


#: instead of today, which some chat templates write: the same record would be another prompt
#: tomorrow
DATE = "26 Jul 2024"
# transformers lets no argument take the place of the function that other templates ask.
_CLOCK = "{% macro strftime_now(form) %}" + DATE + "{% endmacro %}{{ '' }}"


def dated(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Arguments of ``apply_chat_template`` that fix the date."""
    return {"chat_template": _CLOCK + tokenizer.get_chat_template(), "date_string": DATE}


def templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]]) -> str:
    """Messages in the tokenizer's chat template, of which the last is to be answered.

    :param messages: role, such as ``user``, and text.
    :raises DataError: if the template leaves a text out.
    """
    rendered, reasons = in_template(tokenizer, messages)
    if rendered is None:
        shots = " or what is shown before it" if len(messages) > 1 else ""
        raise DataError(
            f"the chat template leaves the prompt {messages[-1][1][:40]!r} out{shots}, as a text"
            f" ({reasons[0]}) and as a list of parts ({reasons[1]}); set chat=false, or give the"
            " tokenizer a template that writes the user's message as it is"
        )
    return rendered


def in_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[tuple[str, str]],
    *,
    answered: bool = False,
) -> tuple[str | None, list[str]]:
    """Messages in the chat template, or why not: as texts, and as lists of parts.

    :param answered: the last one is the answer; else the assistant's turn begins behind it.
    """
    # Templates of models that also see pictures take a list of parts, and leave out a text.
    forms: list[Callable[[str], Any]] = [str, lambda text: [{"type": "text", "text": text}]]
    reasons = []
    for form in forms:
        try:
            rendered = str(
                tokenizer.apply_chat_template(
                    [{"role": role, "content": form(text)} for role, text in messages],
                    add_generation_prompt=not answered,
                    tokenize=False,
                    **dated(tokenizer),
                )
            )
        except (TemplateError, TypeError, AttributeError, LookupError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        absent = _absent(rendered, messages)
        if absent is None:
            return rendered, []
        reasons.append(f"gave {rendered[:80]!r}, where {absent[:40]!r} is left out")
    return None, reasons


def _absent(rendered: str, messages: Sequence[tuple[str, str]]) -> str | None:
    """The first message that a text does not hold: turns in their order, the system's anywhere."""
    place = 0
    for role, text in messages:
        start = rendered.find(text.strip(), 0 if role == "system" else place)
        if start < 0:
            return text
        if role != "system":
            place = start + len(text.strip())
    return None


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """:raises ValueError: if there is no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError("chat=true, but the tokenizer has no chat template; set chat=false")


def last_logits(llm: PreTrainedModel, inputs: dict[str, Tensor], count: int) -> Tensor:
    """(R, count, vocabulary), the logits at the last positions of R left-padded rows."""
    # GPT-2 and others number positions from the padding unless they are told.
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + _first_position(llm)
    extra = {"logits_to_keep": count} if keeps_logits(type(llm)) else {}
    return llm(**inputs, position_ids=positions, use_cache=False, **extra).logits[:, -count:]


@torch.no_grad()
def check_left_padding(llm: PreTrainedModel, ids: Tensor) -> None:
    """Refuse a recurrent model that reads the padding before a row: its logits would depend on what
    else is in the batch.

    :param ids: (T,), a short text.
    :raises ValueError: if it does.
    """
    # Attention has a mask; of the others transformers says that they carry a state.
    if not getattr(llm, "_is_stateful", False) or llm.device.type == "meta":
        return
    alone = ids.to(llm.device)[None]
    padded = torch.cat([alone[:, :1].repeat(1, 8), alone], 1)
    logits = []
    for rows in (alone, padded):
        mask = torch.ones_like(rows)
        mask[:, : rows.shape[1] - len(ids)] = 0
        logits.append(last_logits(llm, {"input_ids": rows, "attention_mask": mask}, 1).float())
    off = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    if off > (1e-3 if llm.dtype in (torch.float32, torch.float64) else 2**-4):
        raise ValueError(
            f"{type(llm).__name__} reads the padding before a shorter prompt: the logits of a text"
            f" move by {off:.2g} of the largest, so that they would depend on the batch; set"
            " model.readout=choice_likelihood, which pads behind"
        )


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
