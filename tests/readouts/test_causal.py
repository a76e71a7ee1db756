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
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForCausalLM,
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
