from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import lora, tiny_llama, whole

from scalabl_pyro import FitConfig, KLSchedule, Predictor, SubspaceAdapter, evaluate, predict
from scalabl_pyro.data import Completion
from scalabl_pyro.methods import (
    MLE,
    TFB,
    BLoB,
    BLoBTFB,
    LaplaceLoRA,
    LastLayerLaplace,
    ScalaBL,
    ZeroShot,
)
from scalabl_pyro.readouts import CompletionTokens

CONFIG = FitConfig(steps=5, batch_size=4, lr=0.01)


def test_a_decomposed_product_computes_the_same(make_causal, records):
    adapter = make_causal(svd=False)
    batch = whole(adapter.readout.encode(records))
    with torch.no_grad():
        before = adapter(batch)
        d = adapter.matrices.decompose_product()
        torch.testing.assert_close(adapter(batch), before, atol=1e-5, rtol=1e-4)
    matrices = adapter.matrices
    for A, B, values in zip(matrices.A.values(), matrices.B.values(), d, strict=True):
        A, B = A.weight, B.weight
        torch.testing.assert_close(A @ A.mT, torch.eye(len(A)), atol=1e-5, rtol=0)
        torch.testing.assert_close(B.mT @ B, values.square().diag(), atol=1e-5, rtol=1e-4)


def test_noise_is_the_same_in_all_directions_of_the_update(make_choice, records):
    split = make_choice().readout.encode(records)
    method = TFB(CONFIG, progress=False, tolerance=1e6, max_scale=0.1, bisections=3, draws=200)
    fitted = method.fit(make_choice, split, None, seed=0)
    adapter = fitted.model.adapter
    sigma = 0.1 * (1 - 2**-3)
    weights = fitted.predictor.weights.items()
    for (name, draws), linear in zip(weights, adapter.matrices.B.values(), strict=True):
        B = linear.weight
        U = B / B.norm(dim=0)
        noise = (U.mT @ B @ (draws - adapter.state()[name])).detach()  # (S, r, d_in)
        torch.testing.assert_close(noise.std((0, 2)), torch.full((4,), sigma), rtol=0.1, atol=0)
        assert abs(float(noise.mean())) < 0.04 * sigma


def test_it_is_the_most_noise_that_training_data_allow(make_choice, records):
    split = make_choice().readout.encode(records)
    settings = {"tolerance": 0.01, "max_scale": 2.0, "draws": 5, "examples": len(records)}
    config = FitConfig(steps=40, batch_size=4, lr=0.05)
    plain = MLE(config, progress=False).fit(make_choice, split, None, seed=0)
    nll = evaluate(predict(plain.predictor, split).logits, split.labels)["nll"]

    def change(bisections):
        method = TFB(config, progress=False, bisections=bisections, **settings)
        fitted = method.fit(make_choice, split, None, seed=0)
        with_noise = evaluate(predict(fitted.predictor, split).logits, split.labels)["nll"]
        name, draws = next(iter(fitted.predictor.weights.items()))
        return abs(with_noise - nll), float(
            (draws - fitted.model.adapter.state()[name].detach()).std()
        )

    coarse, fine = change(4), change(8)
    assert coarse[0] <= 0.01 * nll
    assert fine[0] <= 0.01 * nll
    assert fine[1] >= coarse[1]
    assert fine[1] > 0


def test_noise_on_the_last_module_alone(make_causal, records):
    """The same noise as among all, and none elsewhere."""
    config = replace(CONFIG, steps=2)
    noise = dict(tolerance=1e6, max_scale=0.1, bisections=2, draws=3)
    last = TFB(config, progress=False, modules="last", **noise)
    everywhere = TFB(config, progress=False, **noise)

    make = partial(make_causal, svd=False)
    split = make().readout.encode(records)
    one, every = (method.fit(make, split, None, seed=0) for method in (last, everywhere))
    (name,) = one.predictor.weights
    assert name == list(every.predictor.weights)[-1]
    torch.testing.assert_close(one.predictor.weights[name], every.predictor.weights[name])
    state = one.model.adapter.state()
    for other, draws in every.predictor.weights.items():
        assert ((draws - state[other]).abs().amax((1, 2)) > 0).all()
    logits = predict(one.predictor, split).logits
    for k, draw in enumerate(one.predictor.weights[name]):
        with one.model.adapter.holding({name: draw}), torch.no_grad():
            by_hand = one.model.adapter(whole(split))
        torch.testing.assert_close(logits[k], by_hand, atol=1e-5, rtol=1e-5)
    assert logits.std(0).max() > 1e-6


def test_where_no_noise_is_allowed_it_says_so(make_choice, records, caplog):
    split = make_choice().readout.encode(records)
    method = TFB(CONFIG, progress=False, tolerance=1e-12, max_scale=5.0, draws=2)
    fitted = method.fit(make_choice, split, None, seed=0)
    assert "all draws are the same" in caplog.text
    first, second = predict(fitted.predictor, split).logits
    assert torch.equal(first, second)


def test_pseudo_labels_are_the_models_own_answers(make_choice, records):
    """As if the labels were what the trained model answers."""
    split = make_choice().readout.encode(records)
    settings = {"tolerance": 1e-4, "bisections": 9, "draws": 5, "max_scale": 2.0}
    config = FitConfig(steps=15, batch_size=4, lr=0.05)
    trained = MLE(config, progress=False).fit(make_choice, split, None, seed=0)
    answers = predict(trained.predictor, split).logits[0].argmax(-1).tolist()
    assert answers != split.labels.tolist()
    relabelled = [replace(r, label=answer) for r, answer in zip(records, answers, strict=True)]
    own = make_choice().readout.encode(relabelled)
    pseudo = TFB(CONFIG, progress=False, pseudo_labels=True, **settings)
    plain = TFB(CONFIG, progress=False, **settings)
    sigma = pseudo.finish(trained, split, None, seed=0).result.history[-1]["sigma_q"]
    assert sigma == plain.finish(trained, own, None, seed=0).result.history[-1]["sigma_q"]
    assert sigma != plain.finish(trained, split, None, seed=0).result.history[-1]["sigma_q"]


def test_the_cap_is_told(make_choice, records, caplog):
    split = make_choice().readout.encode(records)
    method = TFB(CONFIG, progress=False, tolerance=1e6, max_scale=0.1, bisections=3, draws=2)
    fitted = method.fit(make_choice, split, None, seed=0)
    assert "σ_q is 0.0875, at its cap" in caplog.text
    assert fitted.result.history[-1]["sigma_q"] == pytest.approx(0.1 * (1 - 2**-3))


def test_blob_then_tfb_has_its_noise_about_blobs_mean(make_choice, records):
    split = make_choice().readout.encode(records)
    config = FitConfig(steps=5, batch_size=4, lr=0.01, kl=KLSchedule(0.01))
    noise = {"tolerance": 1e6, "max_scale": 1e-2, "draws": 3}
    blob = BLoB(config, progress=False).fit(make_choice, split, None, seed=0)
    expected = predict(Predictor(blob.model.adapter), split).logits[0]
    method = BLoBTFB(config, progress=False, tfb=noise)
    logits = predict(method.fit(make_choice, split, None, seed=0).predictor, split).logits
    assert len(logits) == 3
    torch.testing.assert_close(logits.mean(0), expected, atol=5e-3, rtol=0)
    assert logits.std(0).max() > 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"max_scale": -1.0}, "max_scale is -1.0"),
        ({"bisections": 0}, "bisections is 0"),
        ({"examples": 0}, "examples is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"modules": "first"}, "modules is 'first'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TFB(**options)


def test_noise_on_an_adapter_that_nothing_trained(make_causal, records):
    split = make_causal().readout.encode(records)
    fitted = ZeroShot(progress=False).fit(make_causal, split, None, seed=0)
    method = TFB(CONFIG, progress=False, tolerance=1e6, max_scale=0.1, bisections=3, draws=2)
    noisy = method.finish(fitted, split, None, seed=0)
    assert noisy.result.history == [{"sigma_q": pytest.approx(0.1 * (1 - 2**-3))}]


@pytest.mark.parametrize("method", [TFB, LaplaceLoRA, LastLayerLaplace])
def test_what_works_on_plain_lora_refuses_vectors_s(make_choice, records, method):
    split = make_choice().readout.encode(records)
    fitted = ScalaBL(CONFIG, progress=False).fit(make_choice, split, None, seed=0)
    before = {n: p.detach().clone() for n, p in fitted.model.adapter.state().items()}
    with pytest.raises(ValueError, match="works on A and B of plain LoRA, and this model has vec"):
        method(CONFIG, progress=False).finish(fitted, split, None, seed=0)
    for name, value in fitted.model.adapter.state().items():
        assert torch.equal(value, before[name])


def test_pseudo_labels_of_texts_are_refused_before_training(tokenizer, records, monkeypatch):
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    readout = CompletionTokens(tokenizer, num_classes=len(tokenizer), max_length=64)
    texts = [Completion(r.id, r.question, f" {r.choices[0]}") for r in records]
    monkeypatch.setattr(BLoBTFB, "_train", None)
    for method in (TFB(CONFIG, pseudo_labels=True), BLoBTFB(CONFIG, tfb={"pseudo_labels": True})):

        def make(**options):
            return SubspaceAdapter(
                tiny_llama(vocab_size=len(tokenizer)), lora("q_proj"), readout, **options
            )

        with pytest.raises(ValueError, match="pseudo_labels is true, and the readout reads texts"):
            method.fit(make, readout.encode(texts), None, seed=0)
