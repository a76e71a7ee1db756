from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from conftest import lora, make_records, tiny_llama, whole
from scipy import stats
from scipy.optimize import minimize_scalar

from scalabl_pyro import Predictor, SubspaceAdapter, entropy, evaluate, mutual_information, predict
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.methods.temperature import best_temperature
from scalabl_pyro.prediction import NonFinitePredictionsError, average
from scalabl_pyro.prediction.metrics import half_width
from scalabl_pyro.prediction.predictor import predict_proba
from scalabl_pyro.readouts import LabelTokens


def test_chunked_predictions_equal_whole_ones_in_the_order_of_the_records(adapter, split):
    draws = torch.randn(5, *adapter.shape)
    predictions = predict(Predictor(adapter, draws, max_rows=9), split, batch_size=5)
    expected = adapter(whole(split), draws).detach()
    torch.testing.assert_close(predictions.logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(predictions.labels, split.labels)


def test_a_temperature_divides_the_logits_of_merged_weights(make_causal, records):
    adapter = make_causal()
    tokenizer, ids = adapter.readout.tokenizer, adapter.readout.label_ids
    draws = torch.randn(2, *adapter.shape)
    answers = predict(Predictor(adapter, draws, temperature=3.0), records).logits
    for s, logits in zip(draws, answers, strict=True):
        llm = tiny_llama()
        with torch.no_grad():
            for (name, layer), s_m in zip(adapter.layers.items(), s, strict=True):
                A, B = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
                llm.get_submodule(name).weight += 8 / 4 * B @ s_m.diag() @ A
            for record, found in zip(records, logits, strict=True):
                prompt = tokenizer(adapter.readout.prompt.render(record), return_tensors="pt")
                expected = llm(prompt.input_ids).logits[0, -1, ids] / 3
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_records_are_predicted_as_their_split_is(adapter, split, records):
    predictor = Predictor(adapter, torch.randn(5, *adapter.shape))
    predictions, expected = predict(predictor, records), predict(predictor, split)
    assert torch.equal(predictions.logits, expected.logits)
    assert torch.equal(predictions.labels, split.labels)
    assert torch.equal(predictions.probabilities, average(expected.logits).exp())
    assert torch.equal(predictions.entropy, entropy(expected.logits))
    assert torch.equal(predictions.mutual_information, mutual_information(expected.logits))


def test_probabilities_of_records_without_labels(make_choice):
    adapter = make_choice()
    records = make_records(5, choices=3, labelled=False)
    predictor = Predictor(adapter, torch.randn(4, *adapter.shape))
    probabilities = predict_proba(predictor, records, batch_size=2)
    expected = adapter(whole(adapter.readout.encode(records)), predictor.draws).softmax(-1).mean(0)
    torch.testing.assert_close(probabilities, expected.detach(), atol=1e-6, rtol=1e-6)
    assert (probabilities[:, 3] == 0).all()


def test_the_average_is_of_probabilities_and_stable():
    logits = torch.randn(6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(average(logits).exp(), logits.softmax(-1).mean(0))
    far = torch.tensor([[[0.0, -2000.0]], [[0.0, -1000.0]]])
    assert average(far)[0, 1] == pytest.approx(-1000 - np.log(2))


def test_metrics_against_their_definitions():
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    labels = torch.tensor([0, 1, 1, 0])
    metrics = evaluate(probs.log()[None], labels)
    assert metrics["acc"] == pytest.approx(0.75)
    assert metrics["nll"] == pytest.approx(-np.log([0.8, 0.4, 0.7, 0.9]).mean(), rel=1e-5)
    assert metrics["brier"] == pytest.approx(
        (2 * np.array([0.2, 0.6, 0.3, 0.1]) ** 2).mean(), rel=1e-5
    )
    # Four bins of one example each: |accuracy − confidence| averages.
    assert metrics["ece"] == pytest.approx(np.mean([0.2, 0.6, 0.3, 0.1]), rel=1e-5)
    assert metrics["mutual_information"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("draws", [7, 47, 49])
def test_sure_answers_do_not_round_above_one(draws):
    logits = torch.zeros(draws, 2, 2)
    logits[:, 0, 0] = 200.0
    assert (average(logits) <= 0).all()
    for _ in range(20):  # of most weights the sum is a little more or less than 1
        weights = torch.randn(draws, 2).log_softmax(0)
        assert (average(logits, weights) <= 0).all()
    metrics = evaluate(logits, torch.tensor([0, 0]))
    assert metrics["ece"] == pytest.approx(0.25, abs=1e-5)


def test_mutual_information_is_the_disagreement_of_draws():
    sure = torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]])
    assert float(mutual_information(sure)) == pytest.approx(np.log(2), rel=1e-4)
    assert float(entropy(sure)) == pytest.approx(np.log(2), rel=1e-4)
    torch.testing.assert_close(mutual_information(torch.zeros(3, 1, 4)), torch.zeros(1).double())


def test_temperature_recovers_a_known_scale():
    torch.manual_seed(0)
    logits = torch.randn(20000, 4) * 2
    logits[::2, 3] = float("-inf")
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert best_temperature(logits * 3, labels) == pytest.approx(3.0, rel=0.05)


def test_a_temperature_is_the_minimum_of_scipy_and_bounded_where_there_is_none(caplog):
    logits = torch.randn(300, 4).double()
    labels = torch.distributions.Categorical(logits=0.4 * logits).sample()
    nll = lambda t: float(torch.nn.functional.cross_entropy(logits / t, labels))  # noqa: E731
    expected = minimize_scalar(nll, bounds=(0.01, 100), method="bounded").x
    assert best_temperature(logits, labels) == pytest.approx(expected, rel=1e-3)
    assert not caplog.records
    caplog.set_level("INFO")
    spread = float(logits.std(-1, unbiased=False).mean())
    for right, bound in ((logits.argmax(-1), spread / 100), (logits.argmin(-1), 10 * spread)):
        assert best_temperature(logits, right) == pytest.approx(bound, rel=1e-3)
        assert "the bound, which says little about others" in caplog.text
        caplog.clear()


def test_half_width_covers_the_mean_of_independent_draws():
    torch.manual_seed(0)
    p = torch.rand(8, 4000)  # S draws of a probability whose mean is one half
    logits = torch.stack([p.log(), (1 - p).log()], -1)
    covered = (p.mean(0) - 0.5).abs() <= half_width(logits)
    assert float(covered.float().mean()) == pytest.approx(0.95, abs=0.015)


def half_widths_by_hand(logits):
    """Of each example, for the class with the widest of Student's intervals."""
    S = len(logits)
    spread = np.std(logits.softmax(-1).double().numpy(), axis=0, ddof=1).max(-1)
    return stats.t.ppf(0.975, S - 1) * spread / S**0.5


@pytest.mark.parametrize("tolerance", [1e-9, "middle", 1.0])
def test_settled_examples_take_fewer_draws(adapter, split, tolerance):
    torch.manual_seed(0)
    # At another scale of s, some examples are sure and some are not.
    draws = adapter.init_loc * (1 + 0.3 * torch.randn(12, *adapter.shape))
    every = predict(Predictor(adapter, draws), split).logits
    widths = {stop: half_widths_by_hand(every[:stop]) for stop in (4, 6, 12)}
    if tolerance == "middle":
        tolerance = float(np.sort(widths[4])[5:7].mean())
    predictions = predict(
        Predictor(adapter, draws, max_rows=9), split, batch_size=5, tolerance=tolerance
    )
    expected = [
        next((stop for stop in (4, 6) if widths[stop][n] <= tolerance), 12)
        for n in range(len(split))
    ]
    assert predictions.used.tolist() == expected
    if 1e-9 < tolerance < 1.0:
        assert expected.count(4) == 6
    for n, used in enumerate(expected):
        torch.testing.assert_close(
            average(predictions.logits[:, n : n + 1]),
            average(every[:used, n : n + 1]),
            atol=1e-5,
            rtol=1e-5,
        )
    torch.testing.assert_close(
        mutual_information(predictions.logits)[predictions.used == 12],
        mutual_information(every)[predictions.used == 12],
        atol=1e-5,
        rtol=1e-4,
    )
    if tolerance == 1e-9:
        torch.testing.assert_close(predictions.logits, every, atol=1e-5, rtol=1e-5)
    if tolerance == 1.0:
        assert (predictions.used == 4).all()


def test_half_width_is_that_of_students_interval():
    logits = 2 * torch.randn(4, 30, 3)
    expected = torch.from_numpy(half_widths_by_hand(logits)).float()
    torch.testing.assert_close(half_width(logits), expected)


def test_a_tolerance_needs_draws_and_a_positive_number(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    for draws in (None, torch.ones(1, *adapter.shape)):
        with pytest.raises(ValueError, match="a predictor with several draws"):
            predict(Predictor(adapter, draws), split, tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance is 0"):
        predict(Predictor(adapter, torch.ones(4, *adapter.shape)), split, tolerance=0)


class SmallMemory:
    """An adapter that runs out of memory above so many draws at once."""

    def __init__(self, adapter, most: int) -> None:
        self.adapter, self.most, self.sizes = adapter, most, []

    def __getattr__(self, name: str):
        return getattr(self.adapter, name)

    def above_trunk(self, batch, s):
        return partial(self, batch)

    def __call__(self, batch, s):
        self.sizes.append(len(s))
        if len(s) > self.most:
            raise torch.OutOfMemoryError("too many rows")
        return self.adapter(batch, s)


def test_out_of_memory_halves_the_chunk_and_goes_on(make_causal, records, caplog):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    draws = torch.randn(10, *adapter.shape)
    small = SmallMemory(adapter, most=3)
    predictions = predict(Predictor(small, draws), split, batch_size=6)
    expected = predict(Predictor(adapter, draws), split, batch_size=6)
    torch.testing.assert_close(predictions.logits, expected.logits, atol=1e-6, rtol=1e-6)
    assert small.sizes == [10, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]  # and remembered
    assert "10 draws of a batch of 6 rows" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        predict(Predictor(SmallMemory(adapter, most=0), draws), split)


def test_a_pass_on_a_cpu_holds_as_many_rows_as_fit_its_cache(make_causal):
    adapter = make_causal()
    predictor = Predictor(adapter, torch.ones(2, *adapter.shape))
    assert [predictor.most_rows(tokens) for tokens in (1, 16, 64, 5000)] == [256, 256, 64, 0]
    predictor.max_rows = 300
    assert predictor.most_rows(64) == 300


def test_shapes_that_hold_no_draws_are_named(adapter):
    with pytest.raises(ValueError, match=r"draws has shape .*: expected \(S, M, r\)"):
        Predictor(adapter, torch.ones(adapter.shape))
    for measure in (average, entropy, mutual_information):
        with pytest.raises(ValueError, match=r"logits has shape \(5, 4\): expected \(S, N, C\)"):
            measure(torch.zeros(5, 4))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_divides_by_nothing_is_refused(make_causal, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}: expected a finite"):
        Predictor(make_causal(), temperature=temperature)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_draws_that_are_not_finite_are_refused_by_number(make_causal, bad):
    adapter = make_causal()
    draws = torch.ones(4, *adapter.shape)
    draws[2, 0, 1] = bad
    with pytest.raises(ValueError, match="in 1 of 4 draws, the first of which is 2"):
        Predictor(adapter, draws)


@pytest.mark.parametrize("tolerance", [None, 0.1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_weights_that_are_not_finite_predict_nothing(adapter, split, tolerance, value):
    """The last one overflows on the way."""
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            if ".lora_B." in name:
                parameter.fill_(value)
    predictor = Predictor(adapter, torch.full((4, *adapter.shape), 1e30))
    with pytest.raises(NonFinitePredictionsError, match=r"record 'q\d+': .*for choice \d at draw"):
        predict(predictor, split, tolerance=tolerance)


def test_a_float16_base_that_overflows_is_named(tokenizer, records):
    llm = tiny_llama().half()
    torch.nn.init.constant_(llm.lm_head.weight, 6e4)
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    adapter = SubspaceAdapter(llm, lora("q_proj"), readout)
    with pytest.raises(ValueError, match="float16, which ends at 65,504"):
        predict(Predictor(adapter), readout.encode(records))


@pytest.mark.parametrize("measure", [average, entropy, mutual_information, half_width])
@pytest.mark.parametrize(
    "row", [[float("nan"), 0.0], [float("inf"), 0.0], [float("-inf"), float("-inf")]]
)
def test_measures_of_no_numbers_are_refused(measure, row):
    logits = torch.zeros(3, 4, 2)
    logits[1, 2] = torch.tensor(row)
    with pytest.raises(ValueError, match=r"the logits of example 2 hold NaN or infinity"):
        measure(logits)


def test_missing_choices_are_no_fault(make_choice):
    adapter = make_choice()
    split = adapter.readout.encode(make_records(4, choices=3))
    predictions = predict(Predictor(adapter, torch.ones(2, *adapter.shape)), split)
    assert (predictions.logits[..., 3] == float("-inf")).all()
    assert evaluate(predictions.logits, predictions.labels)["nll"] > 0
