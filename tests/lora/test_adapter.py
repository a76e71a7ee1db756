from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import fill_lora_B, lora, make_records, tiny_bert_config, tiny_llama, whole
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
)

from scalabl_pyro import AutoSubspaceNormal, ScalaBLModel, SubspaceAdapter
from scalabl_pyro.data import PROMPTS, Batch
from scalabl_pyro.prediction.metrics import average
from scalabl_pyro.readouts import LabelTokens


def test_s_of_one_before_the_svd_reproduces_plain_peft(make_causal, records):
    adapter = make_causal(svd=False)
    batch = whole(adapter.readout.encode(records))
    ones = torch.ones(adapter.shape)
    assert torch.equal(adapter.init_loc, ones)
    torch.testing.assert_close(adapter(batch, ones), adapter(batch))


def test_singular_values_after_the_svd_reproduce_plain_peft(make_causal, records):
    torch.manual_seed(5)
    plain = make_causal(svd=False, filled=False)
    torch.manual_seed(5)
    subspace = make_causal(svd=True, filled=False)
    batch = whole(plain.readout.encode(records))
    A = plain.named_parameters()["lm_head.lora_A.default.weight"]
    V = subspace.named_parameters()["lm_head.lora_A.default.weight"]
    torch.testing.assert_close(subspace.init_loc[-1], torch.linalg.svdvals(A))
    torch.testing.assert_close(V @ V.T, torch.eye(subspace.rank))
    with torch.no_grad():  # the same B on both sides, rotated as the SVD rotates it
        for name, parameter in plain.named_parameters().items():
            if ".lora_B." in name:
                other = name.replace("lora_B", "lora_A")
                parameter.normal_()
                U = torch.linalg.svd(plain.named_parameters()[other], full_matrices=False).U
                subspace.named_parameters()[name].copy_(parameter @ U)
    expected = plain(batch)
    torch.testing.assert_close(subspace(batch, subspace.init_loc), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(subspace(batch, subspace.init_loc / 2), expected, atol=1e-3)


def test_looped_draws_equal_vectorised_draws(adapter, split):
    batch = whole(split)
    s = torch.randn(3, 2, *adapter.shape)
    vectorised = adapter(batch, s)
    looped = torch.stack([torch.stack([adapter(batch, x) for x in row]) for row in s])
    assert vectorised.shape == (3, 2, len(split), 4)
    torch.testing.assert_close(vectorised, looped, atol=1e-5, rtol=1e-5)
    assert (vectorised[0, 0] - vectorised[2, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("draws", [(), (3,)])
def test_checkpointed_gradients_equal_plain_gradients(make_causal, records, draws):
    gradients = []
    for checkpointing in (False, True):
        adapter = make_causal(gradient_checkpointing=checkpointing)
        adapter.train()
        batch = whole(adapter.readout.encode(records))
        s = torch.linspace(0.5, 1.5, adapter.init_loc.numel()).view(adapter.shape)
        s = (s.expand(*draws, *adapter.shape) * torch.rand(*draws, 1, 1)).detach().requires_grad_()
        torch.manual_seed(0)
        adapter(batch, s).log_softmax(-1)[..., 0].sum().backward()
        gradients.append([s.grad, *(p.grad for p in adapter.named_parameters().values())])
        torch.manual_seed(0)
    assert gradients[0][0].abs().max() > 0
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_checkpointing_recomputes_with_the_draw_of_its_own_forward_pass(make_causal, records):
    """Two forward passes before one backward pass, as looped particles make them."""
    gradients = []
    for checkpointing in (False, True):
        adapter = make_causal(gradient_checkpointing=checkpointing)
        adapter.train()
        batch = whole(adapter.readout.encode(records))
        first = torch.ones(adapter.shape, requires_grad=True)
        second = torch.full(adapter.shape, 2.0, requires_grad=True)
        (adapter(batch, first)[:, 0] * adapter(batch, second)[:, 1]).sum().backward()
        gradients.append((first.grad, second.grad))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_checkpointed_blocks_drop_nothing_out(tokenizer, records):
    """Those of OPT read their training flag themselves."""
    torch.manual_seed(1)
    sizes = dict(vocab_size=32, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32)
    config = OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, dropout=0.5)
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    adapter = SubspaceAdapter(
        OPTForCausalLM(config).eval(),
        lora("q_proj", "v_proj"),
        readout,
        gradient_checkpointing=True,
    )
    adapter.train()
    batch = whole(readout.encode(records))
    assert torch.equal(adapter(batch, adapter.init_loc), adapter(batch, adapter.init_loc))


def test_checkpointing_from_outside_is_refused(make_causal, records):
    adapter = make_causal()
    adapter.peft_model.get_base_model().activation_checkpointing_enable()
    batch = whole(adapter.readout.encode(records))
    with pytest.raises(ValueError, match="gradient_checkpointing=True"):
        adapter(batch, adapter.init_loc)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_left_right_and_single_prompts_give_the_same_logits(tokenizer, architecture):
    torch.manual_seed(1)
    sizes = dict(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    llm = tiny_llama() if architecture == "llama" else GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    targets = ["q_proj"] if architecture == "llama" else ["lm_head"]
    adapter = SubspaceAdapter(llm, lora(*targets), readout)
    fill_lora_B(adapter)
    split = readout.encode(make_records(6))
    left = whole(split)
    ids = [example.rows["input_ids"][0] for example in split]
    rows = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    right = Batch(
        dict(tokenizer.pad(rows, padding_side="right", return_tensors="pt")), left.choices
    )
    assert not torch.equal(left.inputs["attention_mask"], right.inputs["attention_mask"])
    s = torch.rand(2, *adapter.shape)
    singles = torch.cat([adapter(split.collate([example]), s) for example in split], dim=1)
    torch.testing.assert_close(adapter(left, s), singles, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapter(right, s), singles, atol=1e-5, rtol=1e-5)


def test_a_forward_pass_that_failed_does_not_count(make_causal, records):
    adapter = make_causal()
    batch = whole(adapter.readout.encode(records))
    with pytest.raises(IndexError):
        adapter(
            replace(batch, inputs={k: v + 99 for k, v in batch.inputs.items()}), adapter.init_loc
        )
    adapter(batch, adapter.init_loc)


def test_missing_choices_are_masked_and_entropy_stays_finite(make_choice):
    adapter = make_choice()
    batch = whole(adapter.readout.encode(make_records(5, choices=3)))
    logits = adapter(batch, adapter.init_loc.expand(2, -1, -1))
    assert logits[..., 3].isinf().all()
    probs = average(logits).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(5))
    assert torch.special.entr(probs).sum(-1).isfinite().all()
    s = adapter.init_loc.clone().requires_grad_()
    adapter(batch, s).log_softmax(-1)[:, 0].sum().backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize(
    ("hidden", "intermediate", "blocks", "heads", "expected"),
    [(3584, 18944, 28, 28, (57, 3_768_320)), (5120, 27648, 64, 40, (129, 9_646_080))],
    ids=["7B", "32B"],
)
def test_parameter_counts_of_qwen_on_the_meta_device(
    tokenizer, hidden, intermediate, blocks, heads, expected
):
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=4 if blocks == 28 else 8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
        readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
        adapter = SubspaceAdapter(
            llm, lora("q_proj", "v_proj", "lm_head", r=8), readout, projections="free"
        )
    modules, parameters = expected
    assert adapter.shape == (modules, 8)
    assert adapter.num_parameters() == {"lora": parameters, "heads": 0}
    guide = AutoSubspaceNormal(ScalaBLModel(adapter, num_data=1))
    assert sum(p.numel() for p in guide.parameters()) == {57: 912, 129: 2064}[modules]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora("query"), r"\['query'\] match no module .* \['down_proj', .*'q_proj'"),
        (lora("q_proj", use_dora=True), "variant"),
        (lora("embed_tokens"), "Embedding"),
        (lora("q_proj", rank_pattern={"layers.0": 2}), r"ranks \[2, 4\]"),
        (lora("q_proj", target_parameters=["weight"]), "target_parameters"),
        (lora("q_proj", r=32), "fewer than the rank"),
    ],
    ids=["no module", "dora", "embedding", "ragged rank", "parameters", "rank"],
)
def test_what_bypasses_the_hook_is_refused(tokenizer, config, message):
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            SubspaceAdapter(tiny_llama(), config, readout)


def test_a_module_that_fires_twice_is_refused(tokenizer, records):
    llm = tiny_llama()
    llm.model.layers[1] = llm.model.layers[0]  # weights shared between blocks
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    adapter = SubspaceAdapter(llm, lora("q_proj"), readout)
    with pytest.raises(ValueError, match=r"once in a forward pass.*q_proj': 2"):
        adapter(whole(readout.encode(records)), adapter.init_loc)


def test_wrong_shape_of_s_is_refused(make_causal, records):
    adapter = make_causal()
    with pytest.raises(ValueError, match=re.escape("(*draws, 5, 4)")):
        adapter(whole(adapter.readout.encode(records)), torch.ones(4, 5))


def test_base_model_stays_in_evaluation_mode_unless_dropout_is_asked_for(make_choice, records):
    adapter = make_choice()
    batch = whole(adapter.readout.encode(records))
    adapter.train()
    assert torch.equal(adapter(batch, adapter.init_loc), adapter(batch, adapter.init_loc))
    adapter = make_choice(base_dropout=True)
    adapter.train()
    assert not torch.equal(adapter(batch, adapter.init_loc), adapter(batch, adapter.init_loc))
    adapter.eval()
    assert torch.equal(adapter(batch, adapter.init_loc), adapter(batch, adapter.init_loc))


def test_real_llama_starts_as_the_pretrained_model(shared):
    from transformers import AutoTokenizer

    folder = shared / "models" / "stories260k"
    readout = LabelTokens(
        AutoTokenizer.from_pretrained(folder), PROMPTS["letters"], "ABCD", max_length=512
    )
    llm = AutoModelForCausalLM.from_pretrained(folder)
    batch = whole(readout.encode(make_records(4)))
    expected = readout(llm, batch.inputs)
    adapter = SubspaceAdapter(llm, lora("q_proj", "v_proj"), readout)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers * 2 == adapter.shape[0]
    torch.testing.assert_close(adapter(batch, adapter.init_loc), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(adapter.peft_model, nn.Module)


def test_every_example_may_have_its_own_s(adapter, split):
    batch = split.collate(list(split)[:3])
    s = adapter.init_loc * torch.rand(3, *adapter.shape)
    own = adapter(batch, s, per_example=True)
    each = torch.stack([adapter(split.collate([split[n]]), s[n])[0] for n in range(3)])
    torch.testing.assert_close(own, each, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"2\,\) draws of s for 3 examples"):
        adapter(batch, s[:2], per_example=True)


def test_v_is_frozen_by_default_and_a_plain_adapter_is_free(make_causal):
    for svd, kinds in ((True, {"lora_B"}), (False, {"lora_A", "lora_B"})):
        trained = make_causal(svd=svd, projections=None).named_parameters()
        assert {name.split(".")[-3] for name in trained} == kinds


@pytest.mark.parametrize("projections", ["free", "unit", "frozen_v", "fixed"])
def test_what_is_trained_beside_s(make_choice, projections):
    adapter = make_choice(projections=projections)
    trained, stored = set(adapter.named_parameters()), set(adapter.state())
    kinds = {name.split(".")[-3] for name in trained if ".lora_" in name}
    assert (
        kinds
        == {
            "free": {"lora_A", "lora_B"},
            "unit": {"lora_A", "lora_B"},
            "frozen_v": {"lora_B"},
            "fixed": set(),
        }[projections]
    )
    assert any("classifier" in name for name in trained) == (projections != "fixed")
    assert any("classifier" in name for name in stored)
    assert sum(".lora_" in name for name in stored) == 2 * adapter.shape[0]


def test_unit_rows_leave_the_scale_to_s(make_causal, records):
    adapter = make_causal(projections="unit")
    split = adapter.readout.encode(records)
    batch = split.collate(list(split))
    before = adapter(batch, adapter.init_loc)
    with torch.no_grad():
        for name, V in adapter.state().items():
            if ".lora_A." in name:
                V *= torch.rand(len(V), 1) + 0.5
    torch.testing.assert_close(adapter(batch, adapter.init_loc), before)
    with adapter.folded(adapter.init_loc):
        outside = adapter.readout(adapter.peft_model.get_base_model(), batch.inputs)
    torch.testing.assert_close(outside, before, atol=1e-5, rtol=1e-5)
    adapter(batch, adapter.init_loc).sum().backward()
    along = [
        (V * V.grad).sum(-1).abs().max() / V.grad.abs().max()
        for name, V in adapter.state().items()
        if ".lora_A." in name and V.grad is not None
    ]
    # No gradient along a row: its length does not matter.
    assert len(along) == len(adapter.module_names)
    assert max(along) < 1e-4


def test_a_trained_adapter_starts_at_s_1_with_its_own_logits(make_causal, records, tmp_path):
    source = make_causal(svd=False)
    split = source.readout.encode(records)
    batch = split.collate(list(split))
    source.peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = source(batch)
    started = make_causal(start=tmp_path, filled=False)
    assert torch.equal(started.init_loc, torch.ones(started.shape))
    torch.testing.assert_close(started(batch, started.init_loc), expected, atol=1e-5, rtol=1e-5)
    V = started.state()[next(n for n in started.state() if ".lora_A." in n)]
    torch.testing.assert_close((V @ V.mT).detach(), torch.eye(len(V)), atol=1e-5, rtol=0)


def test_a_trained_adapter_may_have_a_layer_with_fewer_outputs_than_its_rank(
    make_classifier, records, tmp_path
):
    def make(**options):
        llm = BertForSequenceClassification(tiny_bert_config(num_labels=4)).eval()
        readout = make_classifier().readout
        return SubspaceAdapter(llm, lora("query", "classifier", r=8), readout, **options)

    torch.manual_seed(1)
    source = make(svd=False)
    fill_lora_B(source)
    batch = whole(source.readout.encode(records))
    source.peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = source(batch)
    torch.manual_seed(1)
    started = make(start=tmp_path)
    torch.testing.assert_close(started(batch, started.init_loc), expected, atol=1e-5, rtol=1e-5)


def test_a_trained_adapter_of_another_base_is_refused(make_causal, tmp_path):
    make_causal(svd=False).peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = LoraConfig.from_pretrained(tmp_path)
    wider = tiny_llama(hidden_size=48)
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM"):
        SubspaceAdapter(wider, config, make_causal().readout, start=tmp_path)


def test_weights_are_put_back_whatever_fails(make_causal):
    adapter = make_causal()
    before = {name: value.clone() for name, value in adapter.state().items()}
    first, second = list(before)[:2]
    wrong = {first: torch.full_like(before[first], 7.0), second: torch.zeros(3, 5, 7)}
    with pytest.raises(RuntimeError), adapter.holding(wrong):
        pass
    for name, value in adapter.state().items():
        assert torch.equal(value, before[name]), name


def test_a_model_on_a_device_whose_random_state_is_not_kept_is_refused(tokenizer, monkeypatch):
    llm = tiny_llama()
    monkeypatch.setattr(type(llm), "device", torch.device("mps"))
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    with pytest.raises(ValueError, match="is on mps: expected a CPU or a CUDA device"):
        SubspaceAdapter(llm, lora("q_proj"), readout)
