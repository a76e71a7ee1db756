"""Last-layer Laplace, against logistic regression on the features of a plain transformers model."""

from __future__ import annotations

import pytest
import torch
from conftest import make_records, whole

from scalabl_pyro import FitConfig, predict
from scalabl_pyro.methods import LastLayerLaplace

CONFIG = FitConfig(steps=20, batch_size=4, lr=0.05)


def features(adapter, batch):
    """What BERT's pooler returns, and a 1 for the bias: (rows, 17)."""
    inputs = {name: value.flatten(0, -2) for name, value in batch.inputs.items()}
    with torch.no_grad():
        pooled = adapter.peft_model.base_model.model.bert(**inputs).pooler_output.double()
    return torch.cat([pooled, torch.ones(len(pooled), 1)], 1)


def test_a_classifiers_covariance_is_that_of_logistic_regression(make_classifier, records):
    split = make_classifier().readout.encode(records)
    method = LastLayerLaplace(CONFIG, progress=False, prior_precision=0.7, draws=20_000)
    fitted = method.fit(make_classifier, split, None, seed=0)
    adapter, batch = fitted.model.adapter, whole(split)
    h = features(adapter, batch)
    p = adapter(batch).detach().double().softmax(-1)
    H = 0.7 * torch.eye(4 * 17, dtype=torch.float64)
    for x, q in zip(h, p, strict=True):
        H += torch.kron(q.diag() - torch.outer(q, q), torch.outer(x, x))
    covariance = torch.linalg.inv(H).view(4, 17, 4, 17)
    expected = torch.einsum("bd,cdef,bf->bce", h, covariance, h)
    draws = predict(fitted.predictor, split).logits.double()
    for b in range(len(split)):
        torch.testing.assert_close(draws[:, b].T.cov(), expected[b], rtol=0.05, atol=0.02)
    # Our order is all weights, then all biases.
    order = [*(17 * c + d for c in range(4) for d in range(16)), *(17 * c + 16 for c in range(4))]
    flat = covariance.reshape(68, 68)[order][:, order]
    torch.testing.assert_close(fitted.predictor.covariance, flat, rtol=1e-4, atol=1e-6)


def test_a_scorer_of_choices_has_the_conditional_logit_hessian(make_choice, records):
    """A choice that does not exist has no probability and no part in it."""
    split = make_choice().readout.encode([*records, *make_records(5, choices=2)])
    method = LastLayerLaplace(CONFIG, progress=False, prior_precision=0.3, draws=2)
    fitted = method.fit(make_choice, split, None, seed=0)
    adapter, batch = fitted.model.adapter, whole(split)
    h = features(adapter, batch).view(len(split), 4, 17)
    p = adapter(batch).detach().double().softmax(-1)
    assert (p[-5:, 2:] == 0).all()
    centred = h - (p[:, :, None] * h).sum(1, keepdim=True)
    H = torch.einsum("bc,bcd,bce->de", p, centred, centred) + 0.3 * torch.eye(17)
    expected = torch.linalg.inv(H)
    torch.testing.assert_close(fitted.predictor.covariance, expected, rtol=1e-4, atol=1e-6)


def test_the_precision_maximises_the_evidence(make_classifier, records):
    """λ‖w‖² = Σ h / (h + λ), with the eigenvalues h of the Hessian."""

    def make(**options):
        adapter = make_classifier(**options)
        (bias,) = (p for name, p in adapter.state().items() if name.endswith("default.bias"))
        bias.data.fill_(1.0)  # as much of it as of the weight
        return adapter

    split = make().readout.encode(records)
    fitted = LastLayerLaplace(CONFIG, progress=False).fit(make, split, None, seed=0)
    inverse = torch.linalg.eigvalsh(fitted.predictor.covariance)
    precision = 1 / float(inverse.max())  # the Hessian is singular
    head = fitted.model.adapter.peft_model.base_model.model.classifier.modules_to_save["default"]
    norm = sum(float(p.detach().double().square().sum()) for p in head.parameters())
    h = 1 / inverse - precision
    assert precision * norm == pytest.approx(float((h / (h + precision)).sum()), rel=0.01)


def test_without_a_head_it_is_refused(make_causal, records):
    split = make_causal().readout.encode(records)
    with pytest.raises(ValueError, match="needs a head that is trained"):
        LastLayerLaplace(CONFIG, progress=False).fit(make_causal, split, None, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"draws": 0}, "draws is 0"), ({"prior_precision": -1.0}, "prior_precision is -1.0")],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LastLayerLaplace(**options)
