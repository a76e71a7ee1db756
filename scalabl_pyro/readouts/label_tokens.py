"""The next token after a prompt, restricted to one word for each class."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import PROMPTS, DataError, Prompt, Record
from ..data.records import is_text
from .base import Classes, Readout
from .causal import last_logits, left_padded, prompt_ids, templated

__all__ = ["LabelTokens"]


class LabelTokens(Readout):
    """The next token after the prompt, restricted to C label words (causal language models).

    The label words share one form: with a leading space if each is then a single token after the
    prompt, else without; the other way round where the prompt ends in white space.

    :param prompt: renders a record as text.
    :param label_words: the C words, for example ``("A", "B", "C", "D")``.
    :param anchor: the end of a prompt, after which the words must be single tokens.
    :param chat: put each prompt through the tokenizer's chat template, as a text, or as a list of
        parts where it takes that. Of a prompt that is too long the question is then cut alone.
    :param form: ``"space"`` or ``"plain"`` fixes the form, as a saved run does.
    :raises ValueError: if neither form gives single, distinct tokens; the message shows the pieces;
        if a chat template is missing, or leaves the prompt out.
    """

    padding_side = "left"
    auto_class = "AutoModelForCausalLM"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        label_words: Sequence[str],
        *,
        max_length: int,
        truncate: bool = False,
        chat: bool = False,
        anchor: str = "Answer:",
        form: str | None = None,
    ) -> None:
        super().__init__(
            tokenizer, num_classes=len(label_words), max_length=max_length, truncate=truncate
        )
        if chat and tokenizer.chat_template is None:
            raise ValueError("chat=true, but the tokenizer has no chat template; set chat=false")
        self.prompt = prompt
        self.label_words = tuple(label_words)
        self.chat = chat
        self.form, ids = self._label_ids(anchor, form)
        self.label_ids = torch.tensor(ids)
        self.class_names = self.label_words if prompt.shares_choices else ()

    @classmethod
    def words(cls, records: Sequence[Record], *, prompt: str) -> tuple[str, ...]:
        return PROMPTS[prompt].label_words(records)

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        classes: Classes,
        *,
        prompt: str,
        chat: bool,
        max_length: int,
        truncate: bool,
        normalise: str,
        temperature: str,
    ) -> Self:
        return cls(
            tokenizer,
            PROMPTS[prompt],
            classes.words,
            max_length=max_length,
            truncate=truncate,
            chat=chat,
            form=classes.form,
        )

    @classmethod
    def untokenized(cls, num_classes: int) -> Self:
        readout = super().untokenized(num_classes)
        readout.label_ids = torch.arange(num_classes)
        return readout

    def manifest(self, llm: PreTrainedModel) -> dict[str, Any]:
        return {"label_words": list(self.label_words), "label_ids": self.label_ids.tolist()}

    def _label_ids(self, anchor: str, form: str | None) -> tuple[str, list[int]]:
        forms = {"space": " ", "plain": ""}
        if form is not None and form not in forms:
            raise ValueError(f"form is {form!r}: expected one of {list(forms)}")
        anchor = self._templated(anchor)
        before = self._ids(anchor)
        pieces = {}
        # After a chat template that ends in a line break, an answer begins without a space.
        order = reversed(forms) if anchor[-1:].isspace() else forms
        for name in [form] if form else order:
            rows = [self._ids(anchor + forms[name] + word) for word in self.label_words]
            added = [row[len(before) :] for row in rows if row[: len(before)] == before]
            if [len(ids) for ids in added] == [1] * len(rows):
                ids = [ids[0] for ids in added]
                if len(set(ids)) == len(ids):
                    return name, ids
            pieces[name] = [self.tokenizer.convert_ids_to_tokens(row) for row in rows]
        raise ValueError(
            f"the label words {list(self.label_words)} are not single, distinct tokens after"
            f" {anchor!r}: {pieces}; choose words of one token each, as prompt=letters does, or"
            " readout=choice_likelihood, which takes words of any length"
        )

    def _tokenize(self, record: Record) -> dict[str, list[list[int]]]:
        ids = self._ids(self._templated(self.prompt.render(record)))
        return {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}

    def _truncate(self, record: Record) -> dict[str, list[list[int]]]:
        if self.chat:
            return self._tokenize(self._with_less_question(record))
        # The end stays: the answer follows it.
        return self._cut_left(self._tokenize(record))

    def _with_less_question(self, record: Record) -> Record:
        """The record with the longest end of its question that fits: a template stays whole.

        :raises DataError: if not even its last character does.
        """
        question = record.question.rstrip()

        def fits(length: int) -> bool:
            return len(self._tokenize(shortened(length))["input_ids"][0]) <= self.max_length

        def shortened(length: int) -> Record:
            return replace(record, question=question[-length:])

        lengths = [n for n in range(1, len(question) + 1) if is_text(question[-n:])]
        # The more characters, the more tokens, but for a few at the cut.
        most = bisect_left(lengths, True, key=lambda n: not fits(n))
        while most and not fits(lengths[most - 1]):
            most -= 1
        if not most:
            raise DataError(
                f"record {record.id!r}: the chat template and what stands beside the question leave"
                f" no room for it in the context of {self.max_length} tokens; shorten the choices,"
                " or set chat=false"
            )
        return shortened(lengths[most - 1])

    def _templated(self, text: str) -> str:
        return templated(self.tokenizer, text) if self.chat else text

    def _ids(self, text: str) -> list[int]:
        # A chat template writes the special tokens itself.
        return prompt_ids(self.tokenizer, text, add_special_tokens=not self.chat)

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        logits = last_logits(llm, left_padded(inputs), 1)[:, 0]
        return logits[:, self.label_ids.to(logits.device)].float()
