"""The next token after a prompt, restricted to one word for each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import PROMPTS, Prompt, Record
from .base import Classes, common
from .causal import CausalReadout, check_left_padding, last_logits, left_padded, templated
from .config import ReadoutConfig

__all__ = ["LabelTokens"]

#: what stands before a label word
_FORMS = {"space": " ", "plain": ""}


class LabelTokens(CausalReadout):
    """The next token after the prompt, restricted to C label words (causal language models).

    The label words share one form: with a leading space if each is then a single token after the
    prompt, else without; the other way round where the prompt ends in white space.

    :param prompt: how a record is put, with what is shown before it.
    :param label_words: the C words, for example ``("A", "B", "C", "D")``.
    :param truncate: cut the question of a prompt that is too long, and nothing else of it.
    :param chat: put each prompt through the tokenizer's chat template, as a text, or as a list of
        parts where it takes that.
    :param form: ``"space"`` or ``"plain"`` fixes the form, as a saved run does.
    :raises ValueError: if neither form gives single, distinct tokens; the message shows the pieces;
        if a chat template is missing, or leaves the prompt or the system message out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        label_words: Sequence[str],
        *,
        max_length: int,
        truncate: bool = False,
        chat: bool = False,
        form: str | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            prompt,
            num_classes=len(label_words),
            max_length=max_length,
            truncate=truncate,
            chat=chat,
        )
        self.label_words = tuple(label_words)
        self.form, ids = self._label_ids(form)
        self.label_ids = torch.tensor(ids)
        self.class_names = () if prompt.letters else self.label_words

    @classmethod
    def words(cls, records: Sequence[Record], *, prompt: str) -> tuple[str, ...]:
        return PROMPTS[prompt].label_words(records)

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        classes: Classes,
        config: ReadoutConfig,
        *,
        max_length: int,
    ) -> Self:
        return cls(
            tokenizer,
            config.make_prompt(classes.shots),
            classes.words,
            max_length=max_length,
            truncate=config.truncate,
            chat=config.chat,
            form=classes.form,
        )

    @classmethod
    def untokenized(cls, num_classes: int) -> Self:
        readout = super().untokenized(num_classes)
        readout.label_ids = torch.arange(num_classes)
        return readout

    def manifest(self, llm: PreTrainedModel) -> dict[str, Any]:
        labels = {"label_words": list(self.label_words), "label_ids": self.label_ids.tolist()}
        return labels | super().manifest(llm)

    def attach(self, llm: PreTrainedModel) -> dict[str, nn.Parameter]:
        """As :meth:`Readout.attach`; looks whether the model takes padding before a prompt."""
        check_left_padding(llm, self.label_ids)
        return super().attach(llm)

    def _label_ids(self, form: str | None) -> tuple[str, list[int]]:
        if form is not None and form not in _FORMS:
            raise ValueError(f"form is {form!r}: expected one of {list(_FORMS)}")
        anchor = self.prompt.anchor
        if self.chat:
            anchor = templated(self.tokenizer, [("user", anchor)])
        before = self._ids(anchor)
        pieces: dict[str, Any] = {}
        # After a chat template that ends in a line break, an answer begins without a space.
        order = reversed(_FORMS) if anchor[-1:].isspace() else _FORMS
        for name in [form] if form else order:
            rows = [self._ids(anchor + _FORMS[name] + word) for word in self.label_words]
            added = [row[len(before) :] for row in rows if row[: len(before)] == before]
            if [len(ids) for ids in added] == [1] * len(rows):
                ids = [ids[0] for ids in added]
                if len(set(ids)) == len(ids):
                    return name, ids
            pieces = {
                word: self.tokenizer.convert_ids_to_tokens(row[common(before, row) :])
                for word, row in zip(self.label_words, rows, strict=True)
            }
        raise ValueError(
            f"the label words {list(self.label_words)} are not single, distinct tokens after"
            f" {anchor!r}, but {pieces}; choose words of one token each, as model.prompt=letters"
            " does, or model.readout=choice_likelihood, which takes words of any length"
        )

    def _answer(self, shot: Record) -> str:
        return self.label_words[cast(int, shot.label)]

    def _between(self, text: str) -> str:
        return _FORMS[cast(str, self.form)]

    def _rows(self, record: Record, question: str) -> dict[str, list[list[int]]]:
        ids = self._ids(self._text(record, question))
        return {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}

    def scoring(self) -> str:
        return "the next token"

    def _prompt_and_answers(
        self, record: Record, rows: dict[str, list[list[int]]]
    ) -> tuple[str, list[tuple[str, str]]]:
        (row,) = rows["input_ids"]
        labels = self.label_ids.tolist()[: len(record.choices)]
        return self._decode(row), [("", self._decode([label], behind=row)) for label in labels]

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        logits = last_logits(llm, left_padded(inputs), 1)[:, 0]
        return logits[:, self.label_ids.to(logits.device)].float()
