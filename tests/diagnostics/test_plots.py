"""What the pictures show, read back from matplotlib's own objects."""

from __future__ import annotations

from collections.abc import Iterator

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from scalabl_pyro import Predictions, Predictor
from scalabl_pyro.commands._plots import plot_comparison, plot_reliability, save_figure
from scalabl_pyro.diagnostics.inference_data import to_inference_data
from scalabl_pyro.diagnostics.plots import (
    plot_correlation,
    plot_forest,
    plot_history,
    plot_prior_posterior,
    plot_signal_to_noise,
)

LLAMA = [f"model.layers.{i}.self_attn.{k}" for i in range(28) for k in ("q_proj", "v_proj")]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def axis() -> Axes:
    return plt.subplots()[1]


def posterior(names: list[str], *, rank: int = 8, num_draws: int = 50) -> az.InferenceData:
    """Coordinate j of module m: mean m + 1, standard deviation j + 1."""
    noise = np.random.default_rng(0).normal(size=(num_draws, len(names), rank))
    noise = (noise - noise.mean(0)) / noise.std(0, ddof=1)
    s = np.arange(1, len(names) + 1)[:, None] + noise * np.arange(1, rank + 1)
    return az.from_dict(
        posterior={"s": s[None]},
        prior={"s": noise[None]},
        coords={"module": names, "rank": range(rank)},
        dims={"s": ["module", "rank"]},
    )


@pytest.mark.parametrize("names", [LLAMA[:4], [*LLAMA, "lm_head"]], ids=["few", "many"])
def test_forest_has_a_row_for_every_module(names):
    data = posterior(names)
    figure = plot_forest(data)
    labels = [label.get_text() for axis in figure.axes for label in axis.get_yticklabels()]
    assert labels == [
        name if "." not in name else f"{name.split('.')[2]} {name.split('.')[-1]}" for name in names
    ]
    segments = [
        line for axis in figure.axes for lines in axis.collections for line in lines.get_segments()
    ]
    low, high = np.quantile(data.posterior["s"][0], [0.05, 0.95], axis=0)
    assert len(segments) == 8 * len(names)
    np.testing.assert_allclose([line[0, 0] for line in segments], low.ravel())
    np.testing.assert_allclose([line[1, 0] for line in segments], high.ravel())


def test_labels_of_modules_are_as_long_as_they_need_to_be():
    tails = ["attention.self.query", "attention.output.dense", "output.dense"]
    figure = plot_forest(posterior([f"bert.encoder.layer.0.{tail}" for tail in tails], rank=1))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"0 {tail}" for tail in tails]


def test_signal_to_noise_by_depth_and_kind(axis):
    plot_signal_to_noise(posterior([*LLAMA, "lm_head"]), ax=axis)
    lines = {line.get_label(): line for line in axis.lines}
    median = np.median(1 / np.arange(1, 9))
    np.testing.assert_allclose(lines["q_proj"].get_ydata(), median * np.arange(1, 57, 2))
    np.testing.assert_allclose(lines["v_proj"].get_ydata(), median * np.arange(2, 57, 2))
    np.testing.assert_allclose(lines["lm_head"].get_ydata(), median * 57)
    assert np.array_equal(lines["q_proj"].get_xdata().round(), np.arange(28))
    assert lines["lm_head"].get_xdata() > 27.5
    assert axis.get_xticklabels()[-1].get_text() == "lm_head"


@pytest.mark.parametrize(
    ("names", "ticks"),
    [(LLAMA[40:44], ["20", "21"]), (["lm_head"], ["lm_head"])],
    ids=["top blocks", "head"],
)
def test_signal_to_noise_of_some_modules_shows_no_others(axis, names, ticks):
    plot_signal_to_noise(posterior(names), ax=axis)
    assert plot_signal_to_noise(posterior(names)) is not axis
    assert [label.get_text() for label in axis.get_xticklabels()] == ticks


def test_correlation_is_that_of_the_draws_without_its_diagonal(axis):
    data = posterior(LLAMA[:3], rank=2)
    s = data.posterior["s"].values
    s[..., 1, 0] = -s[..., 0, 0]
    assert plot_correlation(data, ax=axis) is axis
    correlations = axis.images[0].get_array().filled(np.nan)
    assert correlations.shape == (6, 6)
    assert correlations[0, 2] == correlations[2, 0] == pytest.approx(-1)
    assert np.isnan(correlations.diagonal()).all()
    assert abs(correlations[0, 1]) < 0.6
    assert axis.images[0].get_clim() == (-1, 1)
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "0 q_proj",
        "0 v_proj",
        "1 q_proj",
    ]


def test_history_is_drawn_and_must_be_there(make_causal):
    adapter = make_causal()
    predictor = Predictor(adapter, torch.ones(2, *adapter.shape))
    history = [
        {"step": i, "loss": 2.0 / i, "nll": 1.0 / i, "kl": 5.0, "kl_weight": min(1.0, i / 10)}
        for i in range(1, 41)
    ]
    history[19]["validation_nll"] = 1.5
    figure = plot_history(to_inference_data(predictor, history=history))
    raw = [axis.lines[0].get_ydata() for axis in figure.axes]
    for name, values in zip(("loss", "nll", "kl", "kl_weight"), raw, strict=True):
        np.testing.assert_allclose(values, [row[name] for row in history])
    np.testing.assert_allclose(figure.axes[1].lines[2].get_ydata()[19], 1.5)
    with pytest.raises(ValueError, match="no history in the data"):
        plot_history(to_inference_data(predictor))


def test_prior_against_posterior_of_chosen_modules():
    data = posterior([*LLAMA, "lm_head"])
    figure = plot_prior_posterior(data, ["lm_head", LLAMA[3]])
    assert [axis.get_title() for axis in figure.axes] == ["lm_head", "1 v_proj"]
    first = figure.axes[0].lines
    assert len(first) == 8
    grid, density = first[0].get_data()
    assert density.max() == 1
    assert grid[density.argmax()] == pytest.approx(57, abs=1)
    assert len(plot_prior_posterior(data).axes) == 6
    with pytest.raises(ValueError, match="no module 'q_proj'"):
        plot_prior_posterior(data, ["q_proj"])
    del data.prior
    with pytest.raises(ValueError, match="no prior in the data"):
        plot_prior_posterior(data)


def test_reliability_bars_are_the_accuracy_of_their_bin(axis):
    probs = torch.tensor([[0.55, 0.45], [0.55, 0.45], [0.05, 0.95]])
    plot_reliability(axis, [Predictions(probs.log()[None], torch.tensor([0, 1, 1]))])
    bars = {round(bar.get_x() + bar.get_width() / 2, 3): bar.get_height() for bar in axis.patches}
    assert bars == {0.55: 0.5, 0.95: 1.0}


def test_pictures_are_written_whole(tmp_path):
    predictions = Predictions(torch.randn(2, 5, 3), torch.tensor([0, 1, 2, 0, 1]))
    path = tmp_path / "new" / "comparison.png"
    plot_comparison(
        {"mle": [{"test": predictions, "validation": predictions, "ood": predictions}]}, path
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    save_figure(plt.figure(), path)
    assert [p.name for p in path.parent.iterdir()] == ["comparison.png"]
    assert not plt.get_fignums()


def test_one_coordinate_correlates_with_nothing(axis):
    plot_correlation(posterior(LLAMA[:1], rank=1), ax=axis)
    assert axis.images[0].get_array().shape == (1, 1)
