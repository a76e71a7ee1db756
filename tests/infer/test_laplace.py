"""The Laplace approximation against closed forms and automatic differentiation."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from conftest import lora, make_records, tiny_llama, whole

from benchmarks.correctness._linear import LinearAdapter, LinearGaussian, make_split
from scalabl_pyro import ScalaBLModel, SubspaceAdapter, draw
from scalabl_pyro.data import Completion
from scalabl_pyro.infer.laplace_approximation import CURVATURES, ggn, hessian, laplace
from scalabl_pyro.models.priors import Horseshoe
from scalabl_pyro.readouts.completion_tokens import CompletionTokens


def gaussian(count: int = 15) -> tuple[LinearGaussian, object]:
    """A linear model with Gaussian noise, of correlated features."""
    features = torch.randn(count, 1, 4) + torch.randn(count, 1, 1)
    labels = features.sum(-1) + 0.7 * torch.randn(count, 1)
    model = LinearGaussian(LinearAdapter((2, 2)), num_data=count, noise=0.7)
    return model, make_split(features, labels)


def logistic(prior: dist.Normal, count: int = 30) -> tuple[ScalaBLModel, object, torch.Tensor]:
    """Softmax regression, C = 3 and D = 4; its features are returned too."""
    features = torch.randn(count, 3, 4)
    labels = dist.Categorical(logits=features @ torch.tensor([1.0, -1.0, 0.5, 2.0])).sample()
    model = ScalaBLModel(LinearAdapter((2, 2)), num_data=count, prior=prior)
    return model, make_split(features, labels), features


def test_nothing_is_dropped(make_causal, records):
    """Of an adapter as training leaves it."""
    found = []
    for dropout in (0.0, 0.5):
        adapter = make_causal()
        split = adapter.readout.encode(records)
        model = ScalaBLModel(adapter, num_data=len(split))
        adapter.set_dropout(dropout)
        adapter.train()
        found.append(laplace(model, split, loc=adapter.init_loc))
    draws = [draw(each.guide, 20, seed=0) for each in found]
    torch.testing.assert_close(*draws)
    assert found[1].log_evidence == pytest.approx(found[0].log_evidence, rel=1e-5)


def test_at_the_priors_mean_no_precision_has_the_highest_evidence():
    model, split, _ = logistic(dist.Normal(1.0, 2.0))
    with pytest.raises(ValueError, match=r"loc is the prior's mean: the narrower the prior"):
        laplace(model, split, loc=torch.ones(2, 2), by_evidence=True)
    beside = laplace(model, split, loc=torch.full((2, 2), 1.5), by_evidence=True)
    assert 1e-5 < beside.prior_precision < 1e5


def test_ggn_of_texts_is_refused_before_any_pass(tokenizer):
    readout = CompletionTokens(tokenizer, num_classes=32, max_length=64, end_token=False)
    adapter = SubspaceAdapter(tiny_llama(), lora("q_proj"), readout)
    split = readout.encode([Completion("a", "the cat", " runs"), Completion("b", "the", " dog")])
    model = ScalaBLModel(adapter, num_data=len(split))
    with pytest.raises(ValueError, match=r"CompletionTokens reads texts, .* curvature='hessian'"):
        laplace(model, split, loc=model.init_loc)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_gaussian_likelihood_gives_the_exact_posterior(curvature):
    model, split = gaussian()
    exact = model.posterior(split)
    guide = laplace(
        model, split, loc=exact.mean.reshape(2, 2), curvature=curvature, batch_size=4
    ).guide
    joint = guide.joint()
    torch.testing.assert_close(joint.mean.detach(), exact.mean)
    torch.testing.assert_close(
        joint.covariance_matrix.detach(), exact.covariance_matrix, rtol=1e-3, atol=1e-5
    )
    assert guide.sample(3).shape == (3, 2, 2)


def test_the_evidence_of_a_gaussian_likelihood_is_exact():
    model, split = gaussian()
    approximation = laplace(model, split, loc=model.posterior(split).mean.reshape(2, 2))
    batch = whole(split)
    X = batch.inputs["features"][:, 0]
    marginal = dist.MultivariateNormal(
        torch.zeros(len(X)), 0.7**2 * torch.eye(len(X)) + X @ X.T
    ).log_prob(batch.labels[:, 0])
    assert approximation.log_evidence == pytest.approx(float(marginal), rel=1e-4)


def test_curvature_of_softmax_regression_is_the_textbook_one():
    """Σ_n W_nᵀ (diag p − p pᵀ) W_n, and with logits linear in s the two curvatures are one."""
    model, split, W = logistic(dist.Normal(0.0, 1.0))
    loc = torch.tensor([[0.3, -0.2], [0.1, 0.5]])
    p = (W @ loc.flatten()).softmax(-1).double()
    Lam = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("ncd,nce,nef->df", W.double(), Lam, W.double())
    batch = whole(split)
    for curvature in (ggn, hessian):
        torch.testing.assert_close(curvature(model, batch, loc), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_evidence", [False, True])
def test_the_prior_adds_its_precision(by_evidence):
    prior = dist.Normal(torch.tensor([[0.5], [-0.5]]), torch.tensor([[0.5], [2.0]]))
    model, split, _ = logistic(prior)
    loc = torch.full((2, 2), 0.4)
    approximation = laplace(model, split, loc=loc, by_evidence=by_evidence)
    expected = torch.tensor([4.0, 4.0, 0.25, 0.25])
    if by_evidence:
        expected = torch.full((4,), approximation.prior_precision)
    else:
        assert approximation.prior_precision is None
    precision = approximation.guide.joint().precision_matrix.detach().double()
    added = precision - ggn(model, whole(split), loc)
    torch.testing.assert_close(added, expected.double().diag(), rtol=1e-3, atol=1e-3)


def test_the_evidence_is_highest_at_the_precision_that_is_chosen():
    """Against the evidence of models whose priors have the precisions of a grid."""
    model, split, _ = logistic(dist.Normal(0.0, 1.0))
    loc = torch.tensor([[0.6, -0.6], [0.3, 1.2]])
    best = laplace(model, split, loc=loc, by_evidence=True)

    def evidence(precision: float) -> float:
        model.prior = ScalaBLModel(
            model.adapter, num_data=30, prior=dist.Normal(0.0, precision**-0.5)
        ).prior
        return laplace(model, split, loc=loc).log_evidence

    grid = [best.prior_precision * 1.2**k for k in range(-8, 9)]
    values = [evidence(precision) for precision in grid]
    assert max(range(17), key=values.__getitem__) == 8
    assert values[8] == pytest.approx(best.log_evidence, abs=1e-3)
    # MacKay's condition: λ ‖s*‖² is the number of well-determined coordinates.
    eigenvalues = torch.linalg.eigvalsh(ggn(model, whole(split), loc))
    determined = float((eigenvalues / (eigenvalues + best.prior_precision)).sum())
    distance = float(loc.square().sum())
    assert best.prior_precision * distance == pytest.approx(determined, rel=0.01)


def test_curvatures_of_a_language_model(make_causal):
    """Hessian by torch.autograd; both skip choices that do not exist."""
    records = [*make_records(3), *make_records(2, choices=3)]
    adapter = make_causal(targets=("q_proj", "v_proj"))
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=5)
    batch, loc = whole(split), adapter.init_loc

    def nll(vec):
        logits = adapter(batch, vec.view(loc.shape))
        return torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.autograd.functional.hessian(nll, loc.flatten())
    curvature = hessian(model, batch, loc)
    torch.testing.assert_close(curvature, expected.double(), rtol=1e-3, atol=1e-4)

    J = torch.autograd.functional.jacobian(
        lambda vec: adapter(batch, vec.view(loc.shape)), loc.flatten()
    ).double()
    p = adapter(batch, loc).detach().softmax(-1).double()
    Lam = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("ncd,nce,nef->df", J, Lam, J)
    curvature = ggn(model, batch, loc)
    assert curvature.isfinite().all()
    assert curvature.abs().max() > 1e-3
    torch.testing.assert_close(curvature, expected, rtol=1e-3, atol=1e-5)


def test_what_is_no_mode_or_no_normal_prior_is_refused(make_causal, records):
    model, split, _ = logistic(dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"curvature is 'kfac': expected one of \['ggn'"):
        laplace(model, split, curvature="kfac")
    with pytest.raises(ValueError, match=r"loc has shape \(4,\): expected \(M, r\) \(2, 2\)"):
        laplace(model, split, loc=torch.zeros(4))
    for prior in (dist.Laplace(0.0, 1.0), Horseshoe((2, 2))):
        other = ScalaBLModel(LinearAdapter((2, 2)), num_data=30, prior=prior)
        with pytest.raises(ValueError, match="needs a normal one"):
            laplace(other, split)
    adapter = make_causal(targets=("q_proj", "v_proj"))
    data = adapter.readout.encode(records)
    flat = ScalaBLModel(adapter, num_data=len(data), prior=dist.Normal(0.0, 1e3))
    with pytest.raises(ValueError, match="not positive definite"):
        laplace(flat, data, loc=20 * adapter.init_loc, curvature="hessian")
    assert math.isfinite(laplace(flat, data, loc=20 * adapter.init_loc).log_evidence)
