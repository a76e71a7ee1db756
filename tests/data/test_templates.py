"""Prompts of one's own: templates, and records that are shown before the question."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import make_records

from scalabl_pyro import Record
from scalabl_pyro.data import PROMPTS, DataError, Prompt, draw_shots, read_template
from scalabl_pyro.lora.config import ModelConfig

RECORD = Record("q", "What {is} it?", ("red", "dark blue"), 1)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (PROMPTS["letters"], "What {is} it?\nA. red\nB. dark blue\nAnswer:"),
        (PROMPTS["classes"], "What {is} it?\nAnswer:"),
        (PROMPTS["question"], "Question: What {is} it?\nAnswer:"),
        (Prompt("{{Q}} {question} [{choices}]\nA:"), "{Q} What {is} it? [red, dark blue]\nA:"),
        (
            Prompt("{choices}\n{question} Letter:", letters=True),
            "A. red\nB. dark blue\nWhat {is} it? Letter:",
        ),
    ],
)
def test_a_record_is_put_as_the_template_says(prompt, text):
    assert prompt.render(RECORD) == text


@pytest.mark.parametrize(
    ("template", "anchor"),
    [
        ("{question}\nThe answer is", "The answer is"),
        ("{question}\nThink {{hard}}.\nAnswer:\n", "Think {hard}.\nAnswer:\n"),
        ("Answer: {question}", "?"),
        ("{question}\n", "?\n"),
    ],
)
def test_label_words_are_looked_for_where_the_template_ends(template, anchor):
    assert Prompt(template).anchor == anchor
    assert Prompt(template).render(replace(RECORD, question="Why?")).endswith(anchor)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "template is '': expected a text"),
        (" \n", "expected a text"),
        ("Answer:", "or a file with such a text"),
        ("nowhere.txt", "or a file with such a text"),
        ("x" * 5000, "or a file with such a text"),
        ("{choices} Answer:", "without {question}"),
        ("{question}\nAnswer:", "without {choices}, but the answers are their letters"),
        ("{passage} {question} {choices}", "there is no field {passage}: a record gives {question} and {choices}"),  # noqa: E501
        ("{question} {choices} {label}", "there is no field {label}"),
        ("{question.id} {choices}", "there is no field {question.id}"),
        ("{question!r} {choices}", "there is no field {question!r}"),
        ("{question:>9} {choices}", "there is no field {question:>9}"),
        ("{question} {choices} {}", "there is no field {}"),
        ("{question} {choices} }", "a brace itself is {{ or }}"),
        ("{question} {choices} ${HOME}", "expected a text without '${'"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_filled_in_is_refused_in_a_line(template, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ModelConfig("x", template=template)
    assert str(error.value).startswith("template is ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": -1}, "shots is -1: expected 0 or more"),
        ({"system": ""}, "system is '': expected a text"),
        ({"system": "Be brief."}, "system is 'Be brief.', but chat is false"),
        ({"chat": True, "system": "${x}"}, "system is '${x}': expected a text without '${'"),
        (
            {"readout": "multiple_choice", "shots": 2},
            "shots is 2 with readout 'multiple_choice', which reads no such thing: leave it out, or"
            " take one of ['choice_likelihood', 'label_tokens']",
        ),
        (
            {"readout": "sequence_classification", "system": "Be brief.", "chat": True},
            "system is 'Be brief.' with readout 'sequence_classification'",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ModelConfig("x", **settings)
    assert message in str(error.value)


def test_a_template_is_read_from_a_file_once(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffÜber {question}\r\n{choices} \\nabla:\r\n".encode())
    config = ModelConfig("x", template=str(path))
    path.unlink()
    assert config.template == "Über {question}\n{choices} \\nabla:"
    assert replace(config, dtype="bfloat16").template == config.template
    path.write_bytes(b"\xff{question}")
    with pytest.raises(ValueError, match="which is not UTF-8"):
        read_template(str(path))


def test_a_gap_may_stand_in_the_template(tokenizer):
    prompt = Prompt("{question}: the answer is _ .", gap=True)
    assert prompt.render(replace(RECORD, question="Why?")) == "Why?: the answer is _ ."
    with pytest.raises(DataError, match=r"the prompt of record 'q' is 'Is _ so\?: the .*one '_'"):
        prompt.render(replace(RECORD, question="Is _ so?"))


def test_shots_come_from_train_by_a_seed():
    train = make_records(12)
    shots = draw_shots(train, 5, seed=3)
    assert len(set(shots)) == 5
    assert set(shots) <= set(train)
    assert shots == draw_shots(train, 5, seed=3)
    assert len({draw_shots(train, 5, seed=seed) for seed in range(8)}) > 1
    assert draw_shots(train, 0, seed=0) == ()
    assert set(draw_shots(train, 12, seed=0)) == set(train)
    with pytest.raises(DataError, match="shots is 13, but the training split has 12 records"):
        draw_shots(train, 13, seed=0)


def test_a_question_is_not_shown_with_its_own_answer():
    shots = tuple(make_records(4))
    prompt = replace(PROMPTS["letters"], shots=shots)
    assert prompt.shots_for(shots[1]) == [shots[0], *shots[2:]]
    respelled = Record("other id", shots[1].question.upper() + " ", shots[1].choices[::-1])
    assert prompt.shots_for(respelled) == [shots[0], *shots[2:]]
    same_id = replace(RECORD, id=shots[1].id)
    assert prompt.shots_for(same_id) == list(shots)
    with pytest.raises(ValueError, match="the shot 'q' has no label"):
        replace(prompt, shots=(replace(RECORD, label=None),))
