"""Models in GGUF files that the package gguf writes, against the weights that it unpacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_records, scalabl, tiny_llama, whole, write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from scalabl_pyro.lora import gguf as gguf_file
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import Classes, load_llm, load_readout
from scalabl_pyro.runs.exports import export
from scalabl_pyro.runs.folder import load_run
from scalabl_pyro.runs.memory import MemoryConfig, estimate

LETTERS = Classes(4, ("A", "B", "C", "D"))
TOKENS = ["<unk>", "<s>", "</s>", "▁", "A", "B", "C", "D", ":", ".", *"abdeglinoprstuwh"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
HEADS = 2


def write_gguf(path: Path, llm: LlamaForCausalLM, kind: str) -> dict[str, torch.Tensor]:
    """Write a Llama as llama.cpp does; returns the weights that its blocks stand for."""
    gguf = pytest.importorskip("gguf")
    config, writer = llm.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    tokens = TOKENS + [f"<{i}>" for i in range(config.vocab_size - len(TOKENS))]
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    stored = {}
    for name, value in llm.state_dict().items():
        array = value.float().numpy()
        quantised = kind != "F32" and array.ndim == 2
        type_ = gguf.GGMLQuantizationType[kind if quantised else "F32"]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp turns pairs of neighbours, transformers the two halves of a head.
            out, width = array.shape
            array = array.reshape(HEADS, 2, out // HEADS // 2, width).swapaxes(1, 2)
            array = np.ascontiguousarray(array.reshape(out, width))
        blocks = gguf.quants.quantize(array, type_)
        back = gguf.quants.dequantize(blocks, type_)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            back = back.reshape(HEADS, out // HEADS // 2, 2, width).swapaxes(1, 2)
            back = back.reshape(out, width)
        stored[name] = torch.tensor(np.ascontiguousarray(back))
        module = name.removesuffix(".weight")
        block = ""
        if module.startswith("model.layers."):
            _, _, number, module = module.split(".", 3)
            block = f"blk.{number}."
        writer.add_tensor(f"{block}{NAMES[module]}.weight", blocks, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def wide_llama() -> LlamaForCausalLM:
    """Of rows of whole blocks of 32."""
    return tiny_llama(vocab_size=64, hidden_size=32, intermediate_size=64)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("named", ["file", "folder"])
def test_logits_are_those_of_the_unpacked_weights(tmp_path, kind, named):
    (tmp_path / "m").mkdir()
    plain = wide_llama()
    before = plain.lm_head.weight.detach().clone()
    plain.load_state_dict(write_gguf(tmp_path / "m" / "tiny.gguf", plain, kind))
    assert torch.equal(plain.lm_head.weight, before) == (kind == "F32")
    name = tmp_path / "m" / ("tiny.gguf" if named == "file" else "")
    config = ModelConfig(str(name), device="cpu")
    readout = load_readout(config, LETTERS)
    llm = load_llm(config, readout)
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(llm(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)
    batch = whole(readout.encode(make_records(3)))
    assert batch.inputs["input_ids"][:, -1].ne(0).all()  # its own tokenizer reads the prompts


def test_a_gguf_model_trains_saves_reloads_and_exports(tmp_path):
    (tmp_path / "m").mkdir()
    write_gguf(tmp_path / "m" / "tiny.gguf", wide_llama(), "Q8_0")
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", make_records(10 + len(split)))
    words = [
        f"model.name={tmp_path / 'm' / 'tiny.gguf'}",
        "model.device=cpu",
        "model.truncate=true",
    ]
    words += [f"data.root={tmp_path / 'data'}", "fit.steps=2", "fit.batch_size=4", "progress=false"]
    assert scalabl("train", *words, "lora.r=4", f"run_dir={tmp_path / 'run'}") == 0
    run = load_run(tmp_path / "run")
    manifest = export(run, tmp_path / "out")
    assert manifest["base_model"]["gguf_file"] == "tiny.gguf"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "gguf_file='tiny.gguf'" in card
    base = AutoModelForCausalLM.from_pretrained(
        manifest["base_model"]["name"], gguf_file="tiny.gguf", dtype=torch.float32
    )
    served = PeftModel.from_pretrained(base, tmp_path / "out" / "draw_00").eval()
    batch = whole(run.encode(make_records(3)))
    adapter, s = run.predictor.adapter, run.predictor.draws[0]
    with torch.no_grad():
        logits = served(**batch.inputs).logits[:, -1]
        expected = adapter(batch, s)
    torch.testing.assert_close(logits[:, manifest["label_ids"]], expected, rtol=1e-4, atol=1e-5)


def test_memory_of_a_gguf_model_is_that_of_its_plain_weights(tmp_path):
    plain = wide_llama()
    write_gguf(tmp_path / "tiny.gguf", plain, "Q8_0")
    memory = estimate(
        MemoryConfig(
            ModelConfig(str(tmp_path / "tiny.gguf")), AdapterConfig(r=2, targets=("q_proj",))
        )
    )
    held = sum(p.nbytes for p in plain.parameters())
    assert memory.weights == pytest.approx(held, rel=0.01)


def test_what_cannot_be_read_is_refused_in_words(tmp_path, monkeypatch):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    parts = tmp_path / "x-00001-of-00002.gguf"
    parts.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds \['a.gguf', 'b.gguf', .*name one of them, as in"):
        gguf_file.find_gguf(str(tmp_path))
    with pytest.raises(ValueError, match=r"one part of several.*llama-gguf-split --merge"):
        gguf_file.find_gguf(str(parts))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        gguf_file.find_gguf(str(tmp_path / "c.gguf"))
    monkeypatch.setattr(gguf_file, "is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match=r"'a.gguf' is a GGUF file, .*run pip install gguf"):
        load_readout(ModelConfig(str(tmp_path / "a.gguf")), LETTERS)


def test_names_on_the_hub_with_a_file(monkeypatch):
    monkeypatch.setattr(gguf_file, "is_gguf_available", lambda: True)
    assert gguf_file.find_gguf("owner/model/q8.gguf") == ("owner/model", "q8.gguf")
    assert gguf_file.find_gguf("owner/model") == ("owner/model", None)


def test_a_gguf_file_is_not_quantised_again(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", wide_llama(), "Q8_0")
    config = ModelConfig(str(tmp_path / "tiny.gguf"), device="cpu", quantization="4bit")
    with pytest.raises(ValueError, match=r"is a GGUF file, which is unpacked.*quantization=null"):
        load_llm(config, load_readout(config, LETTERS))


# ---------------------------------------------------------------------- other checkpoints


@pytest.mark.parametrize("method", ["gptq", "awq", "torchao", "fp8", "bitsandbytes"])
def test_checkpoints_that_are_quantised_already_are_refused(local_model, method):
    path = local_model / "config.json"
    quantized = {"quant_method": method, "bits": 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantized}))
    with pytest.raises(ValueError, match=rf"quantised already \({method}\).*made from.*=4bit"):
        load_readout(ModelConfig(str(local_model)), LETTERS)


def test_models_that_a_readout_cannot_read_are_told_apart_in_one_line(local_model, tmp_path):
    with pytest.raises(
        ValueError, match=r"of type llama, .*: set readout=label_tokens or "
    ) as told:
        load_readout(ModelConfig(str(local_model), readout="multiple_choice"), LETTERS)
    able = ("label_tokens", "choice_likelihood", "completion_tokens")
    assert str(told.value).endswith(" or ".join(f"readout={name}" for name in able))
    path = local_model / "config.json"
    for entry, message in (
        ({"model_type": "vit"}, "of type vit, .*: no readout reads such a model"),
        ({"model_type": "no_such"}, "no_such"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | entry))
        with pytest.raises(ValueError, match=message) as told:
            load_readout(ModelConfig(str(local_model)), LETTERS)
        assert len(str(told.value)) < 400
        assert "\n" not in str(told.value)
    values = json.loads(path.read_text())
    del values["model_type"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="cannot be loaded: Unrecognized model") as told:
        load_readout(ModelConfig(str(local_model)), LETTERS)
    assert len(str(told.value)) < 400


def test_a_folder_without_a_tokenizer_says_so(local_model):
    for path in local_model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer files, such as tokenizer.json"):
        load_readout(ModelConfig(str(local_model)), LETTERS)


def test_classification_heads_advise_readouts_of_questions():
    config = ModelConfig("m", readout="sequence_classification")
    with pytest.raises(ValueError, match=r"multiple_choice .*label_tokens or readout=choice_like"):
        config.classes(make_records(4))
