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

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
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
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..data.completions import Completion
from ..data.records import is_text
from ..readouts.causal import prompt_ids
from ..readouts.completion_tokens import CompletionTokens
from .predictor import Predictor
from .text_scores import WEIGHTS, token_scores

__all__ = ["Decoding", "ScoredText", "generate", "score"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the next token is taken from the model average, in the terms of ``transformers``.

    :param max_new_tokens: most tokens of a text; the end token ends it sooner.
    :param do_sample: draw the token; otherwise take the most probable one.
    :param temperature: divides the average's log-probabilities before a draw.
    :param top_k: draw from the so many most probable tokens; 0 is off.
    :param top_p: draw from the fewest most probable tokens that hold this probability; 1 is off.
    :param num_beams: 1; beam search is not offered.
    :param weights: of the draws, ``equal`` or ``posterior``: by what they gave the text so far.
    :param seed: fixes the draws, of each prompt by its number, whatever else is generated with it.
    :raises ValueError: if a value is out of range, or beam search is asked for.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    weights: str = "equal"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_beams != 1:
            raise ValueError(
                f"num_beams is {self.num_beams}: expected 1, for the rows of a prompt are draws of"
                " s, which must all read the same text; use do_sample=true for several texts"
            )
        _check_weights(self.weights)
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

    def warpers(self) -> LogitsProcessorList:
        """What changes log-probabilities before a draw, in the order of ``transformers``."""
        found = LogitsProcessorList()
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        return found

    def generator(self, number: int) -> torch.Generator:
        """The source of the draws of the prompt with this number."""
        return torch.Generator().manual_seed(random.Random(f"{self.seed} {number}").getrandbits(63))


@dataclass(frozen=True, slots=True, eq=False)
class ScoredText:
    r"""A text of T tokens y_1 … y_T and its uncertainty under S draws, in nats.

    :param text: the text after the prompt.
    :param tokens: the T tokens as the tokenizer spells them; the end token is one of them.
    :param ids: (T,).
    :param draw_log_probs: (S, T), log p_k(y_t).
    :param log_weights: (S, T), log w_kt of the draws in p̄_t = Σ_k w_kt p_k: −log S where they are
        equal.
    :param entropy: (T,), H[p̄_t]: total uncertainty of the next token.
    :param mutual_information: (T,), H[p̄_t] − Σ_k w_kt H[p_k] ≥ 0: how far the draws disagree on it.
    :param epkl: (T,), Σ_jk w_jt w_kt KL(p_j ‖ p_k) of it; with the mutual information taken away,
        its reverse mutual information.
    """

    text: str
    tokens: tuple[str, ...]
    ids: Tensor
    draw_log_probs: Tensor
    log_weights: Tensor
    entropy: Tensor
    mutual_information: Tensor
    epkl: Tensor

    @property
    def log_probs(self) -> Tensor:
        """(T,), log p̄_t(y_t), under the average and before any temperature, top-k or top-p."""
        return (self.draw_log_probs + self.log_weights).logsumexp(0).clamp(max=0)

    @property
    def log_prob(self) -> float:
        """Σ_t log p̄_t(y_t), of the text under the average."""
        return float(self.log_probs.sum())

    @property
    def spread(self) -> float:
        """Standard deviation over the draws of Σ_t log p_k(y_t); 0 for one draw."""
        return float(self.draw_log_probs.sum(-1).std(correction=0))

    @property
    def token_mutual_information(self) -> float:
        """Σ_t of the tokens' mutual informations; divide by T to compare texts of other lengths.

        With equal weights this is no information of the text, which is at most log S: each token's
        term forgets what the tokens before it tell about the draws, and the sum can be far above
        log S. With posterior weights its mean over texts that were drawn from the average, without
        temperature, top-k or top-p, is the mutual information between text and draw.
        """
        return float(self.mutual_information.sum())

    @property
    def token_epkl(self) -> float:
        """Σ_t of the tokens' expected pairwise KL divergences."""
        return float(self.epkl.sum())


class ModelAverage(LogitsProcessor):
    """Takes the next token from the average of S rows, and leaves all S no other token.

    Rows are draw-major. The token is taken here, a draw included: if ``generate`` drew for each
    row, the rows would part.

    :param num_draws: S.
    :param temperature: the predictor's, which divides the logits.
    :param weights: a key of ``WEIGHTS``.
    :param generators: one for each of the B prompts, to draw; ``None`` takes the most probable.
    """

    def __init__(
        self,
        num_draws: int,
        temperature: float,
        weights: str,
        warpers: LogitsProcessorList,
        generators: Sequence[torch.Generator] | None,
    ) -> None:
        self.num_draws = num_draws
        self.temperature = temperature
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
        logits = scores.unflatten(0, (self.num_draws, -1)) / self.temperature  # (S, B, C)
        log_weights = self.weights(torch.zeros_like(logits[..., 0]) + self.read)
        found = token_scores(logits, log_weights)
        log_probs: Any = found.log_probs  # (B, C)
        if self.generators is None:
            token = log_probs.argmax(-1)
        else:
            probs = self.warpers(input_ids, log_probs).softmax(-1).cpu()
            drawn = zip(probs, self.generators, strict=True)
            token = torch.cat([torch.multinomial(p, 1, generator=g) for p, g in drawn])
            token = token.to(scores.device)
        self.tokens.append(token)
        draw_log_probs = _log_probs_of(token, logits)
        self.measured.append((draw_log_probs, log_weights, *found[1:]))
        self.read = self.read + draw_log_probs
        only = torch.full_like(log_probs, float("-inf")).scatter(-1, token[:, None], 0.0)
        return cast(torch.FloatTensor, only.repeat(self.num_draws, 1))


def generate(
    predictor: Predictor,
    prompts: Sequence[str],
    decoding: Decoding | None = None,
    *,
    start: int = 0,
) -> Iterator[ScoredText]:
    """Continue prompts by ``transformers``' own ``generate``, with its cache; texts in their order.

    As many prompts run together as S·B ≤ ``predictor.most_rows()`` allows, one at least; where
    memory runs out it is halved, with a line in the log. The checkpoint's own decoding defaults,
    such as a repetition penalty, are off: what is reported is what is used.

    :param predictor: S draws on a causal language model; without draws S = 1.
    :param prompts: put to the model as they are, without a template.
    :param decoding: greedy if left out.
    :param start: the number of the first prompt to continue, for going on after an interruption.
    :raises ValueError: before any work, if the model cannot generate, or a prompt is empty or
        leaves too little of the context.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the text {prompts[:40]!r}: expected a list of texts")
    decoding = Decoding() if decoding is None else decoding
    rows = _encode(predictor, prompts, decoding)

    def run(numbers: Sequence[int]) -> list[ScoredText]:
        return _generate(predictor, [rows[n] for n in numbers], numbers, decoding)

    # Chunks begin where they began before an interruption, so that the numbers are the same.
    first = start - start % _size(predictor)
    return islice(_in_chunks(predictor, range(first, len(rows)), run), start - first, None)


def _encode(predictor: Predictor, prompts: Sequence[str], decoding: Decoding) -> list[list[int]]:
    _language_model(predictor)
    readout = predictor.adapter.readout
    room = readout.max_length - decoding.max_new_tokens
    rows = []
    for number, prompt in enumerate(prompts):
        if not is_text(prompt):
            raise ValueError(
                f"prompt {number} is {prompt!r}: expected a text that is not empty, of whole"
                " characters"
            )
        ids = prompt_ids(readout.tokenizer, prompt)
        if not prompt_ids(readout.tokenizer, prompt, add_special_tokens=False):
            raise ValueError(
                f"prompt {number}, {prompt[:40]!r}, becomes no token: expected a text that the"
                " tokenizer knows"
            )
        if len(ids) > room:
            raise ValueError(
                f"prompt {number}, {prompt[:40]!r}…, has {len(ids)} tokens, and with max_new_tokens"
                f" {decoding.max_new_tokens} exceeds the context of {readout.max_length}; shorten"
                " it, or lower max_new_tokens"
            )
        rows.append(ids)
    return rows


def _language_model(predictor: Predictor) -> PreTrainedModel:
    """:raises ValueError: if it cannot continue a text."""
    llm = cast(PreTrainedModel, predictor.adapter.peft_model.get_base_model())
    if not llm.can_generate() or llm.config.is_encoder_decoder:
        raise ValueError(
            f"{type(llm).__name__}, read by {type(predictor.adapter.readout).__name__}, cannot"
            " continue a text: expected a causal language model, as with readout=label_tokens"
        )
    return llm


@torch.no_grad()
def _generate(
    predictor: Predictor, prompts: list[list[int]], numbers: Sequence[int], decoding: Decoding
) -> list[ScoredText]:
    adapter, tokenizer = predictor.adapter, predictor.adapter.readout.tokenizer
    picks = ModelAverage(
        predictor.num_draws,
        predictor.temperature,
        decoding.weights,
        decoding.warpers(),
        [decoding.generator(n) for n in numbers] if decoding.do_sample else None,
    )
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    with adapter.bound(predictor.draws) as llm:
        end = llm.generation_config.eos_token_id
        end = tokenizer.eos_token_id if end is None else end
        settings = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
        with _without_defaults(llm):
            cast(Any, llm).generate(
                **{k: v.to(adapter.device).repeat(picks.num_draws, 1) for k, v in padded.items()},
                generation_config=settings,
                logits_processor=LogitsProcessorList([picks]),
            )
    ids = torch.stack(picks.tokens, dim=-1).cpu()  # (B, T)
    measured = [torch.stack(x, dim=-1).cpu() for x in zip(*picks.measured, strict=True)]
    ends = torch.isin(ids, torch.tensor([] if end is None else end, dtype=torch.long))
    # What follows a prompt's end token only waits for the others.
    lengths = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, decoding.max_new_tokens)
    found = []
    for b, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        kept = ids[b, :length]
        # Decoded with the prompt, so that a space between them stays.
        whole = str(tokenizer.decode(prompt + kept.tolist(), skip_special_tokens=True))
        found.append(
            ScoredText(
                whole[len(str(tokenizer.decode(prompt, skip_special_tokens=True))) :],
                tuple(tokenizer.convert_ids_to_tokens(kept.tolist())),
                kept,
                *(x[..., b, :length] for x in measured),
            )
        )
    return found


@contextmanager
def _without_defaults(llm: PreTrainedModel) -> Iterator[None]:
    """``generate`` fills what is not set from the checkpoint's own decoding defaults."""
    kept, llm.generation_config = llm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        llm.generation_config = kept


def score(
    predictor: Predictor,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    weights: str = "equal",
) -> list[ScoredText]:
    """The same numbers for given texts, each read whole in one pass (teacher forcing).

    A completion follows its prompt at once, any space between them included; no end token is added.

    :param weights: of the draws, as in :class:`Decoding`.
    :raises ValueError: if the model is no causal language model, a text is given for a list or
        lists of different lengths, or there are no such weights.
    :raises DataError: if a text is empty, or exceeds the context.
    """
    _check_weights(weights)
    for name, texts in (("prompts", prompts), ("completions", completions)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is the text {texts[:40]!r}: expected a list of texts")
    if len(prompts) != len(completions):
        raise ValueError(
            f"there are {len(prompts)} prompts and {len(completions)} completions: expected as many"
        )
    llm = _language_model(predictor)
    adapter, tokenizer = predictor.adapter, predictor.adapter.readout.tokenizer
    readout = CompletionTokens(
        tokenizer,
        num_classes=llm.config.get_text_config().vocab_size,
        max_length=adapter.readout.max_length,
        end_token=False,
    )
    pairs = zip(prompts, completions, strict=True)
    split = readout.encode([Completion(str(n), *pair) for n, pair in enumerate(pairs)])

    @torch.no_grad()
    def run(numbers: Sequence[int]) -> list[ScoredText]:
        batch = split.collate([split[n] for n in numbers]).to(adapter.device)
        rows = {k: v.repeat(predictor.num_draws, 1) for k, v in batch.inputs.items()}
        with adapter.bound(predictor.draws) as llm:
            logits = readout(llm, rows).unflatten(0, (predictor.num_draws, -1))
        assert batch.labels is not None
        there = batch.labels >= 0  # (B, K)
        lengths = there.sum(-1).tolist()
        logits, tokens = logits[:, there] / predictor.temperature, batch.labels[there]
        log_probs = _log_probs_of(tokens, logits)
        before = [part.cumsum(-1) - part for part in log_probs.split(lengths, dim=-1)]
        log_weights = WEIGHTS[weights](torch.cat(before, dim=-1))
        found = token_scores(logits, log_weights)
        parts = (
            x.cpu().split(lengths, dim=-1) for x in (tokens, log_probs, log_weights, *found[1:])
        )
        return [
            ScoredText(
                completions[n], tuple(tokenizer.convert_ids_to_tokens(ids.tolist())), ids, *values
            )
            for n, ids, *values in zip(numbers, *parts, strict=True)
        ]

    # In the order of their length, so that little is padded.
    order = sorted(range(len(split)), key=split.lengths.__getitem__)
    found = dict(zip(order, _in_chunks(predictor, order, run), strict=True))
    return [found[n] for n in range(len(split))]


def _size(predictor: Predictor) -> int:
    """How many texts run at once."""
    return max(1, predictor.most_rows() // predictor.num_draws)


def _in_chunks(
    predictor: Predictor,
    numbers: Sequence[int],
    run: Callable[[Sequence[int]], list[ScoredText]],
) -> Iterator[ScoredText]:
    """As many texts at once as ``most_rows`` allows; where memory runs out, half as many."""
    predictor.adapter.eval()
    done = 0
    while done < len(numbers):
        chunk = numbers[done : done + _size(predictor)]
        try:
            found = run(chunk)
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
        else:
            yield from found
            done += len(chunk)
            continue
        # Outside the handler, whose traceback keeps the failed pass in memory.
        predictor.max_rows = predictor.num_draws * (len(chunk) // 2)
        log.warning(
            "out of memory with %d draws of %d texts at once: going on with %d texts",
            predictor.num_draws,
            len(chunk),
            len(chunk) // 2,
        )


def _log_probs_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """log p_k of each token, (S, N) from (N,) and (S, N, C)."""
    picked = tokens.expand(len(logits), -1)[..., None]  # (S, N, 1)
    return logits.log_softmax(-1).gather(-1, picked)[..., 0]


def _check_weights(weights: str) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}: expected one of {sorted(WEIGHTS)}")
