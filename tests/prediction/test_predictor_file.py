"""A predictor that is written to one file, and read in another process."""

from __future__ import annotations

import pytest
import torch
from conftest import lora, tiny_llama
from safetensors.torch import load_file, save_file

from scalabl_pyro import Predictor, SubspaceAdapter, load_predictor, predict, save_predictor
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.readouts import ChoiceLikelihood, LabelTokens


@pytest.fixture
def saved(make_causal, tmp_path):
    """A predictor with a V of its own, and its file."""
    adapter = make_causal(projections="frozen_v")
    torch.manual_seed(5)
    with torch.no_grad():
        for A in adapter.matrices.A.values():
            A.weight.normal_()
    predictor = Predictor(adapter, torch.randn(3, *adapter.shape), temperature=1.5)
    path = tmp_path / "posterior.safetensors"
    save_predictor(predictor, path)
    return predictor, path


def test_an_adapter_made_in_the_same_way_predicts_the_same(saved, make_causal, records):
    predictor, path = saved
    again = load_predictor(path, make_causal(projections="frozen_v", filled=False))
    assert again.temperature == 1.5
    assert torch.equal(predict(again, records).logits, predict(predictor, records).logits)


@pytest.mark.parametrize("name", ["make_choice", "make_classifier", "make_likelihood"])
def test_heads_and_numbers_of_the_readout_are_kept(name, request, records, tmp_path):
    make = request.getfixturevalue(name)
    adapter = make()
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter.add_(0.1)
    predictor = Predictor(adapter)
    save_predictor(predictor, tmp_path / "file")
    again = load_predictor(tmp_path / "file", make())
    assert again.draws is None
    assert torch.equal(predict(again, records).logits, predict(predictor, records).logits)


def test_the_file_holds_what_was_trained_and_no_more(saved):
    predictor, path = saved
    tensors = load_file(path)
    assert torch.equal(tensors.pop("s"), predictor.draws)
    state = predictor.adapter.state()
    assert tensors.keys() == {f"projections.{name}" for name in state}
    for name, parameter in state.items():
        assert torch.equal(tensors[f"projections.{name}"], parameter)


def test_another_adapter_is_refused_before_anything_is_changed(saved, make_causal, tokenizer):
    _, path = saved
    before = make_causal(targets=("q_proj",))
    kept = {name: p.clone() for name, p in before.state().items()}
    with pytest.raises(ValueError, match=r"whose adapted modules is \[.* make the adapter as"):
        load_predictor(path, before)
    assert all(torch.equal(p, kept[name]) for name, p in before.state().items())
    with pytest.raises(ValueError, match="whose shape of s is"):
        load_predictor(path, make_causal(core="full"))
    readout = LabelTokens(tokenizer, PROMPTS["question"], ["cat", "dog"], max_length=64)
    other = SubspaceAdapter(tiny_llama(), make_causal().peft_model.peft_config["default"], readout)
    with pytest.raises(ValueError, match="whose number of classes is 4, and here it is 2"):
        load_predictor(path, other)
    llm = make_causal()
    with torch.no_grad():
        llm.peft_model.get_base_model().model.embed_tokens.weight.add_(1)
    with pytest.raises(ValueError, match="whose base model is"):
        load_predictor(path, llm)


def test_wrong_files_are_named(saved, make_causal, tmp_path):
    predictor, path = saved
    with pytest.raises(FileExistsError, match="exists"):
        save_predictor(predictor, path)
    with pytest.raises(FileNotFoundError, match="none: no such file"):
        load_predictor(tmp_path / "none", predictor.adapter)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="text is no file of safetensors"):
        load_predictor(tmp_path / "text", predictor.adapter)
    for metadata in (None, {"note": "by hand"}, {"temperature": "1.0"}):
        save_file({"s": torch.ones(2)}, tmp_path / "other", metadata)
        with pytest.raises(ValueError, match="other was not written by save_predictor"):
            load_predictor(tmp_path / "other", predictor.adapter)
    with pytest.raises(TypeError, match="predictor is a dict: expected a Predictor"):
        save_predictor({}, tmp_path / "new")


def test_a_readout_that_scores_otherwise_is_refused(tokenizer, tmp_path):
    def make(normalise):
        readout = ChoiceLikelihood(
            tokenizer, PROMPTS["question"], num_classes=4, max_length=64, normalise=normalise
        )
        return SubspaceAdapter(tiny_llama(), lora("q_proj"), readout)

    save_predictor(Predictor(make("characters")), tmp_path / "file")
    load_predictor(tmp_path / "file", make("characters"))
    with pytest.raises(ValueError, match=r"readout's settings is .*'tokens'"):
        load_predictor(tmp_path / "file", make("tokens"))
