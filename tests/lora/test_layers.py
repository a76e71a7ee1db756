"""What an adapter is built on: which models, configurations and trained adapters are refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from conftest import lora, make_records, scalabl, tiny_bert_config, tiny_llama, whole, write_jsonl
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from scalabl_pyro import AutoSubspaceNormal, ScalaBLModel, SubspaceAdapter, load_run
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import Classes, load_readout, make_adapter
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.readouts.heads import SequenceClassification

LLAMA = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
LLAMA |= dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
LLAMA |= dict(pad_token_id=0)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


@pytest.fixture
def letters(tokenizer) -> LabelTokens:
    return LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)


@pytest.fixture
def classes(tokenizer) -> SequenceClassification:
    return SequenceClassification(tokenizer, num_classes=4, max_length=64)


# ---------------------------------------------------------------------- models


def second_adapter(llm):
    SubspaceAdapter(llm, lora("q_proj"), LabelTokens.untokenized(4))
    return llm


def added_adapter(llm):
    llm.add_adapter(lora("q_proj"))
    return llm


def wrapped_peft(llm):
    return get_peft_model(llm, lora("q_proj"))


def trained_head(llm):
    get_peft_model(llm, lora("q_proj", modules_to_save=["norm"]))
    return llm


def adapted_part(llm):
    llm.model = get_peft_model(llm.model, lora("q_proj"))
    return llm


def compiled_part(llm):
    llm.model.layers[1] = torch.compile(llm.model.layers[1])
    return llm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (second_adapter, r"already carries a PEFT adapter: .*q_proj of the model"),
        (added_adapter, r"already carries a PEFT adapter: .*q_proj of the model"),
        (wrapped_peft, "already carries a PEFT adapter: the model is a PeftModel"),
        (trained_head, "already carries a PEFT adapter"),
        (adapted_part, "already carries a PEFT adapter: model of the model"),
        (torch.compile, "wrapped in OptimizedModule.*attribute _orig_mod"),
        (compiled_part, r"model\.layers\.1 of the model is wrapped in OptimizedModule"),
        (nn.DataParallel, "wrapped in DataParallel.*attribute module"),
        (torch.optim.swa_utils.AveragedModel, "llm is a AveragedModel: expected a model of"),
        (lambda llm: nn.Sequential(llm), "llm is a Sequential: expected a model of transformers"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_models_that_are_wrapped_or_hold_an_adapter_are_refused(letters, change, message):
    llm = change(tiny_llama())
    with pytest.raises(ValueError, match=message):
        SubspaceAdapter(llm, lora("v_proj"), letters)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"projections": "unit"}])
def test_a_copy_computes_with_its_own_s(make_causal, records, options):
    """As a second adapter, built alike on weights of its own, does."""
    original = make_causal(**options)
    batch = whole(original.readout.encode(records))
    s = torch.rand(2, *original.shape)
    original(batch, s.clone().requires_grad_())  # leaves a graph behind
    model = ScalaBLModel(original, num_data=len(records))
    for made in (copy.deepcopy(original), copy.deepcopy(model).adapter):
        built = make_causal(**options)
        with torch.no_grad():
            for adapter in (made, built):
                for parameter in adapter.named_parameters().values():
                    parameter.mul_(1.5)
            built._init_loc = original.init_loc
            for name, parameter in built.state().items():
                parameter.copy_(made.state()[name])
        before = original(batch, s)
        tensors = []
        for adapter in (made, built):
            adapter.train()
            own = s.clone().requires_grad_()
            logits = adapter(batch, own)
            original(batch, 3 * s)  # binds another s before the backward pass
            logits.log_softmax(-1)[..., 0].sum().backward()
            tensors.append([logits, own.grad, *(p.grad for p in adapter.state().values())])
        assert tensors[0][1].abs().max() > 0
        for one, other in zip(*tensors, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(original(batch, s), before)
    assert all(p.grad is None for p in original.state().values())


def test_no_library_warns_of_another_when_layers_are_added(letters, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = SubspaceAdapter(tiny_llama(), lora("q_proj"), letters)
        with first.folded(first.init_loc) as peft_model:
            peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
        SubspaceAdapter(tiny_llama(), lora("q_proj"), letters, start=tmp_path)
        with pytest.warns(FutureWarning, match="^`is_gradient_checkpointing`"):
            tiny_llama().is_gradient_checkpointing  # noqa: B018  in sight again


# ---------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inference_mode": True}, "inference_mode is true, which trains nothing"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    ],
)
def test_configurations_that_train_nothing_are_refused(letters, options, message):
    config = LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | options))
    with pytest.raises(ValueError, match=message):
        SubspaceAdapter(tiny_llama(), config, letters)


def test_fixed_projections_of_a_fresh_adapter_are_refused(make_causal, records):
    adapter = make_causal(projections="fixed", filled=False)
    with pytest.raises(ValueError, match="nothing depends on s: projections is 'fixed'"):
        AutoSubspaceNormal(ScalaBLModel(adapter, num_data=len(records)))


@pytest.mark.parametrize(
    ("targets", "heads"),
    [
        (["query", "classifier"], ["classifier"]),
        (["query", "pooler.dense"], ["pooler"]),
        (r".*(query|classifier)", ["classifier"]),
        (["bert.pooler.dense"], ["pooler.dense", "classifier"]),
    ],
)
def test_a_layer_both_adapted_and_trained_whole_is_refused(classes, targets, heads):
    llm = BertForSequenceClassification(tiny_bert_config(num_labels=4))
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=heads)
    with pytest.raises(ValueError, match=r"both in target_modules.* and in modules_to_save"):
        SubspaceAdapter(llm, config, classes)


@pytest.mark.parametrize("targets", [["query", "dense"], "all-linear"])
def test_other_layers_of_a_name_are_adapted_beside_a_head(classes, targets):
    llm = BertForSequenceClassification(tiny_bert_config(num_labels=4))
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["pooler", "classifier"])
    adapter = SubspaceAdapter(llm, config, classes)
    assert not any("pooler" in name or "classifier" in name for name in adapter.module_names)
    assert sum("dense" in name for name in adapter.module_names) == 6


@pytest.mark.parametrize(
    ("cls", "config"),
    [(MixtralForCausalLM, MixtralConfig), (Qwen3MoeForCausalLM, Qwen3MoeConfig)],
)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate"], ["q_proj", "mlp.gate"]])
def test_experts_in_one_tensor_are_refused_in_words(letters, cls, config, targets):
    llm = cls(config(**LLAMA | MOE)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="without a layer of its own"):
            SubspaceAdapter(llm, LoraConfig(r=2, target_modules=targets), letters)
    llm = cls(config(**LLAMA | MOE)).eval()
    assert SubspaceAdapter(llm, lora("q_proj", "v_proj"), letters).shape == (4, 4)


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 14), (r".*\.1\.self_attn\.(q|k)_proj", 2), (r".*v_proj|lm_head", 3)],
)
def test_targets_may_be_one_string_from_the_command_line_on(tmp_path, local_model, targets, count):
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", make_records(10 + len(split)))
    status = scalabl(
        "train",
        f"model.name={local_model}",
        "model.device=cpu",
        "lora.r=2",
        f'lora.targets="{targets}"' if targets == "all-linear" else f"lora.targets='{targets}'",
        f"data.root={tmp_path / 'data'}",
        "fit.steps=1",
        "fit.batch_size=4",
        "progress=false",
        f"run_dir={tmp_path / 'run'}",
    )
    assert status == 0
    adapter = load_run(tmp_path / "run").predictor.adapter
    assert len(adapter.module_names) == count
    plain = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=targets))
    names = {n.split(".lora_A")[0] for n, _ in plain.named_parameters() if "lora_A" in n}
    assert {f"base_model.model.{name}" for name in adapter.module_names} == names


def test_a_string_of_targets_has_its_own_blocks():
    with pytest.raises(ValueError, match=r"layers is \[1\], but targets is the string"):
        AdapterConfig(targets="all-linear", layers=(1,))


# ---------------------------------------------------------------------- heads


def distilbert():
    sizes = dict(vocab_size=32, dim=16, hidden_dim=32, n_layers=2, n_heads=2, pad_token_id=0)
    return DistilBertForSequenceClassification(
        DistilBertConfig(**sizes, max_position_embeddings=64, num_labels=4)
    )


HEADS = {
    "llama": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=4)),
        "q_proj",
        ["embed_tokens", "norm", "score", "layers.0.mlp", "layers.1.self_attn"],
    ),
    "bert": (
        lambda: BertForSequenceClassification(tiny_bert_config(num_labels=4)),
        "query",
        ["pooler", "classifier", "word_embeddings", "LayerNorm", "layer.0.output"],
    ),
    "distilbert": (distilbert, "q_lin", ["pre_classifier", "position_embeddings", "ffn"]),
}
CASES = [(kind, head) for kind, (_, _, heads) in HEADS.items() for head in heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_any_head_runs_and_trains_as_in_plain_peft(classes, kind, head, dtype):
    build, target, _ = HEADS[kind]
    config = lora(target, modules_to_save=[head])
    torch.manual_seed(1)
    plain = get_peft_model(build().to(dtype), config).eval()
    torch.manual_seed(1)
    adapter = SubspaceAdapter(build().to(dtype), config, classes, svd=False)
    batch = whole(classes.encode(make_records(6)))
    expected = classes(plain.get_base_model(), batch.inputs)
    logits = adapter(batch)
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    logits[:, 0].sum().backward()
    trained = [p for n, p in adapter.named_parameters().items() if ".lora_" not in n]
    assert trained
    assert all(p.dtype == torch.float32 for p in trained)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


def test_the_logits_of_a_last_head_are_not_rounded(classes):
    """They differ from their nearest bfloat16 numbers."""
    llm = BertForSequenceClassification(tiny_bert_config(num_labels=4)).to(torch.bfloat16)
    config = lora("query", modules_to_save=["pooler", "classifier"])
    adapter = SubspaceAdapter(llm, config, classes)
    logits = adapter(whole(classes.encode(make_records(6))), adapter.init_loc)
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9


# ---------------------------------------------------------------------- trained adapters


def save_trained(llm, config, folder: Path):
    """An adapter with random weights, and plain PEFT's model with it."""
    torch.manual_seed(2)
    model = get_peft_model(llm, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


@pytest.mark.parametrize(
    ("build", "target", "heads"),
    [
        (HEADS["bert"][0], "query", None),
        (HEADS["llama"][0], "q_proj", None),
        (distilbert, "q_lin", ["pre_classifier"]),
    ],
    ids=["classifier", "score", "one more"],
)
@pytest.mark.parametrize("svd", [False, True])
def test_an_adapter_of_a_task_type_is_a_start(tmp_path, tokenizer, build, target, heads, svd):
    """PEFT lists more heads than a model has."""
    torch.manual_seed(1)
    build().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    llm = build().from_pretrained(tmp_path / "base")
    config = lora(target, task_type="SEQ_CLS", modules_to_save=heads)
    plain = save_trained(llm, config, tmp_path / "adapter")
    saved = LoraConfig.from_pretrained(tmp_path / "adapter").modules_to_save
    assert {"classifier", "score"} <= set(saved)
    model = ModelConfig(str(tmp_path / "base"), readout="sequence_classification", device="cpu")
    readout = load_readout(model, Classes(4))
    adapter = make_adapter(model, AdapterConfig(start=str(tmp_path / "adapter")), readout, svd=svd)
    batch = whole(readout.encode(make_records(6)))
    with torch.no_grad():
        expected = readout(plain.get_base_model(), batch.inputs)
    logits = adapter(batch, adapter.init_loc)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert adapter.num_parameters()["heads"] > 0


def test_heads_of_a_task_type_that_a_model_lacks_altogether_are_refused(letters):
    config = lora("q_proj", modules_to_save=["classifier", "score"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="match no module of LlamaForCausalLM"):
        SubspaceAdapter(tiny_llama(), config, letters)
    config = lora("query", modules_to_save=["classifier", "scores"], task_type="SEQ_CLS")
    llm = BertForTokenClassification(tiny_bert_config(num_labels=4))
    with pytest.raises(ValueError, match=r"modules_to_save \['scores'\] match no module"):
        SubspaceAdapter(llm, config, letters)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        VeraConfig(r=4, target_modules=["q_proj"]),
        LoHaConfig(r=4, target_modules=["q_proj"]),
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_an_adapter_of_another_type_is_refused_by_name(tmp_path, letters, config):
    get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path))
    message = rf"is of PEFT's type {config.peft_type.value}: expected LORA"
    with pytest.raises(ValueError, match=message):
        SubspaceAdapter(tiny_llama(), lora("q_proj"), letters, start=tmp_path)
    with pytest.raises(ValueError, match=message):
        AdapterConfig(start=str(tmp_path)).lora()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "norm"])
def test_an_adapter_with_numbers_that_are_none_is_refused(tmp_path, letters, part, value):
    config = lora("q_proj", modules_to_save=["norm"])
    save_trained(tiny_llama(), config, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if part in name and "layernorm" not in name)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"not finite, in .*{part}"):
        SubspaceAdapter(tiny_llama(), config, letters, start=tmp_path)


def test_an_adapter_that_is_a_pickle_is_refused(tmp_path, letters):
    model = get_peft_model(tiny_llama(), lora("q_proj"))
    model.save_pretrained(str(tmp_path), safe_serialization=False, save_embedding_layers=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(ValueError, match=r"adapter_model\.bin, a pickle"):
        SubspaceAdapter(tiny_llama(), lora("q_proj"), letters, start=tmp_path)


def test_a_router_among_all_linear_layers_is_named(tokenizer):
    """It is a linear layer of a class of its own, which returns scores and logits."""
    sizes = LLAMA | dict(num_local_experts=2, head_dim=8, intermediate_size_mlp=32)
    llm = Llama4ForCausalLM(Llama4TextConfig(**sizes))
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    with pytest.raises(ValueError, match=r"router is a Llama4Router, which chooses experts"):
        SubspaceAdapter(llm, LoraConfig(r=2, target_modules="all-linear"), readout)


def test_a_variant_of_lora_is_named(tokenizer):
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    with pytest.raises(ValueError, match=r"uses the LoRA variant DoraLinearVariant; only plain"):
        SubspaceAdapter(tiny_llama(), lora("q_proj", use_dora=True), readout)
