"""Templates, shots and system messages, against texts written by hand and plain transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import fill_lora_B, lora, tiny_bert_config, tiny_llama, whole
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertForMultipleChoice, LlamaForCausalLM

from scalabl_pyro import Predictor, Record, SubspaceAdapter, from_pretrained, predict
from scalabl_pyro.data import PROMPTS, DataError, Prompt
from scalabl_pyro.embedded import model_path
from scalabl_pyro.readouts import ChoiceLikelihood, LabelTokens
from scalabl_pyro.readouts.heads import MultipleChoice, SequenceClassification

SHOTS = (
    Record("s1", "a dog runs", ("red", "blue"), 1),
    Record("s2", "the bird sings", ("red", "blue"), 0),
)
RECORD = Record("q", "the cat sleeps", ("red", "blue"), 0)
OWN = Prompt("tree . {question}\n{choices} Answer:", shots=SHOTS)
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SYSTEM = "Answer with a colour."


def text_of(readout, record):
    return readout._text(record, record.question)


def label_tokens(tokenizer, prompt, **options):
    return LabelTokens(tokenizer, prompt, ["red", "blue"], **{"max_length": 64} | options)


def choice_likelihood(tokenizer, prompt, **options):
    return ChoiceLikelihood(tokenizer, prompt, **{"num_classes": 2, "max_length": 64} | options)


BOTH = pytest.mark.parametrize("make", [label_tokens, choice_likelihood])


@BOTH
def test_shots_stand_before_the_question_with_their_answers(tokenizer, make):
    assert text_of(make(tokenizer, OWN), RECORD) == (
        "tree . a dog runs\nred, blue Answer: blue\n\n"
        "tree . the bird sings\nred, blue Answer: red\n\n"
        "tree . the cat sleeps\nred, blue Answer:"
    )


@BOTH
def test_a_shot_is_asked_without_itself(tokenizer, make):
    assert text_of(make(tokenizer, OWN), replace(SHOTS[0], label=None)) == (
        "tree . the bird sings\nred, blue Answer: red\n\n"
        "tree . a dog runs\nred, blue Answer:"
    )  # fmt: skip


def test_letters_answer_shots_where_letters_are_asked(tokenizer):
    prompt = replace(PROMPTS["letters"], shots=SHOTS[:1])
    readout = LabelTokens(tokenizer, prompt, "AB", max_length=64)
    assert text_of(readout, RECORD) == (
        "a dog runs\nA. red\nB. blue\nAnswer: B\n\nthe cat sleeps\nA. red\nB. blue\nAnswer:"
    )


def test_the_gap_of_a_shot_is_filled(tokenizer):
    shot = Record("s", "the _ runs", ("cat", "dog_"), 1)
    prompt = replace(PROMPTS["gap"], shots=(shot,))
    readout = choice_likelihood(tokenizer, prompt)
    record = Record("q", "a _ sings here", ("bird", "tree"))
    assert readout._texts(record, record.question) == [
        ("the dog_ runs\n\na bird", " sings here"),
        ("the dog_ runs\n\na tree", " sings here"),
    ]


@BOTH
def test_in_a_chat_template_shots_are_earlier_turns(tokenizer, make):
    tokenizer.chat_template = TEMPLATE
    prompt = replace(OWN, system=SYSTEM)
    messages = [
        {"role": "system", "content": "Answer with a colour."},
        {"role": "user", "content": "tree . a dog runs\nred, blue Answer:"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "tree . the bird sings\nred, blue Answer:"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "tree . the cat sleeps\nred, blue Answer:"},
    ]
    text = text_of(make(tokenizer, prompt, chat=True), RECORD)
    assert text == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert text.startswith("<|system|>\nAnswer with a colour.\n<|user|>\ntree . a dog runs\n")


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ m.content }} {% endfor %}"
)
NO_ASSISTANT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% endif %}{% endfor %}"
)


@BOTH
@pytest.mark.parametrize(
    ("template", "reason"), [(NO_SYSTEM, "gave 'Why? '"), (REFUSES_SYSTEM, "no system role")]
)
def test_a_chat_template_that_writes_no_system_message_is_refused(
    tokenizer, make, template, reason
):
    tokenizer.chat_template = template
    make(tokenizer, OWN, chat=True)
    with pytest.raises(ValueError, match=r"system is 'Answer with a .*', but the tok") as error:
        make(tokenizer, replace(OWN, system=SYSTEM), chat=True)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"system is .* but chat is false"):
        make(tokenizer, replace(OWN, system=SYSTEM))


@BOTH
def test_a_chat_template_that_leaves_answers_out_is_refused(tokenizer, make):
    tokenizer.chat_template = NO_ASSISTANT
    with pytest.raises(DataError, match="or what is shown before it"):
        make(tokenizer, OWN, chat=True).encode([RECORD])


# ---------------------------------------------------------------------- what the model computes


@torch.no_grad()
def log_prob(llm, tokenizer, prompt, answer):
    """log p(answer | prompt): the whole text alone, then a cross entropy over its end."""
    ids = tokenizer(prompt + answer, return_tensors="pt", add_special_tokens=False).input_ids
    count = ids.shape[1] - len(tokenizer(prompt, add_special_tokens=False).input_ids)
    logits = llm(ids).logits[0].float()
    return -float(cross_entropy(logits[-count - 1 : -1], ids[0, -count:], reduction="sum"))


def test_choice_likelihood_in_chat_equals_a_loop_over_plain_transformers():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = TEMPLATE
    shots = (
        Record("s1", "What did Tom see?", ("a big dog", "a red ball"), 0),
        Record("s2", "Who was sad?", ("Lily", "the old tree", "her mom"), 2),
    )
    records = [
        Record("q1", "Where did she go?", ("to the park", "home", "to a house in the woods"), 1),
        Record("q2", "What was it?", ("a cat", "a little bird"), 0),
        shots[1],
    ]
    prompt = Prompt("Story time. {question} Is it {choices}?", system="Be kind.", shots=shots)
    readout = choice_likelihood(
        tokenizer, prompt, chat=True, num_classes=3, max_length=256, normalise="none"
    )
    llm = LlamaForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    adapter = SubspaceAdapter(llm, lora("q_proj"), readout)
    fill_lora_B(adapter)
    assert readout.packed
    scores = adapter(whole(readout.encode(records)), adapter.init_loc).detach()

    def asked(record):
        text = f"Story time. {record.question} Is it {', '.join(record.choices)}?"
        return {"role": "user", "content": text}

    expected = torch.full((3, 3), float("-inf"))
    with adapter.folded(adapter.init_loc) as llm:
        for n, record in enumerate(records):
            messages = [{"role": "system", "content": "Be kind."}]
            for shot in shots[:1] if record is shots[1] else shots:
                answer = {"role": "assistant", "content": shot.choices[shot.label]}
                messages += [asked(shot), answer]
            text = tokenizer.apply_chat_template(
                [*messages, asked(record)], add_generation_prompt=True, tokenize=False
            )
            for c, choice in enumerate(record.choices):
                expected[n, c] = log_prob(llm, tokenizer, text, choice)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_label_tokens_read_the_token_behind_shots_and_a_template(tokenizer):
    readout = label_tokens(tokenizer, OWN)
    llm = tiny_llama()
    logits = readout(llm, whole(readout.encode([RECORD])).inputs)
    text = (
        "tree . a dog runs red , blue Answer : blue tree . the bird sings red , blue Answer : red"
        " tree . the cat sleeps red , blue Answer :"
    )
    words = tokenizer("red blue").input_ids
    expected = llm(torch.tensor([tokenizer(text).input_ids])).logits[:, -1, words]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_encoders_take_a_template(tokenizer):
    prompt = Prompt("bird . {question} tree ({choices})")
    text = "bird . the cat sleeps tree (red, blue)"
    options = {"num_classes": 2, "max_length": 64, "prompt": prompt}
    rows = SequenceClassification(tokenizer, **options).encode([RECORD])[0].rows["input_ids"]
    assert rows == [tokenizer(text).input_ids]
    rows = MultipleChoice(tokenizer, **options).encode([RECORD])[0].rows["input_ids"]
    assert rows == [tokenizer(text, choice).input_ids for choice in RECORD.choices]


def test_a_template_for_multiple_choice_in_one_call(tokenizer):
    adapter = from_pretrained(
        BertForMultipleChoice(tiny_bert_config()),
        lora("query", modules_to_save=["classifier"]),
        [RECORD],
        tokenizer=tokenizer,
        readout="multiple_choice",
        prompt="classes",
        template="bird {question}",
    )
    assert (
        adapter.encode([RECORD])[0].rows["input_ids"][1]
        == tokenizer("bird the cat sleeps", "blue").input_ids
    )
    assert predict(Predictor(adapter), [RECORD]).logits.shape == (1, 1, 2)


def test_shots_in_one_call(tokenizer):
    adapter = from_pretrained(
        tiny_llama(),
        lora("q_proj"),
        [RECORD, *SHOTS],
        tokenizer=tokenizer,
        prompt="classes",
        template=OWN.template,
        shots=SHOTS,
    )
    expected = label_tokens(tokenizer, OWN).encode([RECORD])[0].rows
    assert adapter.encode([RECORD])[0].rows == expected


# ---------------------------------------------------------------------- what is too long


LONG = Record("q", " ".join(["the cat runs", "a dog sleeps"] * 10), ("red", "blue"), 1)


@BOTH
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("most", [48, 55])
def test_of_a_long_prompt_the_question_alone_is_cut(tokenizer, make, chat, most):
    tokenizer.chat_template = "bird {% for m in messages %}{{ m.content }} green {% endfor %}"
    full = make(tokenizer, OWN, chat=chat, max_length=200).encode([LONG])[0].rows["input_ids"][0]
    words = tokenizer(LONG.question).input_ids
    start = next(i for i in range(len(full)) if full[i : i + len(words)] == words)
    before, after = full[:start], full[start + len(words) :]
    readout = make(tokenizer, OWN, chat=chat, truncate=True, max_length=most)
    row = readout.encode([LONG])[0].rows["input_ids"][0]
    assert len(row) == most
    assert row[: len(before)] == before
    assert row[-len(after) :] == after
    rest = row[len(before) + 1 : -len(after)]  # of the first word a part may be left
    assert rest == words[-len(rest) :]
    full = make(tokenizer, OWN, chat=chat, truncate=True, max_length=len(before) + len(after))
    with pytest.raises(DataError, match="what stands beside the question leaves no room for it"):
        full.encode([LONG])


def test_of_a_long_prompt_with_a_gap_the_gap_stays(tokenizer):
    record = replace(LONG, question=f"{LONG.question} _ sings in a tree")
    readout = choice_likelihood(tokenizer, PROMPTS["gap"], truncate=True, max_length=12)
    rows = readout.encode([record])[0].rows["input_ids"]
    for row, choice in zip(rows, record.choices, strict=True):
        assert row[-5:] == tokenizer(f"{choice} sings in a tree").input_ids
        assert row[-8:-5] == tokenizer("a dog sleeps").input_ids


@pytest.mark.parametrize("make", [SequenceClassification, MultipleChoice])
def test_of_a_long_text_in_a_template_the_end_is_cut(tokenizer, make):
    prompt = Prompt("bird . {question} green tree")
    readout = make(tokenizer, num_classes=2, max_length=20, truncate=True, prompt=prompt)
    row = readout.encode([LONG])[0].rows["input_ids"][0]
    after = tokenizer("green tree").input_ids
    after += tokenizer("red").input_ids if make is MultipleChoice else []
    assert row[:10] == tokenizer("bird . the cat runs a dog sleeps the cat").input_ids
    assert row[-len(after) :] == after
    assert len(row) <= 20


# ---------------------------------------------------------------------- as people read it


def test_a_reading_of_an_encoder_shows_names_or_the_ends_of_rows(tokenizer):
    for make in (SequenceClassification, MultipleChoice):
        reading = make(tokenizer, num_classes=2, max_length=8).reading(RECORD)
        assert (reading.prompt, reading.cut_tokens) == ("the cat sleeps", 0)
        assert [scored.strip() for _, scored in reading.answers] == ["red", "blue"]
        assert reading.tokens == (4 if make is MultipleChoice else 3)


def test_a_reading_shows_what_is_given_what_is_scored_and_what_is_cut():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    record = Record("q", "Tom saw a bird. What did he see?", ("a bird", "a cat"), 0)
    readout = choice_likelihood(tokenizer, PROMPTS["question"])
    reading = readout.reading(record)
    assert reading.prompt == "Question: Tom saw a bird. What did he see?\nAnswer:"
    assert reading.answers == [("", " a bird"), ("", " a cat")]
    ids = tokenizer("Question: Tom saw a bird. What did he see?\nAnswer: a bird").input_ids
    assert (reading.tokens, reading.cut, reading.cut_tokens) == (len(ids), "", 0)
    most = len(ids) - 4
    cut = choice_likelihood(tokenizer, PROMPTS["question"], max_length=most, truncate=True).reading(
        record
    )
    assert cut.tokens + cut.cut_tokens == len(ids)
    assert cut.tokens <= most
    assert cut.cut.strip().startswith("Tom")
    assert cut.prompt.startswith("Question: ")
    assert cut.prompt.endswith(" see?\nAnswer:")
    gap = Record("g", "The _ was big", ("cat", "dog"), 0)
    reading = choice_likelihood(tokenizer, PROMPTS["gap"]).reading(gap)
    assert [context.strip() + scored for context, scored in reading.answers] == [
        "cat was big",
        "dog was big",
    ]
