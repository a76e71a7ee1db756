"""Draws at once equal a loop over draws, or are refused by name, for every layout of rows."""

from __future__ import annotations

import pytest
import torch
from conftest import fill_lora_B, lora, make_records, tiny_bert_config, tiny_llama, whole
from torch import nn
from transformers import (
    BertForMultipleChoice,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from scalabl_pyro import Predictor, SubspaceAdapter
from scalabl_pyro.prediction import Decoding, generate, score
from scalabl_pyro.readouts import CompletionTokens
from scalabl_pyro.readouts.heads import MultipleChoice, SequenceClassification

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=2, max_position_embeddings=80, pad_token_id=0)
LLAMA = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
LLAMA |= dict(num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, num_labels=4)
XLNET = dict(vocab_size=32, d_model=16, n_layer=2, n_head=2, d_inner=32, num_labels=4)


class Turned(nn.Module):
    """A layer that is called on (T, R, d), or on all tokens in another order."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(0, 1)
        if self.how == "time first":
            return self.inner(turned).transpose(0, 1)
        if self.how == "flat":
            return self.inner(x.flatten(0, 1)).view(*x.shape[:2], -1)
        if self.how == "flat, time first":
            flat = self.inner(turned.flatten(0, 1))
            return flat.view(*turned.shape[:2], -1).transpose(0, 1)
        if self.how == "some":  # as an expert, which sees the tokens that are sent to it
            chosen = x[..., 0] > x[..., 0].mean()
            out = torch.zeros_like(x)
            out[chosen] = self.inner(x[chosen])
            return out
        if self.how == "rowless":
            return x + self.inner(x[0])
        raise AssertionError(self.how)


def turned(how: str):
    torch.manual_seed(1)
    llm = LlamaForSequenceClassification(LlamaConfig(**LLAMA))
    for block in llm.model.layers:
        block.self_attn.o_proj = Turned(block.self_attn.o_proj, how)
    return llm, "inner"


def longformer():
    config = LongformerConfig(**SIZES, attention_window=4, num_labels=4)
    return LongformerForSequenceClassification(config), "query"


REFUSED = {
    "longformer": longformer,
    "xlnet feed-forward": lambda: (XLNetForSequenceClassification(XLNetConfig(**XLNET)), "layer_1"),
    "time first": lambda: turned("time first"),
    "flat, time first": lambda: turned("flat, time first"),
    "some tokens": lambda: turned("some"),
    "one row for all": lambda: turned("rowless"),
}
SERVED = {
    "bert": lambda: (BertForSequenceClassification(tiny_bert_config(num_labels=4)), "query"),
    "bert head": lambda: (
        BertForSequenceClassification(tiny_bert_config(num_labels=4)),
        "classifier",
    ),
    "bert choices": lambda: (BertForMultipleChoice(tiny_bert_config()), "value"),
    "flat": lambda: turned("flat"),
    "longformer output": lambda: (longformer()[0], "output.dense"),
}


def make(tokenizer, build, **options) -> SubspaceAdapter:
    torch.manual_seed(1)
    llm, target = build()
    cls = MultipleChoice if "MultipleChoice" in type(llm).__name__ else SequenceClassification
    readout = cls(tokenizer, num_classes=4, max_length=64)
    adapter = SubspaceAdapter(llm.eval(), lora(target), readout, **options)
    fill_lora_B(adapter)
    return adapter


def batch_of(adapter: SubspaceAdapter, count: int, length: int | None = None):
    """Rows of different lengths, padded to one."""
    batch = whole(adapter.readout.encode(make_records(count)))
    if length is not None:
        inputs = {
            n: v[..., :1].repeat(*[1] * (v.dim() - 1), length) for n, v in batch.inputs.items()
        }
        size = inputs["input_ids"].shape
        inputs["input_ids"] = torch.randint(3, 32, size)
        batch = type(batch)(inputs, batch.choices, batch.labels)
    return batch


# As many rows as tokens, where the two cannot be told from one another by shape, and others.
@pytest.mark.parametrize(("count", "length", "draws"), [(3, None, 2), (4, 8, 2), (1, 4, 4)])
@pytest.mark.parametrize("kind", REFUSED)
def test_rows_that_are_no_rows_are_refused_by_name(tokenizer, kind, count, length, draws):
    adapter = make(tokenizer, REFUSED[kind])
    batch, s = batch_of(adapter, count, length), torch.rand(draws, *adapter.shape)
    loop = torch.stack([adapter(batch, each) for each in s])  # one draw at a time is right
    with pytest.raises(ValueError, match=r"calls .* on an input that .*one draw at a time"):
        adapter(batch, s)
    logits = Predictor(adapter, s, max_rows=1).logits(batch)
    torch.testing.assert_close(logits, loop, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("count", "length", "draws"), [(3, None, 2), (4, 8, 2), (1, 4, 4)])
@pytest.mark.parametrize("kind", SERVED)
def test_rows_in_any_other_layout_are_served(tokenizer, kind, count, length, draws):
    adapter = make(tokenizer, SERVED[kind])
    batch, s = batch_of(adapter, count, length), torch.rand(draws, *adapter.shape)
    for _ in range(2):
        loop = torch.stack([adapter(batch, each) for each in s])
        torch.testing.assert_close(adapter(batch, s), loop, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["time first", "some tokens"])
def test_rows_of_examples_with_their_own_s_are_looked_at_too(tokenizer, kind):
    adapter = make(tokenizer, REFUSED[kind])
    batch, s = batch_of(adapter, 4, 4), torch.rand(4, *adapter.shape)
    with pytest.raises(ValueError, match="one draw at a time"):
        adapter(batch, s, per_example=True)


def test_the_doubt_is_resolved_once(tokenizer):
    adapter = make(tokenizer, SERVED["flat"], base_dropout=True)
    calls = []
    adapter.peft_model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    batch, s = batch_of(adapter, 4), torch.rand(2, *adapter.shape)
    adapter.train()
    counts = []
    for _ in range(3):
        adapter(batch, s)
        counts.append(len(calls))
    assert counts == [4, 5, 6]  # together, and each of two examples alone
    assert adapter.peft_model.training


def test_recomputed_blocks_look_at_the_rows_of_their_own_pass(tokenizer):
    """Two passes of other sizes before one backward pass."""
    gradients = []
    for checkpointing in (False, True):
        adapter = make(tokenizer, lambda: (tiny(), "q_proj"), gradient_checkpointing=checkpointing)
        adapter.train()
        s = torch.rand(2, *adapter.shape, generator=torch.Generator().manual_seed(0))
        s.requires_grad_()
        torch.manual_seed(3)
        (adapter(batch_of(adapter, 4), s).sum() * adapter(batch_of(adapter, 3), s).sum()).backward()
        gradients.append(s.grad)
    torch.testing.assert_close(*gradients)


def tiny() -> nn.Module:
    torch.manual_seed(1)
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA))


def causal(tokenizer, how: str | None) -> SubspaceAdapter:
    llm = tiny_llama()
    if how:
        for block in llm.model.layers:
            block.self_attn.o_proj = Turned(block.self_attn.o_proj, how)
    readout = CompletionTokens(tokenizer, num_classes=32, max_length=64, end_token=False)
    adapter = SubspaceAdapter(llm, lora("inner" if how else "o_proj"), readout)
    fill_lora_B(adapter)
    return adapter


def scored(predictor: Predictor) -> torch.Tensor:
    texts = score(predictor, ["dog", "blue cat"], [" sleeps red", " tree"])
    return torch.cat([text.draw_log_probs for text in texts], -1)


def generated(predictor: Predictor) -> torch.Tensor:
    texts = generate(predictor, ["dog", "blue cat"], Decoding(max_new_tokens=3))
    return torch.cat([text.draw_log_probs for text in texts], -1)


@pytest.mark.parametrize("run", [scored, generated])
@pytest.mark.parametrize("how", ["time first", "flat, time first", "some"])
def test_texts_look_at_the_rows_of_draws_too(tokenizer, run, how):
    adapter = causal(tokenizer, how)
    s = torch.rand(2, *adapter.shape)
    with pytest.raises(ValueError, match="one draw at a time"):
        run(Predictor(adapter, s))
    assert scored(Predictor(adapter, s[:1])).isfinite().all()


@pytest.mark.parametrize("how", ["flat", None])
def test_texts_of_several_draws_are_those_of_one_at_a_time(tokenizer, how):
    adapter = causal(tokenizer, how)
    s = torch.rand(2, *adapter.shape)
    alone = torch.cat([scored(Predictor(adapter, each[None])) for each in s])
    torch.testing.assert_close(scored(Predictor(adapter, s)), alone, atol=1e-5, rtol=1e-5)


def test_a_readout_that_calls_parts_of_the_model_is_looked_at_too(tokenizer):
    class Parts(SequenceClassification):
        def __call__(self, llm, inputs):
            hidden = llm.model(**inputs).last_hidden_state
            return llm.score(hidden[:, 0])

    torch.manual_seed(1)
    llm, target = turned("time first")
    readout = Parts(tokenizer, num_classes=4, max_length=64)
    adapter = SubspaceAdapter(llm.eval(), lora(target), readout)
    batch, s = batch_of(adapter, 3), torch.rand(2, *adapter.shape)
    assert adapter(batch, s[0]).shape == (3, 4)
    with pytest.raises(ValueError, match="one draw at a time"):
        adapter(batch, s)


def test_one_row_of_one_token_is_enough_to_tell(tokenizer):
    """It looks the same in every order, and later ones do not."""
    adapter = causal(tokenizer, "flat, time first")
    s = torch.rand(2, *adapter.shape)
    with (
        adapter.bound(s) as llm,
        pytest.raises(ValueError, match="does not hold row after row"),
    ):
        llm(torch.tensor([[5]]).repeat(2, 1))  # by its place
    served = causal(tokenizer, "flat")
    with served.bound(s) as llm:
        llm(input_ids=torch.tensor([[5]]).repeat(2, 1))


def test_a_layer_that_texts_never_call_is_refused(tokenizer):
    adapter = causal(tokenizer, None)
    llm = adapter.peft_model.get_base_model()
    last = llm.model.layers[-1].self_attn
    last.o_proj = nn.Identity()
    with pytest.raises(ValueError, match="not called once in a forward pass"):
        scored(Predictor(adapter, torch.rand(2, *adapter.shape)))
