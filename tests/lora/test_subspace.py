"""V from activations or weights: against loops over plain transformers, and in closed form."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    fill_lora_B,
    lora,
    make_records,
    scalabl,
    tiny_bert_config,
    tiny_llama,
    whole,
    write_jsonl,
)
from peft import get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    BertForMultipleChoice,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

import scalabl_pyro as sp
from scalabl_pyro import ScalaBLModel, SubspaceAdapter, load_run, predict
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.lora import AdapterConfig, ModelConfig, load_readout, make_adapter
from scalabl_pyro.lora.subspace import (
    SUBSPACES,
    _leading,
    second_moments,
    set_perp,
    set_subspace,
)
from scalabl_pyro.readouts import ChoiceLikelihood, LabelTokens
from scalabl_pyro.readouts.heads import MultipleChoice

FROM_DATA = ["activations", "weights"]


def V(adapter: SubspaceAdapter) -> dict[str, torch.Tensor]:
    weights = (A.weight.detach() for A in adapter.matrices.A.values())
    return dict(zip(adapter.module_names, weights, strict=True))


def projector(rows: torch.Tensor) -> torch.Tensor:
    """Onto the span of the rows, whatever their scales, signs and order."""
    Q = torch.linalg.qr(rows.double().mT).Q
    return Q @ Q.mT


def moment(rows: list[torch.Tensor]) -> torch.Tensor:
    """A loop over tokens."""
    total = sum(torch.outer(x, x) for part in rows for x in part.double())
    return total / sum(map(len, rows))


# ---------------------------------------------------------------------- activations


def test_moments_are_those_of_a_causal_models_own_hidden_states(make_causal, records):
    adapter = make_causal(filled=False)
    split = adapter.encode(records)
    moments = second_moments(adapter, split)

    llm = tiny_llama()
    inputs = {name: [] for name in adapter.module_names}
    for example in split:
        (ids,) = example.rows["input_ids"]
        with torch.no_grad():
            out = llm(torch.tensor([ids]), output_hidden_states=True)
            for layer, block in enumerate(llm.model.layers):
                x = block.input_layernorm(out.hidden_states[layer])[0]
                for target in ("q_proj", "v_proj"):
                    inputs[f"model.layers.{layer}.self_attn.{target}"].append(x)
        # The last is behind the model's norm; the output layer reads the last token alone.
        inputs["lm_head"].append(out.hidden_states[-1][0, -1:])
    assert moments.keys() == inputs.keys()
    for name, rows in inputs.items():
        torch.testing.assert_close(moments[name], moment(rows), rtol=1e-4, atol=1e-5)


def test_moments_of_an_encoder_leave_out_padding_and_missing_choices(tokenizer):
    records = [*make_records(4), *make_records(5, choices=2)]
    torch.manual_seed(1)
    plain = BertForMultipleChoice(tiny_bert_config()).eval()
    torch.manual_seed(1)
    llm = BertForMultipleChoice(tiny_bert_config()).eval()
    readout = MultipleChoice(tokenizer, num_classes=4, max_length=64)
    adapter = SubspaceAdapter(llm, lora("query"), readout)
    split = adapter.encode(records)
    moments = second_moments(adapter, split)
    inputs = {name: [] for name in adapter.module_names}
    for example in split:
        assert len(example.rows["input_ids"]) == example.num_choices
        for c, ids in enumerate(example.rows["input_ids"]):
            rest = {n: torch.tensor([rows[c]]) for n, rows in example.rows.items()}
            with torch.no_grad():
                out = plain.bert(**rest, output_hidden_states=True)
            assert rest["input_ids"].shape == (1, len(ids))
            for layer in range(2):
                inputs[f"bert.encoder.layer.{layer}.attention.self.query"].append(
                    out.hidden_states[layer][0]
                )
    for name, rows in inputs.items():
        torch.testing.assert_close(moments[name], moment(rows), rtol=1e-4, atol=1e-5)


def test_choices_that_share_a_row_count_their_prompt_once(tokenizer, records):
    readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
    adapter = SubspaceAdapter(tiny_llama(), lora("q_proj", "lm_head"), readout)
    assert readout.packed
    split = adapter.encode(records)
    moments = second_moments(adapter, split)
    llm, first, output = tiny_llama(), [], []
    for example in split:
        shared = example.rows["shared"][0][0]
        for c, ids in enumerate(example.rows["input_ids"]):
            with torch.no_grad():
                x = llm.model.layers[0].input_layernorm(llm.model.embed_tokens(torch.tensor(ids)))
                last = llm.model(torch.tensor([ids])).last_hidden_state[0]
            first.append(x if c == 0 else x[shared:])
            # What predicts a token is the one before it, of a choice's first the prompt's last.
            output.append(last[shared - 1 : shared] if c == 0 else last[:0])
            output.append(last[shared:-1])
    torch.testing.assert_close(
        moments["model.layers.0.self_attn.q_proj"], moment(first), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(moments["lm_head"], moment(output), rtol=1e-4, atol=1e-5)


def test_choices_behind_their_prompts_and_alone_all_count(tokenizer):
    """``unconditional`` reads two rows a choice, of which those of missing choices are none."""
    records = [*make_records(3), *make_records(4, choices=2)]
    prompt = PROMPTS["question"]
    readout = ChoiceLikelihood(
        tokenizer, prompt, num_classes=4, max_length=64, normalise="unconditional"
    )
    adapter = SubspaceAdapter(tiny_llama(), lora("q_proj", "lm_head"), readout)
    split = adapter.encode(records)
    moments = second_moments(adapter, split)
    llm, first, output = tiny_llama(), [], []
    for example in split:
        assert len(example.rows["input_ids"]) == 2 * example.num_choices
        for ids, scored in zip(*(example.rows[n] for n in ("input_ids", "scored")), strict=True):
            with torch.no_grad():
                hidden = llm.model(torch.tensor([ids])).last_hidden_state[0]
                embedded = llm.model.embed_tokens(torch.tensor(ids))
                first.append(llm.model.layers[0].input_layernorm(embedded))
            output.append(hidden[:-1][torch.tensor(scored[1:]).bool()])
    torch.testing.assert_close(
        moments["model.layers.0.self_attn.q_proj"], moment(first), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(moments["lm_head"], moment(output), rtol=1e-4, atol=1e-5)


def test_directions_of_a_known_covariance(tokenizer):
    """Token k is embedded on axis k, so that C is diagonal, with the tokens' frequencies."""
    llm = tiny_llama(vocab_size=16)
    with torch.no_grad():
        llm.model.embed_tokens.weight.copy_(torch.eye(16))
    counts = {"the": 8, "cat": 4, "runs": 2, "red": 1}
    words = [word for word, count in counts.items() for _ in range(count)]
    record = sp.Record("1", " ".join(words), ("A", "B", "C", "D"))
    ids = [tokenizer.convert_tokens_to_ids(word) for word in counts]

    class Words(LabelTokens):  # nothing but these words
        def _tokenize(self, record):
            return {name: [ids] for name, ids in tokenizer(record.question).items()}

    readout = Words(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    readout.label_ids = torch.arange(4)
    config = lora("q_proj", layers_to_transform=[0])
    adapter = SubspaceAdapter(llm, config, readout)
    set_subspace(adapter, "activations", readout.encode([record]))

    # Inputs are normalised to the norm √16. So C = 16·diag(n_k / 15) and tr C / d = 1, and
    # V_j = e_j / √(16·n_j / 15).
    (directions,) = V(adapter).values()
    expected = torch.zeros(4, 16)
    for j, (k, n) in enumerate(zip(ids, counts.values(), strict=True)):
        expected[j, k] = (16 * n / 15) ** -0.5
    torch.testing.assert_close(directions.abs(), expected, rtol=1e-3, atol=1e-4)


def test_each_direction_has_the_energy_of_a_random_one(make_causal, records):
    adapter = make_causal(filled=False)
    split = adapter.encode(records)
    set_subspace(adapter, "activations", split)
    for name, C in second_moments(adapter, split).items():
        rows = V(adapter)[name].double()
        energy = torch.einsum("jd,de,je->j", rows, C, rows)  # mean of (V_j x)²
        torch.testing.assert_close(energy, (C.trace() / len(C)).expand(4), rtol=1e-4, atol=0)
        leading = torch.linalg.svd(C).Vh[:4]
        torch.testing.assert_close(projector(rows), projector(leading), rtol=0, atol=1e-3)


def test_at_most_256_prompts_run_evenly_spread(make_causal, monkeypatch):
    adapter = make_causal(filled=False, targets=("q_proj",))
    split = adapter.encode(make_records(600))
    seen = []
    collate = split.collate
    split.collate = lambda examples: seen.extend(examples) or collate(examples)
    set_subspace(adapter, "activations", split)
    assert list(map(id, seen)) == list(map(id, split.examples[::3]))


@pytest.mark.parametrize("kind", ["label_tokens", "choice_likelihood"])
def test_a_cached_trunk_gives_the_same(tokenizer, records, kind):
    def make():
        if kind == "label_tokens":
            readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
        else:
            readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
        return SubspaceAdapter(tiny_llama(), lora("q_proj", layers_to_transform=[1]), readout)

    plain, cached = make(), make()
    set_subspace(plain, "activations", plain.encode(records))
    split = cached.cache_trunk(cached.encode(records))
    set_subspace(cached, "activations", split)
    torch.testing.assert_close(V(cached), V(plain), rtol=1e-4, atol=1e-4)
    # And a split that was cached before serves an adapter whose V is another.
    s = torch.randn(3, *cached.shape)
    fill_lora_B(cached)
    rest = cached.encode(records)
    torch.testing.assert_close(cached(whole(split), s), cached(whole(rest), s))


# ---------------------------------------------------------------------- weights


def test_right_singular_vectors_of_weights(make_causal):
    adapter = make_causal(filled=False)
    set_subspace(adapter, "weights")
    llm = tiny_llama()
    for name, rows in V(adapter).items():
        right = torch.linalg.svd(llm.get_submodule(name).weight.detach().double()).Vh[:4]
        cosines = (rows.double() * right).sum(-1).abs()
        torch.testing.assert_close(cosines, torch.ones(4).double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(rows @ rows.mT, torch.eye(4), rtol=0, atol=1e-5)


def test_weights_that_are_stored_transposed(tokenizer):
    torch.manual_seed(1)
    sizes = dict(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    llm = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    right = torch.linalg.svd(llm.transformer.h[0].attn.c_attn.weight.detach().mT).Vh[:4]
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    adapter = SubspaceAdapter(llm, lora("c_attn", fan_in_fan_out=True), readout)
    set_subspace(adapter, "weights")
    (rows,) = V(adapter).values()
    torch.testing.assert_close((rows * right).sum(-1).abs(), torch.ones(4), rtol=0, atol=1e-4)


def test_a_layer_with_fewer_outputs_than_the_rank_has_whole_rows(tokenizer):
    torch.manual_seed(1)
    llm = BertForMultipleChoice(tiny_bert_config()).eval()
    readout = MultipleChoice(tokenizer, num_classes=4, max_length=64)
    adapter = SubspaceAdapter(llm, lora("classifier"), readout)  # one output
    set_subspace(adapter, "weights")
    (rows,) = V(adapter).values()
    torch.testing.assert_close(rows @ rows.mT, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        rows[0].abs(),
        torch.nn.functional.normalize(llm.classifier.base_layer.weight[0], dim=0).abs(),
        rtol=0,
        atol=1e-4,
    )


# ---------------------------------------------------------------------- start, files, settings


@pytest.mark.parametrize("name", SUBSPACES)
@pytest.mark.parametrize("form", [{}, {"svd": False}], ids=["subspace", "plain"])
def test_the_start_is_the_base_model_to_the_bit(make_causal, records, name, form):
    adapter = make_causal(filled=False, **form)
    split = adapter.encode(records)
    set_subspace(adapter, name, split)
    draws = torch.randn(3, *adapter.shape) if not form else torch.ones(3, *adapter.shape)
    llm = make_causal(filled=False).peft_model.unload()
    plain = SubspaceAdapter(llm, lora("down_proj"), adapter.readout)  # another LoRA, also at 0
    expected = plain(whole(split))
    torch.testing.assert_close(adapter(whole(split), draws), expected.expand(3, -1, -1))
    assert torch.equal(adapter(whole(split)), expected)


@pytest.mark.parametrize("name", FROM_DATA)
def test_s_starts_where_it_did_and_plain_lora_computes_the_same(make_causal, records, name):
    torch.manual_seed(3)
    random = make_causal(filled=False)
    torch.manual_seed(3)
    adapter = make_causal(filled=False)
    torch.manual_seed(3)
    plain = make_causal(filled=False, svd=False)
    for each in (adapter, plain):
        set_subspace(each, name, adapter.encode(records))
    assert torch.equal(adapter.init_loc, random.init_loc)
    for scale, rows, A in zip(
        adapter.init_loc, V(adapter).values(), V(plain).values(), strict=True
    ):
        torch.testing.assert_close(scale[:, None] * rows, A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FROM_DATA)
def test_training_lowers_the_loss_and_a_prior_of_another_support_moves_the_start(
    make_causal, records, name
):
    adapter = make_causal(filled=False, projections="frozen_v")
    train = adapter.encode(records)
    set_subspace(adapter, name, train)
    before = {key: value.clone() for key, value in V(adapter).items()}
    model = ScalaBLModel(adapter, num_data=12, prior=sp.make_prior(adapter.shape, "log_normal"))
    guide = sp.AutoSubspaceNormal(model)
    base = float(cross_entropy(adapter(whole(train)).detach(), train.labels))
    sp.fit(model, guide, train, sp.FitConfig(steps=60, batch_size=12, lr=0.05))
    predictions = predict(sp.Predictor(adapter, guide.median()["s"][None]), train)
    assert float(cross_entropy(predictions.logits[0], train.labels)) < base - 0.05
    for key, value in V(adapter).items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("quantization", ["null", "4bit"])
@pytest.mark.parametrize("name", FROM_DATA)
def test_a_run_folder_predicts_the_same_to_the_bit(local_model, tmp_path, name, quantization):
    for split, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", make_records(count))
    words = [f"model.name={local_model}", f"data.root={tmp_path / 'data'}", "progress=false"]
    words += ["fit.steps=3", "fit.batch_size=4", "lora.r=3", f"lora.subspace={name}"]
    words += [f"model.quantization={quantization}", "model.device=cpu"]
    assert scalabl("train", *words, f"run_dir={tmp_path / 'run'}") == 0
    saved = load_file(tmp_path / "run" / "predictions.safetensors")
    run = load_run(tmp_path / "run")
    again = predict(run.predictor, run.encode(make_records(9))).logits
    torch.testing.assert_close(again, saved["test.logits"], rtol=0, atol=0)

    # Another seed has the same V, and another subspace another.
    config = ModelConfig(
        str(local_model), device="cpu", quantization=None if quantization == "null" else "4bit"
    )
    readout = load_readout(config, config.classes(make_records(16)))
    fresh = make_adapter(
        config,
        AdapterConfig(r=3, subspace=name),
        readout,
        svd=True,
        prompts=readout.encode(make_records(16)),
    )
    directions = V(run.predictor.adapter)
    torch.testing.assert_close(V(fresh), directions)
    other = make_adapter(config, AdapterConfig(r=3, subspace="random"), readout, svd=True)
    assert not torch.allclose(
        projector(V(other)["lm_head"]), projector(directions["lm_head"]), atol=0.1
    )


def test_4_bit_weights_are_those_that_they_stand_for(local_model):
    config = ModelConfig(str(local_model), device="cpu", quantization="4bit")
    readout = load_readout(config, config.classes(make_records(4)))
    adapter = make_adapter(config, AdapterConfig(r=3, subspace="weights"), readout, svd=True)
    rows = V(adapter)
    llm = adapter.peft_model.unload().dequantize()
    for name, directions in rows.items():
        right = torch.linalg.svd(llm.get_submodule(name).weight.detach().float()).Vh[:3]
        torch.testing.assert_close(projector(directions), projector(right), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["mle", "reference"])
def test_other_methods_take_it_too(local_model, tmp_path, method):
    for split, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", make_records(count))
    words = [f"model.name={local_model}", f"data.root={tmp_path / 'data'}", "progress=false"]
    words += ["fit.steps=2", "fit.batch_size=4", "lora.r=3", "lora.subspace=activations"]
    assert scalabl("train", *words, f"method={method}", f"run_dir={tmp_path / 'run'}") == 0
    saved = load_file(tmp_path / "run" / "predictions.safetensors")
    run = load_run(tmp_path / "run")
    again = predict(run.predictor, run.encode(make_records(9))).logits
    torch.testing.assert_close(again, saved["test.logits"], rtol=0, atol=0)


@pytest.mark.parametrize("name", FROM_DATA)
def test_from_pretrained(tokenizer, records, name):
    options = dict(tokenizer=tokenizer, projections="frozen_v")
    adapter = sp.from_pretrained(tiny_llama(), lora("q_proj"), records, subspace=name, **options)
    expected = sp.from_pretrained(
        tiny_llama(), lora("q_proj"), records, subspace="random", **options
    )
    start = V(expected)
    for key, value in V(adapter).items():
        assert not torch.allclose(projector(value), projector(start[key]), atol=0.1)
    set_subspace(expected, name, expected.encode(records))
    for key, value in V(expected).items():
        torch.testing.assert_close(V(adapter)[key], value)


def test_by_default_a_frozen_v_comes_from_activations(tokenizer, records, tmp_path):
    """And no other V: the methods that train it, or plain LoRA, start as they are published."""
    train = [*records, *make_records(10)]
    config = ModelConfig("embedded")
    readout = load_readout(config, config.classes(train))
    prompts = readout.encode(train)
    for svd, projections, source in (
        (True, "frozen_v", "activations"),
        (True, "free", "random"),
        (False, "frozen_v", "random"),
        (False, "free", "random"),
    ):
        form = dict(svd=svd, projections=projections, prompts=prompts)
        adapters = []
        for subspace in ("auto", source):
            torch.manual_seed(0)
            settings = AdapterConfig(targets=("q_proj",), subspace=subspace)
            adapters.append(make_adapter(config, settings, readout, **form))
        torch.testing.assert_close(V(adapters[0]), V(adapters[1]), rtol=0, atol=0)
    saved = get_peft_model(tiny_llama(), lora("q_proj", init_lora_weights=False))
    saved.save_pretrained(tmp_path)
    options = dict(tokenizer=tokenizer, start=tmp_path)
    warm, own = (
        sp.from_pretrained(tiny_llama(), lora("q_proj"), records, **options, subspace=subspace)
        for subspace in ("auto", "random")
    )
    torch.testing.assert_close(V(warm), V(own), rtol=0, atol=0)


def test_directions_that_no_input_has_stay_random(make_causal, records):
    """The output layer reads the last token of a prompt alone: two prompts have two directions."""
    adapter = make_causal(filled=False)
    before = V(adapter)["lm_head"].clone()
    split = adapter.encode(records[:2])
    set_subspace(adapter, "activations", split)
    rows = V(adapter)["lm_head"]
    C = second_moments(adapter, split)["lm_head"].float()
    size = C.trace() / len(C)
    torch.testing.assert_close((rows @ C @ rows.mT).diag(), size * torch.tensor([1.0, 1, 0, 0]))
    torch.testing.assert_close(rows[2:] @ rows.mT, torch.eye(4)[2:], atol=1e-5, rtol=0)
    # They are what the two leave of the random ones.
    span = projector(torch.cat([rows[:2], before[:2]]))
    torch.testing.assert_close(span, projector(rows), atol=1e-5, rtol=0)


def test_second_moments_that_do_not_fit_are_computed_one_after_another(
    make_causal, records, monkeypatch
):
    together, apart = make_causal(filled=False), make_causal(filled=False)
    split = together.encode(records)
    set_subspace(together, "activations", split)
    monkeypatch.setattr("scalabl_pyro.lora.subspace._MOST_BYTES", 1)
    set_subspace(apart, "activations", split)
    torch.testing.assert_close(V(apart), V(together), rtol=0, atol=0)


def test_directions_for_s_perp_are_the_same_however_many_moments_fit(
    make_causal, records, monkeypatch
):
    directions = []
    for most in (2**30, 1):
        monkeypatch.setattr("scalabl_pyro.lora.subspace._MOST_BYTES", most)
        adapter = make_causal(perp=2, projections="frozen_v")
        set_perp(adapter, adapter.encode(records))
        directions.append([A.weight.detach().clone() for A in adapter.perp_A])
    torch.testing.assert_close(*directions, rtol=0, atol=0)


def test_the_first_eigenvectors_of_many_inputs_are_those_of_all(monkeypatch):
    Q = torch.linalg.qr(torch.randn(60, 60).double()).Q
    sizes = torch.arange(60, 0, -1).double() ** 2
    C = Q @ sizes.diag() @ Q.mT
    monkeypatch.setattr("scalabl_pyro.lora.subspace._DENSE", 59)
    state = torch.get_rng_state()
    values, vectors = _leading(C, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)  # whatever is drawn elsewhere, they are the same
    again = _leading(C, 4)
    assert torch.equal(values, again[0])
    assert torch.equal(vectors, again[1])
    torch.testing.assert_close(values, sizes[:4])
    torch.testing.assert_close(projector(vectors), projector(Q.mT[:4]), atol=1e-5, rtol=0)


def test_a_module_that_no_token_reaches_stays_as_it_is(tokenizer, records):
    llm = tiny_llama()
    llm.add_module("expert", torch.nn.Linear(16, 16))
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    adapter = SubspaceAdapter(llm, lora("q_proj", "expert"), readout, perp=1)
    before = {name: value.clone() for name, value in V(adapter).items()}
    set_subspace(adapter, "activations", adapter.encode(records))
    for name, rows in V(adapter).items():
        assert torch.allclose(rows, before[name], atol=1e-6) == (name == "expert")
    with pytest.raises(ValueError, match="no token of 12 prompts reaches expert"):
        set_perp(adapter, adapter.encode(records))


def test_what_is_refused(make_causal, records):
    adapter = make_causal(filled=False)
    split = adapter.encode(records)
    with pytest.raises(ValueError, match=r"subspace is 'pca': expected one of \['auto'"):
        set_subspace(adapter, "pca")
    with pytest.raises(ValueError, match="give prompts, a split of training examples"):
        set_subspace(adapter, "activations")
    with pytest.raises(ValueError, match="but B is not 0"):
        set_subspace(make_causal(), "weights")
    unit = make_causal(filled=False, projections="unit")
    with pytest.raises(ValueError, match="'unit' takes it away"):
        set_subspace(unit, "activations", split)
    set_subspace(unit, "weights")
    with pytest.raises(ValueError, match="subspace is 'pca': expected one of"):
        AdapterConfig(subspace="pca")
    with pytest.raises(ValueError, match="to start from has a V of its own"):
        AdapterConfig(subspace="weights", start="somewhere")


def test_layers_whose_input_has_a_dimension_more(tokenizer):
    """As attention of DeepSeek's, one of whose layers takes (R, 1, T, d): by a loop over texts."""
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    sizes |= dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8)
    torch.manual_seed(0)
    config = DeepseekV3Config(**sizes, v_head_dim=8, first_k_dense_replace=1, pad_token_id=0)
    llm = DeepseekV3ForCausalLM(config).eval()
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    split = readout.encode(make_records(5))
    layer = llm.model.layers[0].self_attn.kv_b_proj
    total, count = torch.zeros(8, 8, dtype=torch.float64), 0
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for example in split.examples:
        (row,) = example.rows["input_ids"]
        with torch.no_grad():
            llm(torch.tensor([row]))
        x = seen.pop().reshape(-1, 8).double()
        assert len(x) == len(row)
        total, count = total + x.T @ x, count + len(row)
    hook.remove()
    adapter = SubspaceAdapter(llm, lora("kv_b_proj", r=2), readout)
    (moments,) = second_moments(adapter, split).values()
    torch.testing.assert_close(moments, total / count)
