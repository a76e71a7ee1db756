"""The likelihood of each choice's text after a prompt."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import GAP, Batch, DataError, Example, Prompt, Record, Split
from .base import Classes, common
from .causal import CausalReadout, keeps_logits
from .config import NORMALISE, TEMPERATURE, ReadoutConfig
from .kappa import fit_kappa

__all__ = ["ChoiceLikelihood"]

log = logging.getLogger(__name__)

#: questions that choose the start of κ
_QUESTIONS = 200
#: numbers in float32 at once, where all logits of a batch would need several times their memory
_CHUNK = 2**22
#: what rounding may be of the difference that one choice in sight makes to another: in bfloat16 it
#: is 0.07 (SmolLM2-135M), in float32 1e-5, and 1 in a model that ignores the mask
_ROUNDING = 0.25


class ChoiceLikelihood(CausalReadout):
    r"""The likelihood of each choice's text after the prompt (causal language models).

    .. math:: f_c = κ \, \frac{1}{n_c} \sum_{t} \log p(\mathrm{token}_{ct} \mid \mathrm{prompt},
              \mathrm{token}_{c1}, …, \mathrm{token}_{c,t-1})

    Choices may be any in number and length. In a prompt with a gap each choice goes into the gap,
    and the text behind it is what is scored (partial evaluation; Trinh & Le 2018, arXiv
    1806.02847). A token that holds the end of the prompt and the start of a choice belongs to the
    choice. With ``normalise="unconditional"`` log p of the choice's tokens behind the token that
    begins a text is taken away: what a choice has whatever the question (Brown et al. 2020, arXiv
    2005.14165, section 2.4).

    An example is one packed row: the prompt, then every choice, of which each sees the prompt and
    itself, at the positions that it would have behind the prompt. A model that takes no such mask
    gets a row for each choice, which computes the same. The output layer runs on the choices only.
    With ``unconditional`` every model reads a row for each choice and another with the choice
    alone, and the output layer runs on nearly all of their columns.

    :param prompt: how a record is put, with what is shown before it.
    :param num_classes: C, the most choices of a record; a split that has more is read with more.
    :param truncate: cut the question of a prompt that is too long, and nothing else of it.
    :param chat: put each prompt through the tokenizer's chat template.
    :param normalise: what n_c counts: the ``characters`` of the text that is scored, its
        ``tokens``, or nothing (``none`` and ``unconditional``: n_c = 1).
    :param temperature: ``trained`` makes κ > 0 a parameter, trained as log κ, which starts at the
        value with the lowest NLL (:func:`~scalabl_pyro.readouts.kappa.fit_kappa`); ``none`` leaves
        it at 1.
    :raises ValueError: if a value is not one of those listed; if a chat template is missing, would
        be put around a gap, or leaves the system message out; if the text behind a gap, which all
        choices share, would be unconditional.
    """

    padding_side = "right"
    default_prompt = "question"
    any_number = True
    takes = (*CausalReadout.takes, "normalise", "temperature")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        *,
        num_classes: int,
        max_length: int,
        truncate: bool = False,
        chat: bool = False,
        normalise: str = "characters",
        temperature: str = "trained",
    ) -> None:
        super().__init__(
            tokenizer,
            prompt,
            num_classes=num_classes,
            max_length=max_length,
            truncate=truncate,
            chat=chat,
        )
        if normalise not in NORMALISE:
            raise ValueError(f"normalise is {normalise!r}: expected one of {NORMALISE}")
        if temperature not in TEMPERATURE:
            raise ValueError(f"temperature is {temperature!r}: expected one of {TEMPERATURE}")
        if chat and prompt.gap:
            raise ValueError("chat=true, but a text with a gap is no message; set chat=false")
        if normalise == "unconditional" and prompt.gap:
            raise ValueError(
                "normalise is 'unconditional', but behind a gap all choices have the same text,"
                " which tells none of them apart: expected 'characters', 'tokens' or 'none'"
            )
        self.normalise = normalise
        self.temperature = temperature
        #: whether examples are packed rows, so long as no model that was attached forbids it
        self.packed = normalise != "unconditional"

    @classmethod
    def words(cls, records: Sequence[Record], *, prompt: str) -> tuple[str, ...]:
        """The choices, if all records share them."""
        shared = {record.choices for record in records}
        return shared.pop() if len(shared) == 1 else ()

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        classes: Classes,
        config: ReadoutConfig,
        *,
        max_length: int,
    ) -> Self:
        readout = cls(
            tokenizer,
            config.make_prompt(classes.shots),
            num_classes=classes.count,
            max_length=max_length,
            truncate=config.truncate,
            chat=config.chat,
            normalise=config.normalise,
            temperature=config.temperature,
        )
        readout.class_names = classes.words
        return readout

    @property
    def fitted(self) -> bool:
        """Whether κ is a parameter."""
        return self.temperature == "trained"

    @classmethod
    def untokenized(cls, num_classes: int) -> Self:
        readout = super().untokenized(num_classes)
        readout.packed, readout.temperature = True, "trained"
        return readout

    @classmethod
    def blank_inputs(
        cls, size: int, num_classes: int, tokens: int, config: ReadoutConfig
    ) -> dict[str, Tensor]:
        """Packed rows, of which half are choices, where nobody knows better."""
        inputs = super().blank_inputs(size, num_classes, tokens, config)
        if config.normalise == "unconditional":
            rows = {n: v[:, None].repeat(1, 2 * num_classes, 1) for n, v in inputs.items()}
            scored = torch.ones_like(rows["input_ids"][..., 1:], dtype=torch.bool)
            return rows | {"scored": scored, "sizes": torch.ones(size, num_classes)}
        behind = inputs["input_ids"][:, tokens // 2 :]
        return inputs | {
            "position_ids": inputs["input_ids"],
            "segment": behind,
            "scored": torch.ones_like(behind, dtype=torch.bool),
            "sizes": torch.ones(size, num_classes),
        }

    def manifest(self, llm: PreTrainedModel) -> dict[str, Any]:
        scored = {"kappa": float(self.kappa(llm).detach()), "normalise": self.normalise}
        return {"choice_likelihood": scored} | super().manifest(llm)

    # ------------------------------------------------------------------ records to rows

    def _answer(self, shot: Record) -> str:
        return shot.choices[cast(int, shot.label)]

    def _between(self, text: str) -> str:
        # After a chat template that ends in a line break, an answer begins without a space.
        return "" if text[-1:].isspace() else " "

    def _texts(self, record: Record, question: str) -> list[tuple[str, str]]:
        """For each choice the text that is given, and the one that is scored behind it."""
        text = self._text(record, question)
        if self.prompt.gap:
            before, _, after = text.rpartition(GAP)
            return [(before + choice, after) for choice in record.choices]
        return [(text, self._between(text) + choice) for choice in record.choices]

    def _rows(self, record: Record, question: str) -> dict[str, list[list[int]]]:
        rows: list[list[int]] = []
        starts: list[int] = []
        sizes: list[int] = []
        for prompt, scored in self._texts(record, question):
            row = self._ids(prompt + scored)
            start = common(self._ids(prompt), row)
            if not 0 < start < len(row):
                raise DataError(
                    f"record {record.id!r}: the prompt {prompt!r} and {scored!r} behind it are"
                    f" {start} and {len(row) - start} tokens: expected one or more of each"
                )
            rows.append(row)
            starts.append(start)
            counts = {"characters": len(scored.strip()), "tokens": len(row) - start}
            sizes.append(counts.get(self.normalise, 1))
        shared = min(*starts, *(common(rows[0], row) for row in rows))
        if self.normalise == "unconditional":
            rows += [[self._first, *row[start:]] for start, row in zip(starts, rows, strict=True)]
            starts += [1] * len(starts)
        return {
            "input_ids": rows,
            "scored": [[0] * s + [1] * (len(row) - s) for s, row in zip(starts, rows, strict=True)],
            "size": [[size] for size in sizes],
            "shared": [[shared]],
        }

    @property
    def _first(self) -> int:
        """The token that begins a text; of a tokenizer that has none the one that ends it."""
        tokenizer = self.tokenizer
        beginnings = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return next(cast(int, token) for token in beginnings if token is not None)

    def scoring(self) -> str:
        how = {"none": "", "unconditional": ", less that without the prompt"}
        return "log p of each" + how.get(self.normalise, f", divided by its {self.normalise}")

    def _prompt_and_answers(
        self, record: Record, rows: dict[str, list[list[int]]]
    ) -> tuple[str, list[tuple[str, str]]]:
        shared = rows["shared"][0][0]
        answers = []
        choices = len(record.choices)
        for row, scored in zip(rows["input_ids"][:choices], rows["scored"], strict=False):
            start = scored.index(1)
            context = self._decode(row[shared:start], behind=row[:shared])
            answers.append((context, self._decode(row[start:], behind=row[:start])))
        return self._decode(rows["input_ids"][0][:shared]), answers

    # ------------------------------------------------------------------ rows to batches

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack B examples: (B, T) if they are packed, else (B, C, T)."""
        missing = [self.num_classes - example.num_choices for example in examples]
        sizes = [
            [n for (n,) in e.rows["size"]] + [1] * m for e, m in zip(examples, missing, strict=True)
        ]
        inputs = _packed(examples) if self.packed else _separate(examples, self.num_classes)
        inputs["input_ids"] = inputs["input_ids"].masked_fill(
            inputs["attention_mask"] == 0, cast(int, self.tokenizer.pad_token_id)
        )
        labels = [example.label for example in examples]
        counts = torch.tensor([example.num_choices for example in examples])
        return Batch(
            inputs | {"sizes": torch.tensor(sizes)},  # (B, C)
            choices=torch.arange(self.num_classes) < counts[:, None],  # (B, C)
            labels=None if None in labels else torch.tensor(labels),
            row_per_choice=not self.packed and self.normalise != "unconditional",
        )

    # ------------------------------------------------------------------ the model

    def attach(self, llm: PreTrainedModel) -> dict[str, nn.Parameter]:
        """As :meth:`Readout.attach`; looks whether the model takes packed rows."""
        if self.packed and llm.device.type != "meta":
            why_not = self._why_not_packed(llm)
            if why_not is not None:
                self.packed = False
                log.info("%s reads a row for each choice: %s", type(llm).__name__, why_not)
        if not self.fitted:
            return {}
        # A module of its own, behind all others: a model takes its type from its first parameter.
        scale = nn.ParameterDict({"log_kappa": nn.Parameter(torch.zeros((), device=llm.device))})
        llm.add_module("readout", scale)
        return dict(scale.items())

    def start(
        self, llm: PreTrainedModel, logits: Callable[[Batch], Tensor], train: Split
    ) -> dict[str, float]:
        """κ with the lowest NLL on up to 200 of the examples, evenly spread."""
        if not self.fitted or train.labels is None:
            return {}
        apart = -(-len(train) // _QUESTIONS)
        chosen = train.examples[::apart]
        parts = [
            logits(train.collate(chosen[begin : begin + 16])) for begin in range(0, len(chosen), 16)
        ]
        scores = torch.cat(parts) / self.kappa(llm)
        kappa = fit_kappa(scores, train.labels[::apart].to(scores.device))
        log.info("κ starts at %g", kappa)
        return {"log_kappa": math.log(kappa)}

    def kappa(self, llm: PreTrainedModel) -> Tensor:
        """κ of a model that was attached."""
        if not self.fitted:
            return torch.ones((), device=llm.device)
        return _log_kappa(llm).exp()

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """:raises ValueError: if the batch is packed and the model takes no such rows."""
        if "segment" in inputs:
            if not self.packed:
                raise ValueError(
                    f"the batch was packed before {type(llm).__name__} was attached, which needs a"
                    " row for each choice: collate it again"
                )
            scores = self._score_packed(llm, inputs)
        else:
            scores = self._score_separate(llm, inputs)
        return self.kappa(llm).to(scores.device) * scores / inputs["sizes"].to(scores.device)

    def _score_packed(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """log p of the choices, (R, C)."""
        segment = inputs["segment"]  # (R, K), the choice that a column behind the prompts is of
        mask = _choices_apart(inputs["attention_mask"], segment)
        each = self._log_probs_of_packed(llm, inputs, _as_attention_takes_it(mask, llm))
        choices = torch.arange(inputs["sizes"].shape[1], device=segment.device)
        own = segment[:, :, None] == choices
        return (each[:, :, None] * own.to(each.device)).sum(1)

    def _score_separate(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """The same, of rows (R, C, T); of (R, 2C, T), less those of the second half."""
        rows = {name: v.flatten(0, 1) for name, v in inputs.items() if name != "sizes"}
        each = self._log_probs_of_rows(llm, rows).sum(-1).view(inputs["scored"].shape[:2])
        given, *alone = each.split(inputs["sizes"].shape[1], dim=1)
        return given - alone[0] if alone else given

    def _log_probs_of_packed(
        self, llm: PreTrainedModel, inputs: dict[str, Tensor], mask: Tensor
    ) -> Tensor:
        """(R, K), log p of the tokens behind the prompts."""
        segment = inputs["segment"]
        # Each token is read one column before its own, and the first of a choice where the prompt
        # ends.
        columns = torch.arange(segment.shape[1], device=segment.device)
        begins = segment.diff(dim=1, prepend=segment.new_full((len(segment), 1), -1)) != 0
        source = columns.where(~begins, 0)
        positions = inputs["position_ids"]
        return self._log_probs(llm, inputs, source, attention_mask=mask, position_ids=positions)

    def _log_probs_of_rows(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """(R, K), log p of the last tokens of rows (R, T)."""
        scored = inputs["scored"]
        columns = torch.arange(scored.shape[1], device=scored.device).expand_as(scored)
        return self._log_probs(llm, inputs, columns, attention_mask=inputs["attention_mask"])

    def _log_probs(
        self, llm: PreTrainedModel, inputs: dict[str, Tensor], source: Tensor, **options: Any
    ) -> Tensor:
        """(R, K), log p of the tokens in the last K columns, 0 where they are not scored.

        :param source: (R, K), where to read them, 0 for one column before the K.
        """
        ids, scored = inputs["input_ids"], inputs["scored"]
        first = ids.shape[1] - scored.shape[1]
        if keeps_logits(type(llm)):
            # By positions, and not by their number: a slice is no whole block of memory, on which
            # bfloat16 is slow on CPUs. Positions on the CPU count on every device.
            to_keep = torch.arange(first - 1, ids.shape[1] - 1)
            logits = llm(ids, use_cache=False, logits_to_keep=to_keep, **options).logits
        else:
            logits = llm(ids, use_cache=False, **options).logits[:, first - 1 : -1]
        source, tokens, scored = (x.to(logits.device) for x in (source, ids[:, first:], scored))
        parts = max(1, _CHUNK // logits[0].numel())
        each = [
            _log_prob(*part)
            for part in zip(
                logits.split(parts), source.split(parts), tokens.split(parts), strict=True
            )
        ]
        return torch.cat(each).masked_fill(~scored, 0.0)

    @torch.no_grad()
    def _why_not_packed(self, llm: PreTrainedModel) -> str | None:
        """What of a model keeps examples from being packed, if anything does."""
        if "position_ids" not in inspect.signature(type(llm).forward).parameters:
            return "it takes no position_ids"
        config = llm.config.get_text_config()
        for name in ("sliding_window", "attention_chunk_size"):
            reach = getattr(config, name, None)
            if isinstance(reach, int) and reach < self.max_length:
                return f"its attention reaches {reach} tokens back, {name} of its config"
        kinds = set(getattr(config, "layer_types", None) or ())
        others = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
        if others:
            return f"it has layers of {others}"
        # By what it does, for what a model makes of a mask stands in no config.
        vocabulary = cast(nn.Embedding, llm.get_input_embeddings()).num_embeddings
        prompt, length = 4, 12
        ids = [(37 * i + 11) % vocabulary for i in range(prompt + 2 * length)]
        rows = [ids[: prompt + length], ids[:prompt] + ids[prompt + length :]]
        scored = [[0] * prompt + [1] * length] * 2
        probe = Example({"input_ids": rows, "scored": scored, "shared": [[prompt]]}, 2, None)
        packed = {name: v.to(llm.device) for name, v in _packed([probe]).items()}
        separate = {name: v[0].to(llm.device) for name, v in _separate([probe], 2).items()}
        right = self._log_probs_of_rows(llm, separate).flatten()
        apart = _as_attention_takes_it(
            _choices_apart(packed["attention_mask"], packed["segment"]), llm
        )
        try:
            masked = self._log_probs_of_packed(llm, packed, apart)[0]
            in_sight = self._log_probs_of_packed(llm, packed, packed["attention_mask"])[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models refuse such a mask in ways of their own
            return f"it takes no mask of four dimensions ({error})"
        if not (masked - right).norm() <= _ROUNDING * (in_sight - right).norm():
            return "with a mask of four dimensions it computes something else"
        return None


def _log_kappa(llm: PreTrainedModel) -> nn.Parameter:
    return cast(nn.ParameterDict, llm.get_submodule("readout"))["log_kappa"]


def _packed(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Rows (B, T), in which all prompts end at the same column: the K behind it are the choices'.

    ``segment`` and ``scored`` are (B, K): the choice that a token is of, −1 if none, and whether it
    is scored.
    """
    prompts = [example.rows["shared"][0][0] for example in examples]
    width = max(1, *prompts)
    by_name: dict[str, list[Tensor]] = {}
    for example, shared in zip(examples, prompts, strict=True):
        left, rows = [0] * (width - shared), example.rows["input_ids"]
        tails = [row[shared:] for row in rows]
        values = {
            "input_ids": [*left, *rows[0][:shared], *(i for tail in tails for i in tail)],
            "attention_mask": [*left, *[1] * (shared + sum(map(len, tails)))],
            "position_ids": [
                *[*left, *range(shared)],
                *(shared + i for tail in tails for i in range(len(tail))),
            ],
            "segment": [c for c, tail in enumerate(tails) for _ in tail],
            "scored": [bool(x) for row in example.rows["scored"] for x in row[shared:]],
        }
        for name, value in values.items():
            by_name.setdefault(name, []).append(torch.tensor(value))
    return {
        name: pad_sequence(value, batch_first=True, padding_value=-1 if name == "segment" else 0)
        for name, value in by_name.items()
    }


def _separate(examples: Sequence[Example], num_classes: int) -> dict[str, Tensor]:
    """Rows (B, C, T), or (B, 2C, T) with those of choices alone, padded on the right; ``scored``
    is of the last K columns, from the first that is scored in any row on."""
    by_name: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "scored": []}
    for example in examples:
        # A missing choice is scored as a copy of the first one and masked afterwards.
        places = [*range(example.num_choices), *[0] * (num_classes - example.num_choices)]
        all_rows = range(0, len(example.rows["input_ids"]), example.num_choices)
        for c in (first + place for first in all_rows for place in places):
            row = torch.tensor(example.rows["input_ids"][c])
            by_name["input_ids"].append(row)
            by_name["attention_mask"].append(torch.ones_like(row))
            by_name["scored"].append(torch.tensor(example.rows["scored"][c], dtype=torch.bool))
    padded = {name: pad_sequence(value, batch_first=True) for name, value in by_name.items()}
    first = int(padded["scored"].any(0).int().argmax())
    padded["scored"] = padded["scored"][:, first:]
    return {name: value.unflatten(0, (len(examples), -1)) for name, value in padded.items()}


def _choices_apart(attended: Tensor, segment: Tensor) -> Tensor:
    """(R, 1, T, T), true where a token sees another: of the prompt, or before it in its choice.

    :param attended: (R, T).
    :param segment: (R, K), of the last K columns.
    """
    R, T = attended.shape
    order = torch.arange(T, device=attended.device)
    of = torch.cat([segment.new_full((R, T - segment.shape[1]), -2), segment], dim=1)
    seen = (of[:, None] == -2) | (of[:, None] == of[:, :, None])  # (R, T, T)
    seen = seen & (order <= order[:, None]) & attended[:, None].bool()
    # A row of nothing but padding would have no softmax.
    return (seen | (order == order[:, None]))[:, None]


def _as_attention_takes_it(mask: Tensor, llm: PreTrainedModel) -> Tensor:
    """A mask that is true where a token sees another, as numbers to add except for sdpa."""
    if llm.config.get_text_config()._attn_implementation == "sdpa":
        return mask
    dtype = cast(Tensor, llm.get_input_embeddings().weight).dtype
    numbers = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return numbers.masked_fill(~mask, torch.finfo(dtype).min)


def _log_prob(logits: Tensor, source: Tensor, tokens: Tensor) -> Tensor:
    """(R, K), log p of tokens (R, K), each read at its place ``source`` among K logits."""
    logits = logits.float()
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    return logits[rows, source, tokens] - logits.logsumexp(-1).gather(1, source)
