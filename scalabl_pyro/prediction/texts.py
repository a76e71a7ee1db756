r"""Texts that are given, with the uncertainty of every token: read whole, in one pass a draw.

The numbers are those of :mod:`~scalabl_pyro.prediction.generation`, under the model average of each
next token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data import Batch, Completion, Split
from ..readouts import Readout
from ..readouts.completion_tokens import NO_TOKEN, CompletionTokens
from .halving import halving
from .predictor import MAX_ROWS, NonFinitePredictionsError, Predictor, Predicts
from .text_scores import WEIGHTS, check_weights, token_scores

__all__ = [
    "MOST_LOGITS",
    "ScoredText",
    "chunk_size",
    "evaluate_texts",
    "in_chunks",
    "language_model",
    "log_probs_of",
    "score",
    "score_split",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

#: logits at once, S·B·K·C, of which a few copies are made
MOST_LOGITS = 2**25


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
    :param finish_reason: of a generated text: ``stop`` if the end token or a text to stop at ended
        it, ``length`` if ``max_new_tokens`` did.
    """

    text: str
    tokens: tuple[str, ...]
    ids: Tensor
    draw_log_probs: Tensor
    log_weights: Tensor
    entropy: Tensor
    mutual_information: Tensor
    epkl: Tensor
    finish_reason: str | None = None

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


def score(
    predictor: Predictor,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    weights: str = "equal",
) -> list[ScoredText]:
    """The same numbers for given texts, each read whole in one pass (teacher forcing).

    A completion follows its prompt at once, any space between them included; no end token is added.
    Both go through the chat template if the predictor's readout has ``chat=True``.

    :param weights: of the draws, as in :class:`~scalabl_pyro.prediction.Decoding`.
    :raises ValueError: if the model is no causal language model, a text is given for a list or
        lists of different lengths, or there are no such weights.
    :raises DataError: if a text is empty, or exceeds the context.
    """
    check_weights(weights)
    for name, texts in (("prompts", prompts), ("completions", completions)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is the text {texts[:40]!r}: expected a list of texts")
    if len(prompts) != len(completions):
        raise ValueError(
            f"there are {len(prompts)} prompts and {len(completions)} completions: expected as many"
        )
    llm = language_model(predictor)
    adapter = predictor.adapter
    readout = CompletionTokens(
        adapter.readout.tokenizer,
        num_classes=llm.config.get_text_config().vocab_size,
        max_length=adapter.readout.max_length,
        end_token=False,
        chat=adapter.readout.chat,
    )
    pairs = zip(prompts, completions, strict=True)
    split = readout.encode([Completion(str(n), *pair) for n, pair in enumerate(pairs)])

    @torch.no_grad()
    def run(numbers: Sequence[int]) -> list[ScoredText]:
        texts = []
        for few in _few_logits(
            [split.lengths[n] for n in numbers], predictor.num_draws * readout.num_classes
        ):
            chunk = split.select([numbers[i] for i in few])
            batch = chunk.collate(chunk.examples).to(adapter.device)
            rows = {k: v.repeat(predictor.num_draws, 1) for k, v in batch.inputs.items()}
            with adapter.bound(predictor.draws) as llm:
                logits = readout(llm, rows).unflatten(0, (predictor.num_draws, -1))
            texts += _scored(readout, chunk, batch, logits, weights)
        return texts

    # In the order of their length, so that little is padded.
    order = sorted(range(len(split)), key=split.lengths.__getitem__)
    by_number = dict(zip(order, in_chunks(predictor, order, run), strict=True))
    return [by_number[n] for n in range(len(split))]


def score_split(
    predictor: Predicts, split: Split, *, weights: str = "equal", progress: bool = False
) -> list[ScoredText]:
    """The same for the N completions of a split, end tokens included.

    :param predictor: of any method, whose readout is ``CompletionTokens``.
    :param weights: of the draws, as in :class:`~scalabl_pyro.prediction.Decoding`.
    :raises ValueError: if there are no such weights.
    :raises NonFinitePredictionsError: if a logit is NaN or infinite.
    """
    check_weights(weights)
    readout = predictor.adapter.readout
    predictor.adapter.eval()
    by_number: dict[int, ScoredText] = {}
    with tqdm(total=len(split), disable=not progress) as bar:
        for numbers in _few_logits(split.lengths, predictor.num_draws * readout.num_classes):
            chunk = split.select(numbers)
            batch = chunk.collate(chunk.examples)
            with torch.no_grad():
                logits = predictor.logits(batch)  # (S, B, K, C)
            scored = _scored(readout, chunk, batch.to(logits.device), logits, weights)
            by_number |= zip(numbers, scored, strict=True)
            bar.update(len(numbers))
    return [by_number[n] for n in range(len(split))]


def evaluate_texts(texts: Sequence[ScoredText]) -> dict[str, float]:
    r"""Metrics of N completions with T = Σ_n T_n tokens, under the average of S draws, in nats.

    * ``nll``: -1/N Σ_n Σ_t log p̄_t(y_nt), of a completion; ``nll_token``: -1/T of the same sum
    * ``perplexity``: exp of ``nll_token``
    * ``entropy`` and ``mutual_information``: means over the T tokens; the latter is nan of one draw
    * ``tokens``: T / N

    :raises ValueError: if there is no text.
    """
    if not texts:
        raise ValueError("texts is empty: expected one or more")
    log_probs = torch.cat([text.log_probs for text in texts]).double()
    means = {
        name: float(torch.cat([getattr(text, name) for text in texts]).double().mean())
        for name in ("entropy", "mutual_information")
    }
    if len(texts[0].draw_log_probs) == 1:
        means["mutual_information"] = math.nan
    nll_token = -float(log_probs.mean())
    return {
        "nll": -float(log_probs.sum()) / len(texts),
        "nll_token": nll_token,
        "perplexity": float(torch.tensor(nll_token, dtype=torch.float64).exp()),  # may be inf
        **means,
        "tokens": len(log_probs) / len(texts),
    }


def _few_logits(lengths: Sequence[int], each: int) -> Iterator[list[int]]:
    """Numbers of rows in the order of their length, so many at once as are few logits.

    :param each: logits of a token.
    """
    chunk: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        many = (len(chunk) + 1) * lengths[number] * each > MOST_LOGITS
        if (chunk and many) or len(chunk) == MAX_ROWS:
            yield chunk
            chunk = []
        chunk.append(number)
    yield chunk


def _scored(
    readout: Readout, split: Split, batch: Batch, logits: Tensor, weights: str
) -> list[ScoredText]:
    """Of the B texts of a split.

    :param batch: the same texts.
    :param logits: (S, B, K, C).
    :param weights: a key of ``WEIGHTS``.
    """
    assert batch.labels is not None
    there = batch.labels != NO_TOKEN  # (B, K)
    tokens = logits[:, there]  # (S, T, C)
    if not tokens.isfinite().all():
        bad = (~tokens.isfinite()).any(-1).any(0).nonzero()[0]
        row = int(there.nonzero()[bad, 0])
        raise NonFinitePredictionsError(
            f"record {split.records[row].id!r} has logits that are not finite"
        )
    ids, lengths = batch.labels[there], there.sum(-1).tolist()
    log_probs = log_probs_of(ids, tokens)
    before = [part.cumsum(-1) - part for part in log_probs.split(lengths, dim=-1)]
    log_weights = WEIGHTS[weights](torch.cat(before, dim=-1))
    measured = (log_probs, log_weights, *token_scores(tokens, log_weights)[1:])
    parts = (x.cpu().split(lengths, dim=-1) for x in (ids, *measured))
    records = cast(Sequence[Completion], split.records)
    return [
        ScoredText(
            record.known(),
            tuple(readout.tokenizer.convert_ids_to_tokens(row.tolist())),
            row,
            *values,
        )
        for record, row, *values in zip(records, *parts, strict=True)
    ]


def language_model(predictor: Predictor) -> PreTrainedModel:
    """:raises ValueError: if it cannot continue a text."""
    llm = predictor.adapter.llm
    if not llm.can_generate() or llm.config.is_encoder_decoder:
        raise ValueError(
            f"{type(llm).__name__}, read by {type(predictor.adapter.readout).__name__}, cannot"
            " continue a text: expected a causal language model, as with readout=label_tokens"
        )
    return llm


def chunk_size(predictor: Predictor) -> int:
    """How many texts run at once."""
    return max(1, predictor.most_rows() // predictor.num_draws)


def in_chunks(
    predictor: Predictor,
    numbers: Sequence[int],
    run: Callable[[Sequence[int]], list[T]],
) -> Iterator[T]:
    """As many texts at once as ``most_rows`` allows; where memory runs out, half as many."""
    predictor.adapter.eval()

    def shrink(count: int, half: int) -> None:
        predictor.max_rows = predictor.num_draws * half
        log.warning(
            "out of memory with %d draws of %d texts at once: going on with %d texts",
            *(predictor.num_draws, count, half),
        )

    parts = halving(
        len(numbers),
        lambda: chunk_size(predictor),
        lambda part: run(numbers[part]),
        shrink,
    )
    for texts in parts:
        yield from texts


def log_probs_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """log p_k of each token, (S, N) from (N,) and (S, N, C)."""
    picked = tokens.expand(len(logits), -1)[..., None]  # (S, N, 1)
    return logits.log_softmax(-1).gather(-1, picked)[..., 0]
