"""Conversations: what is given, what is scored, and what a chat template refuses."""

from __future__ import annotations

import pytest
import torch
from conftest import TURNS, lora, tiny_llama, tokens_of_the_last_turn, whole
from tokenizers import Regex
from tokenizers.normalizers import Replace
from torch.nn.functional import cross_entropy

from scalabl_pyro import Predictor, SubspaceAdapter
from scalabl_pyro.data import Completion, DataError, Message
from scalabl_pyro.prediction import Decoding, evaluate_texts, generate, score, score_split
from scalabl_pyro.readouts import CompletionTokens

ROWS = [{"id": "long", "messages": TURNS}, {"id": "short", "messages": TURNS[:2]}]


@pytest.fixture
def predictor(chat_tokenizer):
    """Three draws that disagree."""
    readout = CompletionTokens(chat_tokenizer, num_classes=32, max_length=64, chat=True)
    adapter = SubspaceAdapter(tiny_llama(), lora("q_proj", "lm_head"), readout)
    for B in adapter.matrices.B.values():
        torch.nn.init.normal_(B.weight)
    return Predictor(adapter, adapter.init_loc + torch.randn(3, *adapter.shape))


@pytest.mark.parametrize("line_breaks", [False, True])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_the_last_turn_of_the_assistant_is_scored_up_to_its_end(chat_tokenizer, row, line_breaks):
    """The template writes a line break behind it, which may have a token of its own."""
    if line_breaks:
        chat_tokenizer.add_tokens("\n")
        assert chat_tokenizer("the\n").input_ids[-1] == len(chat_tokenizer) - 1
    readout = CompletionTokens(chat_tokenizer, num_classes=32, max_length=64, chat=True)
    example = readout.encode([Completion.from_mapping(row)])[0]
    ids, mask = tokens_of_the_last_turn(chat_tokenizer, row["messages"])
    assert example.rows["input_ids"] == [ids]
    assert example.rows["completion_mask"] == [mask]
    scored = [i for i, m in zip(ids, mask, strict=True) if m]
    assert chat_tokenizer.decode(scored).replace(" ", "") == (
        row["messages"][-1]["content"] + "<end>"
    ).replace(" ", "")


def test_metrics_are_those_of_a_loop_over_the_plain_model(predictor):
    """Every draw reads each conversation alone; the average is taken token by token."""
    adapter = predictor.adapter
    split = adapter.readout.encode([Completion.from_mapping(row) for row in ROWS])
    metrics = evaluate_texts(score_split(predictor, split))
    log_average, entropies, information = [], [], []
    for row in ROWS:
        ids, mask = tokens_of_the_last_turn(adapter.readout.tokenizer, row["messages"])
        count = sum(mask)
        each = []
        for s in predictor.draws:
            with adapter.folded(s) as plain, torch.no_grad():
                logits = plain(torch.tensor([ids])).logits[0, -count - 1 : -1]
            each.append(logits.double().softmax(-1))
        each = torch.stack(each)  # (S, T, C)
        mean = each.mean(0)
        log_average.append(mean[range(count), ids[-count:]].log())
        entropies.append(-(mean * mean.log()).sum(-1))
        information.append(entropies[-1] + (each * each.log()).sum(-1).mean(0))
    nll_token = -float(torch.cat(log_average).mean())
    assert metrics["nll_token"] == pytest.approx(nll_token, abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(2.718281828**nll_token, rel=1e-5)
    assert metrics["nll"] == pytest.approx(-float(torch.cat(log_average).sum()) / 2, abs=1e-5)
    assert metrics["entropy"] == pytest.approx(float(torch.cat(entropies).mean()), abs=1e-5)
    assert metrics["mutual_information"] == pytest.approx(
        float(torch.cat(information).mean()), abs=1e-5
    )
    assert metrics["mutual_information"] > 0.01
    assert metrics["tokens"] == (4 + 2) / 2


def test_one_draw_has_no_mutual_information(predictor):
    split = predictor.adapter.readout.encode([Completion.from_mapping(row) for row in ROWS])
    metrics = evaluate_texts(score_split(Predictor(predictor.adapter), split))
    assert metrics["mutual_information"] != metrics["mutual_information"]
    batch = whole(split)
    logits = predictor.adapter(batch).detach().flatten(0, 1)
    loss = cross_entropy(logits, batch.labels.flatten(), ignore_index=-100)
    assert metrics["nll_token"] == pytest.approx(float(loss), abs=1e-5)


def test_the_size_of_a_batch_changes_nothing(predictor, monkeypatch):
    split = predictor.adapter.readout.encode([Completion.from_mapping(row) for row in ROWS * 2])
    together = score_split(predictor, split)
    monkeypatch.setattr("scalabl_pyro.prediction.texts.MOST_LOGITS", 1)
    for a, b in zip(together, score_split(predictor, split), strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.draw_log_probs, b.draw_log_probs, atol=1e-5, rtol=1e-5)


def test_prompts_of_a_chat_model_go_through_its_template(predictor, monkeypatch):
    """A text is the user's message; the ids that the model is given are the template's own."""
    llm = predictor.adapter.peft_model.get_base_model()
    plain, calls = llm.generate, []

    def spy(**options):
        calls.append(options)
        return plain(**options)

    monkeypatch.setattr(llm, "generate", spy)
    tokenizer = predictor.adapter.readout.tokenizer
    prompts = ["a red bird", TURNS[:3]]
    texts = list(generate(predictor, prompts, Decoding(8)))
    rows = calls[0]["input_ids"][:2], calls[0]["attention_mask"][:2]
    for prompt, ids, mask in zip(prompts, *rows, strict=True):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
        assert ids[mask.bool()].tolist() == expected
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert end in calls[0]["generation_config"].eos_token_id
    for text in texts:
        assert end not in text.ids[:-1]


def test_a_turn_ends_where_the_template_ends_it(predictor):
    """Also for a base model, whose own end token is another one."""
    adapter = predictor.adapter
    end = adapter.readout.tokenizer.convert_tokens_to_ids("<end>")
    with torch.no_grad():  # a model that says nothing but the end of a turn
        head = adapter.peft_model.get_base_model().lm_head.base_layer
        head.weight.zero_()
        adapter.peft_model.get_base_model().model.norm.weight.fill_(1.0)
        head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(end), 32) * 50.0)
    (text,) = generate(Predictor(adapter), ["the cat"], Decoding(8))
    assert text.ids.tolist() == [end]


def test_scores_of_answers_are_those_of_their_words_in_the_template(predictor):
    """No end token is counted."""
    split = predictor.adapter.readout.encode([Completion.from_mapping(ROWS[0])])
    (whole_turn,) = score_split(predictor, split)
    (words,) = score(predictor, [TURNS[:3]], ["sings the blue"])
    assert words.tokens == ("sings", "the", "blue") == whole_turn.tokens[:-1]
    torch.testing.assert_close(
        words.draw_log_probs, whole_turn.draw_log_probs[:, :-1], atol=1e-5, rtol=1e-5
    )


def test_a_prompt_of_texts_in_a_chat_is_the_users_message(chat_tokenizer):
    readout = CompletionTokens(chat_tokenizer, num_classes=32, max_length=64, chat=True)
    texts = readout.encode([Completion("t", "the cat", "runs")])[0]
    turns = readout.encode([Completion.from_mapping(ROWS[1])])[0]
    assert texts.rows == turns.rows


def test_the_three_forms_of_records_are_read():
    answer = [{"role": "assistant", "content": "sings the blue"}]
    forms = [
        {"id": "1", "messages": TURNS},
        {"id": "1", "prompt": TURNS[:3], "completion": answer},
        {"id": "1", "prompt": TURNS[:3], "completion": "sings the blue"},
    ]
    first, *others = map(Completion.from_mapping, forms)
    assert first.prompt[1] == Message("assistant", "runs")
    assert all(other == first for other in others)
    assert Completion.from_mapping({"id": "1", "messages": TURNS[:3]}).completion is None


def test_other_fields_are_passed_over_and_parts_of_a_content_are_joined():
    parts = [{"type": "text", "text": "sings "}, {"type": "text", "text": "the blue"}]
    row = {"id": "1", "messages": [*TURNS[:3], {"role": "assistant", "content": parts}]}
    expected = Completion.from_mapping({"id": "1", "messages": TURNS})
    assert Completion.from_mapping(row | {"source": "x", "score": 3}) == expected


class Strange:
    """Templates that cannot be scored."""

    leaves_out = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    rewrites = (
        "{% for m in messages %}{{ m.role + ' ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant think' }}{% endif %}"
    )


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"messages is \[\]: expected a list of messages, one or more"),
        ({"messages": "hi"}, "messages is 'hi': expected a list"),
        ({"messages": [user("hi")]}, "no answer: its last message is of the role 'user'"),
        ({"messages": [*TURNS, user("hi")]}, "no answer: its last message is of the role 'user'"),
        ({"messages": TURNS[1:2]}, "holds the assistant's alone"),
        ({"messages": [user(""), TURNS[1]]}, r"content of messages\[0\] is ''"),
        ({"messages": [user(None), TURNS[1]]}, r"content of messages\[0\] is None"),
        (
            {"messages": [user([{"type": "image_url", "image_url": "u"}]), TURNS[1]]},
            r"content of messages\[0\] holds a part of type 'image_url'.*expected texts alone",
        ),
        ({"messages": [user(["hi"]), TURNS[1]]}, "holds a part of type None, 'hi'"),
        ({"messages": [user([]), TURNS[1]]}, r"content of messages\[0\] is ''"),
        ({"messages": TURNS, "completion": "a"}, r"found the fields \['completion', 'id', 'mess"),
        ({"messages": [user("a") | {"name": "x"}, TURNS[1]]}, r"messages\[0\] is .*alone"),
        ({"messages": [*TURNS[:2], TURNS[1]]}, r"roles \['user', 'assistant', 'assistant'\]"),
        ({"messages": TURNS[1:]}, "roles must alternate"),
        ({"prompt": "the", "completion": ""}, "completion is ''"),
        ({"prompt": "the", "completion": TURNS[2:]}, r"completion has the roles \['user', 'ass"),
        ({"prompt": "the", "messages": TURNS}, r"found the fields \['id', 'messages', 'prompt'\]"),
        ({"prompt": "the"}, "record 'q' has no completion, and its tokens are needed"),
    ],
)
def test_bad_conversations_are_refused(chat_tokenizer, row, message):
    readout = CompletionTokens(chat_tokenizer, num_classes=32, max_length=64, chat=True)
    with pytest.raises(DataError, match=message) as caught:
        readout.encode([Completion.from_mapping({"id": "q"} | row)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (Strange.leaves_out, "record 'long': the chat template does not take .*'runs' is left out"),
        (Strange.rewrites, "is answered in another way than before the answer"),
    ],
)
def test_templates_that_cannot_be_scored_are_refused(chat_tokenizer, template, message):
    chat_tokenizer.chat_template = template
    readout = CompletionTokens(chat_tokenizer, num_classes=32, max_length=64, chat=True)
    with pytest.raises(DataError, match=message):
        readout.encode([Completion.from_mapping(ROWS[0])])


def test_conversations_need_the_template(chat_tokenizer, make_causal):
    plain = CompletionTokens(chat_tokenizer, num_classes=32, max_length=64)
    with pytest.raises(DataError, match="record 'long': messages are given, and no chat template"):
        plain.encode([Completion.from_mapping(ROWS[0])])
    with pytest.raises(ValueError, match=r"prompt 0: messages are given.*model.chat=true"):
        list(generate(Predictor(make_causal()), [TURNS[:1]], Decoding(2)))
    chat_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; set chat=false"):
        CompletionTokens(chat_tokenizer, num_classes=32, max_length=64, chat=True)


def test_a_prompt_without_a_token_is_refused(predictor):
    readout = predictor.adapter.readout
    readout.tokenizer.backend_tokenizer.normalizer = Replace(Regex("[0-9]"), "")
    with pytest.raises(ValueError, match="prompt 1, '123', becomes no token"):
        list(generate(predictor, ["the", "123"], Decoding(2)))
    with pytest.raises(DataError, match="record 'q': prompt '123' and completion 'cat' are 0"):
        readout.encode([Completion("q", "123", "cat")])
