"""Checkpoint ensembles and SWAG, against the iterates of plain training, step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from scalabl_pyro import FitConfig, predict
from scalabl_pyro.methods import IVON, MAP, MLE, SWAG, CheckpointEnsemble
from scalabl_pyro.methods.swag import swag_draws

CONFIG = FitConfig(steps=6, batch_size=4, lr=0.01, decay="constant", warmup=0.0)


def after(make_choice, split, steps):
    """Weights of MLE after so many steps, by name."""
    config = FitConfig(steps=steps, batch_size=4, lr=0.01, decay="constant", warmup=0.0)
    fitted = MLE(config, progress=False).fit(make_choice, split, None, seed=0)
    return {name: p.detach() for name, p in fitted.model.adapter.state().items()}


def test_the_members_are_the_iterates_of_plain_training(make_choice, records):
    split = make_choice().readout.encode(records)
    method = CheckpointEnsemble(CONFIG, progress=False, members=3, share=2 / 3)
    fitted = method.fit(make_choice, split, None, seed=0)
    for k, steps in enumerate((2, 4, 6)):
        for name, expected in after(make_choice, split, steps).items():
            torch.testing.assert_close(fitted.predictor.weights[name][k], expected)
    last = MLE(CONFIG, progress=False).fit(make_choice, split, None, seed=0)
    logits = predict(fitted.predictor, split).logits
    torch.testing.assert_close(logits[2], predict(last.predictor, split).logits[0])


@pytest.mark.parametrize("method", [CheckpointEnsemble, SWAG, IVON])
def test_what_a_readout_trains_moves_as_in_plain_training(make_likelihood, records, method):
    """κ is one number, at the guide's rate, and does not decay."""
    split = make_likelihood().readout.encode(records)
    config = replace(CONFIG, lr_guide=0.1, weight_decay=0.5, eps=1e-3)
    if method is IVON:
        config = replace(config, weight_decay=0.0, clip_norm=math.inf)
        fitted = IVON(config, draws=3, progress=False).fit(make_likelihood, split, None, seed=0)
    else:
        own = method(config, members=2, progress=False)
        fitted = own.fit(make_likelihood, split, None, seed=0)
        plain = MAP(config, progress=False).fit(make_likelihood, split, None, seed=0)
        for name, expected in plain.model.adapter.named_parameters().items():
            torch.testing.assert_close(fitted.model.adapter.named_parameters()[name], expected)
    (name,) = (name for name in fitted.predictor.weights if name.endswith("log_kappa"))
    assert fitted.predictor.weights[name].shape == (fitted.predictor.num_draws,)
    assert predict(fitted.predictor, split).logits.isfinite().all()


def test_swag_has_the_moments_of_the_iterates():
    torch.manual_seed(1)
    iterates = torch.randn(4, 3).cumsum(0)
    draws = swag_draws(iterates, 400_000, seed=0)
    columns = [iterates[k] - iterates[: k + 1].mean(0) for k in range(4)]
    covariance = 0.5 * ((iterates**2).mean(0) - iterates.mean(0) ** 2).diag()
    covariance += sum(torch.outer(c, c) for c in columns) / (2 * 3)
    torch.testing.assert_close(draws.mean(0), iterates.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(draws.T.cov(), covariance, atol=0.02, rtol=0.02)


def test_swag_is_about_the_mean_of_plain_training(make_choice, records):
    split = make_choice().readout.encode(records)
    method = SWAG(CONFIG, progress=False, members=2, share=0.5, draws=4000)
    weights = method.fit(make_choice, split, None, seed=0).predictor.weights
    ends = [after(make_choice, split, steps) for steps in (3, 6)]
    for name, draws in weights.items():
        mean = (ends[0][name] + ends[1][name]) / 2
        error = float((ends[0][name] - ends[1][name]).abs().max()) / 30
        torch.testing.assert_close(draws.mean(0), mean, atol=error + 1e-7, rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CheckpointEnsemble(members=1), "members is 1"),
        (lambda: SWAG(share=0.0), "share is 0.0"),
        (lambda: SWAG(draws=0), "draws is 0"),
        (lambda: SWAG(FitConfig(eval_every=1, keep="best")), "keep is 'best'"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_too_few_steps_are_refused(make_choice, records):
    split = make_choice().readout.encode(records)
    with pytest.raises(ValueError, match=r"no 5 different iterates in the last 0\.25 of 6 steps"):
        CheckpointEnsemble(CONFIG, progress=False).fit(make_choice, split, None, seed=0)
