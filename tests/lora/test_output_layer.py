"""Label logits of a bfloat16 body: not rounded, at the model's own values."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import fill_lora_B, lora, make_records, tiny_llama, whole
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from scalabl_pyro import Record, SubspaceAdapter
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.readouts import LabelTokens, SequenceClassification

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=2, max_position_embeddings=64, pad_token_id=0)
KV = dict(num_key_value_heads=2, head_dim=8)
MODELS = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **KV, final_logit_softcapping=0.5, query_pre_attn_scalar=8)
    ),
    "scale": lambda: CohereForCausalLM(CohereConfig(**SIZES, num_key_value_heads=2)),
    "divided": lambda: GraniteForCausalLM(
        GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=3.0)
    ),
    "bias": lambda: PhiForCausalLM(PhiConfig(**SIZES, num_key_value_heads=2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
}


def make(readout, kind: str, *targets: str, dtype=torch.bfloat16, **options) -> SubspaceAdapter:
    torch.manual_seed(1)
    llm = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.copy_(parameter.bfloat16())  # the same numbers in either type
        head = llm.get_output_embeddings()
        head.weight.mul_(8)  # logits in the tens
        if head.bias is not None:
            head.bias.copy_(torch.linspace(-3, 3, len(head.bias)).bfloat16())
    torch.manual_seed(1)
    adapter = SubspaceAdapter(llm.to(dtype), lora(*targets), readout, **options)
    fill_lora_B(adapter)
    return adapter


@pytest.fixture
def readout(tokenizer) -> LabelTokens:
    return LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)


def last_hidden(adapter: SubspaceAdapter, batch) -> torch.Tensor:
    """What reaches the output layer, of the plain model."""
    seen: list[torch.Tensor] = []
    llm = adapter.peft_model.get_base_model()
    handle = llm.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    with torch.no_grad():
        adapter.readout(llm, batch.inputs)
    handle.remove()
    return seen[0][:, -1]


POST = {
    "softcap": lambda x: torch.tanh(x / 0.5) * 0.5,
    "scale": lambda x: x * 0.0625,
    "divided": lambda x: x / 3.0,
}


@pytest.mark.parametrize("kind", MODELS)
def test_label_logits_are_those_of_the_body_in_float32(readout, kind):
    """By hand: W_v·x + b_v, then what the model does with it."""
    target = "query_key_value" if kind == "neox" else "q_proj"
    adapter = make(readout, kind, target)
    batch = whole(readout.encode(make_records(6)))
    logits = adapter(batch)
    x = last_hidden(adapter, batch).double()
    head = adapter.peft_model.get_base_model().get_output_embeddings()
    expected = x @ head.weight[readout.label_ids].double().mT
    if head.bias is not None:
        expected = expected + head.bias[readout.label_ids].double()
    expected = POST.get(kind, lambda x: x)(expected).float().detach()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    rounded = adapter.readout(adapter.peft_model.get_base_model(), batch.inputs)
    assert (rounded - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("kind", ["llama", "tied", "bias", "softcap"])
def test_an_adapted_output_layer_has_its_gradients_and_draws(readout, kind):
    """Against the full rows: the same adapter in float32, on the bfloat16 body's hidden states."""
    adapter = make(readout, kind, "lm_head", "q_proj", projections="free")
    batch = whole(readout.encode(make_records(6)))
    s = torch.rand(3, *adapter.shape).requires_grad_()
    head = adapter.peft_model.get_base_model().get_output_embeddings()
    A, B = head.lora_A["default"], head.lora_B["default"]
    seen: list[torch.Tensor] = []
    A.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = adapter(batch, s)
    logits.log_softmax(-1)[..., 0].sum().backward()
    x = seen[0].detach().float().view(3, 6, -1)
    ids = readout.label_ids
    own = s.detach()[:, list(adapter.layers).index("lm_head"), None]
    base = head.get_base_layer()
    bias = 0 if base.bias is None else base.bias[ids].float()
    weights = [w.detach().clone().requires_grad_() for w in (A.weight, B.weight)]
    plain = x @ base.weight[ids].float().mT + bias
    plain = plain + (own * (x @ weights[0].mT)) @ weights[1][ids].mT * 2.0
    plain = POST.get(kind, lambda x: x)(plain)
    torch.testing.assert_close(logits.detach(), plain.detach(), rtol=1e-5, atol=1e-5)
    plain.log_softmax(-1)[..., 0].sum().backward()
    for mine, other in zip((A.weight, B.weight), weights, strict=True):
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    loop = torch.stack([adapter(batch, each) for each in s])
    torch.testing.assert_close(adapter(batch, s), loop, rtol=1e-2, atol=1e-2)
    copied = copy.deepcopy(adapter)
    assert torch.equal(copied(batch, s), adapter(batch, s))


class Mixed(type(tiny_llama())):
    """Log probabilities in the place of logits: of some words they are not to be had."""

    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits = out.logits.log_softmax(-1)
        return out


def test_a_model_that_mixes_its_logits_keeps_its_own(readout, caplog):
    llm = Mixed(tiny_llama().config).eval().to(torch.bfloat16)
    adapter = SubspaceAdapter(llm, lora("q_proj"), readout)
    assert "does more with its logits than its output layer" in caplog.text
    batch = whole(readout.encode(make_records(6)))
    torch.testing.assert_close(adapter(batch), readout(llm, batch.inputs), rtol=0, atol=0)


def test_an_output_layer_that_does_more_than_a_product_stays(readout, caplog):
    """One whose own rows and all of its rows agree with each other, but not with the model."""
    llm = tiny_llama().to(torch.bfloat16)
    head = llm.lm_head
    head.forward = lambda x: 3 * nn.functional.linear(x, head.weight)
    adapter = SubspaceAdapter(llm, lora("q_proj"), readout)
    assert "does more with its logits than its output layer" in caplog.text
    batch = whole(readout.encode(make_records(6)))
    with torch.no_grad():
        hidden = llm.model(**batch.inputs).last_hidden_state[:, -1]
        expected = 3 * (hidden @ head.weight.mT)[:, readout.label_ids]
    torch.testing.assert_close(adapter(batch), expected.float(), rtol=0.02, atol=1e-2)


def test_float32_and_quantised_output_layers_are_left_alone(readout):
    adapter = make(readout, "llama", "lm_head", dtype=torch.float32)
    llm = adapter.peft_model.get_base_model()
    batch = whole(readout.encode(make_records(6)))
    assert torch.equal(adapter(batch), readout(llm, batch.inputs))


def test_the_check_leaves_weights_and_random_state(readout):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = make(readout, "llama", "lm_head", svd=False)
    torch.manual_seed(5)
    config = lora("lm_head")
    SubspaceAdapter(
        tiny_llama().to(torch.bfloat16), config, SequenceClassification.untokenized(4), svd=False
    )
    without = torch.rand(3)
    torch.manual_seed(5)
    fresh = SubspaceAdapter(tiny_llama().to(torch.bfloat16), config, readout, svd=False)
    assert torch.equal(torch.rand(3), without)
    assert not torch.equal(expected, without)
    B = fresh.state()["lm_head.lora_B.default.weight"]
    assert not B.any()
    assert first.state()["lm_head.lora_B.default.weight"].any()


def test_the_output_layer_gets_rows_without_gaps(readout):
    strided = []
    adapter = make(readout, "llama", "q_proj", dtype=torch.float32)
    llm = adapter.peft_model.get_base_model()
    head = llm.lm_head
    head.register_forward_hook(lambda _, args, out: strided.append(args[0].is_contiguous()))
    adapter(whole(readout.encode(make_records(6))), torch.rand(2, *adapter.shape))
    assert strided == [True]
    assert isinstance(head, nn.Linear)


QUESTIONS = {
    "Which of these is a planet?": ("Mars", "Paris", "Oxygen", "Piano"),
    "What do bees make?": ("Honey", "Steel", "Milk", "Sand"),
    "Which is the coldest?": ("Ice", "Fire", "Steam", "Lava"),
    "How many legs has a spider?": ("Eight", "Six", "Four", "Ten"),
}


@pytest.mark.slow
@pytest.mark.parametrize("block", [28, 29])
def test_mutual_information_of_a_real_model_is_that_of_float32(block, smollm2):
    """Draws of the upper blocks, whose logits near 18 are rounded to steps of 1/8. (Below, the
    rounding of the hidden states of thirty blocks is larger than what draws differ by.)"""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=512)
    records = [Record(q, q, choices, 0) for q, choices in QUESTIONS.items()]
    batch = whole(readout.encode(records))
    layers = lora("q_proj", "v_proj", r=8, layers_to_transform=list(range(block, 30)))
    by_name = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        llm = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype)
        torch.manual_seed(0)
        adapter = SubspaceAdapter(llm, layers, readout)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for key, parameter in adapter.named_parameters().items():
                if ".lora_B." in key:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        noise = torch.randn(10, *adapter.shape, generator=generator)
        s = adapter.init_loc * (1 + 0.1 * noise)
        with torch.no_grad():
            by_name[name] = information(adapter(batch, s))
            adapter._output_rows = None
            by_name[f"{name}, own head"] = information(adapter(batch, s))
    assert (by_name["bfloat16"] - by_name["float32"]).abs().max() < 1e-4
    assert (by_name["bfloat16, own head"] - by_name["float32"]).abs().max() > 1e-4


def information(logits: torch.Tensor) -> torch.Tensor:
    """H(mean p) − mean H(p), (B,), in nats."""
    p = logits.double().softmax(-1)
    return torch.special.entr(p.mean(0)).sum(-1) - torch.special.entr(p).sum(-1).mean(0)
