r"""Log-likelihoods of tokens that continue tokens, under the average of whole continuations.

With draws s_k, a context x and a continuation Y = y_1 … y_T,

.. math:: \log p(Y \mid x) = \log \frac{1}{S} \sum_k \prod_t p_k(y_t \mid x, y_{<t})

which is the product of the next tokens' averages with posterior weights (see
:mod:`~scalabl_pyro.prediction.text_scores`). Draws run in turns and only their sum is kept, so that
memory does not grow with S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..readouts.causal import last_logits
from .predictor import NonFinitePredictionsError, Predictor
from .texts import MOST_LOGITS, in_chunks, language_model

__all__ = [
    "Continuation",
    "average_log_prob",
    "score_tokens",
]


class Continuation(NamedTuple):
    r"""What S draws say of a continuation.

    :param draw_log_probs: (S,), Σ_t log p_k(y_t | x, y_<t), in nats.
    :param greedy: whether each y_t is the most probable next token of the average, whose draws
        weigh as much as they gave y_<t: whether greedy decoding with posterior weights gives Y.
    """

    draw_log_probs: Tensor
    greedy: bool

    @property
    def log_prob(self) -> float:
        """log p(Y | x)."""
        return average_log_prob(self.draw_log_probs)


def average_log_prob(draw_log_probs: Tensor) -> float:
    """log of the mean over the draws of what a text has under each, from (S,)."""
    return float(draw_log_probs.double().logsumexp(0)) - math.log(len(draw_log_probs))


def score_tokens(
    predictor: Predictor,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    progress: bool = False,
) -> list[Continuation]:
    """Read N continuations, each in one pass a draw.

    :param pairs: tokens of the context and of the continuation, one or more of each. Of those that
        exceed the model's context the first tokens are left out; the last one is never read.
    :raises ValueError: if the model is no causal language model, one is empty, or a continuation
        exceeds the context.
    :raises NonFinitePredictionsError: if a logit is NaN or infinite.
    """
    language_model(predictor)
    room = predictor.adapter.readout.max_length
    for number, (context, continuation) in enumerate(pairs):
        if not (context and 0 < len(continuation) <= room):
            raise ValueError(
                f"pair {number} has a context of {len(context)} tokens and a continuation of"
                f" {len(continuation)}: expected one or more of each, and {room} at most, the"
                " model's context, of the continuation"
            )
    rows = [[*context, *own][-room - 1 :] for context, own in pairs]
    counts = [len(own) for _, own in pairs]

    def run(numbers: Sequence[int]) -> list[Continuation]:
        return _read(predictor, [rows[n] for n in numbers], [counts[n] for n in numbers], numbers)

    # In the order of their length, so that little is padded.
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    read = tqdm(in_chunks(predictor, order, run), total=len(order), disable=not progress)
    by_number = dict(zip(order, read, strict=True))
    return [by_number[n] for n in range(len(rows))]


@torch.no_grad()
def _read(
    predictor: Predictor, rows: list[list[int]], counts: list[int], numbers: Sequence[int]
) -> list[Continuation]:
    """Of B rows, of which the last so many tokens are the continuation.

    :param numbers: of the rows among all.
    """
    adapter = predictor.adapter
    whole = _stacked([torch.tensor(row) for row in rows])
    mask = _stacked([torch.ones(len(row), dtype=torch.long) for row in rows])
    inputs = {"input_ids": whole[:, :-1], "attention_mask": mask[:, :-1]}
    inputs = {name: value.to(adapter.device) for name, value in inputs.items()}
    there = _stacked([torch.ones(count, dtype=torch.bool) for count in counts])  # (B, K)
    there = there.to(adapter.device)
    B, K = there.shape
    tokens = whole[:, -K:].to(adapter.device)
    vocabulary = language_model(predictor).config.get_text_config().vocab_size
    at_once = max(1, MOST_LOGITS // (B * K * vocabulary))
    log_probs: list[Tensor] = []
    total: Tensor | None = None  # (B, K, C), log Σ_k p_k(y_<t) p_k(·)
    for draws in [None] if predictor.draws is None else predictor.draws.split(at_once):
        with adapter.bound(draws) as llm:
            many = 1 if draws is None else len(draws)
            logits = last_logits(llm, {k: v.repeat(many, 1) for k, v in inputs.items()}, K)
        logits = logits.float().unflatten(0, (many, B))
        _check_finite(logits, there, numbers)
        each = logits.log_softmax(-1)
        own = each.gather(-1, tokens.expand(many, B, K)[..., None])[..., 0].masked_fill(~there, 0)
        log_probs.append(own.sum(-1))
        part = each.add_((own.cumsum(-1) - own)[..., None]).logsumexp(0)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    greedy = ((total.argmax(-1) == tokens) | ~there).all(-1)
    draw_log_probs = torch.cat(log_probs).cpu()  # (S, B)
    return [Continuation(*each) for each in zip(draw_log_probs.T, greedy.tolist(), strict=True)]


def _stacked(rows: list[Tensor]) -> Tensor:
    """(B, T) of rows of other lengths, padded on the left."""
    return pad_sequence(rows, batch_first=True, padding_side="left")


def _check_finite(logits: Tensor, there: Tensor, numbers: Sequence[int]) -> None:
    """:raises NonFinitePredictionsError: if one of (S, B, K, C) is not, where there is a token."""
    bad = (~logits.isfinite()).any(-1).any(0) & there  # (B, K)
    if bad.any():
        number = numbers[int(bad.any(-1).nonzero()[0])]
        raise NonFinitePredictionsError(f"pair {number} has logits that are not finite")
