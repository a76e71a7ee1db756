"""The likelihood of choices, against loops over plain transformers that share no code with it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pyro
import pytest
import torch
from conftest import fill_lora_B, lora, make_records, scalabl, tiny_llama, whole, write_jsonl
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from scalabl_pyro import (
    AutoSubspaceNormal,
    FitConfig,
    Predictor,
    Record,
    ScalaBLModel,
    SubspaceAdapter,
    distill,
    evaluate,
    fit,
    load_run,
    predict,
)
from scalabl_pyro.data import PROMPTS, DataError, read_records
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.jacobian import jacobian
from scalabl_pyro.lora.loading import load_readout, make_adapter
from scalabl_pyro.methods import MLE, LaplaceLoRA
from scalabl_pyro.readouts import ChoiceLikelihood
from scalabl_pyro.readouts.kappa import fit_kappa
from scalabl_pyro.runs.exports import export
from scalabl_pyro.runs.memory import MemoryConfig, estimate

RECORDS = [
    Record("a", "the cat", ("runs", "sings the red tree"), 0),
    Record("b", "a bird sings in the red tree", ("blue", "green dog", "the dog sleeps"), 2),
    Record("c", "dog", ("a", "red", "blue blue", "sings a tree ."), 1),
    Record("d", "a blue bird sleeps and a dog", ("runs runs runs", "green"), 1),
]
SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
HEADS = dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    sizes = dict(vocab_size=32, n_positions=64, n_embd=16, n_layer=4, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0)).eval()


def tiny(cls, config) -> torch.nn.Module:
    torch.manual_seed(1)
    return cls(config).eval()


LLMS = {
    "llama": (partial(tiny_llama, num_hidden_layers=4), ("q_proj", "v_proj", "lm_head")),
    "llama eager": (
        partial(tiny_llama, num_hidden_layers=4, attn_implementation="eager"),
        ("q_proj", "v_proj", "lm_head"),
    ),
    "gpt2": (tiny_gpt2, ("lm_head",)),
    # A cap behind the output layer, and one in the attention, of layers that slide by turns.
    "gemma2": (
        lambda: tiny(
            Gemma2ForCausalLM,
            Gemma2Config(**SIZES, **HEADS, head_dim=8, final_logit_softcapping=0.5, pad_token_id=0),
        ),
        ("q_proj", "lm_head"),
    ),
}
WITHOUT_MASK = {
    "mistral": lambda: tiny(
        MistralForCausalLM, MistralConfig(**SIZES, **HEADS, sliding_window=4, pad_token_id=0)
    ),
    "bloom": lambda: tiny(
        BloomForCausalLM, BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2)
    ),
    "mamba": lambda: tiny(
        FalconMambaForCausalLM,
        FalconMambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4),
    ),
}


def make(tokenizer, kind="llama", *, prompt="question", filled=True, readout=(), **options):
    build, targets = LLMS[kind]
    read = ChoiceLikelihood(
        tokenizer, PROMPTS[prompt], num_classes=4, max_length=64, **dict(readout)
    )
    adapter = SubspaceAdapter(build(), lora(*targets), read, **options)
    if filled:
        fill_lora_B(adapter)
    return adapter


@pytest.fixture(params=list(LLMS))
def adapter(request, tokenizer):
    return make(tokenizer, request.param)


@torch.no_grad()
def by_hand(llm, tokenizer, prompt: str, answer: str) -> float:
    """log p(answer | prompt): the whole text alone, then a cross entropy over its end."""
    ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
    count = ids.shape[1] - len(tokenizer(prompt).input_ids)
    logits = llm(ids).logits[0].float()
    return -float(cross_entropy(logits[-count - 1 : -1], ids[0, -count:], reduction="sum"))


def scores_by_hand(llm, tokenizer, records, size=len, classes=4) -> torch.Tensor:
    rows = [
        [
            by_hand(llm, tokenizer, f"Question: {r.question}\nAnswer:", f" {choice}") / size(choice)
            for choice in r.choices
        ]
        + [float("-inf")] * (classes - len(r.choices))
        for r in records
    ]
    return torch.tensor(rows)


# ---------------------------------------------------------------------- the scores


@pytest.mark.parametrize(
    ("normalise", "size"),
    [("characters", len), ("tokens", lambda text: len(text.split())), ("none", lambda text: 1)],
)
def test_scores_are_those_of_a_loop_over_plain_transformers(tokenizer, normalise, size):
    for kind in LLMS:
        adapter = make(tokenizer, kind, readout={"normalise": normalise})
        s = torch.randn(adapter.shape)
        scores = adapter(whole(adapter.readout.encode(RECORDS)), s).detach()
        with adapter.folded(s) as llm:
            expected = scores_by_hand(llm, tokenizer, RECORDS, size)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_what_a_choice_has_without_the_prompt_is_taken_away(tokenizer):
    """Equal to a loop; a row of s for each example, and C backward passes, see both rows."""
    first = tokenizer.pad_token_id  # it has no other special token
    for kind in LLMS:
        adapter = make(tokenizer, kind, readout={"normalise": "unconditional"})
        batch = whole(adapter.readout.encode(RECORDS))
        s = torch.randn(3, *adapter.shape)
        logits = adapter(batch, s).detach()
        for one, scores in zip(s, logits, strict=True):
            with adapter.folded(one) as llm:
                given = scores_by_hand(llm, tokenizer, RECORDS, lambda choice: 1)
                alone = torch.tensor(
                    [
                        [behind_first(llm, tokenizer, f" {c}", first) for c in r.choices]
                        + [0.0] * (4 - len(r.choices))
                        for r in RECORDS
                    ]
                )
            torch.testing.assert_close(scores, given - alone, atol=2e-5, rtol=1e-5)
        each, J = jacobian(adapter, batch, s[0])
        torch.testing.assert_close(each, logits[0], atol=1e-5, rtol=1e-5)
        step = 1e-2 * torch.randn(adapter.shape)
        ends = [adapter(batch, s[0] + sign * step) for sign in (1, -1)]
        slope, seen = (ends[0] - ends[1]) / 2, batch.choices
        close = dict(atol=2e-5, rtol=1e-2)
        torch.testing.assert_close((J * step).sum((-1, -2))[seen], slope[seen].detach(), **close)


@pytest.mark.parametrize("special", [("bos", "eos"), ("eos",)])
def test_a_choice_alone_stands_behind_the_token_that_begins_a_text(tokenizer, special):
    tokenizer.add_special_tokens({f"{name}_token": f"<{name}>" for name in special})
    first = tokenizer.convert_tokens_to_ids(f"<{special[0]}>")
    readout = {"normalise": "unconditional", "temperature": "none"}
    adapter = make(tokenizer, filled=False, readout=readout)
    scores = adapter(whole(adapter.readout.encode(RECORDS[:1]))).detach()
    llm = LLMS["llama"][0]()
    given = scores_by_hand(llm, tokenizer, RECORDS[:1], lambda choice: 1)
    for c, choice in enumerate(RECORDS[0].choices):
        alone = behind_first(llm, tokenizer, f" {choice}", first)
        assert float(scores[0, c]) == pytest.approx(float(given[0, c]) - alone, abs=2e-5)


@torch.no_grad()
def behind_first(llm, tokenizer, answer: str, first: int) -> float:
    ids = torch.tensor([[first, *tokenizer(answer).input_ids]])
    logits = llm(ids).logits[0].float()
    return -float(cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))


@pytest.mark.parametrize("normalise", ["characters", "unconditional"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_record_may_have_more_choices_than_any_before(tokenizer, packed, normalise):
    adapter = make(tokenizer, readout={"normalise": normalise})
    more = ("runs", "sings", "red", "the blue tree", "green dog", "a", "bird")
    records = [*RECORDS, Record("e", "the dog", more, 6)]
    split = adapter.readout.encode(records)
    adapter.readout.packed &= packed  # what a model that is attached later may change
    few = [whole(adapter.readout.encode(part)) for part in (RECORDS[:2], RECORDS[2:])]
    draws = torch.randn(2, *adapter.shape)
    predictions = predict(Predictor(adapter, draws), split)
    assert predictions.logits.shape == (2, 5, 7)
    expected = torch.cat([adapter(batch, draws) for batch in few], dim=1).detach()
    torch.testing.assert_close(predictions.logits[:, :4, :4], expected, atol=1e-5, rtol=1e-5)
    assert (predictions.logits[:, :4, 4:] == float("-inf")).all()
    # The seven choices as two records, whose scores are those of the whole.
    halves = [Record("f", "the dog", more[:4], 0), Record("g", "the dog", more[4:], 0)]
    parts = adapter(whole(adapter.readout.encode(halves)), draws).detach()
    torch.testing.assert_close(
        predictions.logits[:, 4], torch.cat([parts[:, 0], parts[:, 1, :3]], -1), atol=1e-5, rtol=0
    )
    assert 0 < evaluate(predictions.logits, predictions.labels)["nll"] < 10


def test_packed_rows_equal_separate_rows(adapter):
    split = adapter.readout.encode(RECORDS)
    packed = whole(split)
    assert packed.inputs["input_ids"].dim() == 2
    s = torch.randn(3, *adapter.shape)
    logits = adapter(packed, s)
    adapter.readout.packed = False
    separate = whole(split)
    assert separate.inputs["input_ids"].dim() == 3
    torch.testing.assert_close(logits, adapter(separate, s), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="collate it again"):
        adapter(packed, s)


def test_the_output_layer_sees_the_columns_of_the_choices_only(adapter):
    seen = []
    llm = adapter.peft_model.get_base_model()
    llm.get_output_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0]))
    batch = whole(adapter.readout.encode(RECORDS))
    adapter(batch, adapter.init_loc)
    longest = max(sum(len(c.split()) for c in record.choices) for record in RECORDS)
    assert [x.shape[:2] for x in seen] == [(len(RECORDS), longest)]
    assert seen[0].is_contiguous()


@pytest.mark.parametrize("kind", WITHOUT_MASK)
def test_models_without_such_a_mask_read_a_row_for_each_choice(tokenizer, kind, caplog):
    llm = WITHOUT_MASK[kind]()
    readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
    expected = scores_by_hand(llm, tokenizer, RECORDS)
    targets = {"mistral": "q_proj", "bloom": "query_key_value", "mamba": "x_proj"}[kind]
    split = readout.encode(RECORDS)  # before the model is seen
    with caplog.at_level("INFO", logger="scalabl_pyro"):
        adapter = SubspaceAdapter(llm, lora(targets), readout)
    assert f"{type(llm).__name__} reads a row for each choice" in caplog.text
    scores = adapter(whole(split), adapter.init_loc).detach()
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_ignores_the_mask_is_found_out_by_what_it_computes(tokenizer, monkeypatch):
    """As one that hands blocks a mask of its own making."""
    plain = type(tiny_llama().model).forward

    def forward(self, *args, attention_mask=None, **kwargs):
        return plain(self, *args, attention_mask=None, **kwargs)

    monkeypatch.setattr(type(tiny_llama().model), "forward", forward)
    assert not make(tokenizer).readout.packed


@pytest.mark.parametrize("window", [63, 64])
def test_a_window_that_holds_the_context_lets_rows_be_packed(tokenizer, window):
    config = MistralConfig(**SIZES, **HEADS, sliding_window=window, pad_token_id=0)
    readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
    SubspaceAdapter(tiny(MistralForCausalLM, config), lora("q_proj"), readout)
    assert readout.packed == (window == 64)


def test_a_gap_is_filled_and_the_text_behind_it_scored(tokenizer):
    """Also where the text begins with the gap, so that the choices share no prompt; and where some
    choices share more of it than others."""
    records = [
        Record("a", "the cat sleeps and the _ sings in a tree", ("bird", "red dog"), 0),
        Record("b", "_ runs", ("the dog", "a"), 1),
        Record("c", "a _ sleeps", ("red dog", "red bird", "blue dog"), 1),
    ]
    for packed in (True, False):
        adapter = make(tokenizer, prompt="gap")
        adapter.readout.packed = packed
        scores = adapter(whole(adapter.readout.encode(records)), adapter.init_loc).detach()
        with adapter.folded(adapter.init_loc) as llm:
            for n, record in enumerate(records):
                before, after = record.question.split("_")
                for c, choice in enumerate(record.choices):
                    score = by_hand(llm, tokenizer, before + choice, after) / len(after.strip())
                    assert float(scores[n, c]) == pytest.approx(score, abs=1e-5)
    with pytest.raises(DataError, match=r"record 'x' is 'the cat': expected one '_'"):
        adapter.readout.encode([Record("x", "the cat", ("a", "red"))])


def test_a_class_name_of_three_tokens(tokenizer):
    """Which label tokens refuse."""
    classes = ("red", "the dog sleeps", "blue")
    records = [Record(str(n), f"a cat {text}", classes, n) for n, text in enumerate(classes)]
    adapter = make(tokenizer, prompt="classes")
    scores = adapter(whole(adapter.readout.encode(records)), adapter.init_loc).detach()
    with adapter.folded(adapter.init_loc) as llm:
        score = by_hand(llm, tokenizer, "a cat blue\nAnswer:", " the dog sleeps")
    assert float(scores[2, 1]) == pytest.approx(score / len("the dog sleeps"), abs=1e-5)


def test_what_is_too_long_is_refused_or_loses_the_start_of_its_prompt(tokenizer):
    record = Record("long", "cat " * 20 + "dog dog dog", ("red red red", "blue"), 0)
    short = Record("short", "dog dog dog", ("red red red", "blue"), 0)
    options = dict(num_classes=2, max_length=8)
    with pytest.raises(DataError, match="exceed the context of 8 tokens"):
        ChoiceLikelihood(tokenizer, PROMPTS["classes"], **options).encode([record])
    readout = ChoiceLikelihood(tokenizer, PROMPTS["classes"], truncate=True, **options)
    cut, whole_rows = (readout.encode([each])[0].rows for each in (record, short))
    assert cut == whole_rows
    with pytest.raises(DataError, match="leaves no room for it in the context of 8"):
        readout.encode([replace(record, choices=("red " * 8, "blue"))])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalise": "words"}, "normalise is 'words': expected one of"),
        ({"temperature": "fixed"}, "temperature is 'fixed': expected one of"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_settings_that_do_not_exist_are_refused(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, readout=settings)


def test_a_chat_template_leads_to_the_choice(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}cat {{ m.content }} dog{% endfor %}"
        "{% if add_generation_prompt %} bird{% endif %}"
    )
    adapter = make(tokenizer, prompt="classes", readout={"chat": True})
    record = RECORDS[0]
    scores = adapter(whole(adapter.readout.encode([record])), adapter.init_loc).detach()
    with adapter.folded(adapter.init_loc) as llm:
        score = by_hand(llm, tokenizer, "cat the cat\nAnswer: dog bird", " runs")
    assert float(scores[0, 0]) == pytest.approx(score / 4, abs=1e-5)


# ---------------------------------------------------------------------- as other readouts


def test_draws_at_once_equal_a_loop_over_draws(adapter):
    batch = whole(adapter.readout.encode(RECORDS))
    s = torch.randn(2, 3, *adapter.shape)
    logits = adapter(batch, s)
    assert logits.shape == (2, 3, 4, 4)
    for i, j in ((0, 0), (0, 2), (1, 1)):
        torch.testing.assert_close(logits[i, j], adapter(batch, s[i, j]), atol=1e-5, rtol=1e-5)


def upper(adapter_of, **options):
    """An adapter on the upper two of four blocks."""
    config = lora("q_proj", "v_proj", layers_to_transform=[2, 3])
    adapter = SubspaceAdapter(tiny_llama(num_hidden_layers=4), config, adapter_of, **options)
    fill_lora_B(adapter)
    return adapter


@pytest.mark.parametrize("packed", [True, False])
def test_a_shared_and_a_cached_trunk_change_nothing(tokenizer, packed):
    readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
    readout.packed = packed
    shared, plain = upper(readout), upper(readout, share_trunk=False)
    split = readout.encode(RECORDS)
    s = torch.randn(3, *shared.shape)
    expected = plain(whole(split), s)
    assert shared.trunk.depth == 2
    torch.testing.assert_close(shared(whole(split), s), expected, atol=1e-5, rtol=1e-5)
    cached = whole(shared.cache_trunk(split, batch_size=3))
    torch.testing.assert_close(shared(cached, s), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.cat([shared.above_trunk(whole(split), s)(s[:1]), shared(cached, s[1:])]),
        expected,
        atol=1e-5,
        rtol=1e-5,
    )


def test_checkpointed_gradients_equal_plain_ones(tokenizer):
    gradients = []
    for checkpointing in (False, True):
        adapter = make(tokenizer, gradient_checkpointing=checkpointing)
        adapter.train()
        s = torch.linspace(0.5, 1.5, 2 * adapter.init_loc.numel()).view(2, *adapter.shape)
        s.requires_grad_()
        batch = whole(adapter.readout.encode(RECORDS))
        adapter(batch, s).log_softmax(-1)[..., 0].sum().backward()
        gradients.append([s.grad, *(p.grad for p in adapter.named_parameters().values())])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_pyro_predictive_gives_the_same_logits(tokenizer):
    adapter = make(tokenizer)
    split = adapter.readout.encode(RECORDS)
    batch = replace(whole(split), labels=None)
    model = ScalaBLModel(adapter, num_data=len(split))
    s = torch.randn(5, *adapter.shape)
    predictive = pyro.infer.Predictive(model, {"s": s}, return_sites=["_RETURN"])
    with torch.no_grad():
        logits = predictive(batch)["_RETURN"]
    expected = Predictor(adapter, s).logits(batch)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_kronecker_factors_of_its_gradients_are_found(tokenizer, records):
    readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
    method = LaplaceLoRA(FitConfig(steps=2, batch_size=4), progress=False)
    split = readout.encode(records)
    fitted = method.fit(
        lambda **form: SubspaceAdapter(tiny_llama(), lora("q_proj", "lm_head"), readout, **form),
        split,
        split,
        seed=0,
    )
    assert predict(fitted.predictor, split).logits.isfinite().all()


# ---------------------------------------------------------------------- κ


def test_kappa_is_trained_with_the_projections_and_belongs_to_its_adapter(tokenizer, records):
    readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
    build = partial(SubspaceAdapter, lora=lora("q_proj"), readout=readout)
    first, second = build(tiny_llama()), build(tiny_llama())
    name = "readout.log_kappa"
    assert set(first.state()) - set(first.matrices.linears) == {name}
    assert first.peft_model.get_base_model().dtype == torch.float32
    split = readout.encode(records)
    model = ScalaBLModel(first, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    svi.step(whole(split))
    assert abs(float(first.named_parameters()[name].detach())) == pytest.approx(0.1, rel=1e-3)
    fit(model, guide, split, FitConfig(steps=2, lr=0.1), progress=False)
    assert float(second.state()[name].detach()) == 0.0
    logits = second(whole(split)).detach()
    second.readout_parameters["log_kappa"].data.fill_(1.0)
    torch.testing.assert_close(second(whole(split)).detach(), logits * torch.tensor(1.0).exp())


def test_kappa_moves_at_the_rate_of_the_guide_and_does_not_decay(tokenizer, records):
    readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
    adapter = SubspaceAdapter(tiny_llama(), lora("q_proj"), readout)
    split = readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    adapter.readout_parameters["log_kappa"].data.fill_(1.0)
    config = FitConfig(steps=1, lr=0.0, lr_guide=0.03, weight_decay=0.5, warmup=0.0)
    fit(model, AutoSubspaceNormal(model), split, config, progress=False)
    # Adam's first step is its learning rate, whatever the gradient.
    moved = float(adapter.readout_parameters["log_kappa"].detach()) - 1.0
    assert abs(moved) == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize(
    ("projections", "trained"),
    [("free", True), ("frozen_v", True), ("unit", True), ("fixed", False)],
)
def test_which_projections_train_kappa(tokenizer, projections, trained):
    adapter = make(tokenizer, filled=False, projections=projections)
    assert ("readout.log_kappa" in adapter.named_parameters()) == trained
    assert "readout.log_kappa" in adapter.state()


def test_bfloat16_models_stay_what_they_are(tokenizer):
    readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
    adapter = SubspaceAdapter(tiny_llama().bfloat16(), lora("q_proj"), readout)
    llm = adapter.peft_model.get_base_model()
    assert llm.dtype == torch.bfloat16
    assert adapter.readout_parameters["log_kappa"].dtype == torch.float32
    logits = adapter(whole(readout.encode(RECORDS)), adapter.init_loc)
    assert logits.dtype == torch.float32


def test_without_a_temperature_kappa_is_one_and_nothing_is_added(tokenizer, records):
    adapter = make(tokenizer, readout={"temperature": "none"})
    assert set(adapter.state()) == set(adapter.matrices.linears)
    adapter.start_readout(adapter.readout.encode(records))
    assert float(adapter.readout.kappa(adapter.peft_model.get_base_model())) == 1.0


def test_fit_kappa_finds_the_best_of_a_fine_grid():
    scores = torch.randn(60, 4)
    labels = torch.distributions.Categorical(logits=2.5 * scores).sample()
    missing = (torch.arange(4) == 3) & (torch.arange(60)[:, None] % 3 == 0) & (labels != 3)[:, None]
    scores = scores.masked_fill(missing, float("-inf"))
    grid = torch.linspace(0.05, 10, 2000)
    nll = torch.stack([cross_entropy(k * scores, labels) for k in grid])
    assert fit_kappa(scores, labels) == pytest.approx(float(grid[nll.argmin()]), abs=0.01)


def test_fit_kappa_stays_where_a_gradient_can_pass():
    scores = torch.randn(200, 4)
    wrong = scores.argmin(-1)
    assert 0.05 < fit_kappa(scores, wrong) < 0.2  # whatever is said, the opposite is right
    assert 50 < fit_kappa(scores, scores.argmax(-1)) < 200  # the sharper, the better
    assert fit_kappa(torch.zeros(3, 4), torch.tensor([0, 1, 2])) == 1.0


def test_training_starts_at_the_best_kappa_of_the_untrained_model(tokenizer):
    """Of 450 examples on every third, at most 200; the labels of the others say nothing."""
    records = make_records(450, choices=2)
    scores = scores_by_hand(tiny_llama(), tokenizer, records[::3])
    labels = torch.randint(2, (450,))
    labels[::3] = torch.distributions.Categorical(logits=4 * scores).sample()
    readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
    split = readout.encode(
        [replace(r, label=label) for r, label in zip(records, labels.tolist(), strict=True)]
    )
    starts = []

    def build(**form):
        adapter = SubspaceAdapter(tiny_llama(), lora("q_proj"), readout, **form)
        starts.append(adapter)
        return adapter

    MLE(FitConfig(steps=1, lr=0.0, lr_guide=0.0), progress=False).fit(build, split, None, seed=0)
    best = minimize_scalar(
        lambda k: float(cross_entropy(k * scores.double(), labels[::3])), bounds=(0.1, 100)
    )
    kappa = readout.kappa(starts[0].peft_model.get_base_model())
    assert 1 < best.x < 50
    assert float(kappa.detach()) == pytest.approx(best.x, rel=1e-3)


# ---------------------------------------------------------------------- runs


@pytest.fixture
def run_folder(tmp_path, local_model):
    for name, count in (("train", 16), ("validation", 7), ("test", 6)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    words = [
        f"model.name={local_model}",
        "model.readout=choice_likelihood",
        "model.normalise=tokens",
        f"data.root={tmp_path / 'data'}",
        "lora.targets=[q_proj,v_proj]",
        f"run_dir={tmp_path / 'run'}",
        "fit.steps=3",
        "fit.batch_size=4",
        "fit.lr=0.05",
        "progress=false",
    ]
    assert scalabl("train", *words) == 0
    return tmp_path / "run"


def test_a_run_loaded_again_gives_the_logits_that_it_gave(run_folder):
    run = load_run(run_folder)
    readout = run.readout
    assert (readout.normalise, run.config.model.prompt) == ("tokens", "question")
    saved = load_file(run_folder / "predictions.safetensors")["test.logits"]
    logits = predict(run.predictor, run.encode(make_records(6))).logits
    torch.testing.assert_close(logits, saved, atol=1e-5, rtol=1e-5)
    log_kappa = load_file(run_folder / "projections.safetensors")["readout.log_kappa"]
    assert float(log_kappa) != 0.0
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert evaluate(logits, torch.tensor([r.label for r in make_records(6)]))[
        "nll"
    ] == pytest.approx(metrics["test"]["nll"], abs=1e-4)


def test_an_export_says_how_to_score(run_folder, tmp_path):
    run = load_run(run_folder)
    manifest = export(run, tmp_path / "export", draws=1)
    kappa = run.readout.kappa(run.predictor.adapter.peft_model.get_base_model())
    assert manifest["choice_likelihood"] == {
        "kappa": pytest.approx(float(kappa.detach())),
        "normalise": "tokens",
    }
    assert manifest["prompt"] == {
        "template": "Question: {question}\nAnswer:",
        "letters": False,
        "gap": False,
        "chat": False,
        "add_special_tokens": True,
        "shots": [],
    }
    assert "log p(choice" in (tmp_path / "export" / "README.md").read_text()


def test_a_run_is_distilled_at_its_own_kappa(run_folder, tmp_path):
    write_jsonl(tmp_path / "more.jsonl", make_records(5, labelled=False))
    words = [f"run={run_folder}", f"input={tmp_path / 'more.jsonl'}", f"output={tmp_path / 'one'}"]
    still = ("fit.lr=0", "fit.lr_guide=0")
    assert scalabl("distill", *words, "fit.steps=1", *still, "progress=false") == 0
    about = json.loads((tmp_path / "one" / "distilled.json").read_text())
    run = load_run(run_folder)
    kappa = run.readout.kappa(run.predictor.adapter.peft_model.get_base_model())
    assert about["kappa"] == pytest.approx(float(kappa.detach()), rel=1e-5)
    assert about["kl_before"] == pytest.approx(about["kl_after"], abs=1e-6)
    assert about["kl_before"] < 0.05  # draws differ from their mean, and in nothing else


def test_an_adapter_is_distilled(tokenizer, records):
    teacher = make(tokenizer)
    split = teacher.readout.encode(records)
    log_probs = predict(Predictor(teacher, torch.randn(3, *teacher.shape)), split).logits
    log_probs = log_probs.log_softmax(-1).mean(0)
    student = make(tokenizer, filled=False, svd=False)
    _, result = distill(student, split, log_probs, FitConfig(steps=3, lr=0.05), progress=False)
    assert len(result.history) == 3


def test_texts_with_class_names_of_several_tokens_train_and_predict(tmp_path, local_model):
    names = ("red tree", "the dog sleeps")
    rows = [f"the cat runs {i % 7} times,{names[i % 2]}" for i in range(24)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,class", *rows]) + "\n")
    words = [
        f"model.name={local_model}",
        "model.readout=choice_likelihood",
        "model.prompt=classes",
        f"data.path={tmp_path / 'texts.csv'}",
        "lora.targets=[q_proj]",
        f"run_dir={tmp_path / 'run'}",
        "fit.steps=2",
        "fit.batch_size=4",
        "method=mle",
        "progress=false",
    ]
    assert scalabl("train", *words) == 0
    run = load_run(tmp_path / "run")
    assert run.class_names == names
    probabilities = run.predict_proba(["the cat runs", "a dog"])
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2))


def test_a_gap_is_no_prompt_for_label_tokens():
    with pytest.raises(ValueError, match="readout=choice_likelihood, which puts"):
        ModelConfig("x", prompt="gap")


def test_memory_is_estimated(local_model):
    config = MemoryConfig(
        ModelConfig(str(local_model), readout="choice_likelihood"),
        AdapterConfig(targets=("q_proj",)),
        "frozen_v",
        batch_size=4,
        eval_batch_size=4,
        tokens=32,
        classes=4,
    )
    memory = estimate(config)
    assert memory.training > memory.weights > 0
    assert memory.activations > 0


# ---------------------------------------------------------------------- a real model


@pytest.mark.slow
def test_a_real_model_scores_as_a_loop_over_plain_transformers(shared, smollm2):
    records = read_records(shared / "data" / "arc_easy" / "test.jsonl")[:50]
    config = ModelConfig(str(smollm2), readout="choice_likelihood", dtype="float32")
    readout = load_readout(config, config.classes(records))
    lora_config = AdapterConfig(targets=("q_proj", "v_proj"), layers=(28, 29))
    adapter = make_adapter(config, lora_config, readout, svd=True)
    assert readout.packed
    scores = predict(Predictor(adapter), readout.encode(records), batch_size=10).logits[0]
    llm = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    expected = scores_by_hand(llm, tokenizer, records, classes=readout.num_classes)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    right = torch.tensor([record.label for record in records])
    assert 0.3 < float((scores.argmax(-1) == right).float().mean()) < 0.8
