"""One call from a model, a LoRA configuration and records to an adapter."""

from __future__ import annotations

import inspect
import textwrap
from functools import partial

import pyro
import pytest
import torch
from conftest import lora, make_records, tiny_bert_config, tiny_llama, whole
from peft import get_peft_model
from transformers import BertForMultipleChoice, BertForSequenceClassification, BertModel

import scalabl_pyro as sp
from scalabl_pyro.data import DataError
from scalabl_pyro.data.world import world
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import load_readout, make_adapter
from scalabl_pyro.methods import ScalaBL


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
    predictions = names["predictions"]
    assert predictions.logits.shape == (10, 12, 4)
    torch.testing.assert_close(predictions.probabilities.sum(-1), torch.ones(12))
    assert (predictions.entropy > predictions.mutual_information).all()
    assert (predictions.logits.std(0) > 0).all()  # B has left 0: the adapter was trained
    assert len(names["losses"]) == 20


def test_a_loaded_model_and_its_folder_give_the_same(local_model, tokenizer, records):
    logits = []
    for model, options in ((tiny_llama(), {"tokenizer": tokenizer}), (local_model, {})):
        torch.manual_seed(0)
        adapter = sp.from_pretrained(model, lora("q_proj", "lm_head"), records, **options)
        logits.append(adapter(whole(adapter.encode(records)), adapter.init_loc))
    torch.testing.assert_close(*logits)


def test_the_embedded_model_with_class_names():
    records = list(world().splits["test"][:3])
    config = lora("q_proj", "v_proj")
    options = dict(prompt="classes", dtype="bfloat16", device="cpu", projections="frozen_v")
    adapter = sp.from_pretrained("embedded", config, records, **options)
    assert adapter.readout.label_words == records[0].choices
    assert all(".lora_B." in name for name in adapter.named_parameters())
    assert adapter(whole(adapter.encode(records))).shape == (3, 4)


@pytest.mark.parametrize("readout", ["label_tokens", "completion_tokens"])
def test_what_is_no_list_of_records_is_refused(records, readout):
    config = lora("q_proj")
    adapter = sp.from_pretrained("embedded", config, records, readout=readout)
    row = {"id": "a", "question": "the cat", "choices": ["a", "b"]}
    for given, found in (
        (records[0], "Record.* in the place of a list of records"),
        ("the cat", "'the cat' in the place of a list of records"),
        (iter(records), "iterator.* in the place of a list of records"),
        ([row], "'question': 'the cat'.* in the place of a record: expected a list of Record"),
    ):
        with pytest.raises(TypeError, match=found):
            adapter.encode(given)
        with pytest.raises(TypeError, match=found):
            sp.from_pretrained("embedded", config, given, readout=readout)
    with pytest.raises(TypeError, match="in the place of a list of records"):
        sp.predict(sp.Predictor(adapter), records[0])


def test_how_choices_are_scored(local_model, records):
    how = dict(readout="choice_likelihood", normalise="tokens", temperature="none")
    adapter = sp.from_pretrained(local_model, lora("q_proj"), records, **how)
    assert adapter.readout.normalise == "tokens"
    assert not adapter.readout_parameters
    with pytest.raises(ValueError, match="normalise is 'tokens' with readout 'label_tokens'"):
        sp.from_pretrained(local_model, lora("q_proj"), records, normalise="tokens")


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


@pytest.mark.parametrize("readout", ["label_tokens", "choice_likelihood"])
def test_python_and_the_command_line_start_alike_and_train_alike(local_model, records, readout):
    """One set of defaults: prompt, projections, prior, and where κ starts."""
    config = ModelConfig(str(local_model), readout=readout)
    fit_config = sp.FitConfig(steps=3, batch_size=4)
    reader = load_readout(config, config.classes(records))
    settings, split = AdapterConfig(r=4, alpha=8, targets=("q_proj",)), reader.encode(records)
    make = partial(make_adapter, config, settings, reader, prompts=split)
    fitted = ScalaBL(fit_config, progress=False).fit(make, split, None, seed=3)

    pyro.set_rng_seed(3)
    adapter = sp.from_pretrained(local_model, lora("q_proj"), records, readout=readout)
    assert adapter.readout.reading(records[0]).prompt == reader.reading(records[0]).prompt
    train = adapter.encode(records)
    model = sp.ScalaBLModel(adapter, num_data=len(train))
    guide = sp.AutoSubspaceNormal(model)
    sp.fit(model, guide, train, fit_config, seed=3, progress=False)
    expected = fitted.model.adapter.named_parameters()
    parameters = adapter.named_parameters()
    assert parameters.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=0)
    torch.testing.assert_close(guide.median()["s"], fitted.guide.median()["s"], rtol=0, atol=0)


def test_a_prior_that_is_left_out_is_centred_where_the_adapter_starts(
    local_model, records, tmp_path
):
    start = get_peft_model(tiny_llama(), lora("q_proj", init_lora_weights=False))
    start.save_pretrained(tmp_path)
    for options, centre in (({}, 0.0), ({"start": tmp_path}, 1.0)):
        adapter = sp.from_pretrained(local_model, lora("q_proj"), records, **options)
        prior = sp.ScalaBLModel(adapter, num_data=12).prior
        torch.testing.assert_close(prior().mean, torch.full(adapter.shape, centre))


def test_kappa_that_has_moved_is_not_started_again(local_model, records):
    adapter = sp.from_pretrained(local_model, lora("q_proj"), records, readout="choice_likelihood")
    (kappa,) = adapter.readout_parameters.values()
    train = adapter.encode(records)
    adapter.start_readout(train)
    started = float(kappa.detach())
    assert started != 0.0
    kappa.data.fill_(0.3)
    adapter.start_readout(train)
    assert float(kappa.detach()) == pytest.approx(0.3)
