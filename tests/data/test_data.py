from __future__ import annotations

import json
import logging
import unicodedata
from dataclasses import replace

import pytest
import torch
from conftest import make_records, write_jsonl
from tokenizers import processors
from transformers import AutoTokenizer

from scalabl_pyro import Record
from scalabl_pyro.data import (
    PROMPTS,
    DataError,
    DataSource,
    Split,
    check_split,
    disjoint,
    hold_out,
    read_completions,
    read_folder,
    read_records,
    without_overlap,
)
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.readouts.heads import MultipleChoice

GOOD = {"id": "1", "question": "why?", "choices": ["a", "b"], "label": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, "label is 3: expected the 0-based number of a choice, 0 to 1"),
        ({"label": -1}, "label is -1: .*; leave it out where it is not known"),
        ({"label": -100}, "label is -100: .*; leave it out where it is not known"),
        ({"label": "b"}, "label is 'b': .* or say how labels are read: data.columns.labels"),
        ({"choices": []}, r"choices is \[\]"),
        ({"choices": "ab"}, "choices is 'ab'"),
        ({"choices": ["a", " "]}, "choices holds ' '"),
        ({"question": ""}, "question is ''"),
        ({"question": "half \ud83d"}, "of whole characters"),
        ({"choices": ["a", "\udc00"]}, "of whole characters"),
    ],
)
def test_bad_records_name_file_line_and_value(tmp_path, change, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(DataError, match=rf"bad.jsonl, line 2: .*{message}"):
        read_records(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{\n", "line 1: not UTF-8 JSON"),
        (b"\n" + b'{"id": ' + b"7" * 5000 + b"}\n", "line 2: not UTF-8 JSON"),
        (b"-" + b"1" * 9999 + b"\n", "line 1: not UTF-8 JSON"),
        (b"[" * 100_000 + b"\n", "line 1: not UTF-8 JSON"),
        (b'{"a":' * 50_000 + b"\n", "line 1: not UTF-8 JSON"),
        (b'{"id": "\xff"}\n', "line 1: not UTF-8 JSON"),
        (b"[1]\n", "line 1: found list"),
        (b"\n", "holds no records"),
        (json.dumps(GOOD).encode() * 1 + b"\n" + json.dumps(GOOD).encode(), "id '1' occurs twice"),
    ],
)
def test_malformed_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(path)


@pytest.mark.parametrize(
    "choices",
    [{"a": 1, "b": 2}, {"a", "b"}, frozenset("ab"), {"a": 1, "b": 2}.keys(), b"ab", "ab", 3, None],
)
def test_choices_without_an_order_are_refused(choices):
    with pytest.raises(DataError, match=f"a {type(choices).__name__}: expected a list of texts"):
        Record("1", "why?", choices, 0)


@pytest.mark.parametrize("choices", [["a", "b"], ("a", "b"), iter("ab"), {1: "a", 2: "b"}.values()])
def test_choices_in_an_order_are_taken(choices):
    assert Record("1", "why?", choices, 0).choices == ("a", "b")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "1", "id": "2"}', "the key 'id' occurs twice, with '1' and '2'"),
        ('{"id": "1", "question": "q", "label": 0, "label": 0}', "the key 'label' occurs twice"),
        ('{"id": "1", "question": {"a": 1, "a": 2}}', "the key 'a' occurs twice"),
        ("[" * 100_000, r"not UTF-8 JSON \("),
        ('{"label": ' + "1" * 5000 + "}", r"not UTF-8 JSON \("),
    ],
)
@pytest.mark.parametrize("read", [read_records, read_completions])
def test_lines_of_json_that_two_readers_would_read_apart_are_refused(tmp_path, line, message, read):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(DataError, match=f"bad.jsonl, line 2: {message}"):
        read(path)


def test_missing_files_and_splits_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        read_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="expected a folder"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match=r"no split 'test'; the data set has \['train'\]"):
        check_split({"train": []}, "test")


def test_records_round_trip(tmp_path):
    records = [*make_records(5), *make_records(3, labelled=False)]
    records = [Record(f"r{i}", r.question, r.choices, r.label) for i, r in enumerate(records)]
    assert read_records(write_jsonl(tmp_path / "x.jsonl", records)) == records


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("arc_challenge", {"train": 1119, "validation": 299, "test": 1172}),
        ("openbookqa", {"train": 4957, "validation": 500, "test": 500}),
        ("winogrande_s", {"train": 640, "test": 1267}),
        ("mmlu/college_chemistry", {"dev": 5, "validation": 8, "test": 100}),
        ("mmlu/college_physics", {"dev": 5, "validation": 11, "test": 102}),
    ],
)
def test_real_data_has_the_published_counts(shared, name, counts):
    splits = read_folder(shared / "data" / name)
    assert {split: len(records) for split, records in splits.items()} == counts


def test_training_questions_that_are_tested_leave_training(shared, caplog):
    splits = read_folder(shared / "data" / "openbookqa")
    with caplog.at_level(logging.WARNING):
        remaining = without_overlap(splits["train"], splits["test"], name="test")
    assert len(splits["train"]) - len(remaining) == 14
    assert "left out 14 questions of train that are also in test" in caplog.text


# Spellings of one question, and the letters are those of Unicode's own chart.
ONE = "Où est le café № 1?"


@pytest.mark.parametrize(
    "other",
    [
        "Ou\u0300 est le cafe\u0301 № 1?",  # NFD
        "Où  est le café № 1?",
        "Où\u00a0est le café\u202f№ 1?",  # no-break spaces
        "Où est\r\nle café № 1?",
        "Où est le ca\u200bfé № 1?",
        "\ufeffOù est le café № 1?\u2060",
        "Où est le ca\u00adfé No 1?",  # a soft hyphen, and № in two letters
        "OÙ EST LE CAFÉ № 1?",
        "Où\u2003est\tle\u3000café № \uff11\uff1f",  # wide spaces and full-width forms
        "  Où est le café № 1?\n",
    ],
)
@pytest.mark.parametrize("choices", [("Straße", "re\u0301sumé"), ("résumé\u200d", "STRASSE ")])
def test_a_question_in_another_spelling_is_the_same(other, choices):
    train = [Record("a", other, choices, 0), Record("b", "Où est le thé?", choices, 0)]
    test = [Record("c", ONE, ("straße", "résumé"), 1)]
    assert [r.id for r in without_overlap(train, test, name="test")] == ["b"]


@pytest.mark.parametrize(
    "other",
    ["Où est le cafe № 1?", "Où est le café № 2?", "Où est le café № 1", "Oùest le café № 1?"],
)
def test_a_question_with_other_letters_is_another(other):
    train, test = [Record("a", other, ("x", "y"))], [Record("c", ONE, ("x", "y"))]
    assert without_overlap(train, test, name="test") == train


@pytest.mark.parametrize("name", ["Cafe\u0301", "A\u030angstro\u0308m", "\u1112\u1161\u11ab"])
def test_a_class_is_one_however_its_accents_were_typed(tmp_path, name):
    """The composed form is that of unicodedata alone."""
    whole = unicodedata.normalize("NFC", name)
    assert len(whole) < len(name)
    path = tmp_path / "train.csv"
    path.write_text(f"text,class\none,{name}\ntwo,{whole}\nthree,tea\n")
    records = DataSource(path=str(path)).read()["train"]
    assert records[0].choices[records[0].label] == records[1].choices[records[1].label] == whole
    assert len(records[0].choices) == 2
    for classes in ((name, "tea"), (whole, "tea")):
        assert [r.label for r in DataSource(path=str(path), classes=classes).read()["train"]] == [
            0,
            0,
            1,
        ]
        assert [r.label for r in read_records(path, classes)] == [0, 0, 1]
    same = [Record("1", "x", (name, "tea")), Record("2", "y", (whole, "tea"))]
    assert PROMPTS["classes"].label_words(same) == (whole, "tea")


@pytest.mark.parametrize(
    ("first", "second"),
    [("good", "go\u200bod"), ("so so", "so\u00a0so"), ("ok", "\ufeffok"), ("a b", "a  b")],
)
def test_classes_that_only_look_the_same_are_refused(tmp_path, first, second):
    path = tmp_path / "train.csv"
    path.write_text(f"text,class\none,{first}\ntwo,{second}\nthree,tea\n")
    with pytest.raises(DataError, match=r"train.csv: the classes .* look the same"):
        DataSource(path=str(path)).read()
    with pytest.raises(ValueError, match=r"data.classes: the classes .* look the same"):
        DataSource(path=str(path), classes=(first, second))


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff \u00ad", "\u2060\n\u00a0", "\u3164"])
def test_a_text_in_which_nothing_is_seen_is_empty(blank):
    with pytest.raises(DataError, match="expected a text that is not empty"):
        Record("1", blank, ("a", "b"))
    with pytest.raises(DataError, match="expected texts that are not empty"):
        Record("1", "q", ("a", blank))


def test_what_is_tested_is_neither_trained_nor_validated_on():
    a, b, c, d, e = make_records(5)
    splits = {"train": [a, b, c, d], "validation": [b, c, e], "test": [c], "shifted": [d]}
    remaining = disjoint(splits)
    assert remaining == {"train": [a], "validation": [b, e], "test": [c], "shifted": [d]}
    assert len(splits["train"]) == 4
    with pytest.raises(DataError, match="every question of validation is also in test"):
        disjoint({"train": [a], "validation": [c], "test": [c]})


def test_hold_out_is_seeded_disjoint_and_complete():
    records = make_records(30)
    rest, held = hold_out(records, 0.1, seed=4)
    assert (len(rest), len(held)) == (27, 3)
    assert sorted([*rest, *held], key=records.index) == records
    assert hold_out(records, 0.1, seed=4) == (rest, held)
    assert hold_out(records, 0.1, seed=5)[1] != held
    with pytest.raises(DataError, match=r"hold out 0.9 of 1 records .*data\.validation_fraction"):
        hold_out(records[:1], 0.9, seed=0)


def test_minibatches_cover_the_data_group_by_length_and_follow_the_seed(tokenizer):
    readout = MultipleChoice(tokenizer, num_classes=4, max_length=64)
    split = readout.encode(make_records(64))

    def epoch(seed):
        stream = split.minibatches(4, seed=seed)
        return [next(stream) for _ in range(16)]

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a.labels, b.labels) for a, b in zip(first, other, strict=True))
    assert sorted(torch.cat([b.labels for b in first]).tolist()) == sorted(split.labels.tolist())
    padded = sum(int((b.inputs["attention_mask"] == 0).sum()) for b in first)
    in_order = [split.collate(list(split)[i : i + 4]) for i in range(0, 64, 4)]
    assert padded < sum(int((b.inputs["attention_mask"] == 0).sum()) for b in in_order)


def test_a_split_has_an_example_for_each_record(tokenizer):
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    split = readout.encode(make_records(3))
    with pytest.raises(DataError, match="3 records and 2 examples: expected as many"):
        type(split)(split.records, split.examples[:2], split.collate)


def test_batches_of_a_split_are_splits_in_its_order(tokenizer):
    split = MultipleChoice(tokenizer, num_classes=4, max_length=64).encode(make_records(7))
    assert [len(chunk) for chunk in split.batches(3)] == [3, 3, 1]
    assert [r for chunk in split.batches(3, start=2) for r in chunk.records] == [*split.records[2:]]
    for chunk, part in zip(split.batches(3), split.labels.split(3), strict=True):
        assert torch.equal(chunk.collate(chunk.examples).labels, part)
    assert split.batches(3, start=7) == []
    assert split.select([5, 0]).records == (split.records[5], split.records[0])
    with pytest.raises(ValueError, match="batch_size is 0: expected 1 or more"):
        split.batches(0)


def test_what_fills_no_batch_waits_for_another_epoch(tokenizer):
    """Of 67, 16 batches of 4 are an epoch; who the other three are is chosen anew."""
    split = MultipleChoice(tokenizer, num_classes=4, max_length=64).encode(make_records(67))
    numbered = [replace(example, label=n) for n, example in enumerate(split)]
    stream = Split(split.records, numbered, split.collate).minibatches(4, seed=0)
    left_out = set()
    for _ in range(200):
        epoch = [next(stream).labels.tolist() for _ in range(16)]
        assert [len(batch) for batch in epoch] == [4] * 16
        seen = sorted(n for batch in epoch for n in batch)
        assert len(set(seen)) == 64
        left_out |= set(range(67)).difference(seen)
    assert left_out == set(range(67))


def test_no_example_is_left_out_for_its_length(tokenizer):
    split = MultipleChoice(tokenizer, num_classes=4, max_length=64).encode(make_records(15))
    stream = split.minibatches(4, seed=0)
    seen = [next(stream).inputs["attention_mask"].sum((1, 2)).tolist() for _ in range(60)]
    longest = max(sum(map(sum, e.rows["attention_mask"])) for e in split)
    assert longest in {tokens for batch in seen for tokens in batch}


def test_a_pair_that_is_too_long_loses_its_question_not_its_choice(tokenizer):
    record = Record("1", "the cat runs " * 20, ("red", "blue", "green"), 1)
    readout = MultipleChoice(tokenizer, num_classes=3, max_length=16, truncate=True)
    rows = readout.encode([record])[0].rows["input_ids"]
    assert {len(row) for row in rows} == {16}
    assert tokenizer.convert_ids_to_tokens([row[-1] for row in rows]) == ["red", "blue", "green"]


def test_chat_prompts_find_label_words_after_the_template(tokenizer):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %} Answer :"
    tokenizer.chat_template = template
    readout = LabelTokens(tokenizer, PROMPTS["classes"], ["red", "blue"], max_length=64, chat=True)
    split = readout.encode([Record("1", "the cat", ("red", "blue"), 0)])
    words = tokenizer.convert_ids_to_tokens(split[0].rows["input_ids"][0])
    assert words[-2:] == ["Answer", ":"]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LabelTokens(tokenizer, PROMPTS["classes"], ["red", "blue"], max_length=64, chat=True)


def test_after_a_line_break_words_are_read_without_a_space(tokenizer):
    for end, form in (("Answer:", "space"), (r"the dog\n", "plain")):
        tokenizer.chat_template = "{{ messages[0]['content'] + '" + end + "' }}"
        prompt = PROMPTS["classes"]
        readout = LabelTokens(tokenizer, prompt, ["red", "blue"], max_length=64, chat=True)
        assert readout.form == form


def test_a_prompt_does_not_hold_the_date_of_today(tokenizer):
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
        "{{ 'cat' if date_string == '26 Jul 2024' else 'dog' }} {{ messages[0]['content'] }}"
    )
    readout = LabelTokens(tokenizer, PROMPTS["classes"], ["red", "blue"], max_length=64, chat=True)
    row = readout.encode([Record("1", "the bird", ("red", "blue"), 0)])[0].rows["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(row) == ["cat", "the", "bird", "Answer", ":"]


def test_a_prompt_that_is_cut_keeps_the_token_that_begins_it(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "the"})  # as Llama's and Gemma's do
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="the $A", special_tokens=[("the", tokenizer.bos_token_id)]
    )
    prompt = PROMPTS["letters"]
    cutting = LabelTokens(tokenizer, prompt, "ABCD", max_length=18, truncate=True)
    long = [e.rows["input_ids"][0] for e in cutting.encode(make_records(6))]
    assert {row[0] for row in long} == {tokenizer.bos_token_id}
    assert max(map(len, long)) == 18


def test_prompts_that_are_too_long_are_refused_or_cut(tokenizer, caplog):
    records = make_records(6)
    prompt = PROMPTS["letters"]
    short = LabelTokens(tokenizer, prompt, "ABCD", max_length=17)
    with pytest.raises(
        DataError,
        match=r"of 6 prompts exceed the context of 17 tokens \(longest: \d+, of record 'q",
    ):
        short.encode(records)
    cutting = LabelTokens(tokenizer, prompt, "ABCD", max_length=17, truncate=True)
    with caplog.at_level(logging.WARNING):
        split = cutting.encode(records)
    assert max(split.lengths) == 17
    assert "they were cut" in caplog.text
    ending = tokenizer("Answer:").input_ids
    assert all(example.rows["input_ids"][0][-2:] == ending for example in split)


def test_label_words_share_one_form(shared, tokenizer):
    sentencepiece = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    readout = LabelTokens(sentencepiece, PROMPTS["letters"], "ABCD", max_length=512)
    assert readout.form == "plain"
    assert sentencepiece.convert_ids_to_tokens(readout.label_ids) == ["A", "B", "C", "D"]
    assert LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64).form == "space"
    with pytest.raises(
        ValueError, match=r"are not single, distinct tokens after 'Answer:', but .*'red cat': "
    ):
        LabelTokens(tokenizer, PROMPTS["classes"], ["red cat", "dog"], max_length=64)


def test_class_names_must_be_the_same_in_every_record():
    with pytest.raises(DataError, match="needs the same choices in every record"):
        PROMPTS["classes"].label_words(make_records(3))
    same = [Record(str(i), "text", ("good", "bad"), 0) for i in range(3)]
    assert PROMPTS["classes"].label_words(same) == ("good", "bad")


def test_more_choices_than_classes_are_refused(tokenizer):
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABC", max_length=64)
    with pytest.raises(DataError, match=r"has 4 choices, .* has 3 .*train on records"):
        readout.encode(make_records(2))
