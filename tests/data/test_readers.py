"""CSV files, data sets in the Hub's own schema, and where a run's records come from."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pandas
import pytest
from conftest import FAST, hub_copy, make_records, scalabl, write_jsonl

from scalabl_pyro import Record
from scalabl_pyro.data import (
    TASKS,
    Columns,
    DataError,
    DataSource,
    read_folder,
    read_records,
    read_rows,
)
from scalabl_pyro.data.csv_rows import csv_rows
from scalabl_pyro.data.readers import read_table
from scalabl_pyro.data.tables import to_records
from scalabl_pyro.runs.data import DataConfig
from scalabl_pyro.runs.settings import ConfigError, build

LETTERS = ["A", "B", "C", "D"]
QUESTIONS = "id,question,choice_1,choice_2,choice_3,label\n"
TEXTS = "id,text,class\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(count: int) -> str:
    """Rows of texts of two classes, without a header."""
    names, verbs = ("dog", "cat"), ("runs", "sings", "sleeps")
    return "".join(
        f"t{i},the {names[i % 2]} {verbs[i % 3]} {'a ' * (i // 6)},{names[i % 2]}\n"
        for i in range(count)
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_of_questions(tmp_path, encoding, newline):
    rows = QUESTIONS + 'a,"Größe, how\nlarge?",x,"y, z",,1\n\nb,Why?,x,y,z,\n'
    path = write(tmp_path / "q.csv", rows.replace("\n", newline).encode(encoding))
    assert read_records(path) == [
        Record("a", f"Größe, how{newline}large?", ("x", "y, z"), 1),
        Record("b", "Why?", ("x", "y", "z")),
    ]


def test_csv_of_questions_needs_neither_ids_nor_labels(tmp_path):
    path = write(tmp_path / "q.csv", "question,choice_1,choice_2\nWhy?,x,y\nHow?,x,y\n")
    assert read_records(path) == [
        Record("1", "Why?", ("x", "y")),
        Record("2", "How?", ("x", "y")),
    ]


#: what a file of our own fields holds → the records by hand
ALIKE = {
    "no ids": ({"label": [0, 2]}, [("1", 0), ("2", 2)]),
    "whole-number ids": ({"id": [7, 8], "label": [0, 2]}, [("7", 0), ("8", 2)]),
    "other fields": ({"label": [0, 2], "source": ["a", "b"]}, [("1", 0), ("2", 2)]),
    "letters": ({"label": ["C", "b"]}, [("1", 2), ("2", 1)]),
    "texts": ({"label": ["red", "sky"]}, [("1", 1), ("2", 2)]),
    "from 1": ({"label": [3, 1]}, [("1", 2), ("2", 0)]),
    "no labels": ({}, [("1", None), ("2", None)]),
    "some labels": ({"label": [None, 0]}, [("1", None), ("2", 0)]),
}


@pytest.mark.parametrize("name", ALIKE)
def test_files_of_our_own_fields_are_read_alike(tmp_path, name):
    columns, expected = ALIKE[name]
    choices = [("grass", "red", "sea"), ("ice", "fire", "sky")]
    rows = [
        {"question": question} | {column: values[i] for column, values in columns.items()}
        for i, question in enumerate(("Why?", "How?"))
    ]
    lists = [row | {"choices": list(c)} for row, c in zip(rows, choices, strict=True)]
    write(tmp_path / "q.jsonl", "".join(json.dumps(row) + "\n" for row in lists))
    datasets.Dataset.from_list(lists).to_parquet(tmp_path / "q.parquet")
    with (tmp_path / "q.csv").open("w", newline="") as file:
        numbered = ["choice_1", "choice_2", "choice_3"]
        writer = csv.DictWriter(file, [*rows[0], *numbered])
        writer.writeheader()
        for row, texts in zip(rows, choices, strict=True):
            writer.writerow(row | dict(zip(numbered, texts, strict=True)))
    by_hand = [
        Record(id, question, texts, label)
        for (id, label), question, texts in zip(expected, ("Why?", "How?"), choices, strict=True)
    ]
    for ending in ("jsonl", "csv", "parquet"):
        assert read_records(tmp_path / f"q.{ending}") == by_hand, ending


def test_tabs_may_separate_the_columns_as_pandas_writes_them(tmp_path):
    texts = ["so, so", "a\ttab", 'he said "no"', "two\nlines", " ünder "]
    frame = pandas.DataFrame({"text": texts, "class": list("aabba")})
    (tmp_path / "tsv").mkdir()
    frame.to_csv(tmp_path / "tsv" / "train.tsv", sep="\t", index=False)
    frame.to_csv(tmp_path / "train.csv", index=False)
    records = read_folder(tmp_path / "tsv")["train"]
    assert records == read_folder(tmp_path)["train"]
    assert [record.question for record in records] == texts
    path = write(tmp_path / "q.tsv", "text\tclass\nfine\ta\tb\n")
    with pytest.raises(DataError, match=r"line 2: 3 cells, but the header has 2; .*hold a tab"):
        read_records(path)
    # Elsewhere quotes are often left as they are, and would take whole lines into a cell.
    for rows in ('"open\tpos\nx\tneg\nbad"\tneg\n', '"Good" movie\tpos\n'):
        write(path, "text\tclass\n" + rows)
        with pytest.raises(DataError, match=r"line 2: .*put it in quotes, and double it"):
            read_records(path)


def test_labels_that_may_count_from_0_or_1_are_indices_in_our_own_fields(tmp_path, caplog):
    rows = "question,choice_1,choice_2,choice_3\n"
    csv_file = write(tmp_path / "q.csv", rows.replace("\n", ",label\n") + "Why?,x,y,z,1\n")
    records = [Record("1", "Why?", ("x", "y", "z"), 1)]
    for path in (csv_file, write_jsonl(tmp_path / "q.jsonl", records)):
        caplog.clear()
        assert read_records(path) == records
        assert "label holds " in caplog.text
        assert "from_0 and as from_1" in caplog.text
        assert "labels=from_1 of columns changes that" in caplog.text
        assert [r.label for r in read_records(path, columns=Columns(labels="from_1"))] == [0]
    source = DataSource(path=str(csv_file), columns=Columns(labels="from_1"))
    assert source.read()["train"][0].label == 0
    # Numbers among the choices name nothing where a number is an index.
    records = [Record("1", "1 + 1?", ("0", "2", "1"), 1), Record("2", "0?", ("1", "0", "2"), 1)]
    assert read_records(write_jsonl(tmp_path / "n.jsonl", records)) == records


def test_csv_of_texts_takes_its_classes_from_the_training_file(tmp_path):
    write(tmp_path / "train.csv", "text,class\nfine,good\nsad, bad\nso so,fair\n")
    write(tmp_path / "test.csv", "text,class\nfine,good\n")
    splits = read_folder(tmp_path)
    assert splits["train"][1] == Record("2", "sad", ("bad", "fair", "good"), 0)
    assert splits["test"] == [Record("1", "fine", ("bad", "fair", "good"), 2)]
    source = DataSource(path=str(tmp_path / "train.csv"), classes=("good", "fair", "bad"))
    assert [record.label for record in source.read()["train"]] == [0, 2, 1]
    with pytest.raises(
        DataError, match=r"test.csv, line 2: the classes are not known.* data.classes"
    ):
        DataSource(path=str(tmp_path / "test.csv")).read_split("test")


def test_how_a_run_read_its_labels_is_not_how_a_layout_of_names_is_read(tmp_path):
    path = write(tmp_path / "test.csv", "text,class\nfine,good\nsad,bad\n")
    trained = Columns(labels="from_0")
    table = read_table(path, None, trained)
    assert [r.label for r in to_records({"": table}, ("bad", "good"))[""]] == [1, 0]
    table = read_table(path, Columns(labels="from_0"), trained)
    with pytest.raises(DataError, match=r"read as from_0, .* data\.columns\.labels says otherwise"):
        to_records({"": table}, ("bad", "good"))


def test_labels_that_are_given_take_the_place_of_the_keys_of_a_run(tmp_path):
    row = {"q": "why?", "options": {"t": ["a", "b"], "k": ["1", "2"]}, "y": 1}
    path = write(tmp_path / "test.jsonl", json.dumps(row) + "\n")
    trained = Columns("q", choices="options.t", keys="options.k", label="y")
    for own, label in ((None, 0), (Columns(labels="from_0"), 1)):
        assert [r.label for r in to_records({"": read_table(path, own, trained)})[""]] == [label]


@pytest.mark.parametrize("length", [131_072, 131_073, 1_000_000])
def test_long_cells_are_read_and_the_limit_of_csv_stays(tmp_path, length):
    limit = csv.field_size_limit()
    text = "a word " * (length // 7) + "x" * (length % 7)
    assert len(text) == length
    path = write(tmp_path / "q.csv", f'question,choice_1,choice_2,label\n"{text}",x,y,1\n')
    rows = csv_rows(path)
    assert next(rows)[1]["question"] == text
    assert csv.field_size_limit() == limit  # between two rows too
    assert list(rows) == []
    assert [record.question for record in read_records(path)] == [text]
    path = write(tmp_path / "t.csv", f"text,class\n{text},good\n{text}b,bad\n")
    assert [len(r.question) for r in DataSource(path=str(path)).read()["train"]] == [
        length,
        length + 1,
    ]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no header; expected id, question"),
        (QUESTIONS, "holds no records"),
        ("id,question,choice_1,label\n", r"line 1: columns missing: \['choice_2'\]"),
        ("question,choice_1,choice_3\n", r"missing: \['choice_2'\]; found \['question'"),
        ("id;text;class\n", "line 1: ';' separates the columns: commas do in .csv"),
        ("text, class\n", r"spaces around the columns \[' class'\]: leave them out"),
        ("text,class,class\n", r"double: \['class'\]"),
        ("question,choice_2,choice_1\n", "expected the choices in order"),
        (QUESTIONS + "a,Why?,x,y,z,1\nb,Why?,x,y\n", "line 3: 4 cells, but the header has 6"),
        (QUESTIONS + "a,Why?,x,y,z,1\na,How?,x,y,z,1\n", "line 3: the id 'a' occurs twice, first"),
        (
            QUESTIONS + "a,Why?,x,y,,3\n",
            "line 2: label is 3: expected the 0-based number of a choice, 0 to 1",
        ),
        (QUESTIONS + "a,Why?,x,y,,-1\n", "line 2: label is -1"),
        (QUESTIONS + "a,Why?,x,y,,C\n", "line 2: label is 'C': expected the 0-based number"),
        (QUESTIONS + "a,Why?,x,,z,0\n", "line 2: choices holds ''"),
        (QUESTIONS + 'a,"Why?,x,y,z,0\n', "line 2: not CSV"),
        (
            QUESTIONS.encode() + b"a,\xe9t\xe9,x,y,z,0\n",
            "line 2: not UTF-8 .*save the file as UTF-8, in Excel as CSV UTF-8",
        ),
        ((QUESTIONS + "a,Why?,x,y,z,0\n").encode("utf-16"), "line 1: not UTF-8"),
        (TEXTS + "a,fine,good\nb,sad,\n", r"the column class holds \['good'\]: expected two"),
        (TEXTS + "a,,good\nb,sad,bad\n", "line 2: question is ''"),
    ],
)
def test_bad_csv_names_file_line_and_value(tmp_path, content, message):
    path = write(tmp_path / "bad.csv", content)
    with pytest.raises(DataError, match=rf"bad\.csv.*{message}"):
        DataSource(path=str(path)).read()


def test_class_names_that_do_not_exist_suggest_the_nearest(tmp_path):
    path = write(tmp_path / "bad.csv", TEXTS + "a,fine,good\nb,sad,bda\n")
    with pytest.raises(
        DataError, match=r"line 3: class is 'bda': expected one of .*did you mean 'bad'"
    ):
        DataSource(path=str(path), classes=("good", "bad")).read()


def test_files_of_other_kinds_and_two_files_for_a_split_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"x\.xlsx: expected a file that ends in \.jsonl, \.csv, \.tsv, \.p"
    ):
        read_records(write(tmp_path / "x.xlsx", "a"))
    write(tmp_path / "train.csv", "")
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(DataError, match=r"train\.csv and .*train\.jsonl: expected one file"):
        read_folder(tmp_path)


# One row in the Hub's own schema, and the record that it becomes.
CHOICES = {"text": ["w", "x", "y", "z"], "label": LETTERS}
SENTENCE = {"sentence": "Ann met Bo; _ left.", "option1": "Ann", "option2": "Bo"}
ARC = {"id": "q1", "question": "Why?"}
MMLU = {"question": "Why?", "subject": "virology", "choices": CHOICES["text"]}
ROWS = {
    "openbookqa": (
        {"id": "q1", "question_stem": "Why is", "choices": CHOICES, "answerKey": "D"},
        Record("q1", "Why is", ("w", "x", "y", "z"), 3),
    ),
    "arc_easy": (
        ARC | {"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        Record("q1", "Why?", ("x", "y", "z"), 1),
    ),
    "arc_challenge": (
        ARC | {"choices": CHOICES, "answerKey": "C"},
        Record("q1", "Why?", ("w", "x", "y", "z"), 2),
    ),
    **{
        f"winogrande_{size}": (
            SENTENCE | {"answer": "2"},
            Record("train-0", SENTENCE["sentence"], ("Ann", "Bo"), 1),
        )
        for size in ("xs", "s", "m", "l")
    },
    "boolq": (
        {"question": "is it so", "passage": "It is so.", "answer": True},
        Record("train-0", "It is so.\nis it so?", ("no", "yes"), 1),
    ),
    "mmlu:virology": (MMLU | {"answer": 3}, Record("dev-0", "Why?", ("w", "x", "y", "z"), 3)),
}


def copy_of(task: str, folder: Path, row: dict) -> Path:
    return hub_copy(
        folder, {split: [row] for split in TASKS[task].splits.values()}, TASKS[task].name
    )


def test_every_data_set_has_a_row():
    assert {name.split(":")[0] for name in ROWS} == {name.split(":")[0] for name in TASKS} - {
        "embedded",
        "openbookqa_500",
    }
    assert sum(name.startswith("mmlu:") for name in TASKS) == 57


@pytest.mark.parametrize("task", ROWS)
def test_data_sets_of_the_hub(tmp_path, task):
    row, record = ROWS[task]
    splits = DataSource(task=task, hub_path=str(copy_of(task, tmp_path / "copy", row))).read()
    assert next(iter(splits.values())) == [record]
    assert set(splits) == (
        {"dev", "validation", "test"}
        if task.startswith("mmlu")
        else {"train", "test"}
        if task.startswith(("winogrande", "boolq"))
        else {"train", "validation", "test"}
    )


def test_official_validation_of_winogrande_is_the_test_split(tmp_path):
    rows = {
        split: [SENTENCE | {"sentence": f"{split} {i} _", "answer": answer} for i in range(count)]
        for split, count, answer in (("train", 20, "1"), ("validation", 3, "2"), ("test", 4, ""))
    }
    copy = hub_copy(tmp_path / "copy", rows, "winogrande_s")
    config = DataConfig(task="winogrande_s", hub_path=str(copy))
    splits = config.splits(seed=0)
    assert {name: len(records) for name, records in splits.items()} == {
        "train": 18,
        "validation": 2,
        "test": 3,
    }
    assert {record.id for record in splits["test"]} == {f"validation-{i}" for i in range(3)}
    assert config.splits(seed=0) == splits
    assert config.splits(seed=1)["validation"] != splits["validation"]


def test_changed_copies_are_read_again(tmp_path):
    row, _ = ROWS["boolq"]
    for passage in ("Before.", "After."):
        copy = copy_of("boolq", tmp_path / "copy", row | {"passage": passage})
        records = DataSource(task="boolq", hub_path=str(copy)).read_split("test")
        assert records[0].question.startswith(passage)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "openbookqa",
            {"answerKey": "E"},
            "allenai/openbookqa, row train-0: answerKey is 'E': expected",
        ),
        ("winogrande_s", {"answer": "3"}, "answer is 3: expected the 1-based number of a choice"),
        ("mmlu:virology", {"answer": -1}, "row dev-0: answer is -1: expected the 0-based number"),
        ("boolq", {"passage": None}, None),
    ],
)
def test_rows_of_another_schema_are_refused(tmp_path, task, change, message):
    row = ROWS[task][0] | change
    if message is None:
        del row["passage"]
        message = "google/boolq, row train-0: no column 'passage'; found"
    with pytest.raises(DataError, match=message):
        DataSource(task=task, hub_path=str(copy_of(task, tmp_path / "copy", row))).read()


def test_copies_that_are_incomplete_are_refused(tmp_path):
    row, _ = ROWS["boolq"]
    copy = hub_copy(tmp_path / "copy", {"train": [row]})
    with pytest.raises(DataError, match=r"copy lacks the splits \['validation'\]: found"):
        DataSource(task="boolq", hub_path=str(copy)).read()
    with pytest.raises(DataError, match=r"cannot read virology of .*'virology' not found"):
        DataSource(task="mmlu:virology", hub_path=str(copy)).read()
    next(copy.rglob("*.parquet")).write_bytes(b"torn")
    with pytest.raises(DataError, match=r"cannot read default of .*hf download"):
        DataSource(task="boolq", hub_path=str(copy)).read()
    with pytest.raises(DataError, match="there is no folder nowhere"):
        DataSource(task="boolq", hub_path="nowhere").read()


def test_without_network_the_error_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    help = "hf download --repo-type dataset allenai/openbookqa --local-dir COPY.*data.root="
    with pytest.raises(DataError, match=help):
        DataSource(task="openbookqa").read()


def test_embedded_world_is_a_data_set():
    splits = DataConfig(task="embedded").splits(seed=0)
    assert set(splits) == {"train", "validation", "test", "unseen", "shifted"}
    with pytest.raises(DataError, match="has no copies"):
        DataSource(task="embedded", hub_path="x").read()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data.root is None, data.task is None, data.hub is None: give exactly one"),
        (
            {"root": "a", "task": "boolq"},
            "give exactly one, and data.task=null takes a default task away",
        ),
        ({"task": "openbokqa"}, "no data set 'openbokqa'; did you mean openbookqa"),
        ({"task": "mmlu:college_fysics"}, "did you mean mmlu:college_physics"),
        ({"task": "zzz"}, r"no data set 'zzz'; expected one of .*'mmlu:<subject>'"),
        ({"root": "a", "hub_path": "b"}, "says something about data.task or data.hub alone"),
        ({"root": "a", "name": "b"}, "data.name is 'b', which says something about data.hub"),
        ({"task": "boolq", "revision": "b"}, "data.revision is 'b', which says something"),
        ({"path": "a", "split_names": {"test": "b"}}, "says something about data.hub or data.root"),
        ({"task": "boolq", "columns": {"label": "a"}}, "about data.path or data.root or data.hub"),
        ({"root": "a", "columns": {"labels": "roman"}}, "columns.labels is 'roman': expected"),
        ({"root": "a", "columns": {"keys": "k", "labels": "letters"}}, "give one of them"),
        ({"root": "a", "classes": ["x"]}, r"data.classes is \['x'\]: expected two"),
        ({"root": "a", "limit": 500}, "limit is 500: expected a mapping, as limit.KEY=VALUE"),
        ({"root": "a", "limit": {"train": 1}}, "data.limit.train is 1: expected 2"),
        ({"root": "a", "limit": {"test": 0}}, "data.limit.test is 0: expected 1"),
        ({"root": "a", "validation_fraction": 1.0}, "data.validation_fraction is 1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, values)


def test_one_file_gives_training_and_validation_that_do_not_mix(tmp_path, caplog):
    twice = [*make_records(20), *make_records(20)]
    records = [Record(f"r{i}", r.question, r.choices, r.label) for i, r in enumerate(twice)]
    path = write_jsonl(tmp_path / "own.jsonl", records)
    splits = DataConfig(path=str(path)).splits(seed=0)
    questions = {name: {r.question for r in records} for name, records in splits.items()}
    assert set(splits) == {"train", "validation"}
    assert not questions["train"] & questions["validation"]
    assert "questions of train that are also in validation" in caplog.text
    assert len(DataConfig(path=str(path), limit={"train": 7}).splits(seed=0)["train"]) == 7


def test_records_without_a_label_cannot_be_trained_on(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", make_records(20, labelled=False))
    with pytest.raises(DataError, match=r"the record 'q\d+' of the split \w+ has no label"):
        DataConfig(path=str(path)).splits(seed=0)


@pytest.fixture
def own(tmp_path, monkeypatch, local_model):
    """The words of a command that trains on 200 texts with class names."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.csv", TEXTS + texts(200))
    return [f"model.name={local_model}", "data.path=own.csv", "model.prompt=classes", *FAST]


def test_own_texts_are_trained_on_evaluated_and_predicted(own, tmp_path, capsys):
    assert scalabl("train", *own, "run_dir=out") == 0
    assert json.loads((tmp_path / "out" / "posterior.json").read_text())["classes"]["words"] == [
        "cat",
        "dog",
    ]
    # The file holds one class of the two: its names are those of the run.
    write(tmp_path / "new.csv", TEXTS + "n,the red dog runs,dog\n")
    capsys.readouterr()
    quiet = ["run=out", "progress=false"]
    assert scalabl("evaluate", *quiet, "data.path=new.csv") == 0
    metrics = json.loads(capsys.readouterr().out)
    write(tmp_path / "in.csv", "text\nthe red dog runs\n")
    assert scalabl("predict", *quiet, "input=in.csv", "output=o.jsonl") == 0
    answer = json.loads((tmp_path / "o.jsonl").read_text())
    assert metrics["acc"] == float(answer["answer"] == "dog")

    other = [Record("a", "the dog runs", ("dog", "cat"), 0)]
    write_jsonl(tmp_path / "other" / "test.jsonl", other)
    capsys.readouterr()
    assert scalabl("evaluate", *quiet, "data.root=other") == 1
    error = capsys.readouterr().err
    assert "labels are read as names, as given or as the run was trained: data.columns" in error
    indices = "data.columns.labels=from_0"
    assert scalabl("evaluate", *quiet, "data.root=other", indices) == 1
    assert "but the classes are ['cat', 'dog']" in capsys.readouterr().err


def test_a_run_is_evaluated_on_another_data_set(local_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "own.jsonl", make_records(30))
    words = [f"model.name={local_model}", "data.path=own.jsonl", "run_dir=out", *FAST]
    assert scalabl("train", *words) == 0
    copy = copy_of("mmlu:virology", tmp_path / "copy", MMLU | {"answer": 1})
    where = ["run=out", "data.task=mmlu:virology", f"data.hub_path={copy}", "progress=false"]
    capsys.readouterr()
    assert scalabl("evaluate", *where) == 0
    assert json.loads(capsys.readouterr().out)["acc"] in (0.0, 1.0)
    assert scalabl("evaluate", *where, "split=tset") == 1
    assert "no split 'tset'; the data set has ['dev', 'test', 'validation']" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.path=bad.csv"], "bad.csv, line 4: the id 't0' occurs twice"),
        (["data.classes=[cat,bird]"], "own.csv, line 2: class is 'dog'"),
        (["data.path=null", "data.task=openbookqua"], "did you mean openbookqa?"),
        (["data.path=null", "data.task=mmlu:virology", "data.hub_path=copy"], "no split 'train'"),
    ],
)
def test_bad_data_is_one_error_and_leaves_nothing(own, tmp_path, capsys, words, message):
    write(tmp_path / "bad.csv", TEXTS + texts(2) + texts(1))
    copy_of("mmlu:virology", tmp_path / "copy", MMLU | {"answer": 1})
    before = sorted(tmp_path.rglob("*"))
    assert scalabl("train", *own, "run_dir=out", *words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_records_with_other_choices_than_the_runs_are_refused(own, tmp_path, capsys):
    assert scalabl("train", *own, "run_dir=out") == 0
    quiet = ["run=out", "progress=false"]
    for choices in (("dog", "cat"), ("red", "blue")):
        write_jsonl(tmp_path / "in.jsonl", [Record("1", "the red dog runs", choices)])
        assert scalabl("predict", *quiet, "input=in.jsonl", "output=o.jsonl") == 1
        assert "but the classes are ['cat', 'dog'], in this order" in capsys.readouterr().err
    write(tmp_path / "new.csv", TEXTS + "n,the red dog runs,dog\n")
    assert scalabl("evaluate", *quiet, "data.path=new.csv", "data.classes=[dog,cat]") == 1
    assert "but the classes are ['cat', 'dog'], in this order" in capsys.readouterr().err


def test_data_saved_to_disk_is_told_from_a_folder_of_files(tmp_path):
    """Of splits it is read; of one table it is said how to write it."""
    rows = [{"question": "a", "choices": ["x", "y"], "label": n % 2} for n in range(4)]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"one is a folder: expected one file; data\.root"):
        read_records(tmp_path / "one")
    for name in ("one", "two"):
        with pytest.raises(DataError, match=r"saved by save_to_disk: give data\.hub=.*to_parquet"):
            read_folder(tmp_path / name)
    with pytest.raises(DataError, match=r"one table saved by save_to_disk, .*to_parquet"):
        DataSource(hub=str(tmp_path / "one")).read()
    records = DataSource(hub=str(tmp_path / "two")).read()
    assert [record.label for record in records["train"]] == [0, 1, 0, 1]
    table.to_parquet(tmp_path / "written" / "train.parquet")
    assert len(read_folder(tmp_path / "written")["train"]) == 4


def test_rows_in_memory_are_read_as_those_of_files():
    rows = [
        {"stem": f"q{n}", "choices": {"text": ["x", "y", "z"]}, "answerKey": "ABC"[n % 3]}
        for n in range(4)
    ]
    columns = Columns("stem", "choices.text", "answerKey")
    expected = [Record(str(n + 1), f"q{n}", ("x", "y", "z"), n % 3) for n in range(4)]
    assert read_rows(rows, columns=columns) == expected
    assert read_rows(datasets.Dataset.from_list(rows), columns=columns) == expected

    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"])
    )
    texts = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    read = read_rows(texts, columns=Columns(question="text"))
    assert read == [Record("1", "a", ("bad", "good"), 1), Record("2", "b", ("bad", "good"), 0)]
    assert [r.choices for r in read_rows([{"question": "a"}], ["no", "yes"])] == [("no", "yes")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows"),
        (["a text"], "row 1: found str: expected a dictionary"),
        ([{"question": "a", "choices": ["x", "y"], "label": 5}], "row 1.* 5"),
    ],
)
def test_bad_rows_in_memory_are_named(rows, message):
    with pytest.raises(DataError, match=message):
        read_rows(rows)
