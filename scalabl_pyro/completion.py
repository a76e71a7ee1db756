"""Completions: texts that follow a prompt, as data, as a readout and as a likelihood.

The likelihood is over the tokens of the completion alone; the prompt is given:

    log p(y | x, s) = Σ_t log p(y_t | x, y_<t, s)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import PROMPTS, Batch, DataError, Example, Record, Split
from .data.readers import jsonl_rows
from .data.records import is_text
from .model import ScalaBLModel
from .readout import Readout, last_logits

__all__ = ["Completion", "CompletionModel", "CompletionTokens", "read_completions"]

_NO_TOKEN = -100  # as in transformers: a position of labels that counts for nothing


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, and the text that follows it where it is known.

    :param id: a name unique within its file.
    :param prompt: the text that is given.
    :param completion: the text that follows at once, any space between them included; ``None`` if
        it is to be generated.
    :raises DataError: if a field is empty or no text.
    """

    id: str
    prompt: str
    completion: str | None = None

    def __post_init__(self) -> None:
        texts = {"id": self.id, "prompt": self.prompt}
        if self.completion is not None:
            texts["completion"] = self.completion
        for name, value in texts.items():
            if not is_text(value):
                raise DataError(
                    f"{name} is {value!r}: expected a text that is not empty, of whole characters"
                )

    @classmethod
    def of(cls, record: Record) -> Completion:
        """A multiple-choice question as a text: the question, then the right choice in words."""
        answer = None if record.label is None else f" {record.choices[record.label]}"
        return cls(record.id, PROMPTS["classes"].render(record), answer)

    @property
    def choices(self) -> tuple[str, ...]:
        """Of all texts, the only one that a readout is shown."""
        return () if self.completion is None else (self.completion,)

    @property
    def label(self) -> int | None:
        """Which of :attr:`choices` is right."""
        return None if self.completion is None else 0


def read_completions(path: str | Path) -> list[Completion]:
    """Read JSON Lines: ``prompt``, and if known ``completion``; ``id`` is else the line's number.

    :raises DataError: at the first bad line or repeated id, with file, line, value and reason; if
        there is no such file, or no line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found: dict[str, Completion] = {}
    for line, fields in jsonl_rows(path, ()):
        place = f"{path}, line {line}"
        if not isinstance(fields, dict) or not {"prompt"} <= fields.keys() <= {
            "id",
            "prompt",
            "completion",
        }:
            raise DataError(
                f"{place}: found {fields!r}: expected an object with 'prompt', and maybe 'id' and"
                " 'completion'"
            )
        try:
            record = Completion(**{"id": str(line)} | fields)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if record.id in found:
            raise DataError(f"{place}: the id {record.id!r} occurs twice; ids name one record each")
        found[record.id] = record
    if not found:
        raise DataError(f"{path}: holds no prompts")
    return list(found.values())


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
        prompt = self.tokenizer(record.prompt).input_ids
        whole = self.tokenizer(record.prompt + record.completion).input_ids
        given = len(
            list(takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
        )
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
        tokens = padded["input_ids"].masked_fill(mask == 0, _NO_TOKEN)
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


class CompletionModel(ScalaBLModel):
    r"""Bayesian LoRA for texts: a categorical for each token of a completion.

    .. math::
        s_{mj} &\sim p(s) \\
        y_{nt} \mid x_n, y_{n,<t}, s &\sim \mathrm{Categorical}(\mathrm{softmax} f_t(x_n, y_n; s)),
        \quad t = 1, …, T_n

    The T_n tokens are one event of the plate ``"data"`` over the N completions: −ELBO/N, and the
    ``nll`` that ``fit`` records, are nats a completion, not a token.

    :param adapter: in the subspace form, with the readout :class:`CompletionTokens`.
    """

    def observe(self, batch: Batch, logits: Tensor) -> Tensor:
        """``"label"``, the tokens of each completion, in the plate ``"data"``.

        :param logits: (\\*draws, B, K, C), returned as they are.
        """
        batch = batch.to(logits.device)
        labels = batch.labels
        assert labels is not None, "CompletionTokens encodes nothing without a completion"
        tokens = dist.Categorical(logits=logits).mask(labels != _NO_TOKEN).to_event(1)
        with self.data_plate(batch):
            pyro.sample("label", tokens, obs=labels.clamp(min=0))
        return logits
