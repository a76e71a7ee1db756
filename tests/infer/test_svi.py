from __future__ import annotations

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_records, whole
from numpy.polynomial.hermite_e import hermegauss
from omegaconf import OmegaConf
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroParam
from torch.nn.functional import logsigmoid

import scalabl_pyro as sp
from scalabl_pyro import (
    AutoSubspaceDelta,
    AutoSubspaceNormal,
    FitConfig,
    KLSchedule,
    LoRAModel,
    ScalaBLModel,
    Split,
    fit,
)
from scalabl_pyro.commands._configs import CONFIGS
from scalabl_pyro.data import Batch, Example
from scalabl_pyro.guides import AutoSubspaceMultivariateNormal
from scalabl_pyro.infer import Callback, KLBudget, NonFiniteLossError, no_guide
from scalabl_pyro.infer.parameters import make_parameters
from scalabl_pyro.prediction import NonFinitePredictionsError
from scalabl_pyro.readouts import LabelTokens

ELBOS = {
    "Trace_ELBO": Trace_ELBO(max_plate_nesting=1),
    "TraceMeanField_ELBO": TraceMeanField_ELBO(max_plate_nesting=1),
    "vectorised": Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    "looped": Trace_ELBO(num_particles=2, max_plate_nesting=1),
    "RenyiELBO": RenyiELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
}


class NormalNormal(ScalaBLModel):
    """Every label is a noisy reading of every coordinate: y_n ~ Normal(s_mj, 2), prior N(0, 1)."""

    def forward(self, batch):
        s = pyro.sample("s", self.prior())
        with pyro.plate("data", self.num_data, subsample=torch.arange(len(batch)), dim=-1):
            readings = batch.labels.float()[:, None, None].expand(-1, *self.adapter.shape)
            pyro.sample("y", dist.Normal(s, 2.0).to_event(2), obs=readings)


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_a_conjugate_model_recovers_the_known_posterior(make_causal, beta):
    adapter = make_causal(targets=("lm_head",))
    split = adapter.readout.encode(make_records(40))
    model = NormalNormal(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model, init_scale=0.5)
    config = FitConfig(
        steps=1500, batch_size=20, lr=0.0, lr_guide=0.03, clip_norm=1e3, kl=KLSchedule(beta)
    )
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    fit(model, guide, split, config, elbo=elbo, progress=False)
    precision = 1 + len(split) / (4 * beta)
    mean = sum(e.label for e in split) / (4 * beta) / precision
    q = guide.get_posterior().base_dist
    assert float(q.loc.detach().mean()) == pytest.approx(mean, abs=0.03)
    assert float(q.scale.detach().mean()) == pytest.approx(precision**-0.5, rel=0.05)


class ManyLogistic(ScalaBLModel):
    """Logistic regressions on the same data, one for each coordinate: each is a replicate."""

    def forward(self, batch):
        s = pyro.sample("s", self.prior())
        x, y = (v[:, None, None].expand(-1, *self.adapter.shape) for v in batch.inputs.values())
        with pyro.plate("data", self.num_data, subsample=torch.arange(len(batch)), dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=x * s).to_event(2), obs=y)


def binary_data(count: int, *, coin_flips: bool) -> Split:
    """x ~ Normal(0, 1), y its sign or a coin flip; a token is the number of its example."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator)
    y = torch.randint(2, (count,), generator=generator) if coin_flips else (x > 0).long()

    def collate(examples):
        rows = torch.tensor([example.rows["input_ids"][0][0] for example in examples])
        choices = torch.ones(len(rows), 2, dtype=torch.bool)
        return Batch({"x": x[rows], "y": y[rows].float()}, choices)

    examples = [Example({"input_ids": [[i]]}, 2, int(label)) for i, label in enumerate(y)]
    return Split(make_records(count), examples, collate)


def log_likelihood(batch: Batch, s: torch.Tensor) -> torch.Tensor:
    """Σ_n log p(y_n | x_n, s) for every s of a vector."""
    x, y = batch.inputs["x"].double(), batch.inputs["y"].double()
    return logsigmoid((2 * y - 1) * x * s[:, None]).sum(1)


def exact_sd(batch: Batch) -> float:
    """Standard deviation of p(s | y), on a grid."""
    s = torch.linspace(-8, 16, 20_001, dtype=torch.float64)
    p = (log_likelihood(batch, s) - s**2 / 2).softmax(0)
    return float((p * (s - p @ s) ** 2).sum().sqrt())


def best_normal(batch: Batch) -> tuple[float, float]:
    """Mean and σ of the normal with the lowest KL(q(s) ‖ p(s | y)), by quadrature."""
    z, weights = map(torch.as_tensor, hermegauss(60))
    unknowns = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([unknowns], max_iter=200, line_search_fn="strong_wolfe")

    def negative_elbo() -> torch.Tensor:
        optimizer.zero_grad()
        q = dist.Normal(unknowns[0], unknowns[1].exp())
        fit = weights / weights.sum() @ log_likelihood(batch, q.mean + q.stddev * z)
        loss = torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0)) - fit
        loss.backward()
        return loss

    optimizer.step(negative_elbo)
    mean, log_scale = unknowns.tolist()
    return mean, math.exp(log_scale)


@pytest.mark.parametrize("coin_flips", [False, True], ids=["separable", "coin flips"])
@pytest.mark.parametrize("count", [32, 128, 512])
def test_the_posterior_is_as_wide_as_the_exact_one(make_causal, count, coin_flips):
    """Coin flips narrow it with N; the sign of x moves the mean away instead."""
    adapter = make_causal()
    split = binary_data(count, coin_flips=coin_flips)
    model = ManyLogistic(adapter, num_data=count)
    mean, scale = best_normal(whole(split))
    assert scale == pytest.approx(exact_sd(whole(split)), rel=0.03)  # a normal is near the truth
    # The mean starts where it is to stay: towards a mean of 7 the slope is too flat to go quickly.
    start = torch.full(adapter.shape, mean)
    guide = AutoSubspaceNormal(model, init_loc=start, init_scale=0.3)
    config = FitConfig(
        steps=200,
        batch_size=count,
        lr=0.0,
        lr_guide=0.05,
        clip_norm=math.inf,
        kl=KLSchedule(1.0),
    )
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    fit(model, guide, split, config, elbo=elbo, progress=False)
    q = guide.marginals()
    for estimate, expected in ((q.loc.detach(), mean), (q.scale.detach(), scale)):
        error = float(estimate.std()) / estimate.numel() ** 0.5
        assert float(estimate.mean()) == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS.keys())
def test_fit_moves_every_trainable_tensor_under_any_elbo(adapter, split, elbo):
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    parameters = {**adapter.named_parameters(), **dict(guide.named_parameters())}
    before = {name: value.detach().clone() for name, value in parameters.items()}
    result = fit(model, guide, split, FitConfig(steps=3, batch_size=4), elbo=elbo, progress=False)
    assert [n for n, value in parameters.items() if torch.equal(value, before[n])] == []
    assert all(math.isfinite(row["loss"]) for row in result.history)


def test_fit_trains_a_point_estimate_and_pyros_own_guides(make_choice, records):
    for make_guide in (lambda _: no_guide, AutoMultivariateNormal):
        adapter = make_choice()
        split = adapter.readout.encode(records)
        model = (LoRAModel if make_guide is not AutoMultivariateNormal else ScalaBLModel)(
            adapter, num_data=len(split)
        )
        before = {k: v.detach().clone() for k, v in adapter.named_parameters().items()}
        config = FitConfig(steps=3, batch_size=4)
        result = fit(model, make_guide(model), split, config, progress=False)
        assert not any(torch.equal(v, before[k]) for k, v in adapter.named_parameters().items())
        if make_guide is not AutoMultivariateNormal:
            assert result.history[0]["loss"] == pytest.approx(result.history[0]["nll"], rel=1e-5)


@pytest.mark.parametrize(
    "make_guide",
    [
        AutoSubspaceNormal,
        AutoSubspaceMultivariateNormal,
        partial(AutoSubspaceMultivariateNormal, per_module=True),
        AutoMultivariateNormal,
        AutoLowRankMultivariateNormal,
    ],
)
def test_the_numbers_trained_are_those_that_move(make_causal, records, make_guide):
    adapter = make_causal(targets=("q_proj", "lm_head"))
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = make_guide(model)
    make_parameters(guide, split)
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    result = fit(model, guide, split, FitConfig(steps=3, batch_size=4), progress=False)
    moved = sum(int((p != b).sum()) for p, b in zip(guide.parameters(), before, strict=True))
    matrices = sum(p.numel() for p in adapter.named_parameters().values())
    assert result.num_trained == matrices + moved


def test_history_adds_up(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    elbo = TraceMeanField_ELBO(max_plate_nesting=1)
    config = FitConfig(steps=5, batch_size=4, kl=KLSchedule(2.0, "linear", 1.0))
    history = fit(
        model, AutoSubspaceNormal(model), split, config, elbo=elbo, progress=False
    ).history
    assert [row["kl_weight"] for row in history] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    row = history[0]
    start = AutoSubspaceNormal(ScalaBLModel(make_causal(), num_data=1)).get_posterior()
    kl = torch.distributions.kl_divergence(start, model.prior()).detach()
    expected = row["nll"] + row["kl_weight"] * float(kl) / len(split)
    assert row["loss"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("clip_norm", [1e3, 0.01])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(12, 1), (6, 2), (3, 4)])
def test_accumulation_averages_minibatches(
    make_causal, records, batch_size, accumulation, clip_norm
):
    """One step of gradient descent, whose size tells that of the gradient, against one by hand."""
    adapter = make_causal(targets=("q_proj", "lm_head"))
    split = adapter.readout.encode(records)
    parameters = list(adapter.named_parameters().values())
    loss = torch.nn.functional.cross_entropy(adapter(whole(split)), split.labels)
    slopes = torch.autograd.grad(loss, parameters)
    norm = float(torch.cat([g.flatten() for g in slopes]).norm())
    assert 0.05 < norm < 1000
    factor = min(1.0, clip_norm / norm)
    expected = [p.detach() - 2.0 * factor * g for p, g in zip(parameters, slopes, strict=True)]
    config = FitConfig(
        steps=1,
        batch_size=batch_size,
        accumulation=accumulation,
        warmup=0.0,
        decay="constant",
        clip_norm=clip_norm,
    )
    optimizer = torch.optim.SGD(parameters, lr=2.0)
    model = LoRAModel(adapter, num_data=12)
    fit(model, no_guide, split, config, optimizer=optimizer, progress=False)
    for one, two in zip(parameters, expected, strict=True):
        torch.testing.assert_close(one.detach(), two, atol=1e-6, rtol=1e-4)


def test_two_runs_with_one_seed_are_equal_to_the_bit(make_choice, records):
    histories, weights = [], []
    for _ in range(2):
        pyro.set_rng_seed(11)
        adapter = make_choice()
        split = adapter.readout.encode(records)
        model = ScalaBLModel(adapter, num_data=len(split))
        result = fit(
            model,
            AutoSubspaceNormal(model),
            split,
            FitConfig(steps=4, batch_size=4),
            seed=5,
            progress=False,
        )
        histories.append(result.history)
        weights.append(list(adapter.named_parameters().values()))
    assert histories[0] == histories[1]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    seen = []
    original = split.collate

    def poisoned(examples):
        batch = original(examples)
        seen.append(len(seen))
        if len(seen) == 4:
            with torch.no_grad():  # what a step that is too long leaves behind
                next(iter(adapter.named_parameters().values())).fill_(float("nan"))
        return batch

    split.collate = poisoned
    with (
        pytest.warns(UserWarning, match="NaN"),
        pytest.raises(NonFiniteLossError, match="at step 4 of 9 the loss is nan"),
    ):
        fit(model, guide, split, FitConfig(steps=9, batch_size=4), progress=False)
    parameters = [*adapter.named_parameters().values(), *guide.parameters()]
    assert all(p.isfinite().all() for p in parameters)
    # Nothing is left of the step that failed: who follows the advice trains on.
    split.collate = original
    result = fit(model, guide, split, FitConfig(steps=2, batch_size=4, lr=1e-4), progress=False)
    assert len(result.history) == 2


def test_the_best_state_is_kept_when_asked(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = LoRAModel(adapter, num_data=len(split))
    states, values = [], iter([3.0, 1.0, 2.0])

    def validate() -> float:
        states.append([p.detach().clone() for p in adapter.named_parameters().values()])
        return next(values)

    config = FitConfig(steps=6, batch_size=4, eval_every=2, keep="best")
    result = fit(model, no_guide, split, config, validate=validate, progress=False)
    assert result.best_step == 4
    parameters = adapter.named_parameters().values()
    assert all(torch.equal(a, b) for a, b in zip(parameters, states[1], strict=True))
    assert math.isfinite(result.history[-1]["kl"])
    assert [row.get("validation_nll") for row in result.history] == [
        None,
        3.0,
        None,
        1.0,
        None,
        2.0,
    ]


def test_the_last_step_is_validated_whatever_the_interval(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    config = FitConfig(steps=5, batch_size=4, eval_every=10, keep="best")
    before = {k: v.clone() for k, v in adapter.named_parameters().items()}
    model = LoRAModel(adapter, num_data=12)
    result = fit(model, no_guide, split, config, validate=lambda: 1.0, progress=False)
    assert result.best_step == 5
    assert not any(torch.equal(v, before[k]) for k, v in adapter.named_parameters().items())


def test_what_a_prior_learns_is_trained_too(make_causal, records):
    class LearnedScale(ScalaBLModel):
        def __init__(self, adapter, **options):
            super().__init__(adapter, **options)
            self.tau = PyroParam(torch.tensor(1.0), dist.constraints.positive)

        def forward(self, batch):
            self.projections()
            s = pyro.sample("s", dist.Normal(0.0, self.tau).expand(self.adapter.shape).to_event(2))
            return self.observe(batch, self.adapter(batch, s))

    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = LearnedScale(adapter, num_data=len(split))
    fit(model, AutoSubspaceNormal(model), split, FitConfig(steps=5, lr=0.05), progress=False)
    assert float(model.tau.detach()) != 1.0


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_kl_schedules_are_positive_rise_and_end_at_their_weight(shape):
    weights = [KLSchedule(3.0, shape, 0.5)(step, 10) for step in range(10)]
    assert all(w > 0 for w in weights)
    assert weights == sorted(weights)
    assert weights[4:] == pytest.approx([3.0] * 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"decay": "step"}, "decay is 'step'"),
        ({"keep": "first"}, "keep is 'first'"),
        ({"keep": "best"}, "eval_every is 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "KL weight is 0.0"),
        ({"shape": "step"}, "shape is 'step'"),
        ({"fraction": 0.0}, "fraction is 0.0"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KLSchedule(**options)


def test_training_needs_labels(make_causal):
    adapter = make_causal()
    split = adapter.readout.encode(make_records(4, labelled=False))
    with pytest.raises(ValueError, match="label in every record"):
        fit(LoRAModel(adapter, num_data=4), no_guide, split, FitConfig(steps=1), progress=False)


def test_a_kl_budget_is_reached(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    ends = {}
    for nats in (5.0, 20.0):
        model = ScalaBLModel(adapter, num_data=1000)
        guide = AutoSubspaceNormal(model)
        config = FitConfig(steps=250, lr=0.0, lr_guide=0.05, kl_budget=nats)
        history = fit(model, guide, split, config, progress=False).history
        ends[nats] = history[-1]["kl"]
        assert ends[nats] == pytest.approx(nats, rel=0.15)
    under_way = KLBudget(10.0)
    for _ in range(100):
        under_way.update(1e9)
    assert under_way.factor < math.exp(3 + 1.1)  # far away it does not wind up
    for kl in (1e9, 1e-9):
        out_of_reach = KLBudget(10.0)
        for _ in range(30_000):
            out_of_reach.update(kl)
        KLSchedule(out_of_reach.factor)  # a weight still, finite and above 0
    weights = KLBudget(10.0)
    weights.update(1e9)
    assert weights.factor > 1
    weights.update(0.0)
    weights.update(0.0)
    assert weights.factor < 1


def test_a_budget_must_be_positive():
    for budget in (-1, 0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"kl_budget is {budget}: expected a finite number"):
            FitConfig(kl_budget=budget)


def test_a_point_has_no_kl_to_budget(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    config = FitConfig(steps=1, kl_budget=2.0)
    with pytest.raises(ValueError, match="the guide is a point"):
        fit(model, AutoSubspaceDelta(model), split, config, progress=False)


@pytest.mark.parametrize("raises", [False, True])
def test_a_validation_that_is_no_number_stops_training(make_causal, records, raises):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    config = FitConfig(steps=4, eval_every=2, keep="best")
    seen = []

    def validate() -> float:
        assert not adapter.peft_model.training
        if raises:  # as predict does
            raise NonFinitePredictionsError("3 of 12 examples are nan")
        return float("nan")

    class Remember(Callback):
        def on_step(self, row):
            seen.append({name: p.detach().clone() for name, p in adapter.state().items()})

    with pytest.raises(NonFiniteLossError, match=r"nan.*; this was after step 2, .* step 1"):
        fit(
            model,
            AutoSubspaceNormal(model),
            split,
            config,
            validate=validate,
            callbacks=[Remember()],
            progress=False,
        )
    for name, parameter in adapter.state().items():
        assert torch.equal(parameter, seen[0][name]), name
    assert not any(module.training for module in adapter.peft_model.modules())


def test_a_likelihood_of_ones_own_knows_whether_it_trains(make_causal, records):
    modes = []

    class Watched(ScalaBLModel):
        def observe(self, batch, logits):
            modes.append(self.training)
            return super().observe(batch, logits)

    adapter = make_causal()
    split = adapter.encode(records)
    model = Watched(adapter, num_data=len(split))
    model.eval()
    fit(model, AutoSubspaceNormal(model), split, FitConfig(steps=2), progress=False)
    assert modes == [True, True]
    assert not model.training


def test_dropout_is_on_again_after_a_validation(make_causal, records):
    adapter = make_causal()
    adapter.set_dropout(0.5)
    split = adapter.readout.encode(records)
    dropouts = [m for m in adapter.peft_model.modules() if isinstance(m, torch.nn.Dropout)]
    modes = []

    class Look(Callback):
        def on_step(self, row):
            modes.append([dropout.training for dropout in dropouts])

    def validate() -> float:
        assert not any(dropout.training for dropout in dropouts)
        return 1.0

    config = FitConfig(steps=3, batch_size=4, eval_every=1)
    model = LoRAModel(adapter, num_data=len(split))
    fit(
        model, no_guide, split, config,
        validate=validate, callbacks=[Look()], progress=False,
    )  # fmt: skip
    assert modes == [[True] * len(adapter.layers)] * 3


def test_a_callback_that_fails_leaves_no_dropout_behind(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))

    class Fails(Callback):
        def on_step(self, row):
            raise RuntimeError("a tracker is down")

    with pytest.raises(RuntimeError, match="tracker"):
        fit(model, AutoSubspaceNormal(model), split, FitConfig(steps=2), callbacks=[Fails()])
    assert not any(module.training for module in adapter.peft_model.modules())


def test_what_is_meant_otherwise_is_told_before_training(make_causal, make_choice, records):
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide, config = AutoSubspaceNormal(model), FitConfig(steps=1, batch_size=4)
    with pytest.raises(TypeError, match=r"validate is a Split: expected a function .* sp\.draw"):
        fit(model, guide, split, config, validate=split)
    other = make_choice().encode(records)
    with pytest.raises(ValueError, match=r"encoded by MultipleChoice, .* readout is LabelTokens"):
        fit(model, guide, other, config)
    for wrong in (split, records):
        with pytest.raises(
            TypeError, match=rf"batch is a {type(wrong).__name__}: expected a Batch"
        ):
            model(wrong)
    for wrong in (2.5, True):
        with pytest.raises(ValueError, match=rf"steps is {wrong}: expected a whole number"):
            FitConfig(steps=wrong)
    assert type(FitConfig(steps=np.int64(5)).steps) is int

    class Mine(LabelTokens):
        """Another one of the kind."""

    adapter.readout.__class__ = Mine
    fit(model, guide, split, config, progress=False)
    laplace = sp.laplace(model, split, loc=adapter.init_loc)
    with pytest.raises(TypeError, match=r"guide is a Laplace: expected its \.guide"):
        sp.draw(laplace, 3, seed=0)
    for wrong in (model, adapter, AutoSubspaceNormal):
        with pytest.raises(TypeError, match="expected a guide"):
            sp.draw(wrong, 3, seed=0)
    chains = sp.mcmc(model, split, num_samples=4, warmup_steps=0, num_chains=1, progress=False)
    with pytest.raises(TypeError, match=r"guide is a Chains: expected its \.thin\(num_draws\)"):
        sp.draw(chains, 3, seed=0)
    with pytest.raises(ValueError, match=r"of chains it is chains\.thin\(S\)"):
        sp.Predictor(adapter, chains.draws)
    predictor = sp.Predictor(adapter, adapter.init_loc[None])
    with pytest.raises(TypeError, match=r"logits is a Predictor: expected .* answers\.labels"):
        sp.evaluate(predictor, records)
    with pytest.raises(TypeError, match=r"logits is a Predictions: expected .* answers\.labels"):
        sp.evaluate(sp.predict(predictor, split))


def test_nothing_to_train_is_refused(make_causal, records):
    adapter = make_causal(projections="fixed")
    split = adapter.readout.encode(records)
    with pytest.raises(ValueError, match="nothing is trained"):
        fit(LoRAModel(adapter, num_data=12), no_guide, split, FitConfig(steps=1), progress=False)


def test_another_optimizer_takes_its_own_steps(make_choice, records):
    """Plain gradient descent on the mean cross-entropy, at a rate that falls to 0."""
    config = FitConfig(steps=3, batch_size=12, warmup=0.0, clip_norm=math.inf)
    ends = []
    for by_hand in (False, True):
        adapter = make_choice(svd=False)
        split = adapter.readout.encode(records)
        parameters = list(adapter.named_parameters().values())
        if not by_hand:
            model = LoRAModel(adapter, num_data=len(split))
            sgd = torch.optim.SGD(parameters, lr=0.3)
            fit(model, no_guide, split, config, optimizer=sgd, progress=False)
        for step in range(3 if by_hand else 0):
            loss = torch.nn.functional.cross_entropy(adapter(whole(split)), split.labels)
            slopes = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, slope in zip(parameters, slopes, strict=True):
                    parameter -= 0.3 * (3 - step) / 3 * slope
        ends.append(parameters)
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_an_optimizer_over_something_else_is_refused(make_choice, records):
    adapter = make_choice(svd=False)
    split = adapter.readout.encode(records)
    optimizer = torch.optim.SGD([next(iter(adapter.named_parameters().values()))], lr=0.1)
    for other in (pyro.optim.Adam({"lr": 0.1}), torch.optim.SGD):
        with pytest.raises(ValueError, match=r"optimizer is a .*expected one of torch"):
            fit(LoRAModel(adapter, num_data=12), no_guide, split, FitConfig(), optimizer=other)
    with pytest.raises(ValueError, match="the SGD given is over 1 parameters: expected the 10"):
        fit(
            LoRAModel(adapter, num_data=12), no_guide, split, FitConfig(steps=1),
            optimizer=optimizer, progress=False,
        )  # fmt: skip


def test_a_fit_may_be_all_warmup(make_causal, records):
    adapter = make_causal()
    model = ScalaBLModel(adapter, num_data=len(records))
    config = FitConfig(steps=2, batch_size=4, warmup=1.0)
    split = adapter.readout.encode(records)
    history = fit(model, AutoSubspaceNormal(model), split, config, progress=False).history
    assert [row["lr_factor"] for row in history] == pytest.approx([1 / 3, 2 / 3])


def test_another_number_of_examples_than_the_model_says_is_told(make_causal, records, caplog):
    adapter = make_causal()
    model = ScalaBLModel(adapter, num_data=1000)
    split = adapter.readout.encode(records)
    fit(model, AutoSubspaceNormal(model), split, FitConfig(steps=1), progress=False)
    assert "12 training examples, but the model's num_data is 1000" in caplog.text


class ScaledLikelihood(ScalaBLModel):
    """A likelihood with a weight, in two sites of half the weight each."""

    weight = 0.25

    def observe(self, batch, logits):
        batch = batch.to(logits.device)
        with self.data_plate(batch):
            for site in ("label", "label_again"):
                with pyro.poutine.scale(scale=self.weight / 2):
                    pyro.sample(site, dist.Categorical(logits=logits), obs=batch.labels)
        return logits


@pytest.mark.parametrize("elbo", [name for name in ELBOS if name != "RenyiELBO"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_kl_of_the_history_is_that_of_any_likelihood(make_causal, elbo, accumulation):
    """Estimated for a guide of Pyro from the loss and the likelihood: the same in both models."""
    rows = []
    for cls in (ScalaBLModel, ScaledLikelihood):
        pyro.set_rng_seed(0)
        adapter = make_causal()
        for parameter in adapter.named_parameters().values():
            parameter.requires_grad_(False)
        split = adapter.readout.encode(make_records(8))
        model = cls(adapter, num_data=len(split))
        guide = AutoNormal(model, init_loc_fn=model.init_loc_fn)
        config = FitConfig(steps=1, batch_size=4, accumulation=accumulation, lr_guide=0.0)
        rows.append(fit(model, guide, split, config, elbo=ELBOS[elbo], progress=False).history[0])
    plain, scaled = rows
    assert scaled["nll"] == pytest.approx(0.25 * plain["nll"], rel=1e-5)
    assert scaled["kl"] == pytest.approx(plain["kl"], abs=1e-3)
    assert plain["kl"] > 1


def test_a_model_that_observes_nothing_in_a_plate_is_refused(make_causal, records):
    class Bare(ScalaBLModel):
        def observe(self, batch, logits):
            pyro.sample("label", dist.Categorical(logits=logits).to_event(1), obs=batch.labels)
            return logits

    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = Bare(adapter, num_data=len(split))
    with pytest.raises(ValueError, match="observes nothing in a plate"):
        fit(model, AutoSubspaceNormal(model), split, FitConfig(steps=1), progress=False)


@pytest.mark.parametrize("guide_class", [AutoSubspaceNormal, AutoNormal])
def test_a_run_too_short_for_sigma_says_so(make_causal, records, caplog, guide_class):
    """Adam moves log σ by about lr_guide a step: by 0.2 in 20 steps, a factor of 1.22."""
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = guide_class(model, init_scale=0.05)
    short = dict(steps=20, warmup=0.0, decay="constant", batch_size=4)
    fit(model, guide, split, FitConfig(**short, lr_guide=0.01), progress=False)
    (line,) = [r.getMessage() for r in caplog.records if "lr_guide" in r.getMessage()]
    assert "20 steps at lr_guide 0.01" in line
    assert "a factor of about 1.22 at most" in line
    assert "raise fit.steps or fit.lr_guide" in line

    def moved():
        sigma = guide.scale if guide_class is AutoSubspaceNormal else guide.scales.s
        return float((sigma.detach() / 0.05).log().abs().max())

    assert 0.1 < moved() < 0.2 * 1.05
    caplog.clear()
    fit(model, guide, split, FitConfig(**short, lr_guide=0.06), progress=False)
    assert not caplog.records
    assert moved() > 0.5


def test_a_point_has_no_sigma_to_move(make_causal, records, caplog):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    for guide in (AutoSubspaceDelta(model), no_guide):
        plain = model if guide is not no_guide else LoRAModel(adapter, num_data=len(split))
        fit(plain, guide, split, FitConfig(steps=2), progress=False)
    assert not caplog.records


def test_the_defaults_are_long_enough_for_sigma():
    """Up for a while and down for the rest: half of the steps count."""
    assert FitConfig().reach == pytest.approx(0.01 * 1000 / 2, rel=0.01)
    assert FitConfig(decay="constant", warmup=0.0).reach == pytest.approx(0.01 * 1000)
    for name in ("base", "compare", "tune"):
        settings = OmegaConf.load(CONFIGS / f"{name}.yaml").fit
        steps = dict(steps=settings.steps, lr_guide=settings.get("lr_guide", 1e-2))
        assert FitConfig(**steps).reach > 1, name


def test_elbos_that_this_loop_cannot_use_are_named(make_causal, records):
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    wrong = (
        Trace_ELBO,
        "trace",
        pyro.infer.EnergyDistance(),
        pyro.infer.JitTrace_ELBO(),
        pyro.infer.ReweightedWakeSleep(),
        pyro.infer.TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True),
    )
    for elbo in wrong:
        with pytest.raises(TypeError, match=r"elbo is .*: expected an object, such as Trace_ELBO"):
            fit(model, AutoSubspaceNormal(model), split, FitConfig(1), elbo=elbo)


def test_what_is_no_model_or_guide_is_named(make_causal, records):
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)

    def by_hand(batch):
        """As in the first notebook."""

    for wrong in (by_hand, adapter, guide, pyro.poutine.scale(model, 0.5)):
        kind = type(wrong).__name__
        for run in (
            lambda wrong=wrong: fit(wrong, guide, split, FitConfig(1)),
            lambda wrong=wrong: sp.mcmc(wrong, split),
            lambda wrong=wrong: sp.laplace(wrong, split),
            lambda wrong=wrong: AutoSubspaceNormal(wrong),
            lambda wrong=wrong: sp.to_inference_data(
                sp.Predictor(adapter, adapter.init_loc[None]), split, model=wrong
            ),
        ):
            with pytest.raises(TypeError, match=f"model is a {kind}: expected a .*Model"):
                run()
    for wrong in (AutoSubspaceNormal, None, model):
        with pytest.raises(TypeError, match=r"guide is (the class|a) \w+: expected a guide"):
            fit(model, wrong, split, FitConfig(1))
    for wrong, kind in ((0.0, TypeError), (torch.full(adapter.shape, math.nan), ValueError)):
        with pytest.raises(kind, match="init_loc"):
            AutoSubspaceNormal(model, init_loc=wrong)
    with pytest.raises(ValueError, match="init_scale is inf"):
        AutoSubspaceNormal(model, init_scale=math.inf)
    with pytest.raises(ValueError, match="kl_budget needs a density"):
        fit(model, AutoDelta(model), split, FitConfig(1, kl_budget=3.0))


class Tempered(ScalaBLModel):
    """With a latent site beside those of the prior."""

    def forward(self, batch):
        self.projections()
        s = pyro.sample("s", self.prior())
        slope = pyro.sample("slope", dist.LogNormal(0.0, 1.0))
        return self.observe(batch, slope * self.adapter(batch, s))


def test_a_list_of_guides_is_trained_where_one_of_them_waits_for_its_first_call(
    make_causal, records
):
    adapter = make_causal()
    split = adapter.encode(records)
    model = Tempered(adapter, num_data=len(split))
    guide = AutoGuideList(model)
    guide.append(AutoSubspaceNormal(model))
    guide.append(AutoNormal(pyro.poutine.block(model, hide=["s"])))
    fit(model, guide, split, FitConfig(5, batch_size=4, lr_guide=0.1), progress=False)
    moved = sp.draw(guide, 50, seed=0, batch=whole(split)).mean(0) - model.init_loc
    assert moved.abs().max() > 0.1
    assert (guide[1].scales.slope - 0.1).abs() > 0.01
