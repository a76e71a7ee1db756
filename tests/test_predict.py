from __future__ import annotations

import arviz as az
import numpy as np
import pytest
import torch
from conftest import make_records, whole

from scalabl_pyro import (
    AutoSubspaceNormal,
    Predictor,
    ScalaBLModel,
    average,
    draw,
    entropy,
    evaluate,
    mutual_information,
    predict,
    to_inference_data,
)
from scalabl_pyro.methods.temperature import best_temperature


def test_chunked_predictions_equal_whole_ones_in_the_order_of_the_records(adapter, split):
    draws = torch.randn(5, *adapter.shape)
    found = predict(Predictor(adapter, draws, max_rows=9), split, batch_size=5)
    expected = adapter(whole(split), draws).detach()
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.labels, split.labels)


def test_the_average_is_of_probabilities_and_stable():
    logits = torch.randn(6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(average(logits).exp(), logits.softmax(-1).mean(0))
    far = torch.tensor([[[0.0, -2000.0]], [[0.0, -1000.0]]])
    assert average(far)[0, 1] == pytest.approx(-1000 - np.log(2))


def test_metrics_against_their_definitions():
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    labels = torch.tensor([0, 1, 1, 0])
    found = evaluate(probs.log()[None], labels)
    assert found["acc"] == pytest.approx(0.75)
    assert found["nll"] == pytest.approx(-np.log([0.8, 0.4, 0.7, 0.9]).mean(), rel=1e-5)
    assert found["brier"] == pytest.approx(
        (2 * np.array([0.2, 0.6, 0.3, 0.1]) ** 2).mean(), rel=1e-5
    )
    # Four bins of one example each: |accuracy − confidence| averages.
    assert found["ece"] == pytest.approx(np.mean([0.2, 0.6, 0.3, 0.1]), rel=1e-5)
    assert found["mutual_information"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("draws", [7, 47, 49])
def test_sure_answers_do_not_round_above_one(draws):
    logits = torch.zeros(draws, 2, 2)
    logits[:, 0, 0] = 200.0
    found = evaluate(logits, torch.tensor([0, 0]))
    assert found["ece"] == pytest.approx(0.25, abs=1e-5)


def test_mutual_information_is_the_disagreement_of_draws():
    sure = torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]])
    assert float(mutual_information(sure)) == pytest.approx(np.log(2), rel=1e-4)
    assert float(entropy(sure)) == pytest.approx(np.log(2), rel=1e-4)
    torch.testing.assert_close(mutual_information(torch.zeros(3, 1, 4)), torch.zeros(1))


def test_temperature_recovers_a_known_scale():
    torch.manual_seed(0)
    logits = torch.randn(20000, 4) * 2
    logits[::2, 3] = float("-inf")
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert best_temperature(logits * 3, labels) == pytest.approx(3.0, rel=0.05)


def test_inference_data_has_named_coordinates_and_true_log_likelihoods(
    make_causal, records, tmp_path
):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    guide = AutoSubspaceNormal(ScalaBLModel(adapter, num_data=len(split)), init_scale=0.3)
    predictor = Predictor(adapter, draw(guide, 4, seed=0))
    data = to_inference_data(predictor, split)
    assert data.posterior["s"].dims == ("chain", "draw", "module", "rank")
    assert list(data.posterior["module"].values) == list(adapter.module_names)
    found = data.log_likelihood["label"]
    assert found.dims == ("chain", "draw", "example")
    assert list(found["example"].values) == [record.id for record in records]
    expected = adapter(whole(split), predictor.draws[2]).log_softmax(-1).detach()
    picked = expected[torch.arange(len(split)), split.labels]
    np.testing.assert_allclose(found.sel(draw=2).values[0], picked, atol=1e-5)
    data.to_netcdf(tmp_path / "posterior.nc")
    again = az.from_netcdf(tmp_path / "posterior.nc")
    np.testing.assert_array_equal(again.posterior["s"], data.posterior["s"])


def test_inference_data_needs_draws_and_labels(make_causal):
    adapter = make_causal()
    with pytest.raises(ValueError, match="point estimate"):
        to_inference_data(Predictor(adapter))
    split = adapter.readout.encode(make_records(3, labelled=False))
    with pytest.raises(ValueError, match="label in every record"):
        to_inference_data(Predictor(adapter, torch.ones(1, *adapter.shape)), split)
