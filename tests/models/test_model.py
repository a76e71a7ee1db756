from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_records, whole
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
    init_to_value,
)
from pyro.infer.inspect import get_dependencies
from pyro.nn import PyroSample
from pyro.poutine import trace

from scalabl_pyro import (
    AutoSubspaceNormal,
    FitConfig,
    LoRAModel,
    ScalaBLModel,
    draw,
    fit,
    kl_weight,
)
from scalabl_pyro.guides import GUIDES, AutoSubspace
from scalabl_pyro.models import Projections
from scalabl_pyro.models.priors import Prior
from scalabl_pyro.prediction.predictor import Predictor

# Gates need a prior on (0, 1).
OURS = [guide for name, guide in GUIDES.items() if name != "relaxed_bernoulli"]
STOCK = [
    AutoNormal,
    AutoDelta,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoStructured,
]


def build_guide(guide_class, model):
    if issubclass(guide_class, AutoSubspace):
        return guide_class(model)
    return guide_class(model, init_loc_fn=model.init_loc_fn)


def test_pyro_finds_what_depends_on_what(model, split):
    """It follows tensors through the whole language model."""
    dependencies = get_dependencies(model, (whole(split),))
    assert dependencies["prior_dependencies"] == {
        "s": {"s": set()},
        "label": {"label": set(), "s": set()},
    }
    assert dependencies["posterior_dependencies"] == {"s": {"s": set(), "label": set()}}


class ConstantLikelihood(ScalaBLModel):
    """The same prior without a language model: what is left of an ELBO is −KL."""

    def forward(self, batch):
        pyro.sample("s", self.prior())


@pytest.mark.parametrize("prior", [dist.Normal(0.0, 1.0), dist.Normal(0.5, 2.0)], ids=str)
def test_kl_equals_the_divergence_from_posterior_to_prior(make_causal, prior):
    model = ConstantLikelihood(make_causal(), num_data=10, prior=prior)
    guide = AutoSubspaceNormal(model, init_scale=0.3)
    expected = torch.distributions.kl_divergence(guide.get_posterior(), model.prior()).detach()
    reversed_kl = torch.distributions.kl_divergence(model.prior(), guide.get_posterior()).detach()
    kl = TraceMeanField_ELBO().loss(model, guide, None)
    assert kl == pytest.approx(float(expected), rel=1e-5)
    assert kl != pytest.approx(float(reversed_kl), rel=0.1)
    sampled = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    assert sampled.loss(model, guide, None) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("make_guide", [AutoSubspaceNormal, AutoNormal])
def test_kl_weight_scales_the_kl_exactly(model, split, elbo, make_guide):
    start = {} if make_guide is AutoSubspaceNormal else {"init_loc_fn": model.init_loc_fn}
    guide = make_guide(model, init_scale=0.3, **start)
    batch = whole(split)

    def loss(weight):
        pyro.set_rng_seed(7)
        with kl_weight(weight):
            return elbo(max_plate_nesting=1).loss(model, guide, batch)

    one, half, tenth = loss(1.0), loss(0.5), loss(0.1)
    kl = (one - half) / 0.5
    assert kl > 1
    assert one - tenth == pytest.approx(0.9 * kl, rel=1e-4)
    if make_guide is AutoSubspaceNormal and elbo is TraceMeanField_ELBO:
        exact = torch.distributions.kl_divergence(guide.get_posterior(), model.prior()).detach()
        assert kl == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_kl_weight_must_be_positive(weight):
    with pytest.raises(ValueError, match="KL weight"):
        kl_weight(weight)


@pytest.mark.parametrize("parallel", [False, True])
def test_our_predictions_equal_those_of_predictive(model, split, parallel):
    guide = AutoSubspaceNormal(model, init_scale=0.5)
    draws = draw(guide, 5, seed=1)
    batch = whole(split)
    ours = Predictor(model.adapter, draws, max_rows=30).logits(batch)
    theirs = Predictive(
        model, posterior_samples={"s": draws}, return_sites=["_RETURN"], parallel=parallel
    )(batch)["_RETURN"]
    assert (ours[0] - ours[1]).abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("particles", [1, 3])
def test_vectorised_particles_give_the_looped_likelihood(model, split, particles):
    """The label site sees (P, B) whatever dimensions vectorisation adds to s."""
    batch = whole(split)
    guide = AutoSubspaceNormal(model, init_scale=0.3)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    for model_trace, guide_trace in elbo._get_traces(model, guide, (batch,), {}):
        s = guide_trace.nodes["s"]["value"].reshape(-1, *model.adapter.shape)
        logits = torch.stack([model.adapter(batch, x) for x in s])
        expected = dist.Categorical(logits=logits).log_prob(batch.labels)
        log_probs = model_trace.nodes["label"]["fn"].log_prob(batch.labels)
        torch.testing.assert_close(
            log_probs.reshape(expected.shape), expected, atol=1e-5, rtol=1e-5
        )


# Pyro's joint normals hold their mean as a bare nn.Parameter, which SVI.step cannot read while
# parameters are local to modules; the torch idiom below and our own guides are not affected.
@pytest.mark.parametrize("guide_class", [*OURS, AutoNormal, AutoDelta])
def test_plain_svi_moves_every_trainable_tensor(model, split, guide_class):
    guide = build_guide(guide_class, model)
    batch = whole(split)
    guide(batch)
    parameters = {**model.adapter.named_parameters(), **dict(guide.named_parameters())}
    before = {name: value.detach().clone() for name, value in parameters.items()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(max_plate_nesting=1))
    for _ in range(3):
        svi.step(batch)
    unmoved = [name for name, value in parameters.items() if torch.equal(value, before[name])]
    assert unmoved == []
    elbo = Trace_ELBO(max_plate_nesting=1)(model, guide)
    assert {id(p) for p in elbo.parameters()} == {id(p) for p in parameters.values()}


@pytest.mark.parametrize("guide_class", STOCK)
def test_the_torch_idiom_trains_pyros_own_guides(make_causal, records, guide_class):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = build_guide(guide_class, model)
    batch = whole(split)
    elbo = Trace_ELBO(max_plate_nesting=1)(model, guide)
    elbo(batch)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in elbo.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        elbo(batch).backward()
        optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(elbo.parameters(), before, strict=True)]
    assert len(moved) > len(adapter.named_parameters())
    assert all(moved)
    assert draw(guide, 3, seed=0, batch=batch).shape == (3, *adapter.shape)


def test_a_function_by_hand_trains_as_the_class_does(make_causal, records):
    """A plain Pyro function on adapter(batch, s) gives the loss and the steps of ScalaBLModel."""
    ends, losses = [], []
    for by_hand in (False, True):
        pyro.set_rng_seed(2)
        adapter = make_causal()
        split = adapter.readout.encode(records)
        model = ScalaBLModel(adapter, num_data=len(split))
        guide = AutoSubspaceNormal(model)
        if by_hand:
            projections = Projections(adapter)

            def model(batch, adapter=adapter, projections=projections):
                projections()
                s = pyro.sample("s", dist.Normal(0.0, 1.0).expand(adapter.shape).to_event(2))
                with pyro.plate("data", len(records), subsample=torch.arange(len(batch))):
                    logits = adapter(batch, s)
                    pyro.sample("label", dist.Categorical(logits=logits), obs=batch.labels)

        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(max_plate_nesting=1))
        losses.append([svi.step(whole(split)) for _ in range(3)])
        ends.append(list(adapter.named_parameters().values()))
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_no_frozen_parameter_is_a_pyro_site(model, split):
    sites = trace(model).get_trace(whole(split)).nodes
    declared = {name for name, site in sites.items() if site["type"] == "param"}
    names = model.adapter.named_parameters()
    trained = {"projections." + name.replace(".", "__") for name in names}
    assert declared == trained
    sampled = {n for n, site in sites.items() if site["type"] == "sample"}
    assert sampled == {"s", "data", "label"} or sampled == {"s", "label"}


def test_one_step_of_fit_is_one_llm_forward(model, split):
    calls = []
    model.adapter.peft_model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    config = FitConfig(steps=3, batch_size=4)
    fit(model, AutoSubspaceNormal(model), split, config, progress=False)
    assert len(calls) == 3


def test_nuts_runs_on_the_same_model_and_predicts_alike(make_causal, records):
    adapter = make_causal(targets=("lm_head",))
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    for parameter in adapter.named_parameters().values():
        parameter.requires_grad_(False)
    kernel = NUTS(model, init_strategy=init_to_value(values={"s": model.init_loc}))
    mcmc = MCMC(kernel, num_samples=30, warmup_steps=30, disable_progbar=True)
    mcmc.run(whole(split))
    draws = mcmc.get_samples()["s"]
    assert draws.shape == (30, *adapter.shape)
    assert draws.std(0).min() > 0.1
    assert Predictor(adapter, draws).logits(whole(split)).shape == (30, len(split), 4)


@pytest.mark.parametrize("guide_kind", ["ours", "vectorised"])
def test_one_step_is_one_llm_forward(model, split, guide_kind):
    calls = []
    llm = model.adapter.peft_model.get_base_model()
    llm.register_forward_hook(lambda *_: calls.append(1))
    guide = AutoSubspaceNormal(model)
    options = {"num_particles": 3, "vectorize_particles": True} if guide_kind != "ours" else {}
    elbo = Trace_ELBO(max_plate_nesting=1, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    svi.step(whole(split))
    assert len(calls) == 1


def test_data_plate_scales_a_minibatch_to_the_data_set(model, split):
    batch = split.collate(list(split)[:4])
    s = model.init_loc
    log_prob = trace(pyro.condition(model, {"s": s})).get_trace(batch)
    log_prob.compute_log_prob()
    plain = torch.nn.functional.cross_entropy(model.adapter(batch, s), batch.labels).detach()
    log_likelihood = float(log_prob.nodes["label"]["log_prob_sum"].detach())
    assert log_likelihood == pytest.approx(-float(plain) * len(split), rel=1e-5)


def test_draws_do_not_touch_the_global_random_state(model):
    guide = AutoSubspaceNormal(model)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = draw(guide, 2, seed=9)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, draw(guide, 2, seed=9))
    with pytest.raises(ValueError, match="number of draws is 0"):
        draw(guide, 0, seed=9)


def test_module_local_params_are_required(make_causal):
    adapter = make_causal()
    off = pyro.settings.context(module_local_params=False)
    with off, pytest.raises(RuntimeError, match="module_local_params=True"):
        LoRAModel(adapter, num_data=3)


def test_unlabelled_batches_sample_labels(model, records, adapter):
    from conftest import make_records

    batch = whole(adapter.readout.encode(make_records(5, labelled=False)))
    sites = trace(model).get_trace(batch).nodes
    assert sites["label"]["value"].shape == (5,)
    assert not sites["label"]["is_observed"]


def test_a_projection_that_a_handler_would_change_is_refused(make_causal, records):
    """The layers compute with their own tensors, whatever a site says."""
    adapter = make_causal()
    split = adapter.encode(records)
    model, batch = ScalaBLModel(adapter, num_data=len(split)), whole(split)
    names = trace(model).get_trace(batch).param_nodes
    B = next(name for name in names if "lora_B" in name)
    shape = trace(model).get_trace(batch).nodes[B]["value"].shape
    lifted = poutine.lift(model, prior={B: dist.Normal(torch.zeros(shape), 1.0).to_event(2)})
    substituted = poutine.substitute(model, data={B: torch.zeros(shape)})
    for program in (lifted, substituted):
        with pytest.raises(
            ValueError, match=r"projections are points; for a prior on B .* scale_B"
        ):
            program(batch)
    attribute = next(name for name in model.projections._held if "lora_B" in name)
    setattr(model.projections, attribute, PyroSample(dist.Normal(torch.zeros(shape), 1.0)))
    with pytest.raises(ValueError, match="projections are points"):
        model(batch)


def test_a_state_that_would_untie_projections_is_refused(make_causal, records):
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    model(whole(split))
    model.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match="load states without assign=True"):
        model(whole(split))


def test_labels_given_by_condition_count_as_those_of_the_batch(model, split):
    s = model.init_loc
    batch = split.collate(list(split)[:4])
    without = replace(batch, labels=None)
    expected = trace(poutine.condition(model, {"s": s})).get_trace(batch)
    given = poutine.condition(model, {"s": s, "label": batch.labels})
    found = trace(given).get_trace(without)
    torch.testing.assert_close(found.log_prob_sum(), expected.log_prob_sum())


def test_the_mode_of_the_model_is_that_of_loras_dropout(make_causal, records):
    adapter = make_causal()
    adapter.set_dropout(0.5)
    split = adapter.encode(records)
    model, batch = LoRAModel(adapter, num_data=len(split)), whole(split)
    still = model(batch)
    assert torch.equal(model(batch), still)
    model.train()
    assert not torch.equal(model(batch), still)
    model.eval()
    assert torch.equal(model(batch), still)


def test_what_a_model_is_made_of_is_checked(make_causal):
    adapter = make_causal()
    with pytest.raises(TypeError, match="adapter is a PeftModel: expected a SubspaceAdapter"):
        ScalaBLModel(adapter.peft_model, num_data=4)
    assert ScalaBLModel(adapter, num_data=np.int64(4)).num_data == 4
    for wrong in (True, 64.0, 0, [1, 2], float("nan")):
        with pytest.raises(ValueError, match=r"num_data is .*: expected the number of training"):
            ScalaBLModel(adapter, num_data=wrong)

    class Positive(Prior):
        """Forgets to say where s may lie."""

        def forward(self):
            return dist.LogNormal(0.0, 1.0).expand(self.shape).to_event(2)

    with pytest.raises(ValueError, match=r"Positive has s in .*: set support = constraints"):
        ScalaBLModel(adapter, num_data=4, prior=Positive(adapter.shape))

    class Computed(Prior):
        """Holds what was computed, of which there is no copy."""

        def __init__(self, shape):
            super().__init__(shape)
            self.log_scale = torch.nn.Parameter(torch.zeros(shape))
            self.scale = self.log_scale.exp()

        def forward(self):
            return dist.Normal(0.0, self.scale).to_event(2)

    ScalaBLModel(adapter, num_data=4, prior=Computed(adapter.shape))
    batch = whole(adapter.encode(make_records(2)))
    with pytest.raises(TypeError, match=r"s is a list: expected a tensor"):
        adapter(batch, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"s has shape \(0, "):
        adapter(batch, torch.ones(0, *adapter.shape))
