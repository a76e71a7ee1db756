from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import fill_lora_B, lora, make_records, tiny_bert_config, tiny_llama, whole
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForMultipleChoice,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from scalabl_pyro import (
    AutoSubspaceNormal,
    FitConfig,
    Predictor,
    ScalaBLModel,
    SubspaceAdapter,
    fit,
    predict,
)
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.lora.trunk import Trunk
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.readouts.heads import MultipleChoice, SequenceClassification

BLOCKS, FIRST = 4, 2
LLAMA = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=BLOCKS)
LLAMA |= dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
GPT2 = dict(vocab_size=32, n_embd=16, n_layer=BLOCKS, n_head=2, n_positions=64)
SLIDING = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "llama": (lambda: tiny_llama(num_hidden_layers=BLOCKS), ("q_proj", "v_proj", "lm_head")),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA | SLIDING)), ("q_proj", "v_proj")),
    "mistral": (
        lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=4)),
        ("o_proj", "up_proj"),
    ),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), ("c_attn",)),
    "bert choices": (
        lambda: BertForMultipleChoice(tiny_bert_config(num_hidden_layers=BLOCKS)),
        ("query", "value"),
    ),
    "bert classes": (
        lambda: BertForSequenceClassification(
            tiny_bert_config(num_hidden_layers=BLOCKS, num_labels=4)
        ),
        ("query", "classifier"),
    ),
    "llama classes": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=4, pad_token_id=0)),
        ("q_proj", "score"),
    ),
    "gpt2 classes": (
        lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=4, pad_token_id=0)),
        ("c_proj",),
    ),
}


def make(tokenizer, kind: str, *, first: int = FIRST, **options) -> SubspaceAdapter:
    """An adapter whose blocks below ``first`` are left alone."""
    torch.manual_seed(1)
    build, targets = MODELS[kind]
    if kind.endswith("choices"):
        readout = MultipleChoice(tokenizer, num_classes=4, max_length=64)
    elif kind.endswith("classes"):
        readout = SequenceClassification(tokenizer, num_classes=4, max_length=64)
    else:
        readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    blocks = "|".join(map(str, range(first, BLOCKS)))
    heads = {"score", "classifier", "lm_head"} & set(targets)
    config = lora("set below", fan_in_fan_out=kind.startswith("gpt2"))
    config.target_modules = "|".join(
        [rf".*\.(layer|layers|h)\.({blocks})\..*({'|'.join(targets)})", *heads]
    )
    adapter = SubspaceAdapter(build().eval(), config, readout, **options)
    fill_lora_B(adapter)
    return adapter


def full_path(adapter: SubspaceAdapter, batch, s: torch.Tensor) -> torch.Tensor:
    """Draw by draw, without a trunk."""
    return torch.stack([adapter(batch, draw) for draw in s])


def count_rows(adapter: SubspaceAdapter) -> list[int]:
    """Rows that run in each block, appended at every forward pass."""
    seen: list[int] = []

    def count(module, args, kwargs) -> None:
        seen.append(len(args[0] if args else kwargs["hidden_states"]))

    for name, module in adapter.peft_model.named_modules():
        if name.split(".")[-1].isdigit():
            # Inside the block, where its own hooks have run.
            next(module.children()).register_forward_pre_hook(count, with_kwargs=True)
    return seen


@pytest.fixture(params=MODELS)
def adapter(request, tokenizer) -> SubspaceAdapter:
    return make(tokenizer, request.param)


def test_a_shared_trunk_computes_what_the_full_path_does(adapter, records):
    batch = whole(adapter.readout.encode(records))
    s = torch.randn(3, *adapter.shape)
    expected = full_path(adapter, batch, s)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    seen = count_rows(adapter)
    torch.testing.assert_close(adapter(batch, s), expected, atol=1e-6, rtol=1e-6)
    one = batch.inputs["input_ids"][..., 0].numel()
    assert seen == [one] * FIRST + [3 * one] * (BLOCKS - FIRST)


def test_draws_in_chunks_share_one_trunk(adapter, records):
    batch = whole(adapter.readout.encode(records))
    one = batch.inputs["input_ids"][..., 0].numel()
    s = torch.randn(5, *adapter.shape)
    with torch.no_grad():
        expected = full_path(adapter, batch, s)
    seen = count_rows(adapter)
    predictor = Predictor(adapter, s, max_rows=2 * one)
    torch.testing.assert_close(predictor.logits(batch), expected, atol=1e-6, rtol=1e-6)
    above = [2 * one] * (BLOCKS - FIRST)
    assert seen == [one] * FIRST + above + above + [one] * (BLOCKS - FIRST)


def test_chunks_of_draws_that_agree_below_go_on_from_there(tokenizer, records):
    adapter = make(tokenizer, "llama", first=0)
    batch = whole(adapter.readout.encode(records))
    s = torch.randn(3, *adapter.shape)
    below = torch.tensor(adapter.trunk.block_of) < 3
    s[:, below] = s[0, below]
    seen = count_rows(adapter)
    logits = Predictor(adapter, s, max_rows=1).logits(batch)  # one draw at a time
    assert seen == [len(records)] * (3 + 3)
    expected = full_path(adapter, batch, s)
    torch.testing.assert_close(logits, expected.detach(), atol=1e-6, rtol=1e-6)


def test_gradients_through_a_shared_trunk_are_those_of_the_full_path(adapter, records):
    batch = whole(adapter.readout.encode(records))
    s = torch.randn(3, *adapter.shape).requires_grad_()
    gradients = []
    for run in (full_path, SubspaceAdapter.__call__):
        loss = run(adapter, batch, s).log_softmax(-1)[..., 0].sum()
        parameters = [s, *adapter.named_parameters().values()]
        gradients.append(torch.autograd.grad(loss, parameters))
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


def test_a_cached_trunk_computes_what_the_full_path_does(adapter, records):
    split = adapter.readout.encode(records)
    cached = adapter.cache_trunk(split, batch_size=5)
    s = torch.randn(3, *adapter.shape)
    for count in (3, 12):  # other lengths than those it was cached with
        batch, other = (x.collate(list(x)[-count:]) for x in (split, cached))
        torch.testing.assert_close(adapter(other, s), adapter(batch, s), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(adapter(other), adapter(batch), atol=1e-6, rtol=1e-6)
        each = torch.randn(count, *adapter.shape)
        torch.testing.assert_close(
            adapter(other, each, per_example=True),
            adapter(batch, each, per_example=True),
            atol=1e-6,
            rtol=1e-6,
        )
    assert torch.equal(cached.labels, split.labels)
    assert cached.lengths == split.lengths


def test_a_cached_trunk_leaves_out_the_blocks_below(tokenizer, records):
    adapter = make(tokenizer, "llama")
    cached = adapter.cache_trunk(adapter.readout.encode(records))
    calls = []
    for module in adapter.peft_model.modules():
        if type(module).__name__ == "LlamaAttention":
            module.register_forward_hook(lambda *_: calls.append(1))
    llm = adapter.peft_model.get_base_model()
    placed = llm.model.layers[0].forward
    llm.model.layers[0].forward = placed  # as libraries do that place layers on devices
    adapter(whole(cached), torch.randn(2, *adapter.shape))
    assert len(calls) == BLOCKS - FIRST
    assert vars(llm.model.layers[0])["forward"] is placed
    assert "forward" not in vars(llm.model.layers[1])


def test_training_on_a_cached_trunk_ends_where_training_in_full_does(tokenizer, records):
    ends = []
    for cache in (False, True):
        adapter = make(tokenizer, "llama")
        train = adapter.readout.encode(records)
        model = ScalaBLModel(adapter, num_data=len(train))
        guide = AutoSubspaceNormal(model)
        torch.manual_seed(0)
        config = FitConfig(steps=5, batch_size=4)
        seen = adapter.cache_trunk(train) if cache else train
        fit(model, guide, seen, config, progress=False)
        predictor = Predictor(adapter, guide.median()["s"][None])
        ends.append((guide.loc.detach(), predict(predictor, seen, batch_size=5).logits))
    assert (ends[0][0] - adapter.init_loc).abs().max() > 1e-3
    for expected, end in zip(*ends, strict=True):
        torch.testing.assert_close(end, expected, atol=1e-4, rtol=1e-4)


def test_with_only_the_head_adapted_every_block_is_trunk(tokenizer, records):
    adapter = make(tokenizer, "llama", first=BLOCKS)
    assert adapter.trunk.depth == BLOCKS
    split = adapter.readout.encode(records)
    batch, s = whole(split), torch.randn(3, *adapter.shape)
    expected = full_path(adapter, batch, s)
    torch.testing.assert_close(adapter(batch, s), expected, atol=1e-6, rtol=1e-6)
    cached = whole(adapter.cache_trunk(split))
    torch.testing.assert_close(adapter(cached, s), expected, atol=1e-6, rtol=1e-6)


def test_modules_that_the_draws_agree_on_join_the_trunk(tokenizer, records):
    adapter = make(tokenizer, "llama", first=0)
    assert adapter.trunk.depth == 0
    batch = whole(adapter.readout.encode(records))
    s = torch.randn(3, *adapter.shape)
    below = torch.tensor(adapter.trunk.block_of) < 3
    s[:, below] = s[0, below]
    expected = full_path(adapter, batch, s)
    seen = count_rows(adapter)
    torch.testing.assert_close(adapter(batch, s), expected, atol=1e-6, rtol=1e-6)
    assert seen == [len(records)] * 3 + [3 * len(records)]
    # Each draw needs a gradient of its own, equal or not.
    s.requires_grad_()
    gradients = [
        torch.autograd.grad(run(adapter, batch, s).log_softmax(-1)[..., 0].sum(), s)[0]
        for run in (full_path, SubspaceAdapter.__call__)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)


def test_the_trunk_can_be_left_unshared(tokenizer, records):
    adapter = make(tokenizer, "llama", share_trunk=False)
    batch, s = whole(adapter.readout.encode(records)), torch.randn(3, *adapter.shape)
    expected = full_path(adapter, batch, s)
    seen = count_rows(adapter)
    torch.testing.assert_close(adapter(batch, s), expected, atol=1e-6, rtol=1e-6)
    assert seen == [3 * len(records)] * BLOCKS


def test_draws_keep_dropout_masks_of_their_own_in_training(tokenizer, records):
    adapter = make(tokenizer, "bert classes", base_dropout=True)
    batch = whole(adapter.readout.encode(records))
    seen = count_rows(adapter)
    adapter.train()
    adapter(batch, torch.randn(3, *adapter.shape))
    adapter.eval()
    adapter(batch, torch.randn(3, *adapter.shape))
    rows = len(records)
    assert seen == [3 * rows] * BLOCKS + [rows] * FIRST + [3 * rows] * (BLOCKS - FIRST)
    with pytest.raises(ValueError, match="base_dropout is on"):
        adapter.cache_trunk(adapter.readout.encode(records))


def test_checkpointed_blocks_recompute_above_a_shared_trunk(tokenizer, records):
    gradients = []
    for checkpointing in (False, True):
        adapter = make(tokenizer, "llama", gradient_checkpointing=checkpointing)
        adapter.train()
        split = adapter.readout.encode(records)
        torch.manual_seed(2)
        s = torch.randn(3, *adapter.shape).requires_grad_()
        for batch in (whole(split), whole(adapter.cache_trunk(split))):
            adapter(batch, s).log_softmax(-1)[..., 0].sum().backward()
        gradients.append([s.grad, *(p.grad for p in adapter.named_parameters().values())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_what_cannot_be_cached_is_refused(tokenizer, records):
    adapter = make(tokenizer, "llama", first=0)
    split = adapter.readout.encode(records)
    with pytest.raises(ValueError, match=r"no trunk.*layers\.0\..* is adapted"):
        adapter.cache_trunk(split)
    deep, deeper = make(tokenizer, "llama", first=2), make(tokenizer, "llama", first=3)
    with pytest.raises(ValueError, match=r"leaving_block_1.* has 3 blocks"):
        deeper(whole(deep.cache_trunk(split)))
    with pytest.raises(ValueError, match="holds what leaves a trunk already"):
        deep.cache_trunk(deep.cache_trunk(split))
    embedding = make(tokenizer, "llama")
    embedding.peft_model.get_input_embeddings().weight.requires_grad_()
    with pytest.raises(ValueError, match="holds parameters that are trained"):
        embedding.cache_trunk(split)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda llm: llm.model.layers.__setitem__(1, llm.model.layers[0]), "more than once"),
        (lambda llm: setattr(llm.config, "_attn_implementation", "flex_attention"), "flex"),
        (lambda llm: llm.model.__setattr__("layers", nn.Sequential(*llm.model.layers)), "in no nn"),
    ],
    ids=["shared block", "flex attention", "no list"],
)
def test_a_model_without_blocks_to_split_says_why(change, why):
    llm = tiny_llama(num_hidden_layers=BLOCKS)
    change(llm)
    trunk = Trunk(llm, ["lm_head"])
    assert trunk.depth == 0
    assert why in trunk.why_not


def test_blocks_that_take_positions_of_their_own_run_for_every_draw(tokenizer, records):
    """DeBERTa's blocks take an argument that has no row for each input."""
    torch.manual_seed(1)
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=BLOCKS)
    positions = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], num_labels=4)
    config = DebertaV2Config(**sizes, **positions, num_attention_heads=2)
    llm = DebertaV2ForSequenceClassification(config).eval()
    readout = SequenceClassification(tokenizer, num_classes=4, max_length=64)
    names = lora("value_proj", layers_to_transform=[FIRST, FIRST + 1])
    adapter = SubspaceAdapter(llm, names, readout)
    fill_lora_B(adapter)
    assert adapter.trunk.depth == 0
    assert "rel_embeddings" in adapter.trunk.why_not
    batch, s = whole(readout.encode(records)), torch.randn(3, *adapter.shape)
    one_by_one = torch.stack([adapter(batch, each) for each in s])
    torch.testing.assert_close(adapter(batch, s), one_by_one, atol=1e-5, rtol=1e-5)


def test_an_argument_that_cannot_be_cut_lets_every_block_run_for_every_draw(
    tokenizer, records, caplog
):
    adapter = make(tokenizer, "llama")
    layers = adapter.peft_model.get_base_model().model.layers
    bias = torch.zeros(2, 5, 5)
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"bias": bias}), with_kwargs=True
    )
    batch, s = whole(adapter.readout.encode(records)), torch.randn(3, *adapter.shape)
    expected = full_path(adapter, batch, s)
    seen = count_rows(adapter)
    torch.testing.assert_close(adapter(batch, s), expected, atol=1e-6, rtol=1e-6)
    assert seen[-BLOCKS:] == [3 * len(records)] * BLOCKS
    assert "shape (2, 5, 5) for 36 rows: every block runs for every draw" in caplog.text
    caplog.clear()
    torch.testing.assert_close(adapter(batch, s), expected, atol=1e-6, rtol=1e-6)
    assert not caplog.text  # said once


@pytest.mark.parametrize("chunks", [False, True])
def test_an_adapted_module_that_runs_early_lets_every_block_run_for_every_draw(
    tokenizer, records, caplog, chunks
):
    class Early(nn.Module):
        """The embeddings, which a layer that stands in the last block changes at once."""

        def __init__(self, embeddings: nn.Module, block: nn.Module) -> None:
            super().__init__()
            self.embeddings, self.block = embeddings, (block,)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.block[0].extra(self.embeddings(ids))

    llm = tiny_llama(num_hidden_layers=BLOCKS)
    llm.model.layers[-1].extra = nn.Linear(16, 16)
    llm.model.embed_tokens = Early(llm.model.embed_tokens, llm.model.layers[-1])
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    adapter = SubspaceAdapter(llm, lora("extra"), readout)
    fill_lora_B(adapter)
    assert adapter.trunk.depth == BLOCKS - 1
    batch, s = whole(readout.encode(records)), torch.randn(3, *adapter.shape)
    expected = full_path(adapter, batch, s).detach()
    logits = Predictor(adapter, s, max_rows=1).logits(batch) if chunks else adapter(batch, s)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    assert "before the blocks below it: every block runs for every draw" in caplog.text
    with pytest.raises(ValueError, match="before the blocks below it"):
        adapter.cache_trunk(readout.encode(records))


def test_a_real_llama_shares_and_caches_its_trunk(shared):
    folder = shared / "models" / "stories260k"
    readout = LabelTokens(
        AutoTokenizer.from_pretrained(folder), PROMPTS["letters"], "ABCD", max_length=512
    )
    config = lora("q_proj", "v_proj", layers_to_transform=[3, 4])
    adapter = SubspaceAdapter(AutoModelForCausalLM.from_pretrained(folder), config, readout)
    fill_lora_B(adapter)
    assert adapter.trunk.depth == 3
    split = readout.encode(make_records(6))
    s = torch.randn(4, *adapter.shape)
    expected = full_path(adapter, whole(split), s)
    torch.testing.assert_close(adapter(whole(split), s), expected, atol=1e-5, rtol=1e-6)
    cached = whole(adapter.cache_trunk(split))
    torch.testing.assert_close(adapter(cached, s), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("options", [{"perp": 2}, {"projections": "unit"}], ids=str)
def test_the_first_pass_may_be_that_which_caches_the_trunk(make_causal, records, options):
    from conftest import longer_and_longer

    adapter = make_causal(targets=("lm_head",), **options)
    split = adapter.encode(longer_and_longer(records))
    cached = adapter.cache_trunk(split)
    s = torch.randn(3, *adapter.shape)
    torch.testing.assert_close(adapter(whole(cached), s), adapter(whole(split), s))
