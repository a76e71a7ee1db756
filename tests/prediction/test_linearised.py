from __future__ import annotations

import torch
from conftest import make_records, whole
from torch.autograd.functional import jacobian

from scalabl_pyro import AutoSubspaceMultivariateNormal, ScalaBLModel, draw, evaluate, predict
from scalabl_pyro.prediction.linearised import Linearised


def test_the_jacobian_is_that_of_the_logits(adapter, split):
    batch = whole(split)
    loc = adapter.init_loc
    M, r = adapter.shape
    steps = 1000 * torch.eye(M * r).view(-1, M, r)
    logits = Linearised(adapter, loc, loc + steps).logits(batch)
    J = jacobian(lambda s: adapter(batch, s), loc).flatten(-2)  # (B, C, M·r)
    assert J.abs().max() > 1e-3
    expected = adapter(batch, loc) + 1000 * J.movedim(-1, 0)
    torch.testing.assert_close(logits, expected.detach(), atol=1e-4, rtol=1e-4)


def test_logits_are_normal_with_the_projected_covariance(make_causal, records):
    adapter = make_causal(targets=("q_proj",))
    split = adapter.readout.encode(records)
    guide = AutoSubspaceMultivariateNormal(ScalaBLModel(adapter, num_data=len(split)))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    loc = guide.median()["s"]
    logits = predict(Linearised(adapter, loc, draw(guide, 50_000, seed=0)), split).logits
    J = jacobian(lambda s: adapter(whole(split), s), loc).flatten(-2)
    covariance = J @ guide.joint().covariance_matrix.detach() @ J.mT  # (N, C, C)
    scale = covariance.diagonal(dim1=-1, dim2=-2).sqrt()
    centred = (logits - logits.mean(0)) / scale
    expected = covariance / scale[..., None] / scale[..., None, :]
    observed = torch.einsum("snc,snd->ncd", centred, centred) / len(logits)
    torch.testing.assert_close(observed, expected, atol=0.03, rtol=0)
    torch.testing.assert_close(
        logits.mean(0), adapter(whole(split), loc).detach(), atol=0.02, rtol=0.02
    )


def test_near_the_mean_it_is_the_model_itself(adapter, split):
    draws = adapter.init_loc + 1e-3 * torch.randn(6, *adapter.shape)
    predictions = predict(Linearised(adapter, adapter.init_loc, draws), split, batch_size=5)
    expected = adapter(whole(split), draws).detach()
    torch.testing.assert_close(predictions.logits, expected, atol=1e-4, rtol=1e-4)
    assert 0 <= evaluate(predictions.logits, predictions.labels)["ece"] <= 1


def test_a_temperature_divides_its_logits(adapter, split):
    draws = adapter.init_loc + 0.1 * torch.randn(6, *adapter.shape)
    one, two = (
        predict(Linearised(adapter, adapter.init_loc, draws, t), split).logits for t in (1.0, 2.0)
    )
    torch.testing.assert_close(two, one / 2)


def test_missing_choices_stay_missing_and_a_cached_trunk_serves(make_choice):
    adapter = make_choice()
    split = adapter.readout.encode(make_records(5, choices=3))
    draws = torch.randn(3, *adapter.shape)
    logits = predict(Linearised(adapter, adapter.init_loc, draws), split).logits
    assert logits[..., 3].isneginf().all()
    assert logits[..., :3].isfinite().all()
