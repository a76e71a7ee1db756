"""Adapters come in from PEFT and go out to it, and compute the same on both sides."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import blocks, lora, make_records, tiny_bert_config, tiny_llama, whole, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, BertForSequenceClassification, BertModel

from scalabl_pyro import FitConfig, SubspaceAdapter, load_run, predict, save_adapter
from scalabl_pyro.commands.export import ExportConfig, export_run
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import Classes, load_readout, make_adapter
from scalabl_pyro.prediction import Interval, average
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.runs import exports, train_run
from scalabl_pyro.runs.config import RunConfig
from scalabl_pyro.runs.data import DataConfig
from scalabl_pyro.runs.exports import export, merge, push_to_hub
from scalabl_pyro.runs.folder import Run

ROOT = Path(__file__).resolve().parents[2]
S = 3


@pytest.fixture
def make_run(tmp_path, tokenizer):
    """Train a small Llama with tied embeddings, so that its draws differ, and load the run."""

    def make(
        *, method: str = "scalabl", stored: torch.dtype = torch.float32, **settings: dict
    ) -> Run:
        sizes = dict(hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
        tiny_llama(**sizes).to(stored).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        for split in ("train", "validation", "test"):
            write_jsonl(tmp_path / "data" / f"{split}.jsonl", make_records(10 + len(split)))
        guide = {"name": "normal", "init_scale": 0.5}
        options = {"draws": S, "guide": guide} if method == "scalabl" else {}
        config = RunConfig(
            model=ModelConfig(str(tmp_path / "model"), device="cpu", **settings.get("model", {})),
            lora=AdapterConfig(r=4, **settings.get("lora", {})),
            data=DataConfig(root=str(tmp_path / "data")),
            run_dir=str(tmp_path / "run"),
            method={"name": method, **options},
            fit=FitConfig(steps=5, batch_size=8, lr=0.05),
            progress=False,
        )
        train_run(config)
        return load_run(tmp_path / "run")

    return make


def batch_of(run: Run):
    return whole(run.readout.encode(make_records(6)))


def label_logits(llm, run: Run) -> torch.Tensor:
    with torch.no_grad():
        return run.readout(llm, batch_of(run).inputs)


PLAIN_PEFT = """
import sys, torch
from safetensors.torch import load_file, save_file
from peft import PeftModel
from transformers import AutoModelForCausalLM
given = load_file(sys.argv[3])
llm = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(llm, sys.argv[2]).eval()
with torch.no_grad():
    found = model(**{name: given[name] for name in ("input_ids", "attention_mask", "position_ids")})
found = found.logits[:, -1, given["labels"]]
assert not any(name.startswith(("scalabl_pyro", "pyro")) for name in sys.modules)
print((found - given["logits"]).abs().max().item(), found.std().item())
"""


def test_plain_peft_computes_our_logits_for_a_draw_without_this_package(make_run, tmp_path):
    run = make_run()
    export(run, tmp_path / "out")
    batch = batch_of(run)
    mask = batch.inputs["attention_mask"]
    tensors = {
        "input_ids": batch.inputs["input_ids"],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": run.readout.label_ids,
        "logits": run.predictor.adapter(batch, run.predictor.draws[1]).detach(),
    }
    save_file(tensors, tmp_path / "given.safetensors")
    command = [sys.executable, "-c", PLAIN_PEFT, tmp_path / "model", tmp_path / "out" / "draw_01"]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "given.safetensors")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    difference, spread = map(float, done.stdout.split())
    assert difference < 1e-5 < spread


@pytest.mark.parametrize(
    ("stored", "chat"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=str,
)
def test_the_snippet_of_the_documentation_serves_the_average_as_one_mixed_batch(
    make_run, tmp_path, monkeypatch, tokenizer, stored, chat
):
    """Also where tokenizer and chat template both begin a text, and there is no padding token."""
    tokenizer.bos_token = tokenizer.eos_token = "dog"
    tokenizer.pad_token = None
    begin = processors.TemplateProcessing(
        single="dog $A", special_tokens=[("dog", tokenizer.convert_tokens_to_ids("dog"))]
    )
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = "{{ bos_token }} {{ messages[0].content }} cat :"
    run = make_run(stored=stored, model={"chat": chat})
    export(run, tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    code = blocks(ROOT / "docs" / "serving.md", "python")[0]
    names: dict = {}
    exec(compile(code, "serving.md", "exec"), names)
    records = make_records(6)
    answers = names["answer"]([run.readout._text(record, record.question) for record in records])
    logits = predict(run.predictor, run.readout.encode(records)).logits
    torch.testing.assert_close(answers, average(logits).exp(), rtol=0, atol=1e-5)
    assert (logits.softmax(-1).std(0) > 1e-3).any()  # the draws do differ


@pytest.mark.parametrize(
    ("stored", "settings", "output_layer", "tolerance"),
    [
        (torch.bfloat16, {}, "keep", 1e-5),
        (torch.float32, {"dtype": "bfloat16"}, "keep", 0.02),
        (torch.float16, {}, "drop", 1e-5),
        (torch.bfloat16, {}, "merge", 1e-5),
        (torch.float32, {"quantization": "4bit"}, "keep", 1e-4),
        (torch.bfloat16, {"quantization": "8bit"}, "keep", 1e-4),
        (torch.bfloat16, {"quantization": "4bit"}, "merge", 1e-4),
    ],
    ids=str,
)
def test_the_snippet_of_the_card_computes_what_the_run_does(
    make_run, tmp_path, monkeypatch, stored, settings, output_layer, tolerance
):
    run = make_run(stored=stored, model=settings)
    export(run, tmp_path / "out", output_layer=output_layer)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    model = names["model"].eval()
    for module in model.modules():  # bitsandbytes would round 4-bit weights anew on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    adapter, s = run.predictor.adapter, run.guide.median()["s"].clone()
    if output_layer == "drop":
        s[adapter.module_names.index("lm_head")] = 0
    expected = adapter(batch_of(run), s).detach()
    logits = label_logits(model, run)
    if output_layer == "merge" and "quantization" in settings:
        # What is merged is no longer quantised while it runs, but holds the same values.
        tolerance = 1e-3
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


def test_the_snippet_of_a_classifiers_card_makes_its_head(tmp_path, tokenizer, monkeypatch):
    torch.manual_seed(1)
    BertModel(tiny_bert_config()).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split in ("train", "validation", "test"):
        rows = [
            replace(record, choices=("w", "x", "y", "z"))
            for record in make_records(10 + len(split))
        ]
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    config = RunConfig(
        model=ModelConfig(str(tmp_path / "model"), readout="sequence_classification", device="cpu"),
        lora=AdapterConfig(r=2, targets=("query",), heads=("classifier", "pooler")),
        data=DataConfig(root=str(tmp_path / "data")),
        run_dir=str(tmp_path / "run"),
        fit=FitConfig(steps=3, batch_size=4, lr=0.05),
        progress=False,
    )
    config = replace(config, model=replace(config.model, name="model"))
    monkeypatch.chdir(tmp_path)
    train_run(config)
    run = load_run(tmp_path / "run")
    manifest = export(run, tmp_path / "out")
    assert manifest["classes"] == ["w", "x", "y", "z"]
    merge(run.config.model, run.readout, tmp_path / "out" / "median", tmp_path / "merged")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged").config
    assert merged.id2label == dict(enumerate("wxyz"))
    assert merged.label2id == {"w": 0, "x": 1, "y": 2, "z": 3}
    # A base that was named by a path from here is found from elsewhere.
    for folder in (tmp_path / "run" / "adapter", tmp_path / "out" / "median"):
        config = LoraConfig.from_pretrained(str(folder))
        assert config.base_model_name_or_path == str(tmp_path / "model")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    batch = whole(run.readout.encode(rows))
    expected = run.predictor.adapter(batch, run.guide.median()["s"]).detach()
    with torch.no_grad():
        logits = names["model"].eval()(**batch.inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_manifest_and_the_card_describe_what_is_there(make_run, tmp_path):
    run = make_run()
    nll = Interval(1.25, 0.02, 1.2, 1.3, 0.0)
    metrics = {"test": {"acc": 0.5, "nll": nll, "prr": None}, "other": {"acc": 0.25}}
    manifest = export(run, tmp_path / "out", draws=2, metrics=metrics)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest["draws"] == ["draw_00", "draw_01"]
    assert manifest["label_words"] == ["A", "B", "C", "D"]
    assert manifest["base_model"]["name"] == str(tmp_path / "model")
    for name, digest in manifest["sha256"].items():
        content = (tmp_path / "out" / name / "adapter_model.safetensors").read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert LoraConfig.from_pretrained(str(tmp_path / "out" / name)).r == run.config.lora.r
    card = (tmp_path / "out" / "README.md").read_text()
    for row in (
        "| | test | other |",
        "| acc | 0.5 | 0.25 |",
        "| nll | 1.25 ± 0.05 | – |",
        "| prr | – | – |",
    ):
        assert row in card.splitlines()
    assert "method:\n  name: scalabl" in card
    assert "base_model:" not in card  # a folder is no name on the Hub
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"median", "draw_00", "draw_01", "manifest.json", "README.md"}


@pytest.mark.parametrize("output_layer", ["drop", "merge"])
def test_exports_that_serve_have_no_adapted_output_layer(make_run, tmp_path, output_layer):
    run = make_run()
    manifest = export(run, tmp_path / "out", output_layer=output_layer)
    tensors = load_file(tmp_path / "out" / "draw_00" / "adapter_model.safetensors")
    assert tensors
    assert not any("lm_head" in name for name in tensors)
    # ΔW of the output layer is 0 in every draw, or that of the mean.
    adapter = run.predictor.adapter
    s = run.predictor.draws[0].clone()
    head = adapter.module_names.index("lm_head")
    s[head] = 0 if output_layer == "drop" else run.guide.median()["s"][head]
    expected = adapter(batch_of(run), s).detach()
    base = tmp_path / ("model" if output_layer == "drop" else "out/base")
    assert manifest["base_model"]["name"] == ("base" if output_layer == "merge" else str(base))
    llm = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out" / "draw_00")
    )
    torch.testing.assert_close(label_logits(llm, run), expected, rtol=0, atol=1e-5)
    full = adapter(batch_of(run), run.predictor.draws[0])
    assert not torch.allclose(full, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("quantization", "tolerance"), [(None, 1e-5), ("4bit", 1e-4), ("8bit", 0.05)]
)
def test_the_merged_model_gives_the_logits_of_the_mean(make_run, tmp_path, quantization, tolerance):
    run = make_run(model={"quantization": quantization})
    summary = export_run(
        ExportConfig(str(tmp_path / "run"), str(tmp_path / "out"), draws=0, merged=True)
    )
    llm = AutoModelForCausalLM.from_pretrained(summary["merged"])
    assert llm.dtype == torch.float32
    expected = run.predictor.adapter(batch_of(run), run.guide.median()["s"]).detach()
    torch.testing.assert_close(label_logits(llm, run), expected, rtol=0, atol=tolerance)
    # The output layer was adapted, the embeddings it was tied to were not.
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(llm.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert not torch.equal(llm.get_output_embeddings().weight, llm.get_input_embeddings().weight)


def test_a_classifier_with_a_trained_head_is_merged_whole(tmp_path, make_choice, records):
    adapter = make_choice(svd=True)
    llm = adapter.peft_model.get_base_model()
    batch = whole(adapter.readout.encode(records))
    with torch.no_grad():
        llm.classifier.modules_to_save["default"].weight.mul_(3.0)
    expected = adapter(batch, adapter.init_loc).detach()
    with adapter.folded(adapter.init_loc) as peft_model:
        peft_model.save_pretrained(str(tmp_path / "adapter"))
    adapter.peft_model.unload().save_pretrained(tmp_path / "base")
    config = ModelConfig(str(tmp_path / "base"), readout="multiple_choice", device="cpu")
    merge(config, adapter.readout, tmp_path / "adapter", tmp_path / "merged")
    merged = type(llm).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = adapter.readout(merged, batch.inputs)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_heads_that_came_with_an_adapter_are_merged(tmp_path, make_classifier, tokenizer):
    trained = make_classifier()
    with trained.folded(trained.init_loc) as peft_model:
        peft_model.save_pretrained(str(tmp_path / "adapter"))
    trained.peft_model.unload().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = ModelConfig(str(tmp_path / "base"), readout="sequence_classification", device="cpu")
    readout = load_readout(config, Classes(4))
    settings = AdapterConfig(start=str(tmp_path / "adapter"))  # which names no heads
    adapter = make_adapter(config, settings, readout, svd=True)
    with adapter.folded(adapter.init_loc) as peft_model:
        peft_model.save_pretrained(str(tmp_path / "median"))
    batch = whole(readout.encode(make_records(6)))
    expected = adapter(batch, adapter.init_loc).detach()
    merge(config, readout, tmp_path / "median", tmp_path / "merged")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(readout(merged, batch.inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("output_layer", ["drop", "merge"])
def test_an_export_without_any_adapted_layer_is_refused(make_run, tmp_path, output_layer):
    run = make_run(lora={"targets": ("lm_head",)})
    with pytest.raises(ValueError, match="nothing else is adapted"):
        export(run, tmp_path / "out", output_layer=output_layer)
    assert not (tmp_path / "out").exists()


def test_a_point_estimate_has_a_mean_and_no_draws(make_run, tmp_path):
    run = make_run(method="mle")
    assert export(run, tmp_path / "out")["draws"] == []
    llm = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), str(tmp_path / "out" / "median")
    )
    expected = run.predictor.adapter(batch_of(run)).detach()
    torch.testing.assert_close(label_logits(llm, run), expected, rtol=0, atol=1e-5)


def test_bad_exports_are_refused_and_leave_nothing(make_run, tmp_path):
    run = make_run(lora={"targets": ("q_proj",)})
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="draws is 4, but the run has 3"):
        export(run, out, draws=4)
    with pytest.raises(ValueError, match="output_layer is 'leave': expected one of"):
        export(run, out, output_layer="leave")
    with pytest.raises(ValueError, match="no output layer is adapted"):
        export(run, out, output_layer="merge")
    with pytest.raises(ValueError, match="draws is -1"):
        ExportConfig("run", "out", draws=-1)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(FileExistsError, match="exists; choose another"):
        export(run, out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_an_export_that_breaks_leaves_no_folder(make_run, tmp_path, monkeypatch):
    run = make_run()
    monkeypatch.setattr(exports, "_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    export(run, tmp_path / "out")  # what the first attempt left is no obstacle
    assert not (tmp_path / "out.part").exists()


def test_an_export_is_uploaded_as_it_lies(tmp_path, monkeypatch):
    calls = []

    def api():
        return SimpleNamespace(
            create_repo=lambda repo, **options: calls.append((repo, options)) or "https://hub/me/x",
            upload_folder=lambda **options: calls.append(options),
        )

    monkeypatch.setattr(exports, "HfApi", api)
    assert push_to_hub(tmp_path, "me/x", private=False) == "https://hub/me/x"
    assert calls == [
        ("me/x", {"private": False, "exist_ok": True}),
        {"repo_id": "me/x", "folder_path": str(tmp_path)},
    ]


def test_an_upload_that_fails_says_how_to_try_again(tmp_path):
    # The tests run with the Hub switched off.
    with pytest.raises(OSError, match=f"is complete, but .* run hf upload me/x {tmp_path}"):
        push_to_hub(tmp_path, "me/x")


# ---------------------------------------------------------------------- adapters from elsewhere


@pytest.fixture
def trained_by_peft(tmp_path, tokenizer):
    """A LoRA adapter trained by others, the model's folder and its logits on a batch."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    model = get_peft_model(tiny_llama(), lora("q_proj", "v_proj", "lm_head"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.eval().save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    batch = whole(readout.encode(make_records(6)))
    with torch.no_grad():
        return tmp_path, batch, readout(model, batch.inputs)


def started(folder: Path, **form: object) -> SubspaceAdapter:
    config = ModelConfig(str(folder / "model"), device="cpu")
    readout = load_readout(config, Classes(4, ("A", "B", "C", "D")))
    lora = AdapterConfig(start=str(folder / "adapter"))
    return make_adapter(config, lora, readout, svd=True, **form)


@pytest.mark.parametrize("projections", ["free", "unit", "frozen_v"])
def test_starting_from_a_trained_adapter_leaves_the_logits(trained_by_peft, projections):
    folder, batch, expected = trained_by_peft
    adapter = started(folder, projections=projections)
    logits = adapter(batch, adapter.init_loc).detach()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(adapter.init_loc, torch.ones(adapter.shape))
    for name, parameter in adapter.state().items():
        if ".lora_A." in name:
            identity = parameter @ parameter.mT
            torch.testing.assert_close(identity, torch.eye(4), rtol=0, atol=1e-5)


def test_an_adapter_of_another_base_is_refused(trained_by_peft, tokenizer):
    folder = trained_by_peft[0]
    for sizes in ({"hidden_size": 32}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}):
        tiny_llama(**sizes).save_pretrained(folder / "model")
        with pytest.raises(ValueError, match="does not fit LlamaForCausalLM"):
            started(folder)


def test_an_adapter_of_several_ranks_is_refused(trained_by_peft):
    folder = trained_by_peft[0]
    config = folder / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"rank_pattern": {"lm_head": 2}}
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"rank_pattern gives ranks \[2, 4\]"):
        started(folder)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_model_is_refused(trained_by_peft, init):
    """PEFT would change the base under an exported adapter, and under each further one again."""
    folder = trained_by_peft[0]
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(ValueError, match=f"init_lora_weights is '{init}', by which PEFT changes"):
        started(folder)


def test_an_adapter_with_embeddings_of_its_own_is_refused(trained_by_peft):
    folder, batch, expected = trained_by_peft
    weights = folder / "adapter" / "adapter_model.safetensors"
    name = "model.embed_tokens"
    base = load_file(folder / "model" / "model.safetensors")[f"{name}.weight"]
    written = load_file(weights)
    save_file(written | {f"base_model.model.{name}.weight": base}, weights)
    adapter = started(folder)  # those of the base model itself
    torch.testing.assert_close(adapter(batch, adapter.init_loc), expected, rtol=1e-5, atol=1e-5)
    save_file(written | {f"base_model.model.{name}.weight": base + 0.1}, weights)
    with pytest.raises(ValueError, match=f"other weights of {name} than the base model"):
        started(folder)


def test_several_adapters_that_train_biases_are_refused(trained_by_peft, tmp_path):
    folder = trained_by_peft[0]
    model = get_peft_model(tiny_llama(), lora("q_proj", bias="lora_only", init_lora_weights=False))
    model.save_pretrained(str(folder / "biased"))
    write_jsonl(tmp_path / "data" / "train.jsonl", make_records(12))
    config = RunConfig(
        model=ModelConfig(str(folder / "model"), device="cpu"),
        lora=AdapterConfig(start=str(folder / "biased")),
        data=DataConfig(root=str(tmp_path / "data")),
        run_dir=str(tmp_path / "run"),
        method={"name": "scalabl", "draws": S, "projections": "fixed"},
        fit=FitConfig(steps=2, batch_size=4),
        progress=False,
    )
    train_run(config)
    run = load_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"trains biases \(bias is 'lora_only'\).*draws=0"):
        export(run, tmp_path / "exported")
    assert export(run, tmp_path / "exported", draws=0)["draws"] == []


def test_a_saved_adapter_holds_s_and_pefts_own_ways_to_save_refuse_to_lose_it(
    trained_by_peft, tmp_path
):
    folder, batch, _ = trained_by_peft
    adapter = started(folder)
    s = torch.rand(adapter.shape) + 0.5
    expected = adapter(batch, s)
    save_adapter(adapter, s, tmp_path / "saved")
    with pytest.raises(FileExistsError):
        save_adapter(adapter, s, tmp_path / "saved")
    llm = AutoModelForCausalLM.from_pretrained(folder / "model")
    plain = PeftModel.from_pretrained(llm, str(tmp_path / "saved")).eval()
    with torch.no_grad():
        logits = adapter.readout(plain, batch.inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for way in ("save_pretrained", "merge_and_unload", "merge_adapter"):
        with pytest.raises(ValueError, match=f"{way} of PEFT's model would lose s"):
            getattr(adapter.peft_model, way)()
    with adapter.folded(s) as peft_model:
        merged = deepcopy(peft_model).merge_and_unload()
    with torch.no_grad():
        logits = adapter.readout(merged, batch.inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_model_called_directly_does_not_depend_on_the_pass_before(trained_by_peft):
    folder, batch, expected = trained_by_peft
    adapter = started(folder)
    for draws in (1, 5):
        adapter(batch, torch.randn(draws, *adapter.shape))
        with torch.no_grad():  # s = 1 is where it started
            logits = adapter.readout(adapter.llm, batch.inputs)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_an_exported_draw_is_a_start(make_run, tmp_path):
    run = make_run()
    export(run, tmp_path / "out", draws=1)
    (tmp_path / "out" / "draw_00").rename(tmp_path / "adapter")
    adapter = started(tmp_path)
    expected = run.predictor.adapter(batch_of(run), run.predictor.draws[0]).detach()
    logits = adapter(batch_of(run), adapter.init_loc).detach()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
