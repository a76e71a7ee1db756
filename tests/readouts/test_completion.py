from __future__ import annotations

import json

import pyro
import pytest
import torch
from conftest import fill_lora_B, lora, make_records, tiny_llama, whole
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from scalabl_pyro import (
    AutoSubspaceNormal,
    FitConfig,
    Record,
    ScalaBLModel,
    SubspaceAdapter,
    fit,
)
from scalabl_pyro.data import Completion, DataError, read_completions
from scalabl_pyro.readouts.completion_tokens import CompletionTokens

TEXTS = [
    Completion("a", "the cat", " runs"),
    Completion("b", "a bird sings the red", " tree runs a dog"),
    Completion("c", "green", " blue blue"),
    Completion("d", "the dog sleeps . the cat", " sings"),
]


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    sizes = dict(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0)).eval()


@pytest.fixture(params=["llama", "gpt2"])
def adapter(request, tokenizer):
    readout = CompletionTokens(tokenizer, num_classes=32, max_length=64, end_token=False)
    if request.param == "llama":
        llm, targets = tiny_llama(), ("q_proj", "v_proj", "lm_head")
    else:
        llm, targets = tiny_gpt2(), ("lm_head",)
    adapter = SubspaceAdapter(llm, lora(*targets), readout, projections="free")
    fill_lora_B(adapter)
    return adapter


def by_hand(adapter, s, text):
    """−log p(completion | prompt, s): the whole text alone, then a cross entropy over its end."""
    ids = adapter.readout.tokenizer(text.prompt + text.completion, return_tensors="pt").input_ids
    count = len(text.completion.split())
    with adapter.bound(s[None]) as llm, torch.no_grad():
        logits = llm(ids).logits[0]
    return cross_entropy(logits[-count - 1 : -1], ids[0, -count:], reduction="sum")


def test_the_likelihood_is_the_cross_entropy_of_the_answer_tokens(adapter):
    split = adapter.readout.encode(TEXTS)
    model = ScalaBLModel(adapter, num_data=len(split))
    s = torch.randn(adapter.shape)
    trace = pyro.poutine.trace(pyro.condition(model, {"s": s})).get_trace(whole(split))
    trace.compute_log_prob()
    expected = torch.stack([by_hand(adapter, s, text) for text in TEXTS])
    torch.testing.assert_close(
        -trace.nodes["label"]["unscaled_log_prob"].detach(), expected, atol=1e-4, rtol=1e-5
    )


def test_many_draws_at_once_equal_the_loop(adapter):
    batch = whole(adapter.readout.encode(TEXTS))
    draws = torch.randn(2, 3, *adapter.shape)
    logits = adapter(batch, draws)  # (2, 3, B, K, vocabulary)
    for i, j in ((0, 0), (1, 2)):
        torch.testing.assert_close(logits[i, j], adapter(batch, draws[i, j]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vectorized", [False, True])
def test_the_loss_is_the_negative_elbo_also_for_one_text(adapter, vectorized):
    """At a posterior without width the ELBO is known: −KL − Σ_n cross entropy."""
    for texts in (TEXTS, TEXTS[:1]):
        split = adapter.readout.encode(texts)
        model = ScalaBLModel(adapter, num_data=len(split))
        guide = AutoSubspaceNormal(model, init_scale=1e-6)
        elbo = TraceMeanField_ELBO(2, max_plate_nesting=1, vectorize_particles=vectorized)
        q, p = guide.get_posterior(), model.prior()
        expected = sum(by_hand(adapter, adapter.init_loc, text) for text in texts)
        expected = expected + torch.distributions.kl_divergence(q, p).detach()
        loss = elbo.loss(model, guide, whole(split))
        assert loss == pytest.approx(float(expected), rel=1e-4)


def test_one_token_of_a_completion_is_what_label_tokens_read(make_causal):
    adapter = make_causal()
    labels, records = adapter.readout, make_records(6)
    s = torch.randn(3, *adapter.shape)
    texts = [
        Completion(r.id, labels.prompt.render(r), f" {labels.label_words[r.label]}")
        for r in records
    ]
    by_label = adapter(whole(labels.encode(records)), s).detach()  # (S, B, 4)
    adapter.readout = CompletionTokens(
        labels.tokenizer, num_classes=32, max_length=64, end_token=False
    )
    batch = whole(adapter.readout.encode(texts))
    by_token = adapter(batch, s).detach()  # (S, B, 1, vocabulary)
    assert by_token.shape == (3, 6, 1, 32)
    torch.testing.assert_close(by_token[:, :, 0, labels.label_ids], by_label, atol=1e-5, rtol=1e-5)
    right = labels.label_ids[torch.tensor([r.label for r in records])]
    assert torch.equal(batch.labels, right[:, None])


def test_fit_lowers_the_loss_and_records_nats_a_completion(adapter):
    split = adapter.readout.encode(TEXTS)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    before = sum(by_hand(adapter, adapter.init_loc, text) for text in TEXTS) / len(TEXTS)
    config = FitConfig(steps=60, batch_size=4, lr=1e-2)
    history = fit(model, guide, split, config, progress=False).history
    assert history[0]["nll"] == pytest.approx(float(before), rel=0.3)
    assert history[-1]["nll"] < 0.5 * history[0]["nll"]
    after = sum(by_hand(adapter, guide.median()["s"], text) for text in TEXTS) / len(TEXTS)
    assert float(after) == pytest.approx(history[-1]["nll"], rel=0.3)


def test_stock_svi_steps_it_too(adapter):
    split = adapter.readout.encode(TEXTS)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(whole(split)) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_a_completion_ends_with_the_end_token_if_asked_to(tokenizer):
    tokenizer.eos_token = "."
    readout = CompletionTokens(tokenizer, num_classes=32, max_length=64)
    batch = whole(readout.encode(TEXTS[:2]))
    dot, runs = tokenizer.convert_tokens_to_ids([".", "runs"])
    assert batch.labels[0].tolist() == [-100, -100, -100, runs, dot]
    assert batch.labels[1, -1] == dot


def test_a_question_becomes_a_text_with_its_right_choice():
    record = Record("q", "Which runs?", ("the tree", "the cat"), 1)
    expected = Completion("q", "Which runs?\nAnswer:", " the cat")
    assert Completion.of(record) == expected


def test_a_prompt_that_is_too_long_is_refused_or_cut_but_its_completion_never_is(tokenizer):
    text = Completion("q", "the " * 70 + "cat", " runs a")
    with pytest.raises(DataError, match="1 of 1 prompts exceed the context of 64 tokens"):
        CompletionTokens(tokenizer, num_classes=32, max_length=64, end_token=False).encode([text])
    cut = CompletionTokens(tokenizer, num_classes=32, max_length=64, end_token=False, truncate=True)
    batch = whole(cut.encode([text]))
    assert batch.inputs["input_ids"].shape == (1, 64)
    assert batch.labels[0].tolist() == tokenizer("runs a").input_ids
    fits = cut.encode([Completion("q", "the dog", " cat" * 63)])[0].rows
    assert fits["input_ids"][0] == tokenizer("dog" + " cat" * 63).input_ids
    for count in (64, 70):  # one of 64 leaves no token of the prompt
        with pytest.raises(DataError, match=f"{count} tokens and leaves no room for a prompt"):
            cut.encode([Completion("q", "the", " cat" * count)])


def test_bad_completions_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="prompt is ' '"):
        Completion("q", " ", "a")
    with pytest.raises(DataError, match="completion is ''"):
        Completion("q", "a", "")
    with pytest.raises(ValueError, match="no end token: set one, or pass end_token=False"):
        CompletionTokens(tokenizer, num_classes=32, max_length=64)
    readout = CompletionTokens(tokenizer, num_classes=32, max_length=64, end_token=False)
    with pytest.raises(DataError, match="'q' has no completion"):
        readout.encode([Completion("q", "the cat")])


def test_completions_are_read_from_json_lines(tmp_path):
    path = tmp_path / "texts.jsonl"

    def written(*rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    rows = {"prompt": "the", "completion": " cat"}, {"id": "x", "prompt": "a"}
    assert read_completions(written(*rows)) == [
        Completion("1", "the", " cat"),
        Completion("x", "a"),
    ]
    extra = {"id": 7, "prompt": "a", "source": "x"}
    assert read_completions(written(rows[0], extra))[1] == Completion("7", "a")
    with pytest.raises(DataError, match=r"line 2: .*columns.prompt.*; found \['id', 'promt'\]"):
        read_completions(written(rows[0], {"id": "x", "promt": "a"}))
    with pytest.raises(DataError, match=r"texts.jsonl, line 2: record 'x' has no completion"):
        read_completions(written(*rows), known=True)
    question = {"id": "q", "question": "the?", "choices": ["cat", "dog"]}
    with pytest.raises(DataError, match="record 'q' is a question with choices"):
        read_completions(written(rows[0], question))
    with pytest.raises(DataError, match="line 2: the id '1' occurs twice"):
        read_completions(written(rows[0], rows[1] | {"id": "1"}))
    with pytest.raises(DataError, match="line 1: prompt is ''"):
        read_completions(written({"prompt": ""}))
    with pytest.raises(DataError, match="holds no records"):
        read_completions(written())
    with pytest.raises(DataError, match="no such file"):
        read_completions(tmp_path / "none.jsonl")
