"""Heads on models that find a row's last token in their own way, against single rows by plain
transformers."""

from __future__ import annotations

import pytest
import torch
from conftest import fill_lora_B, lora, make_records, whole
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from scalabl_pyro import Record, SubspaceAdapter
from scalabl_pyro.readouts import SequenceClassification

CLASSES = ("cat", "dog", "bird")


def llama(pad: int) -> LlamaForSequenceClassification:
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=32, **sizes, **heads, pad_token_id=pad, num_labels=3)
    return LlamaForSequenceClassification(config)


def xlnet() -> XLNetForSequenceClassification:
    sizes = dict(d_model=16, n_layer=2, n_head=2, d_inner=32)
    return XLNetForSequenceClassification(XLNetConfig(vocab_size=32, **sizes, num_labels=3))


MODELS = {
    "llama, another padding token": (lambda: llama(5), "q_proj", ["score"]),
    "llama, a padding token of old files": (lambda: llama(-1), "q_proj", ["score"]),
    "llama, the tokenizer's": (lambda: llama(0), "q_proj", ["score"]),
    "xlnet": (xlnet, "layer_1", ["sequence_summary", "logits_proj"]),
}


def test_a_record_may_have_more_choices_than_any_before(make_choice):
    """The scores are those of its choices in two records."""
    adapter = make_choice()
    names = ("red", "the cat", "dog", "a bird", "blue", "green tree")
    most = adapter.readout.num_classes
    parts = [Record(c, "the dog", names[a:b], 0) for c, a, b in (("b", 0, most), ("c", most, 6))]
    whole_logits = adapter(whole(adapter.encode([Record("a", "the dog", names, 5), parts[0]])))
    first, rest = adapter(whole(adapter.encode(parts)))
    assert whole_logits.shape == (2, 6)
    torch.testing.assert_close(whole_logits[0], torch.cat([first, rest[: 6 - most]]))
    assert (whole_logits[1, most:] == float("-inf")).all()


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_batch_are_those_of_each_row_alone(tokenizer, name):
    build, target, heads = MODELS[name]
    torch.manual_seed(0)
    llm = build().eval()
    records = [Record(r.id, r.question, CLASSES, i % 3) for i, r in enumerate(make_records(9))]
    alone = []
    for record in records:  # B is 0 at first: the base model
        ids = tokenizer(record.question, return_tensors="pt").input_ids
        with torch.no_grad():
            llm.config.pad_token_id = 0
            alone.append(llm(input_ids=ids).logits)
    llm.config.pad_token_id = build().config.pad_token_id
    readout = SequenceClassification(tokenizer, num_classes=3, max_length=64)
    options = dict(init_lora_weights=True, modules_to_save=heads)
    adapter = SubspaceAdapter(llm, lora(target, r=2, **options), readout, svd=False)
    split = adapter.encode(records)
    assert len(set(split.lengths)) > 1
    with torch.no_grad():
        torch.testing.assert_close(adapter(whole(split)), torch.cat(alone), atol=1e-5, rtol=1e-5)
        fill_lora_B(adapter)
        one_by_one = torch.cat([adapter(split.collate([example])) for example in split])
        torch.testing.assert_close(adapter(whole(split)), one_by_one, atol=1e-5, rtol=1e-5)
