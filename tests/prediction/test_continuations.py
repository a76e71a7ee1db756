"""Likelihoods of continuations under the average, against loops over draws."""

from __future__ import annotations

import math

import pytest
import torch

import scalabl_pyro.prediction.continuations as module
from scalabl_pyro import Predictor, generate
from scalabl_pyro.prediction import Decoding, NonFinitePredictionsError, score, score_tokens

PROMPT_TEXTS = ["the cat", "a bird sings the red tree", "green", "the dog sleeps . Answer : A"]
PAIRS = [([2, 3], [4, 5, 6]), ([7], [8]), ([2, 9, 4, 4, 8, 3], [5, 5]), ([3, 3, 3], [9, 2, 7, 4])]


@torch.no_grad()
def by_hand(predictor, context, own):
    """(S, T, C), log-probabilities of the next token: each draw reads the row, alone."""
    log_probs = []
    for s in predictor.draws:
        with predictor.adapter.bound(s[None]) as llm:
            logits = llm(torch.tensor([[*context, *own]])).logits[0, len(context) - 1 : -1]
        log_probs.append(logits.double().log_softmax(-1))
    return torch.stack(log_probs)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("most", [1, 2**25], ids=["one draw at a time", "all draws at once"])
def test_they_are_the_means_of_products(predictor, temperature, most, monkeypatch):
    monkeypatch.setattr(module, "MOST_LOGITS", most)
    # A temperature is one of the answers' logits, not of the next token's.
    predictor = Predictor(predictor.adapter, predictor.draws, temperature, max_rows=10)
    for (context, own), continuation in zip(PAIRS, score_tokens(predictor, PAIRS), strict=True):
        each = by_hand(predictor, context, own)
        picked = each.gather(-1, torch.tensor(own).expand(5, -1)[..., None])[..., 0]  # (S, T)
        torch.testing.assert_close(
            continuation.draw_log_probs.double(), picked.sum(-1), atol=1e-5, rtol=0
        )
        mean = float(picked.sum(-1).exp().mean().log())
        assert continuation.log_prob == pytest.approx(mean, abs=1e-5)
        before = picked.cumsum(-1) - picked
        weighed = (before.exp()[..., None] * each.exp()).sum(0)
        assert continuation.greedy == bool((weighed.argmax(-1) == torch.tensor(own)).all())


def test_greedy_texts_are_greedy_and_no_others(predictor):
    texts = list(generate(predictor, PROMPT_TEXTS, Decoding(12, weights="posterior")))
    rows = [predictor.adapter.readout.tokenizer.encode(prompt) for prompt in PROMPT_TEXTS]
    pairs = [(row, text.ids.tolist()) for row, text in zip(rows, texts, strict=True)]
    pairs += [(row, [*ids[:-1], (ids[-1] + 1) % 20]) for row, ids in pairs]
    continuations = score_tokens(predictor, pairs)
    assert [each.greedy for each in continuations] == [True] * 4 + [False] * 4
    for each, text in zip(continuations, texts, strict=False):
        assert each.log_prob == pytest.approx(text.log_prob, abs=1e-4)
    # Under equal weights the same draws have other favourites.
    other = generate(predictor, PROMPT_TEXTS, Decoding(12))
    assert any(a.ids.tolist() != b.ids.tolist() for a, b in zip(texts, other, strict=True))


def test_they_agree_with_the_score_of_a_text(predictor):
    (text,) = score(predictor, ["the cat"], [" runs a green dog ."], weights="posterior")
    ids = predictor.adapter.readout.tokenizer.encode("the cat")
    (continuation,) = score_tokens(predictor, [(ids, text.ids.tolist())])
    assert continuation.log_prob == pytest.approx(text.log_prob, abs=1e-5)


def test_a_point_estimate_has_one_draw(predictor):
    adapter = predictor.adapter
    ones = Predictor(adapter, torch.ones(3, *adapter.shape))
    for one, same in zip(
        score_tokens(Predictor(adapter), PAIRS), score_tokens(ones, PAIRS), strict=True
    ):
        assert one.draw_log_probs.shape == (1,)
        assert one.log_prob == pytest.approx(same.log_prob, abs=1e-5)
        assert math.isfinite(one.log_prob)


def test_a_context_that_is_too_long_loses_its_beginning(predictor):
    long = [2 + n % 9 for n in range(100)]
    (cut, short) = score_tokens(predictor, [(long, [4, 5]), (long[-63:], [4, 5])])
    torch.testing.assert_close(cut.draw_log_probs, short.draw_log_probs)
    (whole,) = score_tokens(predictor, [([2], long[:64])])  # what is read last is no input
    assert math.isfinite(whole.log_prob)


@pytest.mark.parametrize("pair", [([], [3]), ([2], []), ([2], [3] * 65)])
def test_pairs_that_cannot_be_read_are_refused(predictor, pair):
    message = r"pair 1 has a context of \d tokens and a continuation of \d+: expected one or more"
    with pytest.raises(ValueError, match=message):
        score_tokens(predictor, [PAIRS[0], pair])


def test_logits_that_are_not_finite_are_refused(predictor):
    weight = next(iter(predictor.adapter.state().values()))
    with torch.no_grad():
        weight[0, 0] = math.nan
    with pytest.raises(NonFinitePredictionsError, match="pair 1 has logits that are not finite"):
        score_tokens(predictor, PAIRS)


def test_models_that_read_no_texts_are_refused(make_choice):
    with pytest.raises(ValueError, match="MultipleChoice, cannot continue a text"):
        score_tokens(Predictor(make_choice()), PAIRS)


def test_fewer_run_at_once_where_memory_runs_out(predictor, monkeypatch):
    expected = score_tokens(predictor, PAIRS)
    plain = module.last_logits

    def small(llm, inputs, count):
        if len(inputs["input_ids"]) > 10:
            raise torch.OutOfMemoryError("out of memory")
        return plain(llm, inputs, count)

    monkeypatch.setattr(module, "last_logits", small)
    for a, b in zip(expected, score_tokens(predictor, PAIRS), strict=True):
        torch.testing.assert_close(a.draw_log_probs, b.draw_log_probs)
