from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from scalabl_pyro import evaluate
from scalabl_pyro.prediction import (
    auroc,
    auroc_at_equal_length,
    calibration_band,
    ece,
    ece_floor,
    max_probability,
    mutual_information,
    noise_to_signal,
    per_question,
)
from scalabl_pyro.prediction.text_scores import equal_weights, token_scores


def ece_by_hand(rows, labels, bins):
    """Bins [b / bins, (b + 1) / bins), the last one closed, in a loop over numbers."""
    held = {b: [] for b in range(bins)}
    for row, label in zip(rows, labels, strict=True):
        confidence = max(row)
        b = next((b for b in range(bins) if b / bins <= confidence < (b + 1) / bins), bins - 1)
        held[b].append((confidence, row.index(confidence) == label))
    return sum(
        abs(sum(confidence for confidence, _ in cell) - sum(right for _, right in cell))
        for cell in held.values()
    ) / len(rows)


def two(*confidences):
    return [[c, 1 - c] for c in confidences]


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (two(0.95, 1.0), [0, 1]),
        (two(1.0, 1.0, 1.0), [0, 1, 1]),
        (two(0.94, 0.99, 1.0, 1.0, 0.6), [1, 0, 1, 0, 1]),
        (two(0.6, 0.6, 0.6, 0.8, 0.8), [0, 1, 1, 1, 0]),  # ties, on the edges of bins
        (two(0.5, 0.5), [0, 1]),
        ([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]], [0, 2]),
    ],
)
def test_ece_is_that_of_a_loop_over_bins_whose_last_is_closed(rows, labels, bins):
    for dtype in (torch.float64, torch.float32):
        error = ece(torch.tensor(rows, dtype=dtype), torch.tensor(labels), bins)
        assert error == pytest.approx(ece_by_hand(rows, labels, bins), abs=1e-6)


def test_ece_of_many_rows_is_that_of_the_loop():
    torch.manual_seed(0)
    probabilities = (4 * torch.randn(300, 5, dtype=torch.float64)).softmax(-1)
    probabilities[::7] = torch.eye(5, dtype=torch.float64)[torch.arange(43) % 5]
    labels = torch.randint(5, (300,))
    for bins in (15, 50):
        expected = ece_by_hand(probabilities.tolist(), labels.tolist(), bins)
        assert ece(probabilities, labels, bins) == pytest.approx(expected, abs=1e-12)


def test_evaluate_gives_that_ece_for_sure_answers():
    logits = torch.tensor([[0.95, 0.05], [1.0, 0.0]]).log()[None]
    assert evaluate(logits, torch.tensor([0, 1]))["ece"] == pytest.approx(0.475, abs=1e-6)


def absolute_deviation(p, n):
    """E|k/n − p| of k ~ Binomial(n, p), summed over all k."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) * abs(k / n - p) for k in range(n + 1))


@pytest.mark.parametrize(
    "groups", [[(0.7, 20)], [(0.55, 8), (0.95, 12)], [(0.6, 5), (0.75, 9), (1.0, 6)], [(0.99, 1)]]
)
def test_the_floor_is_the_mean_deviation_of_binomials(groups):
    """Confidences of one bin each: the expected ECE is known."""
    rows = two(*(p for p, n in groups for _ in range(n)))
    count = len(rows)
    expected = sum(n / count * absolute_deviation(p, n) for p, n in groups)
    floor = ece_floor(torch.tensor(rows, dtype=torch.float64), draws=20000, seed=1)
    assert floor.mean == pytest.approx(expected, rel=0.03, abs=1e-12)
    assert floor.low <= floor.mean <= floor.high or groups == [(0.99, 1)]


def test_the_floor_holds_the_ece_of_calibrated_models_and_removes_its_bias():
    torch.manual_seed(0)
    probabilities = torch.randn(400, 4).softmax(-1)
    floor = ece_floor(probabilities)
    errors = [ece(probabilities, torch.multinomial(probabilities, 1)[:, 0]) for _ in range(400)]
    inside = [floor.low <= value <= floor.high for value in errors]
    assert sum(inside) / len(inside) == pytest.approx(0.9, abs=0.04)
    assert sum(errors) / len(errors) == pytest.approx(floor.mean, rel=0.03)
    assert ece_floor(probabilities) == floor
    assert ece_floor(probabilities, seed=1) != floor


@pytest.mark.parametrize("groups", [[(0.75, 40)], [(0.55, 30), (0.95, 60)], [(0.7, 8), (1.0, 5)]])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_band_holds_the_quantiles_of_binomials(groups, level):
    """Confidences of one bin each: how many answers are right is binomial."""
    rows = two(*(p for p, n in groups for _ in range(n)))
    probabilities = torch.tensor(rows, dtype=torch.float64)
    low, high = calibration_band(probabilities, bins=10, level=level, draws=20000, seed=1)
    tail, noise = (1 - level) / 2, 0.006
    for p, n in groups:
        b = min(int(10 * p), 9)
        for end, q in ((low, tail), (high, 1 - tail)):
            k = n * float(end[b])
            assert stats.binom.cdf(math.ceil(k - 1e-9), n, p) >= q - noise
            assert stats.binom.cdf(math.floor(k + 1e-9) - 1, n, p) <= q + noise
    used = {min(int(10 * p), 9) for p, _ in groups}
    assert all(low[b].isnan() and high[b].isnan() for b in range(10) if b not in used)


def test_evaluate_gives_the_floor_and_what_tells_wrong_answers():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 60, 4), torch.randint(4, (60,))
    metrics = evaluate(logits, labels)
    probabilities = logits.softmax(-1).mean(0)
    assert metrics["ece_floor"] == pytest.approx(ece_floor(probabilities).mean, abs=1e-6)
    assert metrics["ece_debiased"] == pytest.approx(metrics["ece"] - metrics["ece_floor"])
    wrong = (probabilities.argmax(-1) != labels).tolist()
    scores = (-(probabilities * probabilities.log()).sum(-1)).tolist()
    assert metrics["auroc_entropy"] == pytest.approx(pairs_won(scores, wrong), abs=1e-6)
    sure = probabilities.amax(-1).neg().tolist()
    assert metrics["auroc_max_probability"] == pytest.approx(pairs_won(sure, wrong), abs=1e-6)
    assert evaluate(logits, labels.tolist()) == evaluate(logits, labels.numpy()) == metrics
    assert 0 <= metrics["auroc_mutual_information"] <= 1
    ratios = ratios_in_loops(logits)
    assert metrics["noise_to_signal"] == pytest.approx(np.median(ratios), rel=1e-5)
    assert metrics["auroc_noise_to_signal"] == pytest.approx(pairs_won(ratios, wrong), abs=1e-6)
    one = evaluate(logits[:1], labels)
    assert math.isnan(one["auroc_mutual_information"])
    assert math.isnan(one["auroc_noise_to_signal"])
    assert one["noise_to_signal"] == 0
    right = evaluate(logits, probabilities.argmax(-1))
    assert math.isnan(right["auroc_entropy"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_as_a_model_gives_them_are_measured(dtype):
    logits = torch.randn(2, 20, 3).to(dtype)
    labels = torch.randint(3, (20,))
    found = evaluate(logits.requires_grad_(), labels)
    expected = evaluate(logits.detach().float(), labels)
    assert found == pytest.approx(expected, rel=1e-2)  # ratios are in the type of the logits


def test_probabilities_next_to_one_keep_their_order():
    """As many are of a model that is too sure: 1 − p is below what float32 knows of p."""
    generator = torch.Generator().manual_seed(0)
    gaps = 5 + 25 * torch.rand(400, generator=generator)
    logits = torch.zeros(1, 400, 4)
    logits[0, :, 0] = gaps
    labels = torch.randint(4, (400,), generator=generator).minimum(
        (torch.rand(400, generator=generator) < 0.5).long() * 3
    )
    wrong = labels.numpy() != 0
    unsure = 3 / (np.exp(gaps.double().numpy()) + 3)  # 1 − p of the answer
    assert len(np.unique(np.float32(1 - unsure))) < 350
    expected = pairs_won(unsure.tolist(), wrong.tolist())
    order = np.argsort(unsure)
    aurc = np.mean(np.cumsum(wrong[order]) / np.arange(1, 401))
    metrics = evaluate(logits, labels)
    assert metrics["auroc_max_probability"] == pytest.approx(expected, abs=1e-9)
    assert metrics["auroc_entropy"] == pytest.approx(expected, abs=1e-4)
    assert metrics["aurc"] == pytest.approx(aurc, abs=1e-9)
    for name, values in per_question(logits, labels).items():
        assert float(values.mean()) == pytest.approx(metrics[name], abs=1e-9), name


def pairs_won(scores, positive):
    """The share of pairs that the positive example wins; a draw is half a win."""
    high = [s for s, p in zip(scores, positive, strict=True) if p]
    low = [s for s, p in zip(scores, positive, strict=True) if not p]
    return sum((a > b) + (a == b) / 2 for a in high for b in low) / (len(high) * len(low))


@pytest.mark.parametrize(
    ("scores", "positive"),
    [
        ([-3.0, -1.0, -2.0, -0.5], [0, 1, 0, 1]),
        ([-3.0, -1.0, -2.0, -0.5, -2.0], [1, 0, 0, 1, 1]),
        ([0.0, 0.0, 0.0], [1, 0, 1]),
        ([5.0, -5.0, 1e30, 1e-30], [0, 1, 1, 0]),
        ([float("inf"), 1.0, float("-inf")], [1, 0, 0]),
        ([1.0, 2.0, 2.0, 3.0, 2.0], [0, 1, 0, 1, 1]),
    ],
)
def test_auroc_is_the_share_of_pairs_in_order(scores, positive):
    area = auroc(torch.tensor(scores), torch.tensor(positive).bool())
    assert area == pytest.approx(pairs_won(scores, positive), abs=1e-12)


@pytest.mark.parametrize("positive", [[0, 0, 0], [1, 1, 1]])
def test_auroc_of_one_class_is_no_number(positive):
    assert math.isnan(auroc(torch.tensor([0.1, 0.5, 0.3]), torch.tensor(positive).bool()))


def ratios_in_loops(logits):
    """Noise to signal with P, f̄ and Σ_f written out, of the choices that exist."""
    ratios = []
    for n in range(logits.shape[1]):
        f = logits[:, n][:, logits[0, n].isfinite()].double()
        C = f.shape[1]
        P = torch.eye(C).double() - torch.ones(C, C).double() / C
        mean = f.mean(0)
        covariance = sum(torch.outer(x - mean, x - mean) for x in f) / len(f)
        ratios.append(float(torch.trace(P @ covariance @ P) / (P @ mean).square().sum()))
    return ratios


def test_noise_to_signal_is_that_of_its_formula():
    logits = (torch.randn(7, 20, 4) + 2 * torch.randn(20, 4)).double()
    logits[:, ::3, 3] = float("-inf")
    logits[:, ::6, 2] = float("-inf")
    ratios = noise_to_signal(logits)
    torch.testing.assert_close(ratios, torch.tensor(ratios_in_loops(logits)).double())
    # A number that all choices share, and the size of all logits, do not matter.
    torch.testing.assert_close(noise_to_signal(3 * logits + torch.randn(7, 20, 1)), ratios)
    # Draws that are repeated leave it as it is.
    torch.testing.assert_close(noise_to_signal(logits.repeat(2, 1, 1)), ratios)


def test_noise_to_signal_of_one_draw_and_of_no_contrast():
    assert noise_to_signal(torch.randn(1, 3, 4)).tolist() == [0, 0, 0]
    assert noise_to_signal(torch.zeros(2, 3, 4)).tolist() == [0, 0, 0]
    opposite = torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]])
    assert noise_to_signal(opposite).tolist() == [math.inf]


def test_max_probability_is_that_of_the_average():
    logits = torch.tensor([[[0.0, 0.0]], [[math.log(3), 0.0]]])
    assert float(max_probability(logits)) == pytest.approx((0.5 + 0.75) / 2)


def matched_in_loops(scores, positive, lengths, apart):
    won, pairs = 0.0, 0
    for s, p, length in zip(scores, positive, lengths, strict=True):
        for other, q, their_length in zip(scores, positive, lengths, strict=True):
            if p and not q and abs(length - their_length) <= apart:
                won += (s > other) + (s == other) / 2
                pairs += 1
    return won / pairs if pairs else math.nan


@pytest.mark.parametrize("apart", [0, 1, 2, 50])
def test_auroc_at_equal_length_is_the_share_of_pairs_that_are_alike(apart):
    generator = torch.Generator().manual_seed(apart)
    lengths = torch.randint(5, 20, (80,), generator=generator)
    positive = torch.rand(80, generator=generator) < lengths / 25
    scores = (lengths + 4 * torch.randn(80, generator=generator)).round()  # with ties
    area = auroc_at_equal_length(scores, positive, lengths, apart=apart)
    expected = matched_in_loops(scores.tolist(), positive.tolist(), lengths.tolist(), apart)
    assert area == pytest.approx(expected, abs=1e-12)
    if apart == 50:
        assert area == pytest.approx(auroc(scores, positive), abs=1e-12)


def test_what_length_alone_explains_is_gone_at_equal_length():
    lengths = torch.arange(4000) % 60
    positive = torch.rand(4000) < lengths / 60
    score = lengths + torch.rand(4000)
    assert auroc(score, positive) > 0.75
    assert auroc_at_equal_length(score, positive, lengths, apart=0) == pytest.approx(0.5, abs=0.03)


def test_auroc_at_equal_length_without_pairs_and_with_bad_input():
    numbers = torch.tensor([1.0, 2.0])
    assert math.isnan(auroc_at_equal_length(numbers, torch.tensor([True, False]), 10 * numbers))
    assert math.isnan(auroc_at_equal_length(numbers, torch.tensor([True, True]), numbers))
    with pytest.raises(ValueError, match=r"lengths has shape \(3,\): expected \(N,\) each"):
        auroc_at_equal_length(numbers, torch.tensor([True, False]), torch.zeros(3))
    with pytest.raises(ValueError, match="scores holds nan at 0"):
        auroc_at_equal_length(numbers * math.nan, torch.tensor([True, False]), numbers)


def test_mutual_information_of_draws_that_hardly_differ():
    """Against float64 by NumPy, and no score at all of draws that are the same."""
    torch.manual_seed(0)
    f = 2 * torch.randn(1, 500, 4)
    labels = torch.distributions.Categorical(logits=f[0]).sample()
    assert evaluate(f.repeat(10, 1, 1), labels)["auroc_mutual_information"] == 0.5
    assert not mutual_information(f.repeat(10, 1, 1)).any()
    logits = f + 1e-3 * torch.randn(10, 500, 4)
    p = np.exp(logits.numpy().astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    expected = -(mean * np.log(mean)).sum(-1) + (p * np.log(p)).sum(-1).mean(0)
    assert 0 < expected.mean() < 1e-6
    np.testing.assert_allclose(mutual_information(logits).numpy(), expected, rtol=1e-5, atol=1e-13)
    scores = token_scores(logits, equal_weights(logits[..., 0]))
    np.testing.assert_allclose(scores.mutual_information.numpy(), expected, rtol=1e-5, atol=1e-13)
    same = token_scores(f.repeat(10, 1, 1), equal_weights(logits[..., 0]))
    assert not same.mutual_information.any()
    assert not same.epkl.any()
