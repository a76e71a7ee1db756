"""An r × r core in the place of diag(s): against merged weights, and against the diagonal."""

from __future__ import annotations

import json

import pyro
import pytest
import torch
from conftest import make_records, scalabl, tiny_llama, whole, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import scalabl_pyro as sp
from scalabl_pyro import load_run, predict
from scalabl_pyro.lora import set_perp
from scalabl_pyro.prediction import fold_into


@pytest.fixture
def make(make_causal):
    """Adapters that are alike, but for what they are asked for."""

    def made(**options):
        torch.manual_seed(5)
        return make_causal(**{"projections": "frozen_v", "core": "full"} | options)

    return made


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("k", [0, 3])
def test_logits_are_those_of_merged_weights(make, records, unit, k):
    adapter = make(projections="unit" if unit else "frozen_v", perp=k)
    if k:
        set_perp(adapter, adapter.encode(records))
    if unit:
        with torch.no_grad():
            for A in adapter.matrices.A.values():
                A.weight.mul_(torch.rand(4, 1) + 0.5)
    batch = whole(adapter.encode(records))
    draws = torch.randn(3, len(adapter.layers), 16 + k)
    for s, logits in zip(draws, adapter(batch, draws), strict=True):
        llm = tiny_llama()
        with torch.no_grad():
            for (name, layer), s_m in zip(adapter.layers.items(), s, strict=True):
                V, B = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
                V = V / V.norm(dim=1, keepdim=True) if unit else V
                update = B @ s_m[:16].view(4, 4) @ V
                if k:
                    V, B = (getattr(layer, part)["perp"].weight for part in ("lora_A", "lora_B"))
                    update = update + B @ s_m[16:].diag() @ V
                llm.get_submodule(name).weight += 8 / 4 * update
            expected = adapter.readout(llm, batch.inputs)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("svd", [True, False])
def test_a_diagonal_core_is_the_diagonal(make, records, svd):
    full, diagonal = make(svd=svd), make(svd=svd, core="diagonal")
    M = len(full.layers)
    assert (full.shape, diagonal.shape) == ((M, 16), (M, 4))
    assert torch.equal(full.init_loc, diagonal.init_loc.diag_embed().view(M, 16))
    batch = whole(full.encode(records))
    s = torch.randn(3, M, 4)
    logits = full(batch, s.diag_embed().flatten(-2))
    torch.testing.assert_close(logits, diagonal(batch, s), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(full(batch, full.init_loc), diagonal(batch, diagonal.init_loc))


def test_the_density_of_the_diagonal_is_a_part_of_that_of_the_core(make):
    """Coordinates of prior and guide are independent, and so the diagonal's are the same ones."""
    kls = {}
    for core in ("full", "diagonal"):
        model = sp.ScalaBLModel(make(core=core), num_data=12)
        guide = sp.AutoSubspaceNormal(model, init_scale=0.3)
        kls[core] = torch.distributions.kl_divergence(guide.get_posterior(), model.prior())
    off = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.0, 0.3), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kls["full"], kls["diagonal"] + len(model.adapter.layers) * 12 * off)


def test_the_priors_centre_is_what_a_trained_adapter_did(make, make_causal, tmp_path):
    trained = make_causal(svd=False)
    trained.peft_model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    adapter = make(start=tmp_path)
    loc = sp.ScalaBLModel(adapter, num_data=12).prior().base_dist.loc
    assert torch.equal(loc, torch.eye(4).flatten().expand(loc.shape))


def test_every_guide_and_pyros_own_take_it(make, records):
    for name in ("normal", "multivariate_normal", "low_rank_multivariate_normal", "top_normal"):
        adapter = make(targets=("q_proj",))
        train = adapter.encode(records)
        model = sp.ScalaBLModel(adapter, num_data=len(train))
        guide = sp.guides.make_guide(model, name)
        sp.fit(model, guide, train, sp.FitConfig(steps=3, batch_size=4), progress=False)
        assert sp.draw(guide, 5, seed=0).shape == (5, 2, 16)
    own = pyro.infer.autoguide.AutoNormal(model, init_loc_fn=model.init_loc_fn)
    own = sp.draw(own, 2, seed=0, batch=whole(train))
    assert own.shape == (2, 2, 16)
    assert sp.draw(sp.laplace(model, train).guide, 2, seed=0).shape == (2, 2, 16)
    chains = sp.mcmc(model, train, num_samples=4, warmup_steps=2, progress=False)
    assert chains.draws.shape[-2:] == (2, 16)
    data = sp.to_inference_data(sp.Predictor(adapter, sp.draw(guide, 4, seed=0)), model=model)
    assert data["posterior"]["s"].shape == (1, 4, 2, 16)


def test_training_moves_numbers_off_the_diagonal(make, records):
    adapter = make()
    train = adapter.encode(records)
    model = sp.ScalaBLModel(adapter, num_data=len(train))
    guide = sp.AutoSubspaceNormal(model)
    sp.fit(model, guide, train, sp.FitConfig(steps=20, batch_size=4, lr=0.1), progress=False)
    off = ~torch.eye(4, dtype=torch.bool).flatten()
    assert float(guide.median()["s"][:, off].abs().max()) > 0.01


def test_a_student_computes_the_same_at_one_s(make, make_causal, records):
    adapter, student = make(), make_causal(svd=False)
    s = torch.randn(adapter.shape)
    fold_into(adapter, s, student)
    batch = whole(adapter.encode(records))
    torch.testing.assert_close(student(batch), adapter(batch, s), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [False, True])
def test_a_run_folder_predicts_the_same_to_the_bit_and_exports(local_model, tmp_path, start):
    for split, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", make_records(count))
    data = [f"model.name={local_model}", f"data.root={tmp_path / 'data'}", "progress=false"]
    words = [*data, "fit.steps=6", "fit.batch_size=4", "fit.lr=0.1", "model.device=cpu"]
    words += ["method.core=full", "method.draws=3"]
    if start:
        plain = ["method=mle", "fit.steps=3", "lora.r=3", f"run_dir={tmp_path / 'plain'}"]
        assert scalabl("train", *data, *plain) == 0
        words += [f"lora.start={tmp_path / 'plain' / 'adapter'}"]
    else:
        words += ["lora.r=3", "lora.alpha=5"]
    assert scalabl("train", *words, f"run_dir={tmp_path / 'run'}") == 0
    saved = load_file(tmp_path / "run" / "predictions.safetensors")
    run = load_run(tmp_path / "run")
    assert run.predictor.draws.shape[-1] == 9
    test = run.encode(make_records(9))
    again = predict(run.predictor, test).logits
    torch.testing.assert_close(again, saved["test.logits"], rtol=0, atol=0)
    if start:  # the prior's centre is what the adapter did, which is R = 1
        loc = run.model.prior().mean
        assert torch.equal(loc, torch.eye(3).flatten().expand(loc.shape))
    out = tmp_path / "exported"
    assert scalabl("export", f"run={tmp_path / 'run'}", f"output={out}") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rank"] == 3
    for k, name in enumerate(manifest["draws"]):
        llm = AutoModelForCausalLM.from_pretrained(local_model, dtype=torch.float32)
        plain = PeftModel.from_pretrained(llm, out / name).eval()
        with torch.no_grad():
            logits = run.readout(plain.get_base_model(), whole(test).inputs)
        torch.testing.assert_close(logits, again[k], rtol=1e-4, atol=1e-5)


def test_bad_values_are_refused(make, make_causal, records):
    for made in (make_causal, sp.methods.ScalaBL):
        with pytest.raises(ValueError, match=r"core is 'dense': expected one of .*diagonal"):
            made(core="dense")
    adapter = make()
    with pytest.raises(ValueError, match=r"\(\*draws, M, r²\) = \(\*draws, 5, 16\)"):
        adapter(whole(adapter.encode(records)), torch.ones(5, 4))
    positive = sp.make_prior(adapter.shape, "log_normal")
    with pytest.raises(ValueError, match="expected a prior on the whole line, or core='diagonal'"):
        sp.ScalaBLModel(adapter, num_data=12, prior=positive)
    with pytest.raises(ValueError, match="the prior 'log_normal' has no 0: expected one on the wh"):
        sp.methods.ScalaBL(core="full", prior={"name": "log_normal"})
