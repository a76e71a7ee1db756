"""IVON, against its formulas written out by hand and a posterior that is known."""

from __future__ import annotations

import math

import pytest
import torch

from scalabl_pyro import FitConfig, predict
from scalabl_pyro.methods import IVON
from scalabl_pyro.methods.ivon import VariationalOnlineNewton


def test_a_quadratic_loss_has_the_known_posterior():
    """λ·½H(θ − a)² with prior precision λδ: Normal(Ha / (H + δ), 1 / λ(H + δ))."""
    torch.manual_seed(0)
    H, a = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([1.0, -2.0, 0.5])
    ess, delta = 200.0, 0.1
    theta = torch.nn.Parameter(torch.zeros(3))
    q = VariationalOnlineNewton(
        [theta], lr=0.02, ess=ess, hess_init=1.0, weight_decay=delta, betas=(0.9, 0.999)
    )
    means, scales = [], []
    for step in range(3500):
        with q.drawn():
            (0.5 * H * (theta - a) ** 2).sum().backward()
        q.step()
        q.zero_grad()
        if step >= 1000:
            means.append(theta.detach().clone())
            scales.append(q.scale(theta).clone())
    torch.testing.assert_close(torch.stack(means).mean(0), H * a / (H + delta), atol=0.01, rtol=0)
    expected = (ess * (H + delta)).rsqrt()
    torch.testing.assert_close(torch.stack(scales).mean(0), expected, atol=0, rtol=0.05)


def test_two_steps_by_hand():
    theta = torch.nn.Parameter(torch.tensor([0.3]))
    q = VariationalOnlineNewton(
        [theta], lr=0.5, ess=10.0, hess_init=2.0, weight_decay=0.25, betas=(0.8, 0.9),
        clip_radius=0.2,
    )  # fmt: skip
    torch.manual_seed(4)
    noise = [float(torch.randn(1)) for _ in range(2)]
    m, g, h = 0.3, 0.0, 2.0
    torch.manual_seed(4)
    for t, epsilon in enumerate(noise, 1):
        sigma = (10 * (h + 0.25)) ** -0.5
        gradient = 3 * (m + sigma * epsilon) ** 2  # of θ³
        estimate = gradient * epsilon / sigma
        g = 0.8 * g + 0.2 * gradient
        h = 0.9 * h + 0.1 * estimate + 0.5 * 0.01 * (h - estimate) ** 2 / (h + 0.25)
        newton = (g / (1 - 0.8**t) + 0.25 * m) / (h + 0.25)
        m = m - 0.5 * min(0.2, max(-0.2, newton))
        with q.drawn():
            (theta**3).sum().backward()
        q.step()
        q.zero_grad()
        assert theta.item() == pytest.approx(m, rel=1e-5)
        assert q.state[theta]["hess"].item() == pytest.approx(h, rel=1e-5)


def test_its_draws_have_its_spread_and_no_draws_is_its_mean(make_choice, records):
    split = make_choice().readout.encode(records)
    config = FitConfig(steps=3, batch_size=4, lr=0.1, clip_norm=math.inf)
    method = IVON(config, progress=False, hess_init=0.5, beta2=1 - 1e-9, draws=2000)
    fitted = method.fit(make_choice, split, None, seed=0)
    N, delta = len(split), 1 / (len(split) * 0.2**2)
    for name, draws in fitted.predictor.weights.items():
        mean = fitted.model.adapter.state()[name].detach()
        deviations = (draws - mean) * (N * (0.5 + delta)) ** 0.5
        assert float(deviations.std()) == pytest.approx(1, rel=0.05)
    at_mean = IVON(config, progress=False, hess_init=0.5, beta2=1 - 1e-9, draws=0)
    point = at_mean.fit(make_choice, split, None, seed=0)
    with torch.no_grad():
        expected = fitted.model.adapter(split.collate(list(split)))
    torch.testing.assert_close(predict(point.predictor, split).logits[0], expected)
    assert at_mean.restore(point.model.adapter, {}).num_draws == 1


def test_its_settings_reach_the_optimizer(make_choice):
    """With λ other than N: σ at the start, and a step that the radius bounds."""
    adapter = make_choice(svd=False)
    config = FitConfig(lr=0.2, clip_norm=math.inf)
    options = {"ess": 500.0, "prior_scale": 0.3, "hess_init": 2.0, "beta2": 1 - 1e-9}
    method = IVON(config, clip_radius=0.05, **options)
    q = method.make_optimizer(method.make_model(adapter, num_data=12))
    parameters = list(adapter.named_parameters().values())
    before = [p.detach().clone() for p in parameters]
    expected = (500 * (2.0 + 1 / (500 * 0.3**2))) ** -0.5
    for p in parameters:
        torch.testing.assert_close(q.scale(p), torch.full_like(p, expected))
    with q.drawn():
        sum(50 * p.sum() for p in parameters).backward()
    q.step()
    for p, start in zip(parameters, before, strict=True):
        torch.testing.assert_close(start - p.detach(), torch.full_like(p, 0.2 * 0.05))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ess": 0.0}, "ess is 0.0"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"draws": -1}, "draws is -1"),
        ({"config": FitConfig(clip_norm=1.0)}, "clip_norm is 1.0, .* set clip_norm=inf"),
        ({"config": FitConfig(accumulation=2)}, "accumulation is 2"),
        ({"config": FitConfig(weight_decay=0.1)}, "set prior_scale"),
        ({"config": FitConfig(eval_every=1, keep="best")}, "keep is 'best'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IVON(**options)
