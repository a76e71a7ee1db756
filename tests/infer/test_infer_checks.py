"""What is refused before and in the first step, and likelihoods with latent sites of their own."""

from __future__ import annotations

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import lora, make_records, tiny_llama
from peft import LoraConfig
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from benchmarks.correctness._linear import LinearAdapter, LinearGaussian, make_split
from scalabl_pyro import (
    AutoSubspaceNormal,
    FitConfig,
    KLSchedule,
    Predictor,
    ScalaBLModel,
    SubspaceAdapter,
    fit,
    laplace,
    mcmc,
    to_inference_data,
)
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.infer.parameters import parameter_groups
from scalabl_pyro.readouts import LabelTokens

KEPT = 0.9  # the probability that a label is not replaced by one at random


class Replaced(ScalaBLModel):
    """Labels that may have been replaced, with a site that says which, for an ELBO to enumerate."""

    infer = {"enumerate": "parallel"}  # noqa: RUF012

    def observe(self, batch, logits):
        batch = batch.to(logits.device)
        probs = logits.softmax(-1)
        with self.data_plate(batch):
            kept = pyro.sample("kept", dist.Bernoulli(torch.tensor(KEPT)), infer=self.infer)
            either = kept[..., None] * probs + (1 - kept[..., None]) / probs.shape[-1]
            pyro.sample("label", dist.Categorical(either), obs=batch.labels)
        return logits


class Shifted(Replaced):
    """A continuous latent site for each example."""

    def observe(self, batch, logits):
        batch = batch.to(logits.device)
        with self.data_plate(batch):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample(
                "label", dist.Categorical(logits=logits * shift[..., None]), obs=batch.labels
            )
        return logits


class Summed(ScalaBLModel):
    """The same likelihood as :class:`Replaced`, with the sum over the site written out."""

    def observe(self, batch, logits):
        batch = batch.to(logits.device)
        probs = KEPT * logits.softmax(-1) + (1 - KEPT) / logits.shape[-1]
        with self.data_plate(batch):
            pyro.sample("label", dist.Categorical(probs), obs=batch.labels)
        return logits


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_an_enumerated_site_is_trained_as_its_sum_would_be(make_causal, records, weight):
    histories = []
    for kind, elbo in ((Replaced, TraceEnum_ELBO(max_plate_nesting=1)), (Summed, None)):
        adapter = make_causal()
        model = kind(adapter, num_data=len(records))
        guide = AutoSubspaceNormal(model)
        torch.manual_seed(0)
        config = FitConfig(3, batch_size=4, lr_guide=0.3, kl=KLSchedule(weight, "constant"))
        split = adapter.readout.encode(records)
        histories.append(fit(model, guide, split, config, elbo=elbo, progress=False).history)
    for enumerated, summed in zip(*histories, strict=True):
        assert enumerated == pytest.approx(summed, rel=1e-4, abs=1e-4)


def test_latent_sites_of_the_likelihood_are_no_data(make_causal, records):
    """Laplace would draw them once and count them, and passes of a chain or of arviz would share
    them."""
    adapter = make_causal()
    split = adapter.readout.encode(records)
    guide = AutoSubspaceNormal(ScalaBLModel(adapter, num_data=len(split)))
    predictor = Predictor(adapter, guide.sample(3))
    for kind, site in ((Replaced, "kept"), (Shifted, "shift")):
        model = kind(adapter, num_data=len(split))
        with pytest.raises(ValueError, match=rf"sites of its own, \['{site}'\], and a Laplace"):
            laplace(model, split)
        with pytest.raises(ValueError, match=rf"\['{site}'\], and the log-likelihood"):
            to_inference_data(predictor, split, model=model)
    options = {"num_samples": 4, "warmup_steps": 0, "num_chains": 1, "progress": False}
    with pytest.raises(ValueError, match=r"\['shift'\], and \d passes \(batch_size\) would share"):
        mcmc(model, split, batch_size=4, **options)
    assert mcmc(model, split, **options).latents["shift"].shape == (1, 4, len(split))


def test_the_history_is_of_numbers_whatever_the_elbo_returns(make_causal, records):
    class Tensors(Trace_ELBO):
        def loss_and_grads(self, model, guide, *args, **kwargs):
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
            loss.backward()
            return loss

    adapter = make_causal()
    model = ScalaBLModel(adapter, num_data=len(records))
    split, config = adapter.readout.encode(records), FitConfig(2, batch_size=4)
    elbo = Tensors(max_plate_nesting=1)
    result = fit(model, AutoSubspaceNormal(model), split, config, elbo=elbo, progress=False)
    assert len(json.dumps(result.history)) > 0


def test_what_a_user_froze_is_neither_moved_nor_counted(make_causal, records):
    adapter = make_causal()
    model = ScalaBLModel(adapter, num_data=len(records))
    guide = AutoSubspaceNormal(model)
    guide.loc_unconstrained.requires_grad_(False)
    before = guide.loc.clone()
    split, config = adapter.readout.encode(records), FitConfig(2, batch_size=4)
    result = fit(model, guide, split, config, progress=False)
    assert torch.equal(guide.loc, before)
    moved = sum(p.numel() for p in adapter.named_parameters().values()) + guide.scale.numel()
    assert result.num_trained == moved


def test_an_optimizer_that_evaluates_the_loss_itself_is_refused(make_causal, records):
    adapter = make_causal()
    model = ScalaBLModel(adapter, num_data=len(records))
    guide = AutoSubspaceNormal(model)
    groups = parameter_groups(model, guide, lr=0.1, lr_guide=0.1)
    optimizer = torch.optim.LBFGS([p for group in groups for p in group["params"]])
    split = adapter.readout.encode(records)
    with pytest.raises(ValueError, match="LBFGS, which evaluates the loss several times"):
        fit(model, guide, split, FitConfig(2), optimizer=optimizer, progress=False)


def test_a_function_of_s_without_an_s_for_each_example_has_no_ggn():
    class Plain(LinearAdapter):
        def __call__(self, batch, s):
            return super().__call__(batch, s)

    split = make_split(torch.randn(8, 1, 4), torch.randn(8, 1))
    model = LinearGaussian(Plain((2, 2)), num_data=8, noise=0.7)
    with pytest.raises(ValueError, match="Plain takes no per_example=True"):
        laplace(model, split)
    exact = LinearGaussian(LinearAdapter((2, 2)), num_data=8, noise=0.7)
    loc = exact.posterior(split).mean.reshape(2, 2)
    found = laplace(model, split, loc=loc, curvature="hessian").guide.joint()
    torch.testing.assert_close(
        found.covariance_matrix, exact.posterior(split).covariance_matrix, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_that_peft_leaves_out_is_refused(make_causal, when):
    """s would be of no effect, whether or not a pass has been checked before."""
    adapter = make_causal()
    split = adapter.readout.encode(make_records(3))
    batch = split.collate(list(split))
    s = adapter.init_loc[None]
    if when == "after":
        adapter(batch, s)
    peft_model = adapter.peft_model
    with peft_model.disable_adapter(), pytest.raises(ValueError, match="is switched off"):
        adapter(batch, s)
    adapter(batch, s)
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    peft_model.set_adapter("other")
    with pytest.raises(
        ValueError, match=r"is not active, but other is: call set_adapter\('default"
    ):
        adapter(batch, s)
    peft_model.set_adapter("default")
    adapter(batch, s)
    peft_model.base_model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into its base layer"), adapter.bound(s):
        pass


@pytest.mark.parametrize("elbo", [RenyiELBO(num_particles=2), TraceGraph_ELBO()])
def test_elbos_that_only_our_loop_can_use_are_told_by_the_other(make_causal, tmp_path, elbo):
    import transformers

    from scalabl_pyro.integrations.trainer import ELBOTrainer

    adapter = make_causal()
    split = adapter.readout.encode(make_records(12))
    model = ScalaBLModel(adapter, num_data=12)
    guide = AutoSubspaceNormal(model)
    fit(model, guide, split, FitConfig(1, batch_size=4), elbo=elbo, progress=False)
    args = transformers.TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True)
    with pytest.raises(TypeError, match=r"no differentiable_loss.*fit takes this one"):
        ELBOTrainer(model, guide, args, split, elbo=elbo)
    with pytest.raises(TypeError, match="elbo is Trace_ELBO: expected an object"):
        ELBOTrainer(model, guide, args, split, elbo=Trace_ELBO)


def test_the_trainer_refuses_a_batch_that_counts_as_all_data(make_causal, tmp_path):
    """As fit does, with a plate of the batch's own size."""
    import transformers

    from scalabl_pyro.integrations.trainer import ELBOTrainer

    class OwnPlate(ScalaBLModel):
        def observe(self, batch, logits):
            with pyro.plate("data", len(batch)):
                pyro.sample("label", dist.Categorical(logits=logits), obs=batch.labels)
            return logits

    adapter = make_causal()
    split = adapter.readout.encode(make_records(12))
    model = OwnPlate(adapter, num_data=12)
    guide = AutoSubspaceNormal(model)
    message = "stands in a plate of the batch's 4 examples, of N = 12"
    with pytest.raises(ValueError, match=message):
        fit(model, guide, split, FitConfig(1, batch_size=4), progress=False)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, per_device_train_batch_size=4, report_to="none"
    )
    with pytest.raises(ValueError, match=message):
        ELBOTrainer(model, guide, args, split).train()


def test_a_readouts_parameters_are_the_models(tokenizer):
    """Others would be trained and saved by nothing."""

    class Bias(LabelTokens):
        def attach(self, llm):
            self.bias = torch.nn.Parameter(torch.zeros(4))
            return {"bias": self.bias}

    class Registered(Bias):
        def attach(self, llm):
            parameters = super().attach(llm)
            llm.register_parameter("bias", self.bias)
            return parameters

    def make(kind):
        readout = kind(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
        return SubspaceAdapter(tiny_llama(), lora("q_proj"), readout)

    with pytest.raises(ValueError, match=r"'bias' that is none of the model's.*register_parameter"):
        make(Bias)
    assert "bias" in make(Registered).named_parameters()
