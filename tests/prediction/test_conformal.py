"""Conformal sets: loops by hand, and coverage in simulations against its known distribution."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from scalabl_pyro.prediction import (
    CONFORMAL_SCORES,
    average,
    conformal_sets,
    conformal_threshold,
    uniform_of,
)
from scalabl_pyro.prediction.conformal import aps, lac, raps

INF = math.inf


def by_hand(row, u, *, penalty=0.0, free=0):
    """Scores of one question's probabilities; None is a choice that does not exist."""
    there = [(p, c) for c, p in enumerate(row) if p is not None]
    ranked = sorted(there, key=lambda pair: (-pair[0], pair[1]))
    scores, above = [INF] * len(row), 0.0
    for rank, (p, c) in enumerate(ranked, start=1):
        scores[c] = above + u * p + penalty * max(0, rank - free)
        above += p
    return scores


ROWS = [
    [0.5, 0.3, 0.2],
    [0.2, 0.3, 0.5],
    [0.4, 0.4, 0.2],  # equal: the earlier first
    [0.1, 0.9, None],
    [1.0, 0.0, 0.0],
]
U = [0.3, 0.0, 0.9, 0.5, 0.25]


def table(rows):
    return torch.tensor([[0.0 if p is None else p for p in row] for row in rows]).double().log()


def log_probs():
    """Zero probability is no missing choice: the last row's are merely tiny."""
    log_p = table(ROWS)
    log_p[4] = torch.tensor([0.0, -800.0, -801.0])
    return log_p


def test_scores_are_those_of_a_loop():
    uniform = torch.tensor(U, dtype=torch.float64)
    for row, u, one, two in zip(
        ROWS,
        U,
        aps(log_probs(), uniform).tolist(),
        raps(log_probs(), uniform, penalty=0.2, free=2).tolist(),
        strict=True,
    ):
        assert one == pytest.approx(by_hand(row, u))
        assert two == pytest.approx(by_hand(row, u, penalty=0.2, free=2))
    for row, scores in zip(ROWS, lac(log_probs(), uniform).tolist(), strict=True):
        assert scores == pytest.approx([INF if p is None else 1 - p for p in row])


@pytest.mark.parametrize("name", CONFORMAL_SCORES)
def test_a_choice_that_does_not_exist_is_in_no_set(name):
    """Also where the threshold lets all others in, tiny ones too."""
    logits = torch.randn(2, 40, 5)
    logits[:, ::3, 3:] = -INF
    logits[:, 1::3, 1] = -2000.0
    scores = CONFORMAL_SCORES[name](average(logits), uniform_of(map(str, range(40))))
    there = ~logits[0].isneginf()
    assert torch.equal(conformal_sets(scores, 1e9), there)
    assert not (conformal_sets(scores, 0.5) & ~there).any()


def test_the_threshold_is_an_order_statistic():
    """Of n = 19, 90 % takes the ⌈20 · 0.9⌉ = 18th smallest; of 9 the largest."""
    for n, coverage, k in ((19, 0.9, 18), (9, 0.9, 9), (99, 0.07, 7), (10, 0.9, 10), (1, 0.5, 1)):
        scores = torch.rand(n, 4, dtype=torch.float64)
        labels = torch.arange(n) % 4
        right = sorted(scores[i, i % 4].item() for i in range(n))
        assert conformal_threshold(scores, labels, coverage) == right[k - 1]


@pytest.mark.parametrize(
    ("n", "coverage", "needed"), [(8, 0.9, 9), (18, 0.95, 19), (98, 0.99, 99), (3, 0.8, 4)]
)
def test_too_few_examples_are_refused(n, coverage, needed):
    scores = torch.rand(n, 3)
    message = rf"coverage is {coverage}, which takes {needed} .*, and there are {n}"
    with pytest.raises(ValueError, match=message):
        conformal_threshold(scores, torch.zeros(n).long(), coverage)
    more = torch.rand(needed, 3)
    assert conformal_threshold(more, torch.zeros(needed).long(), coverage) == more[:, 0].max()


def questions(count, generator):
    """Questions of 3 to 5 choices whose labels follow quite other probabilities than are told."""
    logits = 2 * torch.randn(count, 5, generator=generator, dtype=torch.float64)
    missing = torch.arange(5) >= torch.randint(3, 6, (count, 1), generator=generator)
    logits = logits.masked_fill(missing, -INF)
    truth = (0.3 * logits + 0.5 * torch.arange(5).flip(0)).softmax(-1)
    return logits.log_softmax(-1), torch.multinomial(truth, 1, generator=generator)[:, 0]


@pytest.mark.parametrize("name", CONFORMAL_SCORES)
@pytest.mark.parametrize(("n", "coverage"), [(200, 0.9), (57, 0.8)])
def test_sets_cover_as_often_as_is_known(name, n, coverage):
    """Of m new questions a set misses few: BetaBinomial(m, k, n + 1 − k), for any probabilities."""
    generator = torch.Generator().manual_seed(7)
    m, splits, k = 1000, 20, math.ceil(round((n + 1) * coverage, 9))
    exact = stats.betabinom(m, k, n + 1 - k)
    coverages = []
    for _ in range(splits):
        told, labels = questions(n + m, generator)
        uniform = torch.rand(n + m, generator=generator, dtype=torch.float64)
        scores = CONFORMAL_SCORES[name](told, uniform)
        threshold = conformal_threshold(scores[:n], labels[:n], coverage)
        sets = conformal_sets(scores[n:], threshold)
        hits = int(sets.gather(-1, labels[n:, None]).sum())
        # Twenty splits, each two-sided: together they leave with probability 0.01.
        assert exact.ppf(0.01 / splits / 2) <= hits <= exact.ppf(1 - 0.01 / splits / 2)
        coverages.append(hits / m)
    mean, error = stats.tmean(coverages), stats.sem(coverages)
    assert coverage - 2 * error <= mean <= coverage + 1 / (n + 1) + 2 * error


def test_sets_from_probabilities_that_are_right_are_small():
    """LAC at the coverage of the first choice gives about one choice each."""
    generator = torch.Generator().manual_seed(3)
    log_p = torch.tensor([0.9, 0.06, 0.04]).double().log().expand(4000, 3)
    log_p = log_p + 1e-6 * torch.rand(4000, 3, generator=generator, dtype=torch.float64) - 1e-6
    labels = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
    scores = lac(log_p, torch.zeros(4000))
    threshold = conformal_threshold(scores[:2000], labels[:2000], 0.85)
    assert conformal_sets(scores[2000:], threshold).sum(-1).max() == 1


def test_the_number_of_a_name_is_always_the_same_and_uniform():
    names = [f"q{i}" for i in range(2000)]
    numbers = uniform_of(names)
    assert torch.equal(uniform_of(names[::-1]).flip(0), numbers)
    assert not torch.equal(uniform_of(names, seed=1), numbers)
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformal_threshold(torch.rand(9, 2), torch.zeros(9).long(), 1.0), "is 1.0"),
        (lambda: conformal_threshold(torch.rand(9, 2), torch.ones(9), 0.5), "9 whole numbers"),
        (
            lambda: conformal_threshold(torch.full((9, 2), INF), torch.zeros(9).long(), 0.5),
            "labels holds 0 at 0, where that choice does not exist",
        ),
        (lambda: lac(torch.rand(2, 3), torch.rand(2)), "expected log-probabilities"),
        (lambda: aps(torch.rand(1, 2, 3).log(), torch.rand(2)), "expected log-probabilities"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
