"""A readout that knows its class names takes records with these, in this order."""

from __future__ import annotations

import pytest
from conftest import lora, make_records, tiny_bert_config, tiny_llama
from transformers import BertForSequenceClassification

from scalabl_pyro import Predictor, Record, evaluate, from_pretrained, predict
from scalabl_pyro.data import DataError

NAMES = ("red", "blue", "green")


def texts(names: tuple[str, ...]) -> list[Record]:
    """Each with the label of its own class, wherever that stands in ``names``."""
    return [
        Record(str(i), f"the cat runs {name}", names, names.index(name))
        for i, name in enumerate(NAMES * 2)
    ]


@pytest.fixture(params=["label_tokens", "sequence_classification"])
def adapter(request, tokenizer):
    options = {"tokenizer": tokenizer, "readout": request.param, "prompt": "classes"}
    if request.param == "label_tokens":
        return from_pretrained(tiny_llama(), lora("q_proj"), texts(NAMES), **options)
    llm = BertForSequenceClassification(tiny_bert_config(num_labels=3))
    heads = lora("query", modules_to_save=["classifier"])
    return from_pretrained(llm, heads, texts(NAMES), **options)


@pytest.mark.parametrize("names", [NAMES[::-1], ("red", "blue", "cat"), NAMES[:2]])
def test_other_names_or_another_order_are_refused(adapter, names):
    record = Record("q", "the cat runs red", names, 0)
    for call in (
        lambda: adapter.encode([*texts(NAMES), record]),
        lambda: predict(Predictor(adapter), [record]),
    ):
        with pytest.raises(DataError, match=r"record 'q' has the choices .* but the classes are"):
            call()


def test_the_same_names_are_taken(adapter):
    assert adapter.readout.class_names == NAMES
    predictions = predict(Predictor(adapter), texts(NAMES))
    assert 0 <= evaluate(predictions.logits, predictions.labels)["acc"] <= 1


def test_choices_of_their_own_are_taken_by_letters_and_multiple_choice(make_causal, make_choice):
    for adapter in (make_causal(), make_choice()):
        assert adapter.readout.class_names == ()
        assert len(adapter.encode([*make_records(4), *make_records(4, choices=2)])) == 8
