"""Models that read both ways are told apart from causal ones, which transformers does not do."""

from __future__ import annotations

import pytest
import torch
from conftest import lora, make_records, tiny_bert_config
from transformers import (
    BertForMaskedLM,
    BertLMHeadModel,
    ElectraConfig,
    ElectraForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from scalabl_pyro import from_pretrained
from scalabl_pyro.lora.config import ModelConfig
from scalabl_pyro.lora.loading import load_llm, load_readout

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=2, max_position_embeddings=80, pad_token_id=0)
MASKED = {
    "bert": lambda: BertForMaskedLM(tiny_bert_config()),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=16)),
}


def saved(folder, llm, tokenizer):
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(str(folder))


@pytest.mark.parametrize("readout", ["label_tokens", "choice_likelihood"])
@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_language_model_is_not_taken_for_a_causal_one(kind, readout, tmp_path, tokenizer):
    torch.manual_seed(1)
    config = saved(tmp_path, MASKED[kind](), tokenizer)
    config = ModelConfig(config.name, readout=readout)
    with pytest.raises(ValueError, match=f"masked language model of type {kind}, which reads both"):
        load_readout(config, config.classes(make_records(4)))


def test_a_decoder_of_the_same_architecture_is_one(tmp_path, tokenizer):
    """Its logits do not see what comes after them, which is what makes it causal."""
    torch.manual_seed(1)
    config = saved(tmp_path, BertLMHeadModel(tiny_bert_config(is_decoder=True)), tokenizer)
    llm = load_llm(config, load_readout(config, config.classes(make_records(4))))
    ids = torch.randint(4, 24, (1, 6))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] - 3) % 20 + 4
    with torch.no_grad():
        first, second = llm(ids).logits, llm(other).logits
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5], second[:, 5])


def test_a_loaded_model_is_looked_at_too(tokenizer):
    llm = BertLMHeadModel(tiny_bert_config())
    with pytest.raises(
        ValueError, match=r"'BertLMHeadModel' is a masked .*readout=multiple_choice"
    ):
        from_pretrained(llm, lora("query"), make_records(4), tokenizer=tokenizer)
