"""The tokens of a completion, as a readout."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, DataError, Example, Record, Split
from ..data.completions import Completion
from .base import Readout
from .causal import last_logits, prompt_ids

__all__ = ["NO_TOKEN", "CompletionTokens"]

NO_TOKEN = -100  # as in transformers: a position of labels that counts for nothing


class CompletionTokens(Readout):
    """The tokens of a completion (causal language models): logits (R, K, C) over the vocabulary.

    K is the number of tokens of the batch's longest completion; only there is the head run. A token
    that holds the end of the prompt and the start of the completion belongs to the completion.

    :param num_classes: C, the size of the model's vocabulary.
    :param end_token: let every completion end with the tokenizer's end token, so that the model
        learns where to stop.
    :raises ValueError: if there is no such token.
    """

    padding_side = "left"
    auto_class = "AutoModelForCausalLM"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_classes: int,
        max_length: int,
        truncate: bool = False,
        end_token: bool = True,
    ) -> None:
        super().__init__(
            tokenizer, num_classes=num_classes, max_length=max_length, truncate=truncate
        )
        if end_token and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token: set one, or pass end_token=False")
        self._end = [tokenizer.eos_token_id] if end_token else []

    def encode(self, records: Sequence[Record | Completion]) -> Split:
        """Tokenise completions; a multiple-choice record becomes one by :meth:`Completion.of`.

        :raises DataError: if a record has no completion, it has no token of its own or fills the
            whole context, or rows exceed ``max_length`` and ``truncate`` is off.
        """
        texts = [r if isinstance(r, Completion) else Completion.of(r) for r in records]
        return super().encode(texts)  # type: ignore[arg-type]  # id, choices, label alike

    def _tokenize(self, record: Completion) -> dict[str, list[list[int]]]:  # type: ignore[override]
        if record.completion is None:
            raise DataError(f"record {record.id!r} has no completion, and its tokens are needed")
        prompt = prompt_ids(self.tokenizer, record.prompt)
        whole = prompt_ids(self.tokenizer, record.prompt + record.completion)
        given = len(
            list(takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
        )
        if not prompt_ids(self.tokenizer, record.prompt, add_special_tokens=False):
            given = 0  # what remains are tokens that begin any text
        if not 0 < given < len(whole):
            raise DataError(
                f"record {record.id!r}: prompt {record.prompt!r} and completion"
                f" {record.completion!r} are {given} and {len(whole) - given} tokens: expected one"
                " or more of each"
            )
        whole += self._end
        return {
            "input_ids": [whole],
            "attention_mask": [[1] * len(whole)],
            "completion_mask": [[0] * given + [1] * (len(whole) - given)],
        }

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

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack B examples, padded to the longest; labels are (B, K) tokens, −100 where none is."""
        rows = {name: [e.rows[name][0] for e in examples] for name in examples[0].rows}
        masks = [torch.tensor(row) for row in rows.pop("completion_mask")]
        mask = pad_sequence(masks, batch_first=True, padding_side="left")  # (B, T)
        padded = self.tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        tokens = padded["input_ids"].masked_fill(mask == 0, NO_TOKEN)
        return Batch(
            {**padded, "completion_mask": mask},
            choices=torch.ones(len(examples), 1, 1, dtype=torch.bool),  # any token may follow
            labels=tokens[:, -_longest(mask) :],
        )

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        inputs = dict(inputs)
        count = _longest(inputs.pop("completion_mask"))
        # Each token is read one position before its own.
        return last_logits(llm, inputs, count + 1)[:, :-1].float()


def _longest(mask: Tensor) -> int:
    """K of a (B, T) mask."""
    return int(mask.sum(-1).max())
