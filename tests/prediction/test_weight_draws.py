from __future__ import annotations

import pytest
import torch
from conftest import whole

from scalabl_pyro import FitConfig, fit, predict
from scalabl_pyro.infer.checkpoints import CheckpointConfig, Checkpoints
from scalabl_pyro.methods import MAP, MLE, Ensemble, MCDropout, base
from scalabl_pyro.prediction.weight_draws import WeightAverage

CONFIG = FitConfig(steps=3, batch_size=4, lr=0.01)


def test_each_draw_is_the_adapter_with_these_weights(make_causal, records):
    adapter = make_causal(svd=False)
    batch = whole(adapter.readout.encode(records))
    stored = adapter.state()
    before = {name: p.detach().clone() for name, p in stored.items()}
    name = next(name for name in stored if ".lora_A." in name)
    draws = torch.randn(3, *stored[name].shape)
    logits = WeightAverage(adapter, {name: draws}).logits(batch)
    assert logits.shape == (3, len(records), 4)
    assert all(torch.equal(stored[n], before[n]) for n in stored)
    for k in range(3):
        with torch.no_grad():
            stored[name].copy_(draws[k])
            assert torch.equal(logits[k], adapter(batch))


def test_weights_come_back_where_a_pass_fails(make_causal):
    adapter = make_causal(svd=False)
    name, parameter = next(iter(adapter.state().items()))
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError), adapter.holding({name: parameter + 1}):
        raise RuntimeError
    assert torch.equal(parameter, before)


def test_draws_of_other_weights_are_refused(make_causal):
    adapter = make_causal(svd=False)
    name, parameter = next(iter(adapter.state().items()))
    for state in ({}, {"weights.other": torch.ones(2, 3)}, {f"weights.{name}": parameter}):
        with pytest.raises(ValueError, match="expected draws of the adapter's weights"):
            WeightAverage.restored(adapter, state)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_members_of_an_ensemble_are_fits_of_different_seeds(make_choice, records, weight_decay):
    def make(**options):
        adapter = make_choice(**options)
        with torch.no_grad():  # from the current random state, as a fresh adapter is
            for name, p in adapter.state().items():
                if ".lora_A." in name:
                    p.normal_()
        return adapter

    config = FitConfig(steps=3, batch_size=4, lr=0.01, weight_decay=weight_decay)
    split = make_choice().readout.encode(records)
    fitted = Ensemble(config, progress=False, members=3).fit(make, split, None, seed=5)
    logits = predict(fitted.predictor, split).logits
    seeds = torch.randint(2**31, (3,), generator=torch.Generator().manual_seed(5)).tolist()
    alone = (MAP if weight_decay else MLE)(config, progress=False)
    for k, seed in enumerate(seeds):
        member = alone.fit(make, split, None, seed=seed)
        assert torch.equal(predict(member.predictor, split).logits[0], logits[k])
    assert [row["member"] for row in fitted.result.history] == [0] * 3 + [1] * 3 + [2] * 3
    assert not torch.allclose(logits[0], logits[1])


def test_an_interrupted_ensemble_keeps_its_finished_members(
    make_choice, records, tmp_path, monkeypatch
):
    split = make_choice().readout.encode(records)
    method = Ensemble(CONFIG, progress=False, members=2)
    expected = predict(method.fit(make_choice, split, None, seed=1).predictor, split).logits
    checkpoints = Checkpoints(tmp_path / "unfinished", CheckpointConfig(every=1, keep=1))
    calls = []

    def dies(*args, **options):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return fit(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(base, "fit", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            method.fit(make_choice, split, None, seed=1, checkpoints=checkpoints)
    (first,) = (tmp_path / "unfinished" / "member-0").glob("*.safetensors")
    written = first.stat().st_mtime_ns
    fitted = method.fit(make_choice, split, None, seed=1, checkpoints=checkpoints)
    assert torch.equal(predict(fitted.predictor, split).logits, expected)
    assert first.stat().st_mtime_ns == written  # it was not trained again


def test_dropout_stays_on_in_prediction_and_nowhere_else(make_choice, records):
    split = make_choice().readout.encode(records)
    method = MCDropout(CONFIG, progress=False, dropout=0.5, draws=4)
    fitted = method.fit(make_choice, split, None, seed=0)
    adapter = fitted.model.adapter
    state = torch.get_rng_state()
    logits = predict(fitted.predictor, split).logits
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(predict(fitted.predictor, split).logits, logits)
    assert len({float(x) for x in logits[:, 0, 0]}) == 4  # a mask for each draw
    with torch.no_grad():  # off again
        once, again = (adapter(whole(split)) for _ in range(2))
    assert torch.equal(once, again)


def test_without_any_dropping_the_draws_would_agree(make_choice, records):
    split = make_choice().readout.encode(records)
    method = MCDropout(CONFIG, progress=False, dropout=1e-12, draws=2)
    fitted = method.fit(make_choice, split, None, seed=0)
    plain = MLE(CONFIG, progress=False).fit(make_choice, split, None, seed=0)
    expected = predict(plain.predictor, split).logits[0]
    for logits in predict(fitted.predictor, split).logits:
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ensemble(members=1), "members is 1: expected 2 or more"),
        (lambda: MCDropout(dropout=0.0), "dropout is 0.0: expected a probability between"),
        (lambda: MCDropout(draws=0), "draws is 0: expected 1 or more"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
