r"""Generated text with its uncertainty: every draw of s reads the same tokens, one row a draw.

With p_k(· | y_<t) = softmax f_t(x, y_<t; s_k), the next token's distribution is the model average

.. math:: \bar p_t(\cdot) = \frac{1}{S} \sum_k p_k(\cdot \mid x, y_{<t})

and a text's probability is the product of these over its tokens ("product of expectations", Malinin
and Gales 2021, arXiv 2002.07650): the distribution that is decoded from. With posterior weights in
the place of 1/S, which follow what the tokens so far say of the draws, the product is the mean over
draws of whole-text probabilities ("expectation of products"), see
:mod:`~scalabl_pyro.prediction.text_scores`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..data import Completion, DataError, Message
from ..readouts import Readout
from ..readouts.causal import last_logits, prompt_ids
from ..readouts.conversations import given_text, turn_end_ids
from .predictor import Predictor
from .text_scores import WEIGHTS, check_weights, token_scores
from .texts import ScoredText, chunk_size, in_chunks, language_model, log_probs_of

__all__ = ["Decoding", "continue_tokens", "encode_prompts", "generate", "read_again"]

#: tokens of the first text that are read again
_CHECKED = 4
#: a text, or the messages of a conversation
Prompted = str | Sequence[Mapping[str, str] | Message]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the next token is taken from the model average, in the terms of ``transformers``.

    :param max_new_tokens: most tokens of a text; the end token ends it sooner.
    :param do_sample: draw the token; otherwise take the most probable one.
    :param temperature: divides the average's log-probabilities before a draw.
    :param top_k: draw from the so many most probable tokens; 0 is off.
    :param top_p: draw from the fewest most probable tokens that hold this probability; 1 is off.
    :param stop: texts that end a text, which then ends with the token that completes one of them.
    :param weights: of the draws, ``equal`` or ``posterior``: by what they gave the text so far.
    :param seed: fixes the draws, of each prompt by its number, whatever else is generated with it.
    :raises ValueError: if a value is out of range, or acts on sampled tokens alone and
        ``do_sample`` is false.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    weights: str = "equal"
    seed: int = 0

    def __post_init__(self) -> None:
        check_weights(self.weights)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: expected 1 or more")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}: expected a finite number above 0;"
                " do_sample=false takes the most probable token"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected a number above 0, up to 1")
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError(
                f"temperature is {self.temperature}, top_k is {self.top_k} and top_p is"
                f" {self.top_p}, which act on sampled tokens alone: set do_sample=true, or leave"
                " them out"
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop is {self.stop!r}: expected a list of texts that are not empty")

    def warpers(self) -> LogitsProcessorList:
        """What changes log-probabilities before a draw, in the order of ``transformers``."""
        warpers = LogitsProcessorList()
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers

    def generator(self, number: int) -> torch.Generator:
        """The source of the draws of the prompt with this number."""
        return torch.Generator().manual_seed(random.Random(f"{self.seed} {number}").getrandbits(63))


class ModelAverage(LogitsProcessor):
    """Takes the next token from the average of S rows, and leaves all S no other token.

    Rows are draw-major. The token is taken here, a draw included: if ``generate`` drew for each
    row, the rows would part.

    :param num_draws: S.
    :param weights: a key of ``WEIGHTS``.
    :param generators: one for each of the B prompts, to draw; ``None`` takes the most probable.
    """

    def __init__(
        self,
        num_draws: int,
        weights: str,
        warpers: LogitsProcessorList,
        generators: Sequence[torch.Generator] | None,
    ) -> None:
        self.num_draws = num_draws
        self.weights = WEIGHTS[weights]
        self.warpers = warpers
        self.generators = generators
        self.read: Tensor | float = 0.0
        """(S, B), log p_k of the tokens so far."""
        self.tokens: list[Tensor] = []
        """(B,) a step."""
        self.measured: list[tuple[Tensor, ...]] = []
        """A step: log p_k of the token and log w_k, (S, B); entropy, mutual information, EPKL."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        logits = scores.unflatten(0, (self.num_draws, -1))  # (S, B, C)
        log_weights = self.weights(torch.zeros_like(logits[..., 0]) + self.read)
        measures = token_scores(logits, log_weights)
        log_probs: Any = measures.log_probs  # (B, C)
        if self.generators is None:
            token = log_probs.argmax(-1)
        else:
            probs = self.warpers(input_ids, log_probs).softmax(-1).cpu()
            drawn = zip(probs, self.generators, strict=True)
            token = torch.cat([torch.multinomial(p, 1, generator=g) for p, g in drawn])
            token = token.to(scores.device)
        self.tokens.append(token)
        draw_log_probs = log_probs_of(token, logits)
        self.measured.append((draw_log_probs, log_weights, *measures[1:]))
        self.read = self.read + draw_log_probs
        only = torch.full_like(log_probs, float("-inf")).scatter(-1, token[:, None], 0.0)
        return cast(torch.FloatTensor, only.repeat(self.num_draws, 1))


class StopsAt(StoppingCriteria):
    """Ends a row when its text behind the prompt contains one of these.

    ``transformers``' own criterion also takes one that begins in the prompt.

    :param width: tokens of a padded prompt.
    :param num_draws: S, for which the rows of a prompt hold the same tokens.
    """

    def __init__(
        self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, width: int, num_draws: int
    ) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        self.width = width
        self.num_draws = num_draws

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        own = input_ids[: len(input_ids) // self.num_draws, self.width :].tolist()
        ended = torch.tensor([self._holds(row) for row in own], device=input_ids.device)
        return cast(torch.BoolTensor, ended.repeat(self.num_draws))

    def lengths(self, ids: Tensor) -> Tensor:
        """(B,), how many of T tokens it takes until a text contains one, or T + 1; (B, T)."""
        after = ids.shape[1] + 1
        return torch.tensor(
            [
                next((t for t in range(1, after) if self._holds(row[:t])), after)
                for row in ids.tolist()
            ]
        )

    def _holds(self, row: list[int]) -> bool:
        text = str(self.tokenizer.decode(row))
        return any(stop in text for stop in self.stop)


def generate(
    predictor: Predictor,
    prompts: Sequence[Prompted],
    decoding: Decoding | None = None,
    *,
    start: int = 0,
) -> Iterator[ScoredText]:
    """Continue prompts by ``transformers``' own ``generate``, with its cache; texts in their order.

    As many prompts run together as S·B ≤ ``predictor.most_rows()`` allows, one at least; where
    memory runs out it is halved, with a line in the log. The checkpoint's own decoding defaults,
    such as a repetition penalty, are off: what is reported is what is used.

    :param predictor: S draws on a causal language model; without draws S = 1. Prompts go through
        the chat template if its readout has ``chat=True``, and as they are if not.
    :param prompts: texts; or where the chat template is used, conversations to be answered, lists
        of messages with ``role`` and ``content``.
    :param decoding: greedy if left out.
    :param start: the number of the first prompt to continue, for going on after an interruption.
    :raises ValueError: before any work, if the model cannot generate, or a prompt is empty or
        leaves too little of the context, or the template does not take it; at the first text, if
        the model generates otherwise than it reads.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the text {prompts[:40]!r}: expected a list of texts")
    decoding = Decoding() if decoding is None else decoding
    return continue_tokens(
        predictor, encode_prompts(predictor, prompts, decoding), decoding, start=start
    )


def continue_tokens(
    predictor: Predictor,
    rows: Sequence[list[int]],
    decoding: Decoding,
    *,
    start: int = 0,
) -> Iterator[ScoredText]:
    """:func:`generate` for prompts that are tokens already, each with room for its text.

    :raises ValueError: at the first text, if the model generates otherwise than it reads.
    """
    # Chunks begin where they began before an interruption, so that the numbers are the same.
    first = start - start % chunk_size(predictor)

    def run(numbers: Sequence[int]) -> list[ScoredText]:
        texts = _generate(predictor, [rows[n] for n in numbers], numbers, decoding)
        if numbers[0] == first:
            # The shortest prompt has the most padding before it.
            at = min(range(len(numbers)), key=lambda index: len(rows[numbers[index]]))
            _check_cache(predictor, rows[numbers[at]], texts[at])
        return texts

    return islice(in_chunks(predictor, range(first, len(rows)), run), start - first, None)


def encode_prompts(
    predictor: Predictor, prompts: Sequence[Prompted], decoding: Decoding
) -> list[list[int]]:
    """The tokens that :func:`generate` continues.

    :raises ValueError: as it says there.
    """
    language_model(predictor)
    readout = predictor.adapter.readout
    tokenizer, chat = readout.tokenizer, readout.chat
    room = readout.max_length - decoding.max_new_tokens
    rows = []
    for number, prompt in enumerate(prompts):
        try:
            record = Completion(str(number), prompt)  # type: ignore[arg-type]  # makes messages
            text = given_text(tokenizer, record, chat=chat)
        except DataError as error:
            raise ValueError(f"prompt {number}: {error}") from error
        # A chat template writes the special tokens itself.
        ids = prompt_ids(tokenizer, text, add_special_tokens=not chat)
        last = record.messages[-1].content
        if not prompt_ids(tokenizer, last, add_special_tokens=False):
            raise ValueError(
                f"prompt {number}, {last[:40]!r}, becomes no token: expected a text that the"
                " tokenizer knows"
            )
        if len(ids) > room:
            raise ValueError(
                f"prompt {number}, {last[:40]!r}…, has {len(ids)} tokens, and with max_new_tokens"
                f" {decoding.max_new_tokens} exceeds the context of {readout.max_length}; shorten"
                " it, or lower max_new_tokens"
            )
        rows.append(ids)
    return rows


@torch.no_grad()
def _generate(
    predictor: Predictor, prompts: list[list[int]], numbers: Sequence[int], decoding: Decoding
) -> list[ScoredText]:
    adapter, tokenizer = predictor.adapter, predictor.adapter.readout.tokenizer
    picks = ModelAverage(
        predictor.num_draws,
        decoding.weights,
        decoding.warpers(),
        [decoding.generator(n) for n in numbers] if decoding.do_sample else None,
    )
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    with adapter.bound(predictor.draws) as llm:
        end = _ends(llm, adapter.readout)
        settings = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            eos_token_id=end or None,
            pad_token_id=tokenizer.pad_token_id,
        )
        width = padded["input_ids"].shape[1]
        stops = [StopsAt(decoding.stop, tokenizer, width, picks.num_draws)] if decoding.stop else []
        with _without_defaults(llm):
            cast(Any, llm).generate(
                **{k: v.to(adapter.device).repeat(picks.num_draws, 1) for k, v in padded.items()},
                generation_config=settings,
                logits_processor=LogitsProcessorList([picks]),
                stopping_criteria=StoppingCriteriaList(stops),
            )
    ids = torch.stack(picks.tokens, dim=-1).cpu()  # (B, T)
    measured = [torch.stack(x, dim=-1).cpu() for x in zip(*picks.measured, strict=True)]
    ends = torch.isin(ids, torch.tensor(end, dtype=torch.long))
    # What follows a prompt's end token only waits for the others.
    lengths = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, ids.shape[1] + 1)
    for stop in stops:
        lengths = torch.minimum(lengths, stop.lengths(ids))
    texts = []
    for b, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        text_ids = ids[b, :length]
        # Decoded with the prompt, so that a space between them stays.
        whole = str(tokenizer.decode(prompt + text_ids.tolist(), skip_special_tokens=True))
        draw_log_probs, log_weights, own_entropy, information, epkl = (
            x[..., b, :length] for x in measured
        )
        texts.append(
            ScoredText(
                whole[len(str(tokenizer.decode(prompt, skip_special_tokens=True))) :],
                tuple(tokenizer.convert_ids_to_tokens(text_ids.tolist())),
                text_ids,
                draw_log_probs,
                log_weights,
                own_entropy,
                information,
                epkl,
                "stop" if length <= ids.shape[1] else "length",
            )
        )
    return texts


@torch.no_grad()
def read_again(predictor: Predictor, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """(S, T, C), the logits of the T tokens of a text by one pass over it, without a cache."""
    adapter = predictor.adapter
    rows = torch.tensor([*prompt, *ids], device=adapter.device).repeat(predictor.num_draws, 1)
    with adapter.bound(predictor.draws) as llm:
        inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        logits = last_logits(llm, inputs, len(ids) + 1)[:, :-1].float()
    return logits


def _check_cache(predictor: Predictor, prompt: list[int], text: ScoredText) -> None:
    """Refuse a model whose cache leads elsewhere than a pass over the finished text, by which it
    was trained: for instance one whose first position is not 0, which ``generate`` does not know,
    or one that reads the padding before a prompt.
    """
    llm = language_model(predictor)
    ids = text.ids[:_CHECKED]
    logits = read_again(predictor, prompt, ids.tolist())
    own = log_probs_of(ids.to(logits.device), logits).cpu()
    off = float((own - text.draw_log_probs[:, : len(ids)]).abs().max() / logits.abs().max())
    exact = llm.dtype in (torch.float32, torch.float64) and not hasattr(llm, "hf_quantizer")
    if off > (1e-3 if exact else 32 * torch.finfo(torch.bfloat16).eps):
        raise ValueError(
            f"{type(llm).__name__} generates otherwise than it reads a finished text: its"
            f" log-probabilities of the first tokens differ by {off:.1g} of the largest logit;"
            " expected a model whose cache agrees with its own forward pass"
        )


def _ends(llm: PreTrainedModel, readout: Readout) -> list[int]:
    """The tokens that end a text: the checkpoint's, and the one that ends a turn."""
    end = llm.generation_config.eos_token_id  # type: ignore[union-attr]  # it can generate
    end = readout.tokenizer.eos_token_id if end is None else end
    ids = [] if end is None else [end] if isinstance(end, int) else list(end)
    return [*ids, *(turn_end_ids(readout.tokenizer) if readout.chat else [])]


@contextmanager
def _without_defaults(llm: PreTrainedModel) -> Iterator[None]:
    """``generate`` fills what is not set from the checkpoint's own decoding defaults."""
    defaults, llm.generation_config = llm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        llm.generation_config = defaults
