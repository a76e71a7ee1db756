"""Models load in every number format, quantised ones for real, and train, save and reload alike."""

from __future__ import annotations

import io
import json
import pickle
import platform
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from conftest import fill_lora_B, lora, make_records, scalabl, tiny_bert_config, tiny_llama, whole
from conftest import write_jsonl as write
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    BertForMultipleChoice,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from scalabl_pyro import load_run, predict
from scalabl_pyro.lora import dtypes, loading
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import (
    Classes,
    UntrainedHeadError,
    load_llm,
    load_readout,
    make_adapter,
)

LETTERS = Classes(4, ("A", "B", "C", "D"))


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama whose layers are wide enough for blocks of 64 weights, with tied embeddings."""
    sizes = dict(hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    tiny_llama(**sizes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, *, svd: bool = True, **settings: object):
    config = ModelConfig(str(folder), device="cpu", **settings)
    torch.manual_seed(0)
    readout = load_readout(config, LETTERS)
    adapter = make_adapter(config, AdapterConfig(r=4), readout, svd=svd, projections="free")
    fill_lora_B(adapter)
    return adapter


def test_a_head_that_would_stay_random_is_told_from_another_process(folder):
    """As compare trains in processes of its own."""
    config = ModelConfig(str(folder), readout="sequence_classification", device="cpu")
    with pytest.raises(UntrainedHeadError) as told:
        load_llm(config, load_readout(config, Classes(2, ("red", "blue"))))
    sent = pickle.loads(pickle.dumps(told.value))
    assert str(sent) == str(told.value)
    assert str(sent).endswith("random: train them whole, as by lora.heads=[score]")


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_models_train_save_reload_and_predict_to_the_bit(folder, tmp_path, quantization):
    for split in ("train", "validation", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", make_records(10 + len(split)))
    status = scalabl(
        "train",
        f"model.name={folder}",
        "model.device=cpu",
        f"model.quantization={quantization}",
        "lora.r=4",
        f"data.root={tmp_path / 'data'}",
        "fit.steps=4",
        "fit.eval_every=2",  # validation must not change how the next step trains
        "fit.batch_size=4",
        "progress=false",
        f"run_dir={tmp_path / 'run'}",
    )
    assert status == 0
    saved = load_file(tmp_path / "run" / "predictions.safetensors")
    trained = load_run(tmp_path / "run")
    split = trained.readout.encode(make_records(14))
    torch.testing.assert_close(
        predict(trained.predictor, split).logits, saved["test.logits"], rtol=0, atol=0
    )
    kinds = {type(module).__name__ for module in trained.predictor.adapter.peft_model.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization] in kinds


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_gradients_reach_s_and_both_projections_also_after_predicting(folder, quantization):
    adapter = load(folder, quantization=quantization)
    batch = whole(adapter.readout.encode(make_records(6)))
    with torch.no_grad():
        before = adapter(batch, adapter.init_loc)
    s = adapter.init_loc.requires_grad_()
    logits = adapter(batch, s)
    torch.testing.assert_close(logits, before, rtol=0, atol=1e-5)
    logits.log_softmax(-1)[:, 0].sum().backward()
    assert (s.grad != 0).all()
    for name, parameter in adapter.named_parameters().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    frozen = [p for p in adapter.peft_model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


def test_a_4_bit_gradient_is_that_of_the_weights_it_stands_for(folder):
    quantised = load(folder, quantization="4bit")
    plain = load(folder, quantization="4bit", svd=False)
    llm = plain.peft_model.unload().dequantize()
    copy = type(plain)(
        llm, AdapterConfig(r=4, targets=("q_proj", "v_proj", "lm_head")).lora(), plain.readout
    )
    with torch.no_grad():
        for name, parameter in copy.state().items():
            parameter.copy_(quantised.state()[name])
    batch = whole(quantised.readout.encode(make_records(6)))
    gradients = []
    for adapter in (quantised, copy):
        s = quantised.init_loc.requires_grad_()
        adapter(batch, s).log_softmax(-1)[:, 0].sum().backward()
        gradients.append(s.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_predicting_leaves_4_bit_weights_as_they_are(folder):
    adapter = load(folder, quantization="4bit")
    weight = adapter.peft_model.get_base_model().model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        adapter(whole(adapter.readout.encode(make_records(6))), adapter.init_loc)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_trained_heads_are_not_quantised(tmp_path, tokenizer, quantization):
    BertForMultipleChoice(tiny_bert_config(hidden_size=64)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    config = ModelConfig(
        str(tmp_path / "bert"), readout="multiple_choice", device="cpu", quantization=quantization
    )
    lora = AdapterConfig(r=4, targets=("query", "value"), heads=("classifier", "pooler.dense"))
    readout = load_readout(config, Classes(4))
    adapter = make_adapter(config, lora, readout, svd=True, projections="free")
    fill_lora_B(adapter)
    batch = whole(adapter.readout.encode(make_records(4)))
    adapter(batch, adapter.init_loc).log_softmax(-1)[:, 0].sum().backward()
    heads = {n: p for n, p in adapter.named_parameters().items() if ".lora_" not in n}
    assert len(heads) == 4  # two weights and two biases
    assert all(p.dtype == torch.float32 and p.grad is not None for p in heads.values())


def test_quantisation_without_bitsandbytes_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="'4bit', which needs bitsandbytes: run pip install"):
        load(folder, quantization="4bit")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_frozen_weights_have_the_asked_type_and_trained_ones_float32(folder, dtype):
    adapter = load(folder, dtype=dtype)
    trained = {p.dtype for p in adapter.named_parameters().values()}
    frozen = {p.dtype for p in adapter.peft_model.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == {getattr(torch, dtype)}
    batch = whole(adapter.readout.encode(make_records(6)))
    exact = load(folder)(batch, adapter.init_loc)
    logits = adapter(batch, adapter.init_loc)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0.05, atol=0.05)


def test_attention_and_device_map_do_not_change_the_logits(folder):
    batch = whole(load(folder).readout.encode(make_records(6)))
    plain = load(folder)
    for settings in ({"attention": "eager"}, {"attention": "sdpa"}, {"device_map": "auto"}):
        adapter = load(folder, **settings)
        if "attention" in settings:
            config = adapter.peft_model.get_base_model().config
            assert config._attn_implementation == settings["attention"]
        torch.testing.assert_close(adapter(batch, plain.init_loc), plain(batch, plain.init_loc))


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({trace!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("own", ["config", "model", "tokenizer"])
@pytest.mark.parametrize("step", ["readout", "llm", "skeleton"])
def test_code_in_a_folder_is_never_run_nor_asked_about(folder, tmp_path, monkeypatch, own, step):
    """Whatever stands on standard input."""
    (folder / "own.py").write_text(CODE.format(trace=str(tmp_path / "ran")))
    readout = load_readout(ModelConfig(str(folder)), LETTERS)
    named = {
        "config": {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}},
        "model": {
            "model_type": "own",
            "auto_map": {
                "AutoConfig": "own.OwnConfig",
                "AutoModelForCausalLM": "own.OwnForCausalLM",
            },
        },
        "tokenizer": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
        },
    }[own]
    file = folder / ("tokenizer_config.json" if own == "tokenizer" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    config = ModelConfig(str(folder), device="cpu")
    if own == "tokenizer" and step != "readout":
        pytest.skip("reads no tokenizer")
    load = {
        "readout": lambda: load_readout(config, LETTERS),
        "llm": lambda: load_llm(config, readout),
        "skeleton": lambda: loading.load_skeleton(config, transformers.AutoModelForCausalLM),
    }[step]
    with pytest.raises(ValueError, match="brings code of its own, which is never run"):
        load()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_in_a_pickle_are_refused(folder, tmp_path, sharded):
    readout = load_readout(ModelConfig(str(folder)), LETTERS)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    torch.save(weights, folder / name)
    if sharded:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no weights in safetensors, and a pickle"):
        load_llm(ModelConfig(str(folder), device="cpu"), readout)


def test_the_revision_is_asked_for_everywhere(folder, monkeypatch):
    asked = []
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        auto_class = getattr(transformers, name)

        def spy(*args, _name=name, _load=auto_class.from_pretrained, **options):
            asked.append((_name, options["revision"]))
            return _load(*args, **options)

        monkeypatch.setattr(auto_class, "from_pretrained", spy)
    config = ModelConfig(str(folder), revision="v1.2")
    load_llm(config, load_readout(config, LETTERS))
    assert set(asked) == {
        (n, "v1.2") for n in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")
    }


def test_an_adapted_output_layer_leaves_tied_embeddings_alone(folder):
    adapter = load(folder)
    llm = adapter.peft_model.get_base_model()
    embeddings = llm.get_input_embeddings().weight
    assert llm.get_output_embeddings().base_layer.weight is embeddings
    before = embeddings.detach().clone()
    optimizer = torch.optim.SGD(adapter.named_parameters().values(), lr=0.1)
    batch = whole(adapter.readout.encode(make_records(6)))
    start = adapter(batch, adapter.init_loc)
    start.log_softmax(-1)[:, 0].sum().backward()
    optimizer.step()
    assert embeddings.grad is None
    assert torch.equal(embeddings, before)
    assert not torch.allclose(adapter(batch, adapter.init_loc), start)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float64"}, "dtype is 'float64': expected one of"),
        ({"quantization": "int4"}, r"quantization is 'int4': expected one of \[None, '4bit'"),
        ({"device_map": "cuda"}, "device_map is 'cuda': expected one of"),
        ({"device": "gpu"}, "device is 'gpu': expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig("some/model", **settings)


def test_the_context_of_roberta_leaves_out_the_positions_of_padding(tmp_path, tokenizer):
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    RobertaConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=20, pad_token_id=1
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path), readout="sequence_classification")
    assert load_readout(config, LETTERS).max_length == 18


def test_every_model_that_counts_positions_from_the_padding_is_known():
    """By what its own embeddings say, of all encoders that transformers knows."""
    classes = dict(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.items())
    classes |= dict(MODEL_FOR_MASKED_LM_MAPPING.items())
    generative = {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    others = {config.model_type for config in classes} - generative - {"layoutlmv2"}  # detectron2
    looked_at, after = set(), set()
    for config_class, model_class in classes.items():
        if config_class.model_type not in others | loading._POSITIONS_AFTER_PADDING:
            continue
        config = config_class(pad_token_id=1, vocab_size=33)
        with suppress(NotImplementedError):  # funnel has block sizes
            config.num_hidden_layers = 1
        with torch.device("meta"):
            embeddings = getattr(model_class(config).base_model, "embeddings", None)
        table = getattr(embeddings, "position_embeddings", None)
        looked_at.add(config.model_type)
        if getattr(table, "padding_idx", None) is not None:
            after.add(config.model_type)
    known = loading._POSITIONS_AFTER_PADDING
    assert after == known & looked_at
    assert len(looked_at) > 40


@pytest.mark.parametrize("change", [{"r": 2}, {"lora_alpha": 4}, {"use_rslora": True}])
def test_a_start_of_another_scale_is_another(tmp_path, change):
    """The same weights, and another update that they stand for."""
    get_peft_model(tiny_llama(), lora("q_proj")).save_pretrained(tmp_path)
    config = AdapterConfig(start=str(tmp_path))
    before = config.start_fingerprint()
    assert config.start_fingerprint() == before
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
    assert config.start_fingerprint() != before


def test_a_model_that_cannot_be_fetched_says_why(monkeypatch):
    def gated(*args, **options):
        raise OSError("You are trying to access a gated repo.\nLog in.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", gated)
    with pytest.raises(FileNotFoundError, match="transformers says: You are trying to access a ga"):
        load_readout(ModelConfig("org/gated"), LETTERS)


def test_a_gpu_that_is_not_there_is_told(folder):
    config = ModelConfig(str(folder), device="cuda:63")
    with pytest.raises(ValueError, match=r"device is 'cuda:63', but torch .* sees \d+ GPUs"):
        load_llm(config, load_readout(config, LETTERS))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86 CPUs")
def test_auto_is_bfloat16_where_the_cpu_has_avx_512():
    """With its instructions for bytes and words, from which on oneDNN has such products."""
    flags = torch.cpu.get_capabilities()
    expected = "bfloat16" if flags["avx512_bw"] else "float32"
    assert ModelConfig("m", device="cpu", dtype="auto").dtype == expected
    assert not dtypes.slow_on_cpu(torch.float32)


@pytest.mark.parametrize("slow", [True, False])
def test_a_number_format_that_the_cpu_is_slow_with_is_told(slow, folder, monkeypatch, caplog):
    for module in (loading, dtypes):
        monkeypatch.setattr(module, "slow_on_cpu", lambda dtype: slow and dtype != torch.float32)
    assert load(folder, dtype="auto").llm.dtype == (torch.float32 if slow else torch.bfloat16)
    assert not caplog.records
    load(folder, dtype="bfloat16")
    assert ["bfloat16 on a CPU" in record.message for record in caplog.records] == [True] * slow
