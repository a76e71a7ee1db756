from __future__ import annotations

import pyro
import pytest
import torch
from conftest import whole
from pyro.infer import SVI, TraceMeanField_ELBO
from torch.distributions import Normal, kl_divergence

from scalabl_pyro import FitConfig, KLSchedule, fit, predict
from scalabl_pyro.methods import MLE, BLoB, bursts
from scalabl_pyro.methods.blob import AutoNormalA, BLoBModel

CONFIG = FitConfig(steps=3, batch_size=4, kl=KLSchedule(0.1))


@pytest.fixture(params=["make_causal", "make_choice", "make_classifier"])
def plain(request):
    """A plain LoRA adapter with each readout."""
    return request.getfixturevalue(request.param)(svd=False)


def test_each_example_sees_the_shift_at_its_own_signs(plain, records):
    batch = whole(plain.readout.encode(records))
    shift = torch.randn_like(plain.matrices.flat_A())
    with torch.no_grad():
        seen = []
        with plain.llm.register_forward_hook(lambda *_: seen.append(plain._hooks.bound.shift)):
            logits = plain(batch, shift=shift)
        signs = seen[0]
        rows_each = len(signs[0].u) // len(batch)
        for b in range(len(batch)):
            weights = {
                name: A + delta * torch.outer(sign.v[b * rows_each], sign.u[b * rows_each])
                for (name, A), delta, sign in zip(
                    plain.matrices.named_A(plain.matrices.flat_A()).items(),
                    plain.matrices.named_A(shift).values(),
                    signs,
                    strict=True,
                )
            }
            with plain.holding(weights):
                torch.testing.assert_close(plain(batch)[b], logits[b], atol=1e-5, rtol=1e-4)
        assert len({tuple(row) for row in signs[0].u[::rows_each].tolist()}) > 1
        assert not torch.allclose(plain(batch), logits)  # and gone in the next call


def test_a_checkpointed_gradient_is_that_of_its_own_signs(make_causal, records):
    gradients = []
    for checkpointed in (False, True):
        adapter = make_causal(svd=False, gradient_checkpointing=checkpointed)
        batch = whole(adapter.readout.encode(records))
        shift = torch.full_like(adapter.matrices.flat_A(), 0.3)
        torch.manual_seed(2)
        adapter.train()
        loss = adapter(batch, shift=shift).square().sum()
        with torch.no_grad(), adapter.bound(None):  # something else runs in between
            pass
        loss.backward()
        gradients.append({name: p.grad for name, p in adapter.named_parameters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_names_and_back(plain):
    flat = torch.randn(2, len(plain.matrices.flat_A()))
    named = plain.matrices.named_A(flat)
    assert list(named) == [name for name in plain.state() if ".lora_A." in name]
    assert torch.equal(torch.cat([x.flatten(1) for x in named.values()], dim=1), flat)


def test_the_divergence_is_that_of_q_from_p(plain, records):
    split = plain.readout.encode(records)
    model = BLoBModel(plain, num_data=len(split), prior_scale=0.2)
    guide = AutoNormalA(model, init_scale=0.05)
    sigma = guide.rho.detach().square()
    assert ((sigma >= 0.00125) & (sigma <= 0.0025)).all()
    mean = plain.matrices.flat_A().detach()
    expected = kl_divergence(Normal(mean, sigma), Normal(0.0, 0.2)).sum()
    elbo = TraceMeanField_ELBO(max_plate_nesting=1)
    history = fit(model, guide, split, CONFIG, elbo=elbo, progress=False).history
    assert history[0]["kl"] == pytest.approx(float(expected), rel=1e-3)


def test_with_no_spread_and_no_weight_it_is_maximum_likelihood(make_choice, records):
    split = make_choice().readout.encode(records)
    config = FitConfig(steps=3, batch_size=4, lr=0.01, lr_guide=0.0, kl=KLSchedule(1e-12))
    blob = BLoB(config, progress=False, init_scale=1e-4, draws=2)
    of_draws = predict(blob.fit(make_choice, split, None, seed=1).predictor, split).logits
    mle = MLE(config, progress=False).fit(make_choice, split, None, seed=1)
    expected = predict(mle.predictor, split).logits[0]
    for logits in of_draws:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_a_large_weight_brings_q_to_the_prior(make_choice, records):
    split = make_choice().readout.encode(records)
    config = FitConfig(steps=300, batch_size=12, lr=0.05, lr_guide=0.05, kl=KLSchedule(1e4))
    method = BLoB(config, progress=False, prior_scale=0.2)
    fitted = method.fit(make_choice, split, None, seed=1)
    draws = torch.cat([w.flatten(1) for w in fitted.predictor.weights.values()], dim=1)
    assert float(draws.mean()) == pytest.approx(0, abs=0.01)
    assert float(draws.std()) == pytest.approx(0.2, rel=0.05)
    assert fitted.result.history[-1]["kl"] < fitted.result.history[0]["kl"] / 20


def test_the_published_form_takes_a_step_of_each_optimizer(make_choice, records, monkeypatch):
    """A round of one step, so that the KL has weight 1; against both gradients by hand."""
    monkeypatch.setattr(bursts, "burst_steps", lambda num_data, batch_size: 0)
    split = make_choice().readout.encode(records)
    config = FitConfig(
        steps=1, batch_size=12, lr=0.01, lr_guide=0.02, warmup=0.0, decay="constant",
        clip_norm=float("inf"),
    )  # fmt: skip
    method = BLoB(config, progress=False, lr_kl=1e-3)
    ends = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        adapter = make_choice(svd=False)
        model = method.make_model(adapter, num_data=12)
        guide = method.make_guide(model)
        mean = list(adapter.matrices.A.values())
        torch.manual_seed(1)
        if not by_hand:
            history = method._train(model, guide, split, seed=0).history
        else:
            A = adapter.matrices.flat_A().detach()
            sigma = guide.rho.detach().square()
            batch = next(split.minibatches(12, seed=0))
            noise = torch.randn(len(A))
            logits = adapter(batch, shift=guide.rho.square() * noise)
            torch.nn.functional.cross_entropy(logits, batch.labels).backward()
            points = list(adapter.named_parameters().values())
            first = torch.optim.AdamW(
                [{"params": points, "lr": 0.01}, {"params": [guide.rho_unconstrained], "lr": 0.02}],
                weight_decay=0.0,
            )
            with torch.no_grad():
                slope = A / 0.2**2  # ∂KL/∂M, and ∂KL/∂ρ = 2ρ(σ / σ_p² − 1 / σ)
                for linear, part in zip(
                    mean, adapter.matrices.named_A(slope).values(), strict=True
                ):
                    linear.weight -= 1e-3 * part
                rho = guide.rho_unconstrained
                rho -= 1e-3 * 2 * rho * (sigma / 0.2**2 - 1 / sigma)
            moved = adapter.matrices.flat_A().detach(), guide.rho.detach().square()
            expected_kl = float(kl_divergence(Normal(*moved), Normal(0.0, 0.2)).sum())
            first.step()
        # Not the head's bias, on which nothing depends.
        named = [p for name, p in adapter.state().items() if "bias" not in name]
        ends.append([p.detach().clone() for p in (*named, guide.rho)])
    for end, expected in zip(*ends, strict=True):
        torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-6)
    assert history[0]["kl"] == pytest.approx(expected_kl, rel=1e-5)
    assert history[0]["kl_weight"] == 1


def test_plain_svi_trains_it(make_causal, records):
    adapter = make_causal(svd=False)
    split = adapter.readout.encode(records)
    model = BLoBModel(adapter, num_data=len(split), prior_scale=0.2)
    guide = AutoNormalA(model, init_scale=0.05)
    before = guide.rho.detach().clone(), adapter.matrices.flat_A().detach().clone()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO(max_plate_nesting=1))
    svi.step(whole(split))
    assert not torch.equal(guide.rho, before[0])
    assert not torch.equal(adapter.matrices.flat_A(), before[1])


@pytest.mark.parametrize("projections", ["unit", "frozen_v", "fixed"])
def test_matrices_that_do_not_move_are_refused(make_causal, projections):
    adapter = make_causal(svd=False, projections=projections)
    with pytest.raises(ValueError, match=r"make the adapter's projections free"):
        BLoB().make_model(adapter, num_data=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_scale": 0.0}, "prior_scale is 0.0"),
        ({"init_scale": -1.0}, "init_scale is -1.0"),
        ({"draws": 0}, "draws is 0"),
        ({"config": FitConfig(kl_budget=3.0)}, "kl_budget is for method scalabl"),
        ({"lr_kl": 0.0}, "lr_kl is 0.0"),
        ({"lr_kl": 0.01, "config": FitConfig(accumulation=2)}, "accumulation is 2"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BLoB(**options)
