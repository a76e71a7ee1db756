"""The published algorithm, against its formulas written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import write_jsonl
from scipy import stats

from scalabl_pyro import FitConfig, ScalaBLModel, predict
from scalabl_pyro.infer import NonFiniteLossError
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.methods import METHODS
from scalabl_pyro.methods.bursts import burst_steps, burst_weight, in_bursts
from scalabl_pyro.methods.reference import AutoSubspacePositiveNormal, Reference
from scalabl_pyro.runs import train_run
from scalabl_pyro.runs.config import RunConfig
from scalabl_pyro.runs.data import DataConfig
from scalabl_pyro.runs.folder import load_run

CONFIG = FitConfig(steps=4, batch_size=4, lr=1e-2, lr_guide=1e-2, eps=1e-6)


@pytest.fixture
def parts(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    return model, AutoSubspacePositiveNormal(model), split


def train(model, guide, split, config, *, lr_kl=0.2, **options):
    method = Reference(config, progress=False, lr_kl=lr_kl)
    return method._train(model, guide, split, seed=0, **options)


def reversed_kl(mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """KL(Normal(0, 1) ‖ Normal(mean, scale²)) of each coordinate."""
    return scale.log() + (1 + mean**2) / (2 * scale**2) - 0.5


@pytest.mark.parametrize("steps", [0, 1, 66, 706, 5000])
def test_the_weights_of_a_round_double_add_up_to_one_and_start_again(steps):
    weights = [burst_weight(step, steps) for step in range(2 * (steps + 1))]
    assert sum(weights[: steps + 1]) == pytest.approx(1)
    assert weights[steps + 1 :] == weights[: steps + 1]
    tail = weights[max(0, steps - 60) : steps + 1]
    assert all(b / a == pytest.approx(2) for a, b in pairwise(tail))
    if steps <= 66:
        assert weights[0] == pytest.approx(2**0 / (2 ** (steps + 1) - 1))


def test_a_published_run_has_5_to_16_bursts():
    """5,000 steps of batch 4 on WinoGrande's S, M and L."""
    bursts = [5000 / (burst_steps(count, 4) + 1) for count in (640, 2558, 10234)]
    assert bursts == sorted(bursts, reverse=True)
    assert bursts[0] == pytest.approx(16, abs=0.5)
    assert bursts[-1] == pytest.approx(5, abs=0.5)


@pytest.mark.parametrize(("N", "B", "steps"), [(2558, 4, 544), (640, 4, 316), (12, 12, 22)])
def test_a_round_has_the_whole_number_below(N, B, steps):
    """100 · 2558^(π/8) / 4 = 544.7; a batch has no more examples than there are."""
    assert burst_steps(N, B) == steps
    config = replace(CONFIG, batch_size=64 if B == N else B)
    assert in_bursts(config, N).kl.between == steps


def test_the_prior_has_the_scale_of_the_settings(make_causal):
    adapter = make_causal()
    model = Reference(prior_scale=0.3).make_model(adapter, num_data=1)
    s = torch.randn(adapter.shape)
    expected = stats.norm(scale=0.3).logpdf(s).sum()
    assert float(model.prior().log_prob(s)) == pytest.approx(expected, rel=1e-5)


def test_the_initial_state_has_the_known_divergences(make_causal):
    """Per coordinate KL(p‖q) is about 361.9 and KL(q‖p) about 2.82, for the published start."""
    adapter = make_causal()
    q = AutoSubspacePositiveNormal(ScalaBLModel(adapter, num_data=1)).marginals()
    torch.testing.assert_close(q.loc, adapter.init_loc)
    low, high = 0.05 / 2**0.5, 0.05
    assert (q.scale >= low).all()
    assert (q.scale <= high).all()
    assert len(q.scale.unique()) == q.scale.numel()
    p = dist.Normal(0.0, 1.0)
    for known, divergence in (
        (361.9, torch.distributions.kl_divergence(p, q).detach()),
        (2.82, torch.distributions.kl_divergence(q, p).detach()),
    ):
        error = float(divergence.std()) / divergence.numel() ** 0.5
        assert float(divergence.mean()) == pytest.approx(known, abs=4 * error)


def test_the_kl_steps_follow_the_derivatives_of_the_reversed_kl(parts):
    """With AdamW at rest, q obeys ∂KL/∂λ = μ²/σ² and ∂KL/∂ς = 1 − (1 + μ²)/σ², at a rate that warms
    up and decays."""
    model, guide, split = parts
    steps = 2 * (burst_steps(12, 4) + 1)
    config = replace(CONFIG, steps=steps, lr=0.0, lr_guide=0.0, warmup=0.25)
    log_mean, log_scale = (p.detach().double() for p in (guide.log_loc, guide.log_scale))
    projections = [p.detach().clone() for p in model.adapter.named_parameters().values()]
    expected, before = [], reversed_kl(log_mean.exp(), log_scale.exp()).sum()
    warmup = 0.25 * steps
    for step in range(steps):
        factor = (step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup)
        weight = factor * 2.0 ** (step % 67) / (2.0**67 - 1)
        mean, scale = log_mean.exp(), log_scale.exp()
        log_mean = log_mean - 0.2 * weight * mean**2 / scale**2
        log_scale = log_scale - 0.2 * weight * (1 - (1 + mean**2) / scale**2)
        known = ((2 * log_scale).exp() + (2 * log_mean).exp() - 1) / 2 - log_scale
        expected.append(float(known.sum()))
    history = train(model, guide, split, config).history
    q = guide.marginals()
    torch.testing.assert_close(q.loc.double(), log_mean.exp(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(q.scale.double(), log_scale.exp(), rtol=1e-3, atol=1e-4)
    assert [row["kl"] for row in history] == pytest.approx(expected, rel=1e-3)
    after = reversed_kl(log_mean.exp(), log_scale.exp()).sum()
    assert after < before / 100
    moved = model.adapter.named_parameters().values()
    assert all(torch.equal(a, b) for a, b in zip(moved, projections, strict=True))


def test_the_likelihood_steps_are_adamw_on_the_nll_of_one_draw(make_causal, records):
    """Without the KL, the loop equals one in stock torch with the same adapter and draws."""
    ends = []
    for by_hand in (False, True):
        adapter = make_causal()
        split = adapter.readout.encode(records)
        model = ScalaBLModel(adapter, num_data=len(split))
        torch.manual_seed(0)
        guide = AutoSubspacePositiveNormal(model)
        parameters = [*adapter.named_parameters().values(), *guide.parameters()]
        config = replace(CONFIG, warmup=0.0, decay="constant", clip_norm=math.inf)
        torch.manual_seed(1)
        if by_hand:
            optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.0)
            minibatches = split.minibatches(4, seed=0)
            for _ in range(4):
                batch = next(minibatches)
                noise = torch.randn(adapter.shape)
                s = guide.log_loc.exp() + guide.log_scale.exp() * noise
                log_p = adapter(batch, s).log_softmax(-1)
                optimizer.zero_grad()
                (-log_p[torch.arange(4), batch.labels].mean()).backward()
                optimizer.step()
        else:
            train(model, guide, split, config, lr_kl=1e-30)
        ends.append(parameters)
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_everything_moves_and_the_history_says_what(parts):
    model, guide, split = parts
    parameters = {**model.adapter.named_parameters(), **dict(guide.named_parameters())}
    before = {name: value.detach().clone() for name, value in parameters.items()}
    history = train(model, guide, split, CONFIG).history
    assert [n for n, value in parameters.items() if torch.equal(value, before[n])] == []
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert all(row["loss"] == row["nll"] for row in history)


def test_a_start_that_no_exponential_reaches_is_refused(parts):
    model = parts[0]
    loc = model.init_loc
    loc[0, 0] = -0.5
    with pytest.raises(ValueError, match=r"init_loc has the value -0\.5"):
        AutoSubspacePositiveNormal(model, init_loc=loc)


def test_the_last_good_state_is_back_after_a_loss_that_is_not_finite(parts):
    model, guide, split = parts
    states = []

    def spoil_the_second_step() -> float:
        states.append(guide.log_loc.detach().clone())
        if len(states) == 2:
            with torch.no_grad():
                guide.log_loc.fill_(float("nan"))
        return 1.0

    config = replace(CONFIG, eval_every=1)
    # Validation would find the NaN in an argument, and could not tell the step.
    with (
        pyro.validation_enabled(True),
        pytest.raises(NonFiniteLossError, match="are those of step 1, the last good one"),
    ):
        train(model, guide, split, config, validate=spoil_the_second_step)
    assert torch.equal(guide.log_loc, states[0])


def test_no_deviation_runs_away(make_causal, records):
    """Published rates, at which σ itself as the parameter took some to 200 and more."""
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspacePositiveNormal(model)
    steps = 3 * (burst_steps(12, 4) + 1)
    config = replace(CONFIG, steps=steps, lr=0.0, lr_guide=0.0, batch_size=4)
    train(model, guide, split, config)
    scale = guide.marginals().scale.detach()
    # Where KL(p‖q) is least, σ is 1, and μ is 0.
    assert float(scale.max()) < 3
    assert float(scale.min()) > 0.3


def test_the_best_state_is_kept_when_asked(parts):
    model, guide, split = parts
    states, values = [], iter([3.0, 1.0, 2.0])

    def validate() -> float:
        states.append(guide.log_loc.detach().clone())
        return next(values)

    config = replace(CONFIG, steps=5, eval_every=2, keep="best")
    result = train(model, guide, split, config, validate=validate)
    assert result.best_step == 4
    assert torch.equal(guide.log_loc, states[1])
    assert [row.get("validation_nll") for row in result.history] == [None, 3.0, None, 1.0, 2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_scale": 0.0}, "init_scale is 0.0"),
        ({"prior_scale": -1.0}, "prior_scale is -1.0"),
        ({"lr_kl": 0.0}, "lr_kl is 0.0"),
        ({"draws": 0}, "draws is 0: expected 1 or more"),
        ({"config": FitConfig(accumulation=2)}, "accumulation is 2"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Reference(**options)


def test_a_run_is_saved_and_loaded_as_it_was(local_model, records, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "reference", Reference)
    config = RunConfig(
        model=ModelConfig(str(local_model), device="cpu"),
        lora=AdapterConfig(r=4, targets=("q_proj", "v_proj")),
        data=DataConfig(path=str(write_jsonl(tmp_path / "data.jsonl", records))),
        run_dir=str(tmp_path / "run"),
        method={"name": "reference", "draws": 3},
        fit=CONFIG,
        progress=False,
    )
    metrics = train_run(config)
    loaded = load_run(tmp_path / "run")
    assert isinstance(loaded.guide, AutoSubspacePositiveNormal)
    assert loaded.predictor.num_draws == 3
    predictions = predict(loaded.predictor, loaded.readout.encode(records))
    assert predictions.logits.shape == (3, len(records), 4)
    again = train_run(replace(config, run_dir=str(tmp_path / "again")))
    assert again == metrics
    mean = loaded.guide.median()["s"]
    torch.testing.assert_close(mean, loaded.guide.marginals().loc.detach())
