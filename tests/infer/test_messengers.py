"""What the training loop sees of a model's and a guide's sites: NLL, KL, and what is left out."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoNormal,
    init_to_value,
)
from pyro.nn import PyroModule, PyroParam

import scalabl_pyro as sp
from scalabl_pyro import (
    AutoSubspaceNormal,
    FitConfig,
    ScalaBLModel,
    fit,
)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("particles", [1, 2])
def test_a_latent_site_without_a_guide_is_refused(make_causal, records, accumulation, particles):
    class Extra(ScalaBLModel):
        def forward(self, batch):
            pyro.sample("extra", dist.Normal(0.0, 1.0))
            return super().forward(batch)

    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = Extra(adapter, num_data=len(split))
    config = FitConfig(steps=1, accumulation=accumulation)
    elbo = Trace_ELBO(num_particles=particles, max_plate_nesting=1)
    alone = pytest.warns(UserWarning, match="in model but not guide")  # Pyro's, before ours
    with alone, pytest.raises(ValueError, match=r"latent sites \['extra'\] are in the model or in"):
        fit(model, AutoSubspaceNormal(model), split, config, elbo=elbo, progress=False)


def test_a_parameter_that_would_not_move_is_refused(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))

    def guide(batch):
        loc = pyro.param("loc", model.init_loc)
        return {"s": pyro.sample("s", dist.Normal(loc, 0.1).to_event(2))}

    with pytest.raises(ValueError, match="'loc' belongs to no module that fit trains"):
        fit(model, guide, split, FitConfig(steps=1), progress=False)


class OwnScale(ScalaBLModel):
    """A likelihood in a plate of the batch's own size."""

    def observe(self, batch, logits):
        with pyro.plate("data", len(batch)):
            pyro.sample("label", dist.Categorical(logits=logits), obs=batch.labels)
        return logits


def test_a_likelihood_that_is_not_scaled_to_the_data_is_refused(make_causal, records):
    """Else everything that runs in minibatches would depend on their size."""
    adapter = make_causal()
    split = adapter.encode(records)
    model = OwnScale(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    predictor = sp.Predictor(adapter, sp.draw(guide, 4, seed=0))
    runs = (
        lambda size: fit(model, guide, split, FitConfig(1, batch_size=size), progress=False),
        lambda size: sp.laplace(model, split, batch_size=size),
        lambda size: sp.mcmc(
            model, split, num_samples=4, warmup_steps=0, num_chains=1, progress=False,
            batch_size=size,
        ),
        lambda size: sp.to_inference_data(predictor, split, model=model, batch_size=size),
    )  # fmt: skip
    for run in runs:
        with pytest.raises(ValueError, match=r"the observed site 'label' .* self\.data_plate"):
            run(4)
        run(len(split))  # one batch of all: nothing is to be scaled


class OwnGuide(PyroModule):
    """Ordinary Pyro, which returns nothing."""

    def __init__(self, shape):
        super().__init__()
        self.loc = PyroParam(torch.full(shape, 0.3))
        self.scale = PyroParam(torch.full(shape, 0.2), dist.constraints.positive)

    def forward(self, batch):
        pyro.sample("s", dist.Normal(self.loc, self.scale).to_event(2))


def test_the_kl_is_that_of_q_under_any_elbo(make_causal, records):
    """A bound of Renyi is no NLL plus KL, and has a KL beside it all the same."""
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    q = torch.distributions.Normal(torch.full(adapter.shape, 0.3), 0.2)
    p = torch.distributions.Normal(torch.zeros(adapter.shape), 1.0)
    expected = float(torch.distributions.kl_divergence(q, p).sum())
    still = FitConfig(steps=1, batch_size=4, lr=1e-9, lr_guide=1e-9, accumulation=2)
    for elbo in (
        Trace_ELBO(num_particles=3),
        RenyiELBO(alpha=0.0, num_particles=5),
        RenyiELBO(alpha=0.5, num_particles=5, vectorize_particles=True, max_plate_nesting=1),
    ):
        result = fit(model, OwnGuide(adapter.shape), split, still, elbo=elbo, progress=False)
        assert result.history[0]["kl"] == pytest.approx(expected, rel=1e-5)


def test_the_kl_of_pyros_own_guides_is_estimated_without_bias(make_causal, records):
    """They draw an auxiliary site, and hand it on with the density of a transform."""
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split), prior=dist.LogNormal(0.0, 1.0))
    values = {"s": torch.ones(adapter.shape)}
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=values), init_scale=0.5)
    still = FitConfig(steps=200, batch_size=4, lr=1e-9, lr_guide=1e-9)
    result = fit(model, guide, split, still, elbo=RenyiELBO(num_particles=2), progress=False)
    # log s is normal under both, and a KL does not change with the coordinate.
    q = torch.distributions.Normal(torch.zeros(adapter.shape), 0.5)
    p = torch.distributions.Normal(torch.zeros(adapter.shape), 1.0)
    kl = np.array([row["kl"] for row in result.history])
    error = kl.std() / len(kl) ** 0.5
    expected = float(torch.distributions.kl_divergence(q, p).sum())
    assert abs(kl.mean() - expected) < 4 * error
    assert 4 * error < 0.2 * expected


class Local(ScalaBLModel):
    """With a latent number of each example, in the plate of the data."""

    def forward(self, batch):
        self.projections()
        logits = self.adapter(batch, pyro.sample("s", self.prior()))
        with self.data_plate(batch):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("label", dist.Categorical(logits=logits), obs=batch.labels)


class OfLocal(OwnGuide):
    def __init__(self, model):
        super().__init__(model.adapter.shape)
        self._model = (model,)

    def forward(self, batch):
        super().forward(batch)
        with self._model[0].data_plate(batch):
            pyro.sample("z", dist.Normal(2.0, 1.0))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("particles", [1, 2])
def test_the_kl_of_latents_in_the_plate_counts_all_data(
    make_causal, records, accumulation, particles
):
    adapter = make_causal()
    split = adapter.encode(records)
    model = Local(adapter, num_data=len(split))
    q = torch.distributions.Normal(torch.full(adapter.shape, 0.3), 0.2)
    p = torch.distributions.Normal(torch.zeros(adapter.shape), 1.0)
    # KL(N(2, 1) ‖ N(0, 1)) is 2 for each of the 12 examples.
    expected = float(torch.distributions.kl_divergence(q, p).sum()) + 2 * 12
    still = FitConfig(1, batch_size=4, lr=1e-9, lr_guide=1e-9, accumulation=accumulation)
    elbo = Trace_ELBO(num_particles=particles)
    kl = fit(model, OfLocal(model), split, still, elbo=elbo, progress=False).history[0]["kl"]
    assert kl == pytest.approx(expected, rel=1e-5)


class Watched(ScalaBLModel):
    """A likelihood as it should be, and sites beside it that are none."""

    def observe(self, batch, logits):
        with pyro.plate("rows", len(batch)):
            pyro.deterministic("probabilities", logits.softmax(-1).max(-1).values)
        with pyro.plate("modules", 2):
            pyro.factor("weights", torch.zeros(2))
        with pyro.plate("classes", 4):
            pyro.sample("counts", dist.Normal(torch.zeros(4), 1.0), obs=torch.zeros(4))
        return super().observe(batch, logits)


def test_sites_that_are_no_likelihood_need_no_scale(make_causal, records):
    adapter = make_causal()
    split = adapter.encode(records)
    model = Watched(adapter, num_data=len(split))
    fit(model, AutoSubspaceNormal(model), split, FitConfig(1, batch_size=4), progress=False)
    sp.laplace(model, split, batch_size=4)
