"""What readouts of causal models compute is what the plain model does."""

from __future__ import annotations

import pytest
import torch
from conftest import lora, make_records, whole
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CamembertConfig,
    CamembertForCausalLM,
    Data2VecTextConfig,
    Data2VecTextForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForCausalLM,
    XmodConfig,
    XmodForCausalLM,
)

from scalabl_pyro import SubspaceAdapter
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.readouts import LabelTokens

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=2, max_position_embeddings=100, is_decoder=True)
XMOD = dict(languages=("en_XX",), default_language="en_XX")
OPT = dict(vocab_size=32, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32)
OPT |= dict(num_hidden_layers=2, num_attention_heads=2)

MODELS = {
    "roberta": lambda: RobertaForCausalLM(RobertaConfig(**SIZES, pad_token_id=1)),
    "xlm-roberta": lambda: XLMRobertaForCausalLM(XLMRobertaConfig(**SIZES, pad_token_id=1)),
    "camembert": lambda: CamembertForCausalLM(CamembertConfig(**SIZES, pad_token_id=1)),
    "data2vec": lambda: Data2VecTextForCausalLM(Data2VecTextConfig(**SIZES, pad_token_id=1)),
    "prelayernorm": lambda: RobertaPreLayerNormForCausalLM(
        RobertaPreLayerNormConfig(**SIZES, pad_token_id=1)
    ),
    "xmod": lambda: XmodForCausalLM(XmodConfig(**SIZES, **XMOD, pad_token_id=1)),
    "padding 30": lambda: RobertaForCausalLM(RobertaConfig(**SIZES, pad_token_id=30)),
    "bert": lambda: BertLMHeadModel(BertConfig(**SIZES, pad_token_id=0)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT, pad_token_id=1)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_positions_are_the_models_own(tokenizer, kind):
    """Against the plain model on each row, unpadded, which counts positions itself."""
    torch.manual_seed(1)
    llm = MODELS[kind]().eval()
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "position" in name:
                parameter.normal_()
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    split = readout.encode(make_records(6))
    ids = [torch.tensor(example.rows["input_ids"]) for example in split]
    with torch.no_grad():
        rows = [llm(input_ids=row).logits[0, -1, readout.label_ids] for row in ids]
    batch = whole(split)
    assert (batch.inputs["attention_mask"] == 0).any()
    expected = torch.stack(rows)
    with torch.no_grad():
        torch.testing.assert_close(readout(llm, batch.inputs), expected, atol=1e-5, rtol=1e-5)
    target = "q_proj" if kind == "opt" else "query"
    adapter = SubspaceAdapter(llm, lora(target), readout)
    torch.testing.assert_close(adapter(batch), expected, atol=1e-5, rtol=1e-5)


def with_large_weights(llm):
    """At the size that transformers starts from, what a model reads hardly changes its logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return llm.eval()


RECURRENT = {
    "rwkv": lambda: RwkvForCausalLM(
        RwkvConfig(vocab_size=32, context_length=64, hidden_size=16, num_hidden_layers=2)
    ),
    "recurrent_gemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            **dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3),
            **dict(num_attention_heads=2, head_dim=8, lru_width=16),
        )
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_models_that_read_padding_are_refused(name, tokenizer):
    """Their logits depend on what else is in the batch, as plain transformers shows."""
    llm = with_large_weights(RECURRENT[name]())
    text = torch.tensor([[3, 4, 5]])
    padded = torch.tensor([[0, 0, 0, 0, 3, 4, 5]])
    with torch.no_grad():
        alone = llm(text).logits[0, -1]
        beside = llm(padded, attention_mask=(padded != 0).long()).logits[0, -1]
    assert (alone - beside).abs().max() > 1e-2 * alone.abs().max()
    targets = [n for n, m in llm.named_modules() if isinstance(m, torch.nn.Linear)][:1]
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    with pytest.raises(ValueError, match=r"reads the padding before .*choice_likelihood"):
        SubspaceAdapter(llm, lora(*targets), readout)


def test_recurrent_models_with_a_mask_are_served(tokenizer):
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    llm = with_large_weights(MambaForCausalLM(config)).train()  # as a model of a configuration is
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    adapter = SubspaceAdapter(llm, lora("x_proj", r=2), readout)
    split = adapter.encode(make_records(4))
    together = adapter(whole(split))
    for n, example in enumerate(split.examples):
        alone = adapter(split.collate([example]))
        torch.testing.assert_close(alone[0], together[n], atol=1e-5, rtol=0)
