"""s_perp: against merged weights, in closed form, and against adapters that have none."""

from __future__ import annotations

import json

import pyro
import pytest
import torch
from conftest import fill_lora_B, lora, make_records, scalabl, tiny_llama, whole, write_jsonl
from peft import PeftModel
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import scalabl_pyro as sp
from scalabl_pyro import SubspaceAdapter, load_run, predict
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.lora import second_moments, set_perp, set_subspace
from scalabl_pyro.prediction import Linearised
from scalabl_pyro.readouts import LabelTokens

K = 3


@pytest.fixture
def make(make_causal, records):
    """Adapters with and without s_perp, but for that alike."""

    def made(k: int = K, **options) -> SubspaceAdapter:
        torch.manual_seed(5)
        adapter = make_causal(perp=k, **{"projections": "frozen_v"} | options)
        if k:
            set_perp(adapter, adapter.encode(records))
        return adapter

    return made


def A_and_B(adapter):
    for layer in adapter.layers.values():
        yield [
            getattr(layer, p)[n].weight for p in ("lora_A", "lora_B") for n in ("default", "perp")
        ]


# ---------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("unit", [False, True])
def test_logits_are_those_of_merged_weights(make, records, unit):
    adapter = make(projections="unit" if unit else "frozen_v")
    if unit:
        with torch.no_grad():
            next(iter(adapter.matrices.A.values())).weight.mul_(2)
    batch = whole(adapter.encode(records))
    draws = torch.randn(4, *adapter.with_perp(adapter.init_loc).shape)
    of_draws = adapter(batch, draws)
    for s, logits in zip(draws, of_draws, strict=True):
        llm = tiny_llama()
        with torch.no_grad():
            for name, (V, V_perp, B, B_perp), s_m in zip(
                adapter.module_names, A_and_B(adapter), s, strict=True
            ):
                V = V / V.norm(dim=1, keepdim=True) if unit else V
                update = B @ s_m[:4].diag() @ V + B_perp @ s_m[4:].diag() @ V_perp
                llm.get_submodule(name).weight += 8 / 4 * update
            expected = adapter.readout(llm, batch.inputs)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_its_part_of_s_it_is_as_if_there_were_none(tokenizer, records, dtype):
    def made(k):
        torch.manual_seed(5)
        readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
        llm = tiny_llama().to(dtype)
        adapter = SubspaceAdapter(llm, lora("q_proj", "lm_head"), readout, perp=k)
        fill_lora_B(adapter)
        if k:
            set_perp(adapter, adapter.encode(records))
        return adapter

    plain, adapter = made(0), made(K)
    batch = whole(adapter.encode(records))
    draws = plain.init_loc + torch.randn(3, *plain.shape)
    expected = plain(batch, draws)
    assert torch.equal(adapter(batch, draws), expected)
    assert torch.equal(adapter(batch, adapter.with_perp(draws)), expected)
    assert torch.equal(adapter(batch), plain(batch))
    noisy = adapter.with_perp(draws)
    noisy[..., 4:] = torch.randn(3, len(plain.layers), K)
    assert not torch.allclose(adapter(batch, noisy), expected, atol=1e-2)
    one_by_one = [adapter(batch, s) for s in noisy]
    torch.testing.assert_close(adapter(batch, noisy), torch.stack(one_by_one))


def test_the_variance_of_the_logits_of_a_linear_module(make, records):
    """Logits are linear in s_perp where the output layer alone is adapted."""
    adapter = make(targets=("lm_head",))
    split = adapter.encode(records)
    model = sp.ScalaBLModel(adapter, num_data=len(split), perp_scale=0.7)
    guide = sp.AutoSubspaceNormal(model)
    draws = sp.draw(guide, 4000, seed=0)
    draws[..., :4] = adapter.init_loc  # the noise of s away
    variances = predict(sp.Predictor(adapter, draws), split).logits.var(0)
    llm, ((_, V, _, B),) = tiny_llama(), A_and_B(adapter)
    for n, example in enumerate(split):
        with torch.no_grad():
            x = llm.model(torch.tensor(example.rows["input_ids"])).last_hidden_state[0, -1]
        rows = B[adapter.readout.label_ids]  # (C, k)
        expected = (8 / 4 * 0.7) ** 2 * (rows.square() * (V @ x).square()).sum(-1)
        torch.testing.assert_close(variances[n], expected, rtol=0.12, atol=1e-9)


# ---------------------------------------------------------------------- directions


@pytest.mark.parametrize("subspace", ["random", "activations"])
def test_directions_are_the_least_excited_ones_outside_V(make_causal, records, subspace):
    adapter = make_causal(filled=False, perp=K)
    split = adapter.encode(records)
    set_subspace(adapter, subspace, split)
    set_perp(adapter, split)
    moments = second_moments(adapter, split)
    for C, (V, V_perp, _, B_perp) in zip(moments.values(), A_and_B(adapter), strict=True):
        torch.testing.assert_close(V_perp @ V_perp.mT, torch.eye(K), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            V_perp @ V.mT / V.norm(dim=1), torch.zeros(K, 4), rtol=0, atol=1e-5
        )
        # The penalty lifts V's own directions above all others.
        Q = torch.linalg.qr(V.double().mT).Q
        P = torch.eye(len(C)).double() - Q @ Q.mT
        least = torch.linalg.eigvalsh(P @ C @ P + 1e6 * Q @ Q.mT)[:K]
        energy = torch.einsum("jd,de,je->j", V_perp.double(), C, V_perp.double())
        torch.testing.assert_close(energy, least, rtol=1e-2, atol=1e-5)
        assert float(B_perp.std()) == pytest.approx(len(B_perp) ** -0.5, rel=0.5)


def test_directions_of_a_known_covariance(tokenizer):
    """Token n is embedded on axis n, so that C is diagonal, with the tokens' frequencies."""
    llm = tiny_llama(vocab_size=16)
    with torch.no_grad():
        llm.model.embed_tokens.weight.copy_(torch.eye(16))
    words = [w for w in ("the", "a", "cat", "dog", "bird", "runs") for _ in range(2)]
    words += ["sings", "sleeps", "red", "blue", "green", *["the"] * 20, *["a"] * 9, "tree", "tree"]

    class Words(LabelTokens):  # nothing but these words
        def _tokenize(self, record):
            return {name: [ids] for name, ids in tokenizer(record.question).items()}

    readout = Words(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    readout.label_ids = torch.arange(4)
    config = lora("q_proj", r=2, layers_to_transform=[0])
    adapter = SubspaceAdapter(llm, config, readout, perp=9)
    split = readout.encode([sp.Record("1", " ".join(words), ("A", "B", "C", "D"))])
    set_subspace(adapter, "activations", split)  # "the" and "a"
    set_perp(adapter, split)
    (A,) = adapter.perp_A
    # Four tokens never come, five come once, the rest twice or more.
    rare = ["sings", "sleeps", "red", "blue", "green"]
    axes = [0, 1, 14, 15, *map(tokenizer.convert_tokens_to_ids, rare)]
    expected = torch.zeros(16).index_fill(0, torch.tensor(axes), 1.0).diag()
    torch.testing.assert_close(A.weight.mT @ A.weight, expected, rtol=0, atol=1e-4)


def test_training_moves_neither_matrix(make_causal, records):
    adapter = make_causal(filled=False, perp=K, projections="free")
    train = adapter.encode(records)
    set_perp(adapter, train)
    before = [tuple(w.detach().clone() for w in weights) for weights in A_and_B(adapter)]
    model = sp.ScalaBLModel(adapter, num_data=len(train))
    guide = sp.AutoSubspaceNormal(model)
    config = sp.FitConfig(steps=8, batch_size=6, lr=0.05, weight_decay=0.1)
    sp.fit(model, guide, train, config, progress=False)
    for (V, V_perp, B, B_perp), old in zip(A_and_B(adapter), before, strict=True):
        assert torch.equal(V_perp, old[1])
        assert torch.equal(B_perp, old[3])
        assert not torch.equal(V, old[0])
        assert not torch.equal(B, old[2])


# ---------------------------------------------------------------------- inference


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()], ids=["trace", "mean field"])
@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_the_elbo_differs_in_the_likelihood_alone(make, records, elbo, weight):
    adapter = make()
    batch = whole(adapter.encode(records))
    model = sp.ScalaBLModel(adapter, num_data=24, perp_scale=2.0)
    guide = sp.AutoSubspaceNormal(model, init_scale=0.3)
    pyro.set_rng_seed(3)
    sites = guide()
    assert sites["s_perp"].shape == (len(adapter.layers), K)
    joint = torch.cat([sites["s"], sites["s_perp"]], -1)
    with torch.no_grad():
        logits = adapter(batch, joint)
    likelihood = 2 * float(cross_entropy(logits, batch.labels, reduction="sum"))
    q, p = torch.distributions.Normal(guide.loc, guide.scale), torch.distributions.Normal(0.0, 1.0)
    if isinstance(elbo, TraceMeanField_ELBO):
        kl = torch.distributions.kl_divergence(q, p).sum()
    else:
        kl = (q.log_prob(sites["s"]) - p.log_prob(sites["s"])).sum()
    pyro.set_rng_seed(3)
    with sp.kl_weight(weight):
        loss = elbo.loss(model, guide, batch)
    assert loss == pytest.approx(likelihood + weight * float(kl.detach()), rel=1e-5)
    prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(5, K), 2.0), 2)
    assert float(torch.distributions.kl_divergence(model.prior_perp, prior)) == 0


def test_particles_run_as_one_batch(make, records):
    adapter = make()
    batch = whole(adapter.encode(records))
    model = sp.ScalaBLModel(adapter, num_data=12)
    guide = sp.AutoSubspaceNormal(model)
    with torch.no_grad(), pyro.plate("particles", 3, dim=-2):
        drawn = poutine.trace(guide).get_trace()
        logits = poutine.replay(model, drawn)(batch)
    s, s_perp = (drawn.nodes[name]["value"][:, 0] for name in ("s", "s_perp"))  # (3, M, ...)
    assert s_perp.shape == (3, len(adapter.layers), K)
    with torch.no_grad():
        each = [adapter(batch, torch.cat(pair, -1)) for pair in zip(s, s_perp, strict=True)]
    torch.testing.assert_close(logits, torch.stack(each))


def test_pyros_own_tools_see_a_site(make, records):
    adapter = make()
    batch = whole(adapter.encode(records))
    model = sp.ScalaBLModel(adapter, num_data=12)
    guide = sp.AutoSubspaceNormal(model)
    sites = Predictive(model, guide=guide, num_samples=3)(batch)
    assert sites["s_perp"].shape == (*sites["s"].shape[:-1], K)
    own = pyro.infer.autoguide.AutoNormal(model, init_loc_fn=model.init_loc_fn)
    draws = sp.draw(own, 2, seed=0, batch=batch)
    assert draws.shape == (2, len(adapter.layers), 4 + K)
    data = sp.to_inference_data(sp.Predictor(adapter, sp.draw(guide, 4, seed=0)), model=model)
    assert data["posterior"]["s_perp"].shape == (1, 4, len(adapter.layers), K)
    assert data["prior"]["s_perp"].shape == (1, 4, len(adapter.layers), K)


@pytest.mark.parametrize("kind", ["independent", "antithetic", "sobol"])
def test_draws_hold_both_and_s_as_it_was(make, kind):
    banks = {}
    for k in (0, K):
        model = sp.ScalaBLModel(make(k), num_data=12, perp_scale=0.4)
        guide = sp.AutoSubspaceNormal(model)
        banks[k] = sp.draw(guide, 2000, seed=0, kind=kind)
    M = banks[0].shape[1]
    assert torch.equal(banks[K][..., :4], banks[0])
    perp = banks[K][..., 4:]
    assert perp.shape == (2000, M, K)
    torch.testing.assert_close(perp.std(0), torch.full((M, K), 0.4), rtol=0.1, atol=0)
    torch.testing.assert_close(perp.mean(0), torch.zeros(M, K), rtol=0, atol=0.04)


def test_laplace_and_chains_leave_it_at_its_prior(make, records):
    laplaces, chains = [], []
    for k in (0, K):
        adapter = make(k, targets=("q_proj",))
        train = adapter.encode(records)
        model = sp.ScalaBLModel(adapter, num_data=len(train), perp_scale=3.0)
        laplaces.append(sp.laplace(model, train))
        chains.append(
            sp.mcmc(model, train, num_samples=6, warmup_steps=4, num_chains=2, progress=False)
        )
    assert laplaces[1].log_evidence == pytest.approx(laplaces[0].log_evidence, rel=1e-5)
    banks = [sp.draw(approximation.guide, 500, seed=0) for approximation in laplaces]
    torch.testing.assert_close(banks[1][..., :4], banks[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(banks[1][..., 4:].std(), torch.tensor(3.0), rtol=0.05, atol=0)
    torch.testing.assert_close(chains[1].draws, chains[0].draws, rtol=1e-3, atol=1e-4)
    assert chains[0].thin(12).shape == (12, 2, 4)
    bank = chains[1].thin(12)
    assert bank.shape == (12, 2, 4 + K)
    assert torch.equal(bank[..., :4], chains[1].thin(12)[..., :4])
    assert 2.0 < float(bank[..., 4:].std()) < 4.0


def test_linear_in_s_perp_too(make, records):
    """Where the output layer alone is adapted, logits are linear in s and s_perp."""
    adapter = make(targets=("lm_head",))
    split = adapter.encode(records)
    guide = sp.AutoSubspaceNormal(sp.ScalaBLModel(adapter, num_data=len(split)))
    draws = sp.draw(guide, 5, seed=0)
    exact = predict(sp.Predictor(adapter, draws), split).logits
    linearised = predict(Linearised(adapter, guide.median()["s"], draws), split).logits
    torch.testing.assert_close(linearised, exact, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- files and settings


@pytest.mark.parametrize("quantization", ["null", "4bit"])
def test_a_run_folder_predicts_the_same_to_the_bit_and_exports(local_model, tmp_path, quantization):
    for split, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", make_records(count))
    words = [f"model.name={local_model}", f"data.root={tmp_path / 'data'}", "progress=false"]
    words += ["fit.steps=3", "fit.batch_size=4", "fit.lr=0.1", "lora.r=3", "lora.alpha=5"]
    words += ["method.perp=2", "method.perp_scale=0.8", "method.draws=3", "model.device=cpu"]
    words += [f"model.quantization={quantization}"]
    assert scalabl("train", *words, f"run_dir={tmp_path / 'run'}") == 0
    saved = load_file(tmp_path / "run" / "predictions.safetensors")
    run = load_run(tmp_path / "run")
    assert run.predictor.draws.shape[-1] == 5
    assert run.model.prior_perp.mean.shape == (len(run.predictor.adapter.layers), 2)
    assert all(A.weight.any() for A in run.predictor.adapter.perp_A)
    test = run.encode(make_records(9))
    again = predict(run.predictor, test).logits
    torch.testing.assert_close(again, saved["test.logits"], rtol=0, atol=0)
    mean = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert mean["r"] == 3
    plain = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    adapted = run.predictor.adapter.module_names
    assert plain.keys() == {
        f"base_model.model.{module}.lora_{part}.weight" for module in adapted for part in "AB"
    }
    write_jsonl(tmp_path / "in.jsonl", make_records(8, labelled=False))
    student = [f"run={tmp_path / 'run'}", f"input={tmp_path / 'in.jsonl'}", "fit.steps=20"]
    student += [f"output={tmp_path / 'student'}", "fit.lr=1.0e-3", "progress=false"]
    assert scalabl("distill", *student) == 0

    out = tmp_path / "exported"
    assert scalabl("export", f"run={tmp_path / 'run'}", f"output={out}") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rank"] == 5
    if quantization != "null":
        return  # plain PEFT on the dequantised model is another test's
    for k, name in enumerate(manifest["draws"]):
        values = json.loads((out / name / "adapter_config.json").read_text())
        assert (values["r"], values["lora_alpha"]) == (5, pytest.approx(25 / 3))
        llm = AutoModelForCausalLM.from_pretrained(local_model, dtype=torch.float32)
        plain = PeftModel.from_pretrained(llm, out / name).eval()
        with torch.no_grad():
            logits = run.readout(plain.get_base_model(), whole(test).inputs)
        torch.testing.assert_close(logits, again[k], rtol=1e-4, atol=1e-5)


def test_a_distilled_student_needs_none(make, make_causal, records):
    adapter = make()
    student = make_causal(svd=False)
    s = adapter.init_loc + 0.3
    sp.prediction.fold_into(adapter, s, student)
    batch = whole(adapter.encode(records))
    torch.testing.assert_close(student(batch), adapter(batch, s), rtol=1e-4, atol=1e-5)


def test_bad_values_are_refused(make, make_causal, records):
    with pytest.raises(ValueError, match="perp is -1: expected a number of coordinates"):
        make_causal(perp=-1)
    with pytest.raises(ValueError, match="perp is -1: expected a number of coordinates"):
        sp.methods.ScalaBL(perp=-1)
    with pytest.raises(ValueError, match=r"has 16 inputs, fewer than r \+ perp = 4 \+ 13"):
        make(13)
    adapter = make()
    with pytest.raises(ValueError, match=r"perp_scale is 0\.0: expected a finite number above 0"):
        sp.ScalaBLModel(adapter, num_data=12, perp_scale=0.0)
    with pytest.raises(ValueError, match=r"or with s_perp \(\*draws, 5, 7\)"):
        adapter(whole(adapter.encode(records)), torch.ones(5, 6))
    with pytest.raises(ValueError, match=r"or \(S, 5, 7\) with s_perp"):
        sp.Predictor(adapter, torch.ones(2, 5, 6))


def test_a_value_without_draws_stands_beside_draws(make, records):
    """Conditioned on one part while the other has draws, against one particle after the other."""
    adapter = make(K)
    model = sp.ScalaBLModel(adapter, num_data=3)
    split = adapter.encode(records)
    batch = whole(split)
    draws = {"s": torch.randn(4, *adapter.shape), "s_perp": torch.randn(4, len(adapter.layers), K)}
    for given in draws:
        one = {given: draws[given][0]}
        conditioned = poutine.condition(model, one)
        guide = poutine.block(sp.AutoSubspaceNormal(model), hide=[given])
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        assert elbo.loss(conditioned, guide, batch) > 0
        with pyro.plate("many", 2, dim=-2):
            trace = poutine.trace(conditioned).get_trace(batch)
        for k in range(2):
            parts = {name: trace.nodes[name]["value"] for name in draws}
            flat = [v.reshape(-1, *v.shape[-2:]) for v in parts.values()]
            s = torch.cat([v[min(k, len(v) - 1)] for v in flat], -1)
            torch.testing.assert_close(trace.nodes["_RETURN"]["value"][k], adapter(batch, s))
    for parallel in (False, True):
        sampled = Predictive(
            model, posterior_samples=draws, parallel=parallel, return_sites=["_RETURN"]
        )
        logits = sampled(batch)["_RETURN"]
        expected = adapter(batch, torch.cat([*draws.values()], -1))
        torch.testing.assert_close(logits.reshape(expected.shape), expected)
