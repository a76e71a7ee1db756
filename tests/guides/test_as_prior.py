"""The posterior of one task as the prior of the next."""

from __future__ import annotations

import shlex
from copy import deepcopy

import pyro.distributions as dist
import pytest
import torch
from conftest import FAST, ROOT, blocks, make_records, scalabl, write_jsonl

from benchmarks.correctness._linear import LinearAdapter, LinearGaussian, make_split
from scalabl_pyro import FitConfig, KLSchedule, ScalaBLModel, fit
from scalabl_pyro.guides import make_guide
from scalabl_pyro.infer.chains import _potential, whole_split


def halves(*, correlated: bool, count: int = 40):
    """The data of two tasks, and of both together, as (features, labels)."""
    features = torch.randn(count, 1, 4)
    if correlated:
        features = features + torch.randn(count, 1, 1)
    else:  # orthogonal columns, so that the posterior of each task is diagonal
        columns = torch.linalg.qr(torch.randn(2, count // 2, 4)).Q * 3
        features = columns.reshape(count, 1, 4)
    labels = features.sum(-1) + 0.7 * torch.randn(count, 1)
    half = count // 2
    parts = (slice(half), slice(half, None), slice(None))
    return [make_split(features[part], labels[part]) for part in parts]


def linear(split, prior=None) -> LinearGaussian:
    model = LinearGaussian(LinearAdapter((2, 2)), num_data=len(split), noise=0.7)
    if prior is not None:
        model.prior = prior
    return model


def exactly(guide, exact) -> None:
    """Set a guide to a posterior that is known."""
    with torch.no_grad():
        if hasattr(guide, "scale_tril"):
            deviations = exact.scale_tril.diagonal()
            guide.loc, guide.scale = exact.mean, deviations
            guide.scale_tril = exact.scale_tril / deviations[:, None]
        else:
            guide.loc, guide.scale = exact.mean.reshape(2, 2), exact.stddev.reshape(2, 2)


@pytest.mark.parametrize(("name", "correlated"), [("normal", False), ("multivariate_normal", True)])
def test_two_tasks_in_turn_are_both_at_once(name, correlated):
    """Up to a constant, log p(s) + log p(D2 | s) is the log density given both tasks' data."""
    first, second, both = halves(correlated=correlated)
    model = linear(first)
    guide = make_guide(model, name)
    exactly(guide, model.posterior(first))
    model = linear(second, guide.as_prior())
    potential, _, _ = _potential(model, whole_split(model, second, None))
    exact = linear(both).posterior(both)
    s = torch.randn(6, 2, 2)
    log_density = torch.stack([-potential({"s": each}) for each in s])
    expected = exact.log_prob(s.flatten(1))
    torch.testing.assert_close(
        log_density - log_density.mean(), expected - expected.mean(), rtol=1e-3, atol=1e-3
    )


def test_the_second_posterior_is_that_of_both_tasks():
    """By SVI; and what the first guide becomes later is of no effect."""
    first, second, both = halves(correlated=True)
    model = linear(first)
    guide = make_guide(model, "multivariate_normal")
    exactly(guide, model.posterior(first))
    prior = guide.as_prior()
    with torch.no_grad():
        guide.loc = guide.loc + 100
    model = linear(second, prior)
    later = make_guide(model, "multivariate_normal")
    config = FitConfig(steps=600, batch_size=20, lr_guide=0.05, kl=KLSchedule(1.0))
    fit(model, later, second, config, progress=False)
    exact = linear(both).posterior(both)
    error = (later.joint().mean.detach() - exact.mean) / exact.stddev
    assert error.abs().max() < 0.3
    torch.testing.assert_close(later.joint().stddev.detach(), exact.stddev, rtol=0.2, atol=0)
    assert guide.loc.grad is None


@torch.no_grad()
def divergence(q, p) -> float:
    normals = (dist.Normal(guide.loc, guide.scale) for guide in (q, p))
    return float(torch.distributions.kl_divergence(*normals).sum())


def test_a_language_model_goes_on_from_its_posterior(make_causal, records):
    """V, B and heads stay; s moves from where it was."""
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = make_guide(model, "normal")
    config = FitConfig(steps=3, batch_size=4, lr_guide=0.4, kl=KLSchedule(1.0))
    fit(model, guide, split, config, progress=False)
    adapter.freeze()
    before = {name: value.clone() for name, value in adapter.state().items()}
    prior = deepcopy(guide).as_prior()
    again = ScalaBLModel(adapter, num_data=len(split), prior=prior)
    later = make_guide(again, "normal", init_loc=guide.median()["s"])
    assert later.kl(prior()) == pytest.approx(divergence(later, guide), rel=1e-4)
    fit(again, later, split, config, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in adapter.state().items())
    assert not torch.equal(later.loc, guide.loc)


def test_a_posterior_above_zero_is_a_prior_above_zero(make_causal):
    """A log-normal of torch; the numbers of a next guide are those of the first, not their logs."""
    adapter = make_causal()
    model = ScalaBLModel(adapter, num_data=3, prior=dist.LogNormal(2.0, 0.3))
    guide = make_guide(model, "normal", init_loc=torch.full(adapter.shape, 7.4), init_scale=0.2)
    prior = guide.as_prior()
    assert prior.support.check(torch.tensor([1e-3, 5.0])).all()
    assert not prior.support.check(torch.tensor(-1.0))
    assert not prior().support.check(torch.full(adapter.shape, -1.0))
    assert prior().event_shape == adapter.shape, "a look, before a model takes it"
    q = torch.distributions.LogNormal(torch.full(adapter.shape, 7.4).log(), 0.2)
    s = q.sample()
    torch.testing.assert_close(prior().log_prob(s), q.log_prob(s).sum())
    later = ScalaBLModel(adapter, num_data=3, prior=prior)
    start = make_guide(later, "normal")
    start.load_state_dict(prior.posterior.state_dict())
    torch.testing.assert_close(start.median()["s"], torch.full(adapter.shape, 7.4))
    torch.testing.assert_close(start.get_posterior().log_prob(s), q.log_prob(s).sum())


@pytest.mark.parametrize("options", [{"name": "delta"}, {"name": "top_normal", "blocks": 1}])
def test_a_point_is_no_prior(make_causal, options):
    model = ScalaBLModel(make_causal(), num_data=3)
    with pytest.raises(ValueError, match=r"is a point.* no prior: nothing could move"):
        make_guide(model, **options).as_prior()


def test_the_commands_and_the_snippet_of_a_second_task_run(tmp_path, local_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, records in (("FIRST", make_records(18)), ("SECOND", make_records(15))):
        write_jsonl(tmp_path / folder / "train.jsonl", records[6:])
        write_jsonl(tmp_path / folder / "test.jsonl", records[:6])
    (block,) = blocks(ROOT / "docs" / "method.md", "bash")
    for command in block.splitlines():
        words = shlex.split(command.replace("Qwen/Qwen2.5-0.5B", str(local_model)))
        assert scalabl(*words[1:], "lora.targets=[q_proj]", *FAST) == 0, command
    write_jsonl(tmp_path / "second.jsonl", make_records(9))
    (code,) = blocks(ROOT / "docs" / "method.md", "python")
    names: dict = {}
    exec(compile(code.replace("steps=200", "steps=20, lr_guide=0.1"), "method.md", "exec"), names)
    moved = names["guide"].median()["s"] - names["run"].guide.median()["s"]
    assert float(moved.abs().max()) > 0
    assert not names["adapter"].named_parameters()
