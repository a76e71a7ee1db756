"""The next token after a prompt, restricted to one word for each class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Prompt, Record
from .base import Readout
from .causal import last_logits, left_padded, templated

__all__ = ["LabelTokens"]


class LabelTokens(Readout):
    """The next token after the prompt, restricted to C label words (causal language models).

    The label words share one form: with a leading space if each is then a single token after the
    prompt, else without; the other way round where the prompt ends in white space.

    :param prompt: renders a record as text.
    :param label_words: the C words, for example ``("A", "B", "C", "D")``.
    :param anchor: the end of a prompt, after which the words must be single tokens.
    :param chat: put each prompt through the tokenizer's chat template.
    :param form: ``"space"`` or ``"plain"`` fixes the form, as a saved run does.
    :raises ValueError: if neither form gives single, distinct tokens; the message shows the pieces.
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
        # The end stays: the answer follows it.
        return self._cut_left(self._tokenize(record))

    def _templated(self, text: str) -> str:
        return templated(self.tokenizer, text) if self.chat else text

    def _ids(self, text: str) -> list[int]:
        # A chat template writes the special tokens itself.
        return list(self.tokenizer(text, add_special_tokens=not self.chat).input_ids)

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        logits = last_logits(llm, left_padded(inputs), 1)[:, 0]
        return logits[:, self.label_ids.to(logits.device)].float()
