"""One call from a model, a LoRA configuration and records to an adapter."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from conftest import lora, make_records, tiny_bert_config, tiny_llama, whole
from transformers import BertForMultipleChoice, BertForSequenceClassification, BertModel

import scalabl_pyro as sp
from scalabl_pyro.data import DataError
from scalabl_pyro.data.world import world


def usage() -> str:
    """The snippet in the docstring."""
    return textwrap.dedent(inspect.getdoc(sp.from_pretrained).partition("Usage::\n\n")[2])


def test_the_usage_runs_in_a_cell_of_twelve_lines_with_one_import_of_the_package(
    tokenizer, records
):
    lines = [line for line in usage().splitlines() if line]
    assert len(lines) <= 12
    assert [line for line in lines if "scalabl_pyro" in line] == ["import scalabl_pyro as sp"]
    names = {"llm": tiny_llama(), "tokenizer": tokenizer, "records": records}
    exec(compile(usage(), "from_pretrained", "exec"), names)
    found = names["found"]
    assert found.logits.shape == (10, 12, 4)
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(12))
    assert (found.entropy > found.mutual_information).all()
    assert (found.logits.std(0) > 0).all()  # B has left 0: the adapter was trained
    assert len(names["losses"]) == 20


def test_a_loaded_model_and_its_folder_give_the_same(local_model, tokenizer, records):
    found = []
    for model, options in ((tiny_llama(), {"tokenizer": tokenizer}), (local_model, {})):
        torch.manual_seed(0)
        adapter = sp.from_pretrained(model, lora("q_proj", "lm_head"), records, **options)
        found.append(adapter(whole(adapter.encode(records)), adapter.init_loc))
    torch.testing.assert_close(*found)


def test_the_embedded_model_with_class_names():
    records = list(world().splits["test"][:3])
    config = lora("q_proj", "v_proj")
    options = dict(prompt="classes", dtype="bfloat16", device="cpu", projections="frozen_v")
    adapter = sp.from_pretrained("embedded", config, records, **options)
    assert adapter.readout.label_words == records[0].choices
    assert all(".lora_B." in name for name in adapter.named_parameters())
    assert adapter(whole(adapter.encode(records))).shape == (3, 4)


@pytest.mark.parametrize("readout", ["multiple_choice", "sequence_classification"])
def test_encoders_with_a_head_of_their_own(tokenizer, readout):
    records = make_records(6, choices=3)
    if readout == "multiple_choice":
        llm = BertForMultipleChoice(tiny_bert_config())
    else:
        llm = BertForSequenceClassification(tiny_bert_config(num_labels=3))
        records = [sp.Record(r.id, r.question, ("a", "b", "c"), r.label) for r in records]
    config = lora("query", modules_to_save=["classifier"])
    adapter = sp.from_pretrained(llm, config, records, tokenizer=tokenizer, readout=readout)
    assert adapter(whole(adapter.encode(records))).shape == (6, 3)
    assert adapter.num_parameters()["heads"] > 0


def test_what_does_not_fit_together_is_refused(tokenizer, records):
    def make(model, records=records, **options):
        sp.from_pretrained(model, lora("q_proj"), records, **options)

    with pytest.raises(ValueError, match="model is a LlamaForCausalLM: give its tokenizer too"):
        make(tiny_llama())
    with pytest.raises(ValueError, match="model is 'embedded', whose own tokenizer is taken"):
        make("embedded", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="LlamaForCausalLM, but MultipleChoice reads what AutoMod"):
        make(tiny_llama(), tokenizer=tokenizer, readout="multiple_choice")
    with pytest.raises(
        ValueError, match="is a LlamaModel, but LabelTokens reads what AutoModelForC"
    ):
        make(tiny_llama().model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="'BertModel' is a masked language model of type bert"):
        make(BertModel(tiny_bert_config()), tokenizer=tokenizer)
    headed = BertForSequenceClassification(tiny_bert_config(num_labels=2))
    same = [sp.Record("1", "the cat", ("a", "b", "c"))]
    with pytest.raises(ValueError, match="a head with num_labels 2, but the data needs 3"):
        make(headed, same, tokenizer=tokenizer, readout="sequence_classification")
    with pytest.raises(ValueError, match=r"\['dtype'\] say how a model is loaded, but LlamaForC"):
        make(tiny_llama(), tokenizer=tokenizer, dtype="float32")
    with pytest.raises(ValueError, match="tokens, but the model has embeddings for 8"):
        make(tiny_llama(vocab_size=8), tokenizer=tokenizer)
    with pytest.raises(TypeError, match=r"there is no option \['dtyp'\]: expected \['attention'"):
        make("embedded", dtyp="float32")
    with pytest.raises(ValueError, match="readout is 'letters': expected one of"):
        make("embedded", readout="letters")
    with pytest.raises(DataError, match="records is empty"):
        make("embedded", records=[])
    with pytest.raises(ValueError, match="model is a NoneType: expected a name, a folder or a mod"):
        make(None)


def test_a_model_is_adapted_once(tokenizer, records):
    llm = tiny_llama()
    sp.from_pretrained(llm, lora("q_proj"), records, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="already carries a PEFT adapter"):
        sp.from_pretrained(llm, lora("q_proj"), records, tokenizer=tokenizer)
