"""The tokens of a completion, as a readout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, Completion, DataError, Example, Record, Split
from .base import Classes, Readout, check_records, common
from .causal import check_chat, last_logits, prompt_ids
from .config import ReadoutConfig
from .conversations import answer_text, given_text

__all__ = ["NO_TOKEN", "CompletionTokens"]

NO_TOKEN = -100  # as in transformers: a position of labels that counts for nothing


class CompletionTokens(Readout):
    """The tokens of a completion (causal language models): logits (R, K, C) over the vocabulary.

    K is the number of tokens of the batch's longest completion; only there is the head run. A token
    that holds the end of the prompt and the start of the completion belongs to the completion.

    Of a conversation the assistant's last turn is the completion. This is the turn that a model is
    asked for, and its prompt is then exactly what it is asked by; templates may write earlier
    turns in another way, for instance without the thoughts before an answer. To learn earlier turns
    too, give a record for each of them.

    :param num_classes: C, the size of the model's vocabulary.
    :param end_token: let every completion end with the tokenizer's end token, so that the model
        learns where to stop; or, in the chat template, with the special token that ends a turn
        there, if there is one.
    :param chat: put each prompt through the tokenizer's chat template. Conversations need it.
    :raises ValueError: if there is no such token or template.
    """

    padding_side = "left"
    auto_class = "AutoModelForCausalLM"
    takes = ("chat",)
    reads_texts = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_classes: int,
        max_length: int,
        truncate: bool = False,
        end_token: bool = True,
        chat: bool = False,
    ) -> None:
        super().__init__(
            tokenizer, num_classes=num_classes, max_length=max_length, truncate=truncate
        )
        if end_token and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token: set one, or pass end_token=False")
        if chat:
            check_chat(tokenizer)
        self.end_token = end_token
        self.chat = chat

    @classmethod
    def classes(cls, records: Sequence[Record], *, prompt: str) -> Classes:
        """None that records could fix: the classes are the model's vocabulary."""
        if not records:
            raise DataError("records is empty: expected one or more")
        return Classes(0)

    def manifest(self, llm: PreTrainedModel) -> dict[str, Any]:
        return {"prompt": {"chat": self.chat}}

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        classes: Classes,
        config: ReadoutConfig,
        *,
        max_length: int,
    ) -> Self:
        # The model's own vocabulary, which may be padded, is known when it is attached.
        return cls(
            tokenizer,
            num_classes=len(tokenizer),
            max_length=max_length,
            truncate=config.truncate,
            chat=config.chat,
        )

    @classmethod
    def blank_inputs(
        cls, size: int, num_classes: int, tokens: int, config: ReadoutConfig
    ) -> dict[str, Tensor]:
        """Rows of which half are completions, where nobody knows better."""
        inputs = super().blank_inputs(size, num_classes, tokens, config)
        completion = torch.ones(size, tokens - tokens // 2, dtype=torch.long)
        return inputs | {"completion_mask": completion}

    def attach(self, llm: PreTrainedModel) -> dict[str, nn.Parameter]:
        """As :meth:`Readout.attach`; C is the size of the model's vocabulary."""
        self.num_classes = llm.config.get_text_config().vocab_size
        return {}

    def encode(self, records: Sequence[Record | Completion]) -> Split:
        """Tokenise completions; a multiple-choice record becomes one by :meth:`Completion.of`.

        :raises DataError: if a record has no completion, it has no token of its own or fills the
            whole context, or rows exceed ``max_length`` and ``truncate`` is off.
        """
        check_records(records)
        texts = [r if isinstance(r, Completion) else Completion.of(r) for r in records]
        return super().encode(texts)  # type: ignore[arg-type]  # id, choices, label alike

    def _tokenize(self, record: Completion) -> dict[str, list[list[int]]]:  # type: ignore[override]
        record.known()
        try:
            prompt_text = given_text(self.tokenizer, record, chat=self.chat)
            answer = answer_text(self.tokenizer, record, chat=self.chat, end=self.end_token)
        except DataError as error:
            raise DataError(f"record {record.id!r}: {error}") from error
        prompt, whole = self._ids(prompt_text), self._ids(prompt_text + answer)
        start = common(prompt, whole)
        if not prompt_ids(self.tokenizer, record.messages[-1].content, add_special_tokens=False):
            start = 0  # what remains are tokens that begin any text
        if not 0 < start < len(whole):
            raise DataError(
                f"record {record.id!r}: prompt {record.question!r} and completion"
                f" {record.completion!r} are {start} and {len(whole) - start} tokens: expected one"
                " or more of each"
            )
        special = self.tokenizer.all_special_ids
        if self.end_token and not (self.chat and whole[-1] in special):
            whole.append(self.tokenizer.eos_token_id)
        return {
            "input_ids": [whole],
            "attention_mask": [[1] * len(whole)],
            "completion_mask": [[0] * start + [1] * (len(whole) - start)],
        }

    def _ids(self, text: str) -> list[int]:
        # A chat template writes the special tokens itself.
        return prompt_ids(self.tokenizer, text, add_special_tokens=not self.chat)

    def _truncate(self, record: Completion) -> dict[str, list[list[int]]]:  # type: ignore[override]
        # Of the prompt: a completion that is cut is no completion.
        rows = self._tokenize(record)
        count = sum(rows["completion_mask"][0])
        if count >= self.max_length - self._leading(rows["input_ids"][0]):
            raise DataError(
                f"record {record.id!r}: the completion has {count} tokens and leaves no room for a"
                f" prompt in the context of {self.max_length}; shorten it"
            )
        return self._cut_left(rows)

    def scoring(self) -> str:
        return "log p of each token"

    def _prompt_and_answers(
        self, record: Record, rows: dict[str, list[list[int]]]
    ) -> tuple[str, list[tuple[str, str]]]:
        row, start = rows["input_ids"][0], rows["completion_mask"][0].index(1)
        return self._decode(row[:start]), [("", self._decode(row[start:], behind=row[:start]))]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack B examples, padded to the longest; labels are (B, K) tokens, −100 where none is."""
        rows = {name: [e.rows[name][0] for e in examples] for name in examples[0].rows}
        masks = [torch.tensor(row) for row in rows.pop("completion_mask")]
        mask = pad_sequence(masks, batch_first=True, padding_side="left")  # (B, T)
        padded = self.tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        mask = mask[:, -int(mask.sum(-1).max()) :]  # (B, K), whose shape tells the model K
        tokens = padded["input_ids"][:, -mask.shape[1] :]
        return Batch(
            {**padded, "completion_mask": mask},
            choices=torch.ones(len(examples), 1, 1, dtype=torch.bool),  # any token may follow
            labels=tokens.masked_fill(mask == 0, NO_TOKEN),
        )

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        inputs = dict(inputs)
        count = inputs.pop("completion_mask").shape[-1]
        # Each token is read one position before its own.
        return last_logits(llm, inputs, count + 1)[:, :-1].float()
