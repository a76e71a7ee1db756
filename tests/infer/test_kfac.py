from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import fill_lora_B, longer_and_longer, lora, tiny_llama, whole

from scalabl_pyro import FitConfig, SubspaceAdapter, predict
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.infer.evidence import precision_by_evidence
from scalabl_pyro.infer.kfac import Kronecker, kfac, logit_moments
from scalabl_pyro.methods import MLE, LaplaceLoRA
from scalabl_pyro.readouts import ChoiceLikelihood

CONFIG = FitConfig(steps=5, batch_size=4, lr=0.01)


@pytest.fixture(params=["make_causal", "make_choice", "make_classifier"])
def plain(request):
    """A plain LoRA adapter with each readout."""
    return request.getfixturevalue(request.param)(svd=False)


def jacobians(adapter, batch):
    """Derivatives of the logits by every A and B, (B, C, d_out, d_in) each."""
    stored = {name: p for name, p in adapter.state().items() if ".lora_" in name}
    f = adapter(batch)
    each = [torch.autograd.grad(y, list(stored.values()), retain_graph=True) for y in f.flatten()]
    return {
        name: torch.stack([row[i] for row in each]).unflatten(0, f.shape)
        for i, name in enumerate(stored)
    }


def dense(factor):
    """H of vec(W), W's rows one after another."""
    return torch.kron(factor.g.mT @ factor.g, factor.x.mT @ factor.x).double()


def test_the_covariance_is_that_of_the_dense_matrix(plain, records):
    split = plain.readout.encode(records)
    batch = whole(split)
    precision = 0.3
    for rank in (1000, 3):
        factors = kfac(plain, split, rank=rank, batch_size=5)
        f, covariance = logit_moments(plain, batch, factors, dict.fromkeys(factors, precision))
        torch.testing.assert_close(f, plain(batch).detach())
        expected = torch.zeros_like(covariance)
        for name, J in jacobians(plain, batch).items():
            H = dense(factors[name])
            flat = J.flatten(2).double()
            inverse = torch.linalg.inv(H + precision * torch.eye(len(H)))
            expected += flat @ inverse @ flat.mT
        torch.testing.assert_close(covariance, expected, rtol=1e-3, atol=1e-5)


def test_factors_are_sums_over_tokens_that_are_no_padding(plain, records):
    split = plain.readout.encode(records)
    together, alone = (kfac(plain, split, rank=1000, batch_size=size) for size in (12, 1))
    for name, factor in together.items():  # alone, nothing is padded but choices of one record
        other = alone[name]
        for root, expected in zip(factor, other, strict=True):
            square = expected.mT @ expected
            assert (root.mT @ root - square).norm() < 1e-4 * square.norm()


def test_an_output_layer_counts_no_padding(make_likelihood, records):
    """Choices of one to four words, so that a batch is padded where the output layer reads."""
    plain = make_likelihood(svd=False)
    split = plain.readout.encode(longer_and_longer(records))
    together, alone = (kfac(plain, split, rank=1000, batch_size=size) for size in (12, 1))
    assert any("lm_head" in name for name in alone)
    for name, factor in together.items():
        for root, expected in zip(factor, alone[name], strict=True):
            square = expected.mT @ expected
            assert (root.mT @ root - square).norm() < 1e-4 * square.norm(), name


def test_one_token_of_one_example_has_the_exact_curvature(make_causal, records):
    adapter = make_causal(svd=False, targets=("lm_head",))
    split = adapter.readout.encode(records[:1])
    batch = whole(split)
    factors = kfac(adapter, split, rank=1000)
    p = adapter(batch).detach().softmax(-1)[0].double()
    curvature = p.diag() - torch.outer(p, p)
    for name, J in jacobians(adapter, batch).items():
        flat = J[0].flatten(1).double()
        torch.testing.assert_close(
            dense(factors[name]), flat.mT @ curvature @ flat, rtol=1e-4, atol=1e-6
        )


def test_a_low_rank_keeps_the_largest_directions(plain, records):
    split = plain.readout.encode(records)
    full = kfac(plain, split, rank=1000, batch_size=len(split))
    low = kfac(plain, split, rank=2, batch_size=4)
    torch.manual_seed(9)  # whatever is drawn elsewhere, they are the same
    for name, factor in kfac(plain, split, rank=2, batch_size=4).items():
        assert torch.equal(factor.x, low[name].x)
        assert torch.equal(factor.g, low[name].g)
    for name, factor in low.items():
        for root, whole_root in zip(factor, full[name], strict=True):
            assert len(root) == 2
            torch.testing.assert_close(root @ root.mT, root.square().sum(-1).diag())
            most = float(whole_root[:2].square().sum())
            assert 0.9 * most < float(root.square().sum()) <= 1.001 * most


def test_the_method_keeps_as_many_directions_as_its_rank(make_causal, records):
    """Those of numpy's singular value decomposition of the inputs."""
    make = partial(make_causal, targets=("q_proj", "v_proj"))
    split = make().readout.encode(records)
    still = FitConfig(steps=1, batch_size=len(split), lr=0.0, lr_guide=0.0)
    fitted = LaplaceLoRA(still, progress=False, rank=8).fit(make, split, None, seed=0)
    adapter, batch = fitted.model.adapter, whole(split)
    inputs = {}
    for name, linear in adapter.matrices.linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        adapter(batch)
    real = batch.inputs["attention_mask"].bool()
    for name, factor in fitted.predictor.factors.items():
        x = inputs[name][real].double().numpy()
        _, sizes, directions = np.linalg.svd(x / len(x) ** 0.5, full_matrices=False)
        root = sizes[:8, None] * directions[:8]
        assert len(factor.x) == min(8, x.shape[1]), name
        assert len(factor.g) == min(8, factor.g.shape[1]), name
        square = torch.from_numpy(root.T @ root)
        difference = factor.x.double().mT @ factor.x.double() - square
        assert difference.norm() < 1e-4 * square.norm(), name


def test_log_det_is_that_of_the_dense_matrix():
    factor = Kronecker(torch.eye(3, 5) * 2.0, torch.eye(2, 4) * 3.0)
    expected = torch.logdet(dense(factor) + 0.7 * torch.eye(20))
    assert factor.log_det(0.7) == pytest.approx(float(expected), rel=1e-5)


def test_the_precision_maximises_the_evidence(plain, records):
    factors = kfac(plain, plain.readout.encode(records), rank=1000)
    weights = torch.cat(
        [m.weight.detach().flatten() for m in plain.matrices.linears.values()]
    ).double()
    precision = precision_by_evidence(
        lambda precision: sum(float(factor.log_det(precision)) for factor in factors.values()),
        len(weights),
        float(weights.square().sum()),
    )
    # d/dλ = 0: λ‖θ‖² = Σ h / (h + λ), the number of parameters that the data determine
    effective = sum(
        float((h / (h + precision)).sum()) for h in (f.eigenvalues() for f in factors.values())
    )
    assert precision * float(weights.square().sum()) == pytest.approx(effective, rel=1e-3)


def test_each_matrix_has_the_precision_of_its_own_evidence(make_choice, records):
    """d/dλ = 0 for each: λ‖W‖² = Σ h / (h + λ)."""
    split = make_choice().readout.encode(records)
    config = FitConfig(steps=40, batch_size=4, lr=0.05)
    method = LaplaceLoRA(config, progress=False, per_matrix=True, modules="last")
    fitted = method.fit(make_choice, split, None, seed=0)
    predictor, linears = fitted.predictor, fitted.model.adapter.matrices.linears
    names = [name for name in linears if name.startswith("bert.encoder.layer.1.attention.self.val")]
    assert list(predictor.factors) == names
    for name, factor in predictor.factors.items():
        h, precision = factor.eigenvalues(), predictor.precision[name]
        norm = float(linears[name].weight.detach().double().square().sum())
        assert precision * norm == pytest.approx(float((h / (h + precision)).sum()), rel=0.1)
    assert len(set(predictor.precision.values())) == 2
    again = method.restore(fitted.model.adapter, predictor.state(), seed=0)
    assert torch.equal(again.logits(whole(split)), predictor.logits(whole(split)))


def test_without_uncertainty_it_is_the_trained_model(make_choice, records):
    split = make_choice().readout.encode(records)
    plain = MLE(CONFIG, progress=False).fit(make_choice, split, None, seed=0)
    expected = predict(plain.predictor, split).logits[0]
    settings = {"config": CONFIG, "progress": False, "draws": 4000}
    sure = LaplaceLoRA(prior_precision=1e12, **settings).fit(make_choice, split, None, seed=0)
    torch.testing.assert_close(predict(sure.predictor, split).logits[7], expected)
    unsure = LaplaceLoRA(prior_precision=10.0, **settings).fit(make_choice, split, None, seed=0)
    logits = predict(unsure.predictor, split).logits.double()
    precision = unsure.predictor.precision
    assert set(precision.values()) == {10.0}
    f, covariance = logit_moments(
        unsure.model.adapter, whole(split), unsure.predictor.factors, precision
    )
    deviations = covariance.diagonal(dim1=1, dim2=2).sqrt()
    torch.testing.assert_close(logits.std(0), deviations, rtol=0.1, atol=1e-6)
    torch.testing.assert_close(
        logits.mean(0) / deviations, f.double() / deviations, rtol=0, atol=0.08
    )


def test_missing_choices_stay_impossible(make_choice, records):
    adapter = make_choice(svd=False)
    short = [replace(r, choices=r.choices[:3], label=r.label % 3) for r in records]
    split = adapter.readout.encode(short)
    fitted = LaplaceLoRA(CONFIG, progress=False, draws=5).fit(make_choice, split, None, seed=0)
    logits = predict(fitted.predictor, split).logits
    assert torch.isneginf(logits[..., 3]).all()
    assert logits[..., :3].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"prior_precision": 0.0}, "prior_precision is 0.0"),
        ({"prior_precision": 1.0, "per_matrix": True}, "leaves nothing to choose"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LaplaceLoRA(**options)


@pytest.mark.parametrize("normalise", ["characters", "unconditional"])
def test_factors_of_an_output_layer_do_not_depend_on_the_rows_beside_it(
    tokenizer, records, normalise
):
    """Choices in rows of their own, with prompts of several lengths."""
    readout = ChoiceLikelihood(
        tokenizer, PROMPTS["question"], num_classes=4, max_length=64, normalise=normalise
    )
    readout.packed = False
    targets = ("q_proj", "v_proj", "lm_head")
    adapter = SubspaceAdapter(tiny_llama(), lora(*targets), readout, svd=False)
    fill_lora_B(adapter)
    readout.packed = False
    split = adapter.encode(longer_and_longer(records[:7]))
    one, seven = (kfac(adapter, split, rank=10**4, batch_size=size) for size in (1, 7))
    for name, factor in one.items():
        for part in ("x", "g"):
            first, other = (getattr(f, part) for f in (factor, seven[name]))
            torch.testing.assert_close(
                first.mT @ first, other.mT @ other, rtol=1e-3, atol=1e-5, msg=f"{name} {part}"
            )
