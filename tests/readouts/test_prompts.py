"""What reaches the model of a prompt: no end token after it, and the question in its template."""

from __future__ import annotations

import pytest
import torch
from conftest import lora, tiny_llama, whole
from tokenizers import Regex, normalizers, processors

from scalabl_pyro import Predictor, Record, SubspaceAdapter, predict
from scalabl_pyro.data import PROMPTS, Completion, DataError
from scalabl_pyro.prediction import Decoding, generate, score
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.readouts.causal import prompt_ids
from scalabl_pyro.readouts.completion_tokens import CompletionTokens
from scalabl_pyro.readouts.heads import MultipleChoice, SequenceClassification

QUESTION = Record("q", "the cat sings", ("red", "blue"), 1)
#: what is put around a text, and what of it a prompt keeps
AROUND = {
    "$A B": "",
    "A $A B": "A ",
    "A $A B C": "A ",
    "A A $A B B": "A A ",
    "$A": "",
}


def around(tokenizer, template):
    """The same tokenizer, which puts these special tokens around a text."""
    tokenizer.add_special_tokens({"bos_token": "A", "eos_token": "B", "sep_token": "C"})
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in "ABC"}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(ids.items())
    )
    return tokenizer


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("template", AROUND)
@pytest.mark.parametrize("text", ["the cat", "a", "the cat B", "B", "dog B B"])
def test_what_a_tokenizer_appends_is_no_part_of_a_prompt(tokenizer, template, text):
    tokenizer = around(tokenizer, template)
    expected = plain(tokenizer, AROUND[template] + text)
    assert prompt_ids(tokenizer, text) == expected


@pytest.mark.parametrize("template", AROUND)
def test_label_tokens_read_the_token_after_the_prompt(tokenizer, template):
    """Against a plain transformers model on the tokens written by hand."""
    tokenizer = around(tokenizer, template)
    readout = LabelTokens(tokenizer, PROMPTS["classes"], ["red", "blue"], max_length=64)
    assert tokenizer.convert_ids_to_tokens(readout.label_ids.tolist()) == ["red", "blue"]
    ids = plain(tokenizer, AROUND[template] + "the cat sings Answer :")
    split = readout.encode([QUESTION])
    assert split[0].rows["input_ids"] == [ids]
    llm = tiny_llama()
    with torch.no_grad():
        expected = llm(torch.tensor([ids])).logits[:, -1, plain(tokenizer, "red blue")]
        logits = readout(llm, whole(split).inputs)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("template", AROUND)
def test_a_completion_ends_once(tokenizer, template):
    tokenizer = around(tokenizer, template)
    for end in (True, False):
        readout = CompletionTokens(tokenizer, num_classes=32, max_length=64, end_token=end)
        row = readout.encode([Completion("c", "the cat", " runs")])[0].rows
        text = f"{AROUND[template]}the cat runs" + (" B" if end else "")
        assert row["input_ids"] == [plain(tokenizer, text)]
        assert sum(row["completion_mask"][0]) == 1 + end


@pytest.mark.parametrize("template", AROUND)
def test_generate_and_score_go_on_after_the_text_itself(tokenizer, template):
    tokenizer = around(tokenizer, template)
    llm = tiny_llama()
    ids = plain(tokenizer, AROUND[template] + "the cat")
    expected = llm.generate(
        torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :]
    readout = LabelTokens(tokenizer, PROMPTS["classes"], ["red", "blue"], max_length=64)
    predictor = Predictor(SubspaceAdapter(llm, lora("q_proj"), readout))
    llm.generation_config.eos_token_id = 31
    (generated,) = generate(predictor, ["the cat"], Decoding(4))
    assert torch.equal(generated.ids, expected)
    (scored,) = score(predictor, ["the cat"], [" runs red"])
    assert list(scored.tokens) == ["runs", "red"]
    text = torch.tensor([plain(tokenizer, AROUND[template] + "the cat runs red")])
    with torch.no_grad():
        log_probs = tiny_llama()(text).logits[0].log_softmax(-1)
    expected = log_probs[[-3, -2], text[0, -2:]]
    torch.testing.assert_close(scored.log_probs, expected, atol=1e-5, rtol=1e-5)


PARTS = (
    "{% for m in messages %}user : {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} dog :"
)
PARTS_BY_NAME = (
    "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %} :"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}no{% endif %}"
    "{% endfor %} dog :"
)
TRIMMED = "tree {{ messages[0]['content'] | trim }} dog :"
FIRST_PART = "{{ messages[0]['content'][0]['text'] }} dog :"  # raises nothing on a text
STRICT = (
    "{% if messages[0].content is string %}{{ raise_exception('a list, please') }}{% endif %}"
    "{{ messages[0].content[0].text }} dog :"
)


def chat(tokenizer, template, **options):
    tokenizer.chat_template = template
    prompt = PROMPTS["classes"]
    return LabelTokens(
        tokenizer, prompt, ["red", "blue"], chat=True, **{"max_length": 64} | options
    )


@pytest.mark.parametrize("template", [PARTS, PARTS_BY_NAME, EITHER, TRIMMED, FIRST_PART, STRICT])
def test_a_chat_prompt_holds_the_question(tokenizer, template):
    readout = chat(tokenizer, template)
    words = tokenizer.convert_ids_to_tokens(readout.encode([QUESTION])[0].rows["input_ids"][0])
    shown = " ".join(words)
    assert "the cat sings Answer :" in shown
    assert shown.count("cat") == 1


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("a dog :", "gave 'a dog :'"),
        ("{{ messages[0]['content'] | upper }}", "gave 'ANSWER:'"),
        ("{{ raise_exception('no users') }}", "no users"),
        ("{{ messages[0]['text'] }} :", "gave ' :'"),
        ("{{ messages[1]['content'] }} :", "UndefinedError"),
    ],
)
def test_a_template_that_leaves_the_question_out_is_refused(tokenizer, template, reason):
    with pytest.raises(ValueError, match="the chat template leaves the prompt 'Answer:' out") as e:
        chat(tokenizer, template)
    assert reason in str(e.value)
    assert "set chat=false" in str(e.value)


@pytest.mark.parametrize("template", [PARTS, TRIMMED, "a bird {{ messages[0].content }} a tree :"])
@pytest.mark.parametrize("most", [8, 9, 12, 20])
def test_of_a_chat_prompt_that_is_too_long_the_question_is_cut(tokenizer, template, most):
    question = " ".join(["the cat runs", "a dog sleeps"] * 6)
    record = Record("q", question, ("red", "blue"), 1)
    full = chat(tokenizer, template).encode([record])[0].rows["input_ids"][0]
    short = chat(tokenizer, template, max_length=most, truncate=True)
    row = short.encode([record])[0].rows["input_ids"][0]
    words = question.split()
    begin, end = full.index(plain(tokenizer, "the")[0]), len(full) - len(words)
    if template.startswith("a bird"):
        begin = 2
    assert len(row) == most
    assert row[:begin] == full[:begin]
    after = full[begin + len(words) :]  # "Answer :", and the rest of the template
    assert end == begin + len(after)
    assert row[-len(after) :] == after
    room = most - begin - len(after)
    # Of the first word a part may be left, which this tokenizer does not know.
    assert (
        row[begin + 1 : begin + room] == plain(tokenizer, " ".join(words))[len(words) - room + 1 :]
    )


def test_a_template_that_leaves_no_room_is_refused(tokenizer):
    readout = chat(
        tokenizer, "a bird sings {{ messages[0].content }} a :", max_length=7, truncate=True
    )
    with pytest.raises(DataError, match=r"record 'q': what stands beside .* of 7 tokens"):
        readout.encode([QUESTION])


def silent(tokenizer, *, begin=False):
    """A tokenizer that drops what it does not know, as some drop control characters."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[^a-zA-Z :.]"), "")
    return around(tokenizer, "A $A") if begin else tokenizer


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("text", ["\x00\x01", "123", "日本語"])
def test_a_text_that_becomes_no_token_is_refused(tokenizer, begin, text):
    tokenizer = silent(tokenizer, begin=begin)
    heads = SequenceClassification(tokenizer, num_classes=2, max_length=64)
    with pytest.raises(DataError, match=r"record 'q' becomes .*, no token but special ones"):
        heads.encode([Record("q", text, ("red", "blue"), 0)])
    completions = CompletionTokens(tokenizer, num_classes=32, max_length=64, end_token=False)
    for pair in ((text, text), (text, "the cat"), ("the cat", text)):
        with pytest.raises(DataError, match="expected one or more of each"):
            completions.encode([Completion("q", *pair)])
    readout = LabelTokens(tokenizer, PROMPTS["classes"], ["red", "blue"], max_length=64)
    predictor = Predictor(SubspaceAdapter(tiny_llama(), lora("q_proj"), readout))
    with pytest.raises(ValueError, match=r"prompt 1, .*, becomes no token"):
        generate(predictor, ["the cat", text], Decoding(4))


def test_unknown_words_are_words(tokenizer):
    heads = SequenceClassification(tokenizer, num_classes=2, max_length=64)
    row = heads.encode([Record("q", "zebra giraffe", ("red", "blue"), 0)])[0].rows["input_ids"]
    assert row == [[tokenizer.unk_token_id] * 2]


@pytest.mark.parametrize(("words", "special"), [(16, 0), (40, 0), (13, 3), (15, 3)])
def test_a_choice_longer_than_the_context_is_refused_in_words(tokenizer, words, special):
    if special:
        tokenizer = around(tokenizer, "A $A C")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="A $A C",
            pair="A $A C $B C",
            special_tokens=[(w, tokenizer.convert_tokens_to_ids(w)) for w in "AC"],
        )
    readout = MultipleChoice(tokenizer, num_classes=2, max_length=16, truncate=True)
    bad = Record("q", "the cat", ("red", " ".join(["blue"] * words)), 0)
    message = rf"record 'q': the choice 'blue blue .* has {words} tokens and leaves no room"
    with pytest.raises(DataError, match=message):
        readout.encode([bad])
    fits = Record("q", "the cat runs " * 9, ("red", " ".join(["blue"] * (15 - special))), 0)
    rows = readout.encode([fits])[0].rows["input_ids"]
    assert [len(row) for row in rows] == [16, 16]


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_predict_of_completions_is_refused_in_words(tokenizer, end, count):
    tokenizer = around(tokenizer, "A $A")
    readout = CompletionTokens(tokenizer, num_classes=32, max_length=64, end_token=end)
    adapter = SubspaceAdapter(tiny_llama(), lora("q_proj"), readout)
    split = readout.encode([Completion(str(n), "the cat", " runs") for n in range(count)])
    for predictor in (Predictor(adapter), Predictor(adapter, torch.ones(2, *adapter.shape))):
        with pytest.raises(
            ValueError, match=r"reads texts, such as CompletionTokens: .* take score"
        ):
            predict(predictor, split)


@pytest.mark.parametrize("date", ["{{ strftime_now('%d %B %Y') }}", "{{ date_string }}"])
def test_a_chat_template_that_writes_the_date_writes_one(tokenizer, date):
    """Whatever it reads it from: tomorrow the same record is the same prompt."""
    template = date + " {{ messages[0]['content'] }} dog :"
    text = chat(tokenizer, template)._text(QUESTION, QUESTION.question)
    assert text.startswith("26 Jul 2024 ")
