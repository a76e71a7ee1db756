"""The readout of CONTRIBUTING: a class and an entry in READOUTS."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_records, run_snippet, scalabl, tiny_llama, write_jsonl
from safetensors.torch import load_file

from scalabl_pyro import from_pretrained, load_run, predict, readouts
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.runs.memory import MemoryConfig, estimate


@pytest.fixture
def first_tokens(monkeypatch):
    names = dict(vars(readouts.base))
    run_snippet("class FirstTokens", names)
    monkeypatch.setitem(readouts.READOUTS, "first_tokens", names["FirstTokens"])
    return names["FirstTokens"]


def test_it_trains_reloads_evaluates_and_predicts(
    first_tokens, local_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    words = [f"model.name={local_model}", "model.readout=first_tokens", "data.root=data"]
    words += ["fit.steps=4", "fit.batch_size=4", "run_dir=out", "progress=false"]
    assert scalabl("train", *words) == 0
    trained = json.loads(capsys.readouterr().out)
    run = load_run("out")
    assert isinstance(run.readout, first_tokens)
    saved = load_file("out/predictions.safetensors")["test.logits"]
    assert torch.equal(predict(run.predictor, make_records(9)).logits, saved)
    assert scalabl("evaluate", "run=out", "data.root=data", "progress=false") == 0
    assert json.loads(capsys.readouterr().out) == trained["test"]
    where = ["run=out", "input=data/test.jsonl", "output=o.jsonl", "progress=false"]
    assert scalabl("predict", *where) == 0
    assert scalabl("export", "run=out", "output=exported") == 0
    assert "label_ids" not in json.loads((tmp_path / "exported/manifest.json").read_text())


def test_it_serves_a_model_at_hand_and_the_estimate_of_memory(
    first_tokens, local_model, tokenizer, records
):
    config = AdapterConfig(r=4, targets=("q_proj",))
    options = {"readout": "first_tokens"}
    adapter = from_pretrained(tiny_llama(), config.lora(), records, tokenizer=tokenizer, **options)
    assert isinstance(adapter.readout, first_tokens)
    assert (
        estimate(MemoryConfig(ModelConfig(str(local_model), **options), config, tokens=64)).training
        > 0
    )
