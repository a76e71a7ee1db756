"""Scores of texts: toy models by enumeration, and texts that a real adapter samples."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from scalabl_pyro import generate
from scalabl_pyro.prediction import score, semantic_entropy, sequence_rmi, token_scores
from scalabl_pyro.prediction.generation import Decoding
from scalabl_pyro.prediction.text_scores import equal_weights, posterior_weights
from scalabl_pyro.prediction.texts import ScoredText, evaluate_texts

S, C, T = 3, 3, 4
TEXTS = list(itertools.product(range(C), repeat=T))


def test_the_perplexity_of_a_hopeless_model_is_infinite():
    zero = torch.zeros(1, 2)
    log_probs = torch.tensor([[-2000.0, -800.0]])
    text = ScoredText("ab", ("a", "b"), torch.arange(2), log_probs, zero, *torch.zeros(3, 2))
    metrics = evaluate_texts([text])
    assert metrics["nll_token"] == 1400.0
    assert metrics["perplexity"] == math.inf


def toy(sharpness):
    """log p_k(· | y_<t), (S, C), of every beginning: draws that disagree."""
    generator = torch.Generator().manual_seed(5)
    return {
        start: (sharpness * torch.randn(S, C, generator=generator, dtype=torch.float64))
        for t in range(T)
        for start in itertools.product(range(C), repeat=t)
    }


def along(model, text, weights):
    """What the functions say along a text: Σ_t MI_t, Σ_t log p̄_t, and log p_k of the whole."""
    read, information, log_prob = torch.zeros(S, 1, dtype=torch.float64), 0.0, 0.0
    for t, token in enumerate(text):
        logits = model[text[:t]][:, None]  # (S, 1, C)
        scores = token_scores(logits, weights(read))
        information += float(scores.mutual_information)
        log_prob += float(scores.log_probs[0, token])
        read = read + logits.log_softmax(-1)[..., token]
    return information, log_prob, read[:, 0]


def enumerated(model):
    """p_k(Y) of every text, (S, C^T), by multiplication."""
    columns = []
    for text in TEXTS:
        factors = [model[text[:t]].softmax(-1)[:, y] for t, y in enumerate(text)]
        columns.append(torch.stack(factors).prod(0))
    return torch.stack(columns, -1)


def entropy(p):
    return -(p * p.log()).sum(-1)


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 6.0])
def test_with_posterior_weights_the_chain_rule_holds(sharpness):
    model = toy(sharpness)
    each = enumerated(model)
    mean = each.mean(0)
    expected = float(entropy(mean) - entropy(each).mean())  # I(Y; k)
    total = 0.0
    for text, p in zip(TEXTS, mean.tolist(), strict=True):
        information, log_prob, _ = along(model, text, posterior_weights)
        assert log_prob == pytest.approx(math.log(p)), "the product is the mean over draws"
        total += p * information
    assert total == pytest.approx(expected, abs=1e-10)
    assert total <= math.log(S)


def test_with_equal_weights_the_sum_passes_the_bound():
    """The average of sharp draws, and the sum's own mean over the texts it decodes."""
    model, total, mean = toy(6.0), 0.0, 0.0
    for text in TEXTS:
        information, log_prob, _ = along(model, text, equal_weights)
        total += math.exp(log_prob)
        mean += math.exp(log_prob) * information
    assert total == pytest.approx(1)
    assert mean > 1.5 * math.log(S)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 24])
def test_token_scores_are_those_of_loops_over_draws(monkeypatch, at_once):
    monkeypatch.setattr("scalabl_pyro.prediction.text_scores._AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    logits[:, :, 4] = -math.inf  # a token that no draw ever takes
    log_weights = torch.randn(4, 6, generator=generator, dtype=torch.float64).log_softmax(0)
    scores = token_scores(logits, log_weights)
    for n in range(6):
        p, w = logits[:, n, :4].softmax(-1), log_weights[:, n].exp()
        mean = (w[:, None] * p).sum(0)
        mutual = entropy(mean) - (w * entropy(p)).sum()
        pairs = sum(
            w[j] * w[k] * (p[j] * (p[j] / p[k]).log()).sum() for j in range(4) for k in range(4)
        )
        reverse = sum(w[k] * (mean * (mean / p[k]).log()).sum() for k in range(4))
        torch.testing.assert_close(scores.log_probs[n, :4].exp(), mean)
        torch.testing.assert_close(scores.entropy[n], entropy(mean))
        torch.testing.assert_close(scores.mutual_information[n], mutual)
        torch.testing.assert_close(scores.epkl[n], pairs)
        torch.testing.assert_close(scores.epkl[n] - scores.mutual_information[n], reverse)


def test_one_draw_does_not_disagree():
    scores = token_scores(torch.randn(1, 3, 7), torch.zeros(1, 3))
    assert scores.mutual_information.tolist() == scores.epkl.tolist() == [0, 0, 0]


def test_the_rmi_of_sampled_texts_goes_to_that_of_all_texts():
    each = enumerated(toy(1.0))
    mean = each.mean(0)
    expected = float((mean * (mean.log() - each.log().mean(0))).sum())
    assert sequence_rmi(each.log(), mean) == pytest.approx(expected)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(mean, 20_000, replacement=True, generator=generator)
    terms = (mean.log() - each.log().mean(0))[drawn]
    rmi = sequence_rmi(each.log()[:, drawn])
    assert rmi == pytest.approx(float(terms.mean()))
    assert abs(rmi - expected) <= 3 * float(terms.std()) / 20_000**0.5


def test_posterior_weights_follow_the_text(predictor):
    """As it is generated, and as it is scored."""
    decoding = Decoding(8, do_sample=True, weights="posterior", seed=2)
    for text in generate(predictor, ["the cat"] * 6, decoding):
        before = text.draw_log_probs.double().cumsum(-1) - text.draw_log_probs
        expected = before.exp() / before.exp().sum(0)
        torch.testing.assert_close(text.log_weights.exp().double(), expected, atol=1e-4, rtol=1e-3)
        whole = text.draw_log_probs.double().sum(-1).exp().mean().log()
        assert text.log_prob == pytest.approx(float(whole), abs=1e-4)
    completions = [" runs a red dog", " sings"]
    for text in score(predictor, ["the cat"] * 2, completions, weights="posterior"):
        whole = text.draw_log_probs.double().sum(-1).exp().mean().log()
        assert text.log_prob == pytest.approx(float(whole), abs=1e-4)
        assert text.log_weights[:, 0].tolist() == pytest.approx([-math.log(5)] * 5)


def test_sampled_texts_tell_no_more_than_log_S(predictor):
    """And as much as log p_k(Y) / p̄(Y) says on average, which needs no token's distribution."""
    prompts, by_weights = ["the cat"] * 400, {}
    for weights in ("equal", "posterior"):
        decoding = Decoding(12, do_sample=True, weights=weights)
        texts = list(generate(predictor, prompts, decoding))
        by_weights[weights] = torch.tensor([t.token_mutual_information for t in texts]).double()
    mean, error = by_weights["posterior"].mean(), by_weights["posterior"].std() / 20
    assert mean <= math.log(5) + 2 * error
    assert by_weights["equal"].mean() > mean + 5 * error, "a sum of scores is more"
    whole = torch.stack([t.draw_log_probs.double().sum(-1) for t in texts])  # (400, S)
    ratio = whole - whole.logsumexp(-1, keepdim=True) + math.log(5)  # log p_k(Y) / p̄(Y)
    told = (whole.softmax(-1) * ratio).sum(-1)
    apart = by_weights["posterior"] - told
    assert abs(apart.mean()) <= 3 * apart.std() / 20


def test_semantic_entropy_counts_meanings():
    texts = ["Paris", "Rome", "Paris", "paris", "Rome", "Paris"]
    shares = [3 / 6, 2 / 6, 1 / 6]
    assert semantic_entropy(texts) == pytest.approx(-sum(p * math.log(p) for p in shares))
    shares = [4 / 6, 2 / 6]
    value = semantic_entropy(texts, lambda a, b: a.lower() == b.lower())
    assert value == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert semantic_entropy(["one"]) == 0
    assert semantic_entropy([str(i) for i in range(7)]) == pytest.approx(math.log(7))


def test_one_meaning_takes_entailment_both_ways():
    """A longer text entails a shorter one, and not the other way round."""
    texts = ["in Paris", "in Paris, France"]
    for pair in (texts, texts[::-1]):
        value = semantic_entropy(pair, lambda a, b: a.startswith(b))
        assert value == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: semantic_entropy([]), r"texts is \[\]: expected a list"),
        (lambda: semantic_entropy("Paris"), "texts is 'Paris': expected a list"),
        (lambda: sequence_rmi(torch.zeros(3)), r"shape \(3,\): expected \(S, B\)"),
        (lambda: sequence_rmi(torch.full((2, 2), -math.inf)), "holds NaN or infinity"),
        (lambda: sequence_rmi(torch.zeros(2, 3), torch.ones(2)), r"weights has shape \(2,\)"),
        (lambda: Decoding(weights="even"), r"weights is 'even': expected one of \['equal', 'post"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_draws_that_are_alike_are_one():
    logits = torch.randn(1, 3, 7)
    one = token_scores(logits, torch.zeros(1, 3))
    many = token_scores(logits.expand(4, -1, -1), torch.full((4, 3), 0.25).log())
    # Beside a row of draws that differ, which are averaged.
    differing = torch.cat([logits.expand(4, -1, -1), torch.randn(4, 1, 7)], 1)
    beside = token_scores(differing, torch.full((4, 4), 0.25).log())
    p = logits[0].double().softmax(-1)
    torch.testing.assert_close(one.entropy.double(), -(p * p.log()).sum(-1), rtol=1e-6, atol=0)
    for name in ("log_probs", "entropy", "mutual_information", "epkl"):
        torch.testing.assert_close(getattr(many, name), getattr(one, name))
        torch.testing.assert_close(getattr(beside, name)[:3], getattr(one, name))
