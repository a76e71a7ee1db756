"""What CONTRIBUTING shows how to add works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import hub_copy, keeps_the_contract, run_snippet
from pyro.nn import PyroParam

import scalabl_pyro as sp
import scalabl_pyro.models.model as model_file
from scalabl_pyro import (
    FitConfig,
    Predictor,
    ScalaBLModel,
    draw,
    fit,
    guides,
    predict,
    priors,
    to_inference_data,
)
from scalabl_pyro.data import tasks
from scalabl_pyro.methods import MLE, ScalaBL, temperature
from scalabl_pyro.methods.base import LoRAMethod


def test_the_data_set_of_contributing_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    run_snippet('TASKS["hellaswag"]', vars(tasks))
    row = {"ind": 4, "ctx": "A man sits on a roof. he", "label": "3"}
    row["endings"] = ["is ripping", "pulls up", "is holding", "starts pulling"]
    splits = {"train": [row], "validation": [row | {"label": "0"}]}
    copy = hub_copy(tmp_path / "copy", splits)
    splits_read = tasks.TASKS["hellaswag"].read(str(copy))
    question, choices = row["ctx"], tuple(row["endings"])
    assert splits_read == {
        "train": [sp.Record("train-0", question, choices, 3)],
        "test": [sp.Record("validation-0", question, choices, 0)],
    }


def test_the_guide_of_contributing_keeps_the_contract(make_causal, records, monkeypatch):
    names = dict(vars(guides.base), PyroParam=PyroParam)
    run_snippet("class AutoSubspaceTiedNormal", names)
    monkeypatch.setitem(guides.GUIDES, "tied", names["AutoSubspaceTiedNormal"])
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = guides.make_guide(model, "tied", init_scale=0.25)
    assert sum(p.numel() for p in guide.parameters()) == adapter.shape[0] * (adapter.rank + 1)
    assert draw(guide, 4000, seed=0).std(0).mean() == pytest.approx(0.25, rel=0.02)
    exact = torch.distributions.kl_divergence(guide.get_posterior(), model.prior())
    assert guide.kl(model.prior()) == pytest.approx(exact.item(), rel=1e-4)
    assert draw(guide, 8, seed=0, kind="sobol").shape == (8, *adapter.shape)
    fit(model, guide, split, FitConfig(steps=2), progress=False)


def test_the_guide_of_contributing_that_is_not_normal_keeps_it_too(
    make_causal, records, monkeypatch
):
    names = dict(vars(guides.base), PyroParam=PyroParam)
    run_snippet("class AutoSubspaceStudentT", names)
    monkeypatch.setitem(guides.GUIDES, "student_t", names["AutoSubspaceStudentT"])
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = guides.make_guide(model, "student_t", init_scale=0.25, df=5.0)
    keeps_the_contract(guide, model, init_scale=0.25)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    history = fit(model, guide, split, FitConfig(steps=2), progress=False).history
    assert np.isfinite(history[-1]["kl"])
    assert not [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]
    method = ScalaBL(FitConfig(steps=2), progress=False, guide={"name": "student_t"}, draws=3)
    fitted = method.fit(make_causal, split, None, seed=0)
    assert predict(fitted.predictor, split).logits.shape == (3, len(split), 4)
    with pytest.raises(ValueError, match="no map from normal noise"):
        draw(guide, 8, seed=0, kind="sobol")


def test_the_priors_of_contributing_run(make_causal, records, monkeypatch):
    monkeypatch.setattr(priors, "PRIORS", dict(priors.PRIORS))
    run_snippet("PRIORS[", vars(priors))
    names = dict(vars(priors))
    run_snippet("class SharedScaleNormal", names)
    adapter = make_causal()
    split = adapter.readout.encode(records)
    for prior in (
        priors.make_prior(adapter.shape, "student_t", df=3.0),
        names["SharedScaleNormal"](adapter.shape),
    ):
        model = ScalaBLModel(adapter, num_data=len(split), prior=prior)
        guide = guides.make_guide(model, "multivariate_normal")
        before = {n: p.detach().clone() for n, p in guide.named_parameters()}
        fit(model, guide, split, FitConfig(steps=2), progress=False)
        assert not [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]


def test_the_likelihood_of_contributing_trains(make_causal, records):
    names = dict(vars(model_file))
    run_snippet("class NoisyLabels", names)
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = names["NoisyLabels"](adapter, num_data=len(split))
    guide = guides.make_guide(model)
    fit(model, guide, split, FitConfig(steps=2, batch_size=4), progress=False)
    predictor = Predictor(adapter, draw(guide, 3, seed=0))
    noisy, plain = (
        to_inference_data(predictor, split, model=m).log_likelihood["label"].values
        for m in (model, None)
    )
    np.testing.assert_allclose(noisy, np.log(0.9 * np.exp(plain) + 0.1 / 4), rtol=1e-4)


def test_the_method_of_contributing_fits(make_choice, records):
    names = dict(vars(temperature))
    names |= {"dataclass": dataclass, "LoRAMethod": LoRAMethod, "ClassVar": ClassVar}
    run_snippet("@dataclass", names)
    split = make_choice().readout.encode(records)
    fitted = names["Cool"](FitConfig(steps=2), progress=False).fit(make_choice, split, None, seed=0)
    plain = MLE(FitConfig(steps=2), progress=False).fit(make_choice, split, None, seed=0)
    logits = predict(fitted.predictor, split).logits
    torch.testing.assert_close(2 * logits, predict(plain.predictor, split).logits)
