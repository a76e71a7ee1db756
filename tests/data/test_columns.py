"""Data of other layouts, in the schemas that real data sets have, against records by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pandas
import pytest
import yaml
from conftest import FAST, hub_copy, make_records, scalabl, write_jsonl

from scalabl_pyro import Record
from scalabl_pyro.data import (
    Columns,
    Completion,
    DataError,
    DataSource,
    read_completions,
    read_folder,
    read_records,
    subsample,
)
from scalabl_pyro.runs.data import DataConfig
from scalabl_pyro.runs.settings import build

Splits = dict[str, list[dict]]


def choices(labels: str, *texts: str) -> dict[str, list[str]]:
    return {"text": list(texts), "label": list(labels)}


OPENBOOKQA = [
    {
        "id": "7-980",
        "question_stem": "The sun is responsible for",
        "choices": choices("ABCD", "puppies learning", "children growing", "flowers", "plants"),
        "answerKey": "D",
    },
    {
        "id": "7-584",
        "question_stem": "When standing miles away from Mount Rushmore",
        "choices": choices("ABCD", "smaller", "larger", "the same", "gone"),
        "answerKey": "A",
    },
]
ARC = [
    {
        "id": "Mercury_7175875",
        "question": "Which cools a room?",
        "choices": choices("ABC", "a fan", "a stove", "a lamp"),
        "answerKey": "A",
    },
    {
        "id": "NYSEDREGENTS_1",
        "question": "Which is a metal?",
        "choices": choices("1234", "wood", "glass", "iron", "wool"),
        "answerKey": "3",
    },
]
WINOGRANDE = [
    {"sentence": "Ann met Bo; _ left.", "option1": "Ann", "option2": "Bo", "answer": "2"},
    {"sentence": "Cy called Di; _ came.", "option1": "Cy", "option2": "Di", "answer": "1"},
]
BOOLQ = [
    {"question": "is ice cold", "answer": True, "passage": "Ice is frozen."},
    {"question": "is fire cold", "answer": False, "passage": "Fire burns."},
]
AG_NEWS = [
    {"text": "Stocks fall", "label": 2},
    {"text": "Cup final", "label": 1},
    {"text": "New chip", "label": 3},
    {"text": "Talks begin", "label": 0},
]
AG_NAMES = ("World", "Sports", "Business", "Sci/Tech")
MMLU = [{"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1}]
LETTERS = datasets.ClassLabel(names=["A", "B", "C", "D"])

#: rows, the columns that suit them, other settings, types, and the records by hand
SCHEMAS = {
    "openbookqa": (
        OPENBOOKQA,
        Columns("question_stem", "choices.text", "answerKey"),
        {},
        {},
        [
            Record(
                "7-980",
                "The sun is responsible for",
                ("puppies learning", "children growing", "flowers", "plants"),
                3,
            ),
            Record(
                "7-584",
                "When standing miles away from Mount Rushmore",
                ("smaller", "larger", "the same", "gone"),
                0,
            ),
        ],
    ),
    "arc": (
        ARC,
        Columns(choices="choices.text", label="answerKey", keys="choices.label"),
        {},
        {},
        [
            Record("Mercury_7175875", "Which cools a room?", ("a fan", "a stove", "a lamp"), 0),
            Record("NYSEDREGENTS_1", "Which is a metal?", ("wood", "glass", "iron", "wool"), 2),
        ],
    ),
    "winogrande": (
        WINOGRANDE,
        Columns("sentence", ("option1", "option2"), "answer"),
        {},
        {},
        [
            Record("train-0", "Ann met Bo; _ left.", ("Ann", "Bo"), 1),
            Record("train-1", "Cy called Di; _ came.", ("Cy", "Di"), 0),
        ],
    ),
    "boolq": (
        BOOLQ,
        Columns("{passage} {question}?", label="answer"),
        {"classes": ("no", "yes")},
        {},
        [
            Record("train-0", "Ice is frozen. is ice cold?", ("no", "yes"), 1),
            Record("train-1", "Fire burns. is fire cold?", ("no", "yes"), 0),
        ],
    ),
    "ag_news": (
        AG_NEWS,
        Columns("text"),
        {},
        {"label": datasets.ClassLabel(names=list(AG_NAMES))},
        [
            Record("train-0", "Stocks fall", AG_NAMES, 2),
            Record("train-1", "Cup final", AG_NAMES, 1),
            Record("train-2", "New chip", AG_NAMES, 3),
            Record("train-3", "Talks begin", AG_NAMES, 0),
        ],
    ),
    "ag_news renamed": (
        AG_NEWS[:1],
        Columns("text", labels="from_0"),
        {"classes": ("world", "sport", "money", "science")},
        {"label": datasets.ClassLabel(names=list(AG_NAMES))},
        [Record("train-0", "Stocks fall", ("world", "sport", "money", "science"), 2)],
    ),
    "ag_news in another order": (
        AG_NEWS[:1],
        Columns("text"),
        {"classes": AG_NAMES[::-1]},
        {"label": datasets.ClassLabel(names=list(AG_NAMES))},
        [Record("train-0", "Stocks fall", AG_NAMES[::-1], 1)],
    ),
    "mmlu": (
        MMLU,
        Columns(label="answer"),
        {},
        {"answer": LETTERS},
        [Record("train-0", "2 + 2?", ("3", "4", "5", "6"), 1)],
    ),
    # Encoded from the letters that occur: the code of D is 2.
    "letters that were encoded": (
        [{"question": "2 + 2?", "choices": ["3", "5", "6", "4"], "label": 2}],
        Columns(),
        {},
        {"label": datasets.ClassLabel(names=["A", "C", "D"])},
        [Record("train-0", "2 + 2?", ("3", "5", "6", "4"), 3)],
    ),
    "names": (
        [{"q": "2 + 2?", "key": 17, "opts": ["three", "four"], "a": "four"}],
        Columns("q", "opts", "a", "key"),
        {},
        {},
        [Record("17", "2 + 2?", ("three", "four"), 1)],
    ),
    "choices that are records": (
        [{"question": "2 + 2?", "options": [{"t": "3"}, {"t": "4"}], "label": 0}],
        Columns(choices="options.t", labels="from_0"),
        {},
        {},
        [Record("train-0", "2 + 2?", ("3", "4"), 0)],
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_data_sets_of_the_hub_by_their_columns(tmp_path, name):
    rows, columns, settings, types, records = SCHEMAS[name]
    copy = str(hub_copy(tmp_path / "copy", {"train": rows}, **types))
    source = DataSource(hub="owner/name", hub_path=copy, columns=columns, **settings)
    assert source.read() == {"train": records}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_the_same_columns_in_files(tmp_path, name, ending):
    """JSON has no class labels: their names are in the rows instead."""
    rows, columns, settings, types, records = SCHEMAS[name]
    if ending == "parquet":
        table = datasets.Dataset.from_list(rows)
        for column, feature in types.items():
            table = table.cast_column(column, feature)
        table.to_parquet(tmp_path / "train.parquet")
    elif types:
        pytest.skip("has class labels")
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "train.jsonl").write_text(text)
    expected = [
        replace(record, id=str(i)) if record.id.startswith("train-") else record
        for i, record in enumerate(records, start=1)
    ]
    classes = settings.get("classes", ())
    splits = DataSource(
        path=str(tmp_path / f"train.{ending}"), columns=columns, classes=classes
    ).read()
    assert splits == {"train": expected}
    assert read_folder(tmp_path, classes, columns) == {"train": expected}


def test_a_table_that_a_spreadsheet_exported(tmp_path):
    path = tmp_path / "quiz.csv"
    path.write_text(
        "Nr,Question,a,b,c,d,Answer,Remark\n"
        "q1,Which is a metal?,wood,iron,wool,glass,B,easy\n"
        "q2,Is ice cold?,yes,no,,,a,\n"
        'q3,"Which is red, mostly?",grass,sky,blood,sand,C,\n'
    )
    columns = Columns("Question", ("a", "b", "c", "d"), "Answer", "Nr")
    assert read_records(path, columns=columns) == [
        Record("q1", "Which is a metal?", ("wood", "iron", "wool", "glass"), 1),
        Record("q2", "Is ice cold?", ("yes", "no"), 0),
        Record("q3", "Which is red, mostly?", ("grass", "sky", "blood", "sand"), 2),
    ]


def test_texts_with_classes_in_columns_of_other_names(tmp_path):
    (tmp_path / "train.csv").write_text("review,stars\nfine,good\nsad,bad\n")
    (tmp_path / "test.csv").write_text("review,stars\nso,good\nnew,\n")
    splits = read_folder(tmp_path, columns=Columns("review", label="stars"))
    assert splits == {
        "train": [Record("1", "fine", ("bad", "good"), 1), Record("2", "sad", ("bad", "good"), 0)],
        "test": [Record("1", "so", ("bad", "good"), 1), Record("2", "new", ("bad", "good"))],
    }


def test_numbers_are_names_of_classes_too(tmp_path, caplog):
    rows = "fine,5\nsad,1\nso so,3\n"
    for name, header in (("mapped", "review,stars\n"), ("own", "text,class\n")):
        (tmp_path / f"{name}.csv").write_text(header + rows)
    table = [{"review": line.split(",")[0], "stars": int(line[-1])} for line in rows.splitlines()]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "mapped.parquet")
    columns = Columns("review", label="stars")

    def labels(path: str, columns: Columns = columns, **settings: object) -> list[str]:
        source = build(
            DataSource, {"path": str(tmp_path / path), "columns": columns, **settings}, "data."
        )
        return [record.choices[record.label] for record in source.read()["train"]]

    assert labels("own.csv", Columns()) == ["5", "1", "3"]
    assert not caplog.text
    assert labels("mapped.csv") == ["5", "1", "3"]
    assert "['1', '3', '5'], are taken as the names of classes: give data.classes" in caplog.text
    assert labels("mapped.parquet") == ["5", "1", "3"]
    for classes in ([1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"], (1, 2, 3, 4, 5)):
        for path, read in (("own.csv", Columns()), ("mapped.csv", columns)):
            assert labels(path, read, classes=classes) == ["5", "1", "3"]
    assert DataSource(root="a", classes=(1, 2)).classes == ("1", "2")
    # Of five classes some may not occur, and the numbers of those that do are names all the same.
    (tmp_path / "few.csv").write_text("review,stars\nfine,3\nsad,1\n")
    assert labels("few.csv", classes=[1, 2, 3, 4, 5]) == ["3", "1"]
    # Numbers of classes with other names are indices.
    (tmp_path / "few.csv").write_text("review,stars\nfine,1\nsad,0\n")
    assert labels("few.csv", classes=["bad", "good"]) == ["good", "bad"]
    assert labels("few.csv", classes=[1, 2]) == ["2", "1"]


def quiz(folder: Path, labels: list[object], count: int = 4, name: str = "quiz.jsonl") -> str:
    rows = [
        {"question": f"q{i}", "choices": [f"c{j}" for j in range(count)], "label": label}
        for i, label in enumerate(labels)
    ]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("labels", "indices"),
    [
        ([0, 2, 1], [0, 2, 1]),  # a 0: from 0
        ([1, 4, 2], [0, 3, 1]),  # a 4 of four: from 1
        (["1", "2", "0"], [1, 2, 0]),
        (["4", "3"], [3, 2]),
        ([3.0, 0.0], [3, 0]),
        (["A", "d"], [0, 3]),
        (["c1", "c0"], [1, 0]),
    ],
)
def test_how_labels_count_is_decided_by_the_data(tmp_path, labels, indices):
    columns = Columns(id="question")  # any setting: the layout is not the records' own
    records = read_records(quiz(tmp_path, labels), columns=columns)
    assert [record.label for record in records] == indices


@pytest.mark.parametrize("labels", [[1, 2, 3], ["1", "3"], [2]])
def test_labels_that_may_count_from_0_or_1_are_refused(tmp_path, labels):
    path = quiz(tmp_path, labels)
    message = (
        r"quiz.jsonl, line 1: label holds .* can be read as from_0 and as from_1, with different"
        r" answers: give data.columns.labels=from_0 or data.columns.labels=from_1"
    )
    with pytest.raises(DataError, match=message):
        read_records(path, columns=Columns(id="question"))
    for labelling, first in (("from_0", 0), ("from_1", 1)):
        records = read_records(path, columns=Columns(labels=labelling))
        assert [record.label for record in records] == [int(label) - first for label in labels]


def test_all_splits_decide_together(tmp_path):
    quiz(tmp_path, [1, 2, 3], name="train.jsonl")
    quiz(tmp_path, [3, 4], name="test.jsonl")
    splits = read_folder(tmp_path, columns=Columns(id="question"))
    assert {n: [r.label for r in s] for n, s in splits.items()} == {
        "train": [0, 1, 2],
        "test": [2, 3],
    }


def test_letters_that_are_also_choices_are_refused_where_the_two_differ(tmp_path):
    rows = [{"question": "q", "choices": ["B", "A"], "label": "A"}]
    (tmp_path / "x.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="can be read as letters and as names"):
        read_records(tmp_path / "x.jsonl", columns=Columns(id="question"))
    for labels, index in (("letters", 0), ("names", 1)):
        columns = Columns(labels=labels)
        assert read_records(tmp_path / "x.jsonl", columns=columns)[0].label == index


ROW = {"question": "q", "choices": ["x", "y"], "label": 0}


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (ROW, {"question": "q"}, "no column 'q'; found .*; data.columns.question says which"),
        (ROW, {"choices": ("a", "b")}, "no column 'a'; found"),
        (ROW, {"choices": "choices.text"}, "no column 'choices.text'; found"),
        (ROW, {"label": "answer"}, "no column 'answer'; found .*; data.columns.label says"),
        (ROW, {"id": "nr"}, "no column 'nr'; found"),
        (
            {"question": "q", "options": [{"key": "A", "txt": "x"}, {"key": "B", "txt": "y"}]},
            {"choices": "options"},
            "as by data.columns.choices=options.key or options.txt",
        ),
        (ROW, {"keys": "choices.label"}, "no column 'choices.label'; found"),
        (ROW | {"k": ["A"]}, {"keys": "k"}, r"k is \['A'\]: expected a list of 2 names"),
        (ROW | {"k": ["A", "B"]}, {"keys": "k"}, r"label is 0: expected one of \['A', 'B'\]"),
        (ROW | {"label": 7}, {"id": "question"}, "label is 7: expected"),
        (ROW | {"label": "z"}, {"labels": "names"}, r"label is 'z': expected one of \['x', 'y'\]"),
        (
            ROW | {"label": "c"},
            {"labels": "letters"},
            "label is 'c': expected the letter .* A to B",
        ),
        (ROW | {"label": True}, {"labels": "from_1"}, "label is True: expected the 1-based"),
        (ROW | {"label": "1.5"}, {"labels": "from_0"}, "label is '1.5': expected"),
        (
            ROW | {"choices": "x, y"},
            {"label": "label"},
            "choices is 'x, y', a str: expected a list",
        ),
        (ROW | {"choices": ["x", None]}, {"label": "label"}, "choices holds None"),
        (ROW | {"p": None}, {"question": "{p} {question}"}, "p is None: expected a text"),
        ({"text": "t", "label": 0}, {"question": "text"}, "the classes are not known, and no"),
        ({"text": "t", "label": "0"}, {"question": "text"}, "the classes are not known, and no"),
    ],
)
def test_rows_that_the_columns_do_not_fit_are_refused(tmp_path, row, columns, message):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"x.jsonl, line 1: .*{message}"):
        read_records(tmp_path / "x.jsonl", columns=Columns(**columns))


def test_labels_of_no_one_kind_name_the_odd_one_and_the_settings(tmp_path):
    path = quiz(tmp_path, ["A", "B", "3", "D"])
    message = (
        "line 3: label is 3: expected the letter of a choice, A to D.*data.columns.labels is one of"
        ".*data.columns.keys"
    )
    with pytest.raises(DataError, match=message):
        read_records(path, columns=Columns(id="question"))


def test_other_class_names_than_those_of_the_column_are_refused(tmp_path):
    feature = datasets.ClassLabel(names=["neg", "pos"])
    rows = [{"text": "fine", "label": 1}, {"text": "who knows", "label": -1}]
    copy = str(hub_copy(tmp_path / "copy", {"train": rows}, label=feature))
    source = {"hub": "owner/name", "hub_path": copy, "columns": Columns("text")}
    labels = [r.label for r in DataSource(**source).read()["train"]]
    assert labels == [1, None]  # -1: not known
    for classes in (("bad", "good"), ("neg", "neutral", "pos")):
        with pytest.raises(DataError, match=r"label has the names \['neg', 'pos'\]: give the same"):
            DataSource(**source, classes=classes).read()


def test_splits_by_name_and_validation_from_train(tmp_path):
    rows = [{"q": f"q{i}", "opts": ["x", "y"], "a": i % 2} for i in range(60)]
    splits = {"train": rows[:40], "dev": rows[40:50], "hidden": [{**rows[50], "a": -1}]}
    copy = str(hub_copy(tmp_path / "copy", splits))
    columns = Columns("q", "opts", "a")
    names = {"train": "train", "test": "dev", "validation": None}
    config = DataConfig(hub="owner/n", hub_path=copy, columns=columns, split_names=names)
    read = config.splits(seed=0)
    assert {name: len(records) for name, records in read.items()} == {
        "train": 36,
        "validation": 4,
        "test": 10,
    }
    assert {r.id for r in read["test"]} == {f"dev-{i}" for i in range(10)}
    assert config.splits(seed=0) == read
    with pytest.raises(DataError, match="row hidden-0: a is -1: expected"):
        DataSource(hub="owner/n", hub_path=copy, columns=columns).read()
    wrong = DataSource(hub="o/n", hub_path=copy, columns=columns, split_names={"test": "tset"})
    with pytest.raises(DataError, match=r"lacks the splits \['tset'\]: found \['dev', 'hidden'"):
        wrong.read()


def test_files_of_a_folder_have_other_names_too(tmp_path):
    write_jsonl(tmp_path / "fit.jsonl", make_records(6))
    write_jsonl(tmp_path / "held.jsonl", make_records(3))
    write_jsonl(tmp_path / "notes.jsonl", make_records(2))
    source = DataSource(root=str(tmp_path), split_names={"train": "fit", "test": "held"})
    assert source.read() == {"train": make_records(6), "test": make_records(3)}
    with pytest.raises(DataError, match=r"lacks the splits \['hold'\]: found \['fit', 'held', "):
        DataSource(root=str(tmp_path), split_names={"test": "hold"}).read()


def test_the_name_and_the_revision_reach_datasets(monkeypatch):
    asked = []

    def load_dataset(path, name, **options):
        asked.append((path, name, options["revision"]))
        return datasets.DatasetDict(train=datasets.Dataset.from_list([ROW | {"extra": 1}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = DataSource(hub="o/n", name="sub", revision="v2", columns=Columns(labels="from_0"))
    assert source.read() == {"train": [Record("train-0", "q", ("x", "y"), 0)]}
    assert asked == [("o/n", "sub", "v2")]


def test_scripts_are_never_run(tmp_path):
    (tmp_path / "copy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="cannot read"):
        DataSource(hub="o/copy", hub_path=str(tmp_path)).read()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1 torn", b"question,label\n"])
def test_damaged_parquet_is_refused(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet: not Parquet \("):
        read_records(tmp_path / "x.parquet")


def test_samples_are_the_same_in_every_run_and_hold_smaller_ones():
    records = make_records(100)
    samples = {count: subsample(records, count) for count in (1, 10, 50, 99)}
    for count, sample in samples.items():
        assert len({record.id for record in sample}) == count
        assert sample == [record for record in records if record in sample]  # in their order
        assert sample == subsample(make_records(100), count)
    assert {r.id for r in samples[10]} < {r.id for r in samples[50]} < {r.id for r in samples[99]}
    assert samples[10] != records[:10]
    assert subsample(records, 100) == subsample(records, 1000) == records


def test_each_split_has_a_limit_of_its_own(tmp_path):
    for name, count in (("train", 60), ("validation", 31), ("test", 32)):
        write_jsonl(tmp_path / f"{name}.jsonl", make_records(count))
    limits = {"train": 20, "test": 5, "validation": None}
    config = DataConfig(root=str(tmp_path), limit=limits)
    splits = config.splits(seed=0)
    assert {name: len(records) for name, records in splits.items()} == {
        "train": 20,
        "validation": 31,
        "test": 5,
    }
    assert splits["test"] == config.read_split("test")  # what evaluate reads
    assert config.splits(seed=1)["train"] == splits["train"]
    with pytest.raises(DataError, match="no split 'tset'; the data set has"):
        DataConfig(root=str(tmp_path), limit={"tset": 5}).splits(seed=0)


def test_own_columns_and_limits_on_the_command_line(tmp_path, local_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = ["Question,a,b,c,d,Key"]
    for record in make_records(60):
        lines.append(f"{record.question},{','.join(record.choices)},{'ABCD'[record.label]}")
    (tmp_path / "quiz.csv").write_text("\n".join(lines) + "\n")
    columns = ["question=Question", "choices=[a,b,c,d]", "label=Key"]
    own = ["data.path=quiz.csv", *(f"data.columns.{word}" for word in columns)]
    quick = ["fit.steps=2", "fit.batch_size=4", "lora.targets=[q_proj,v_proj]", "progress=false"]
    limits = ["data.limit.train=20", "data.limit.validation=4"]
    model = f"model.name={local_model}"
    assert scalabl("train", model, *own, *quick, *limits, "run_dir=out") == 0
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert re.search(r"limit:\n +train: 20\n +validation: 4\n", config)
    assert "question: Question" in config
    quiet = ["run=out", "progress=false"]
    capsys.readouterr()
    assert scalabl("evaluate", *quiet, *own, "data.limit.test=7") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["acc"] * 7 == pytest.approx(round(metrics["acc"] * 7))
    words = [f"columns.{word}" for word in columns]
    assert scalabl("predict", *quiet, *words, "input=quiz.csv", "output=o.jsonl") == 0
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 60
    assert scalabl("train", model, *own, "data.limit=500", "run_dir=x") == 1
    assert "data.limit is 500: expected a mapping, as data.limit.KEY=VALUE" in (
        capsys.readouterr().err
    )
    assert scalabl("train", model, own[0], "run_dir=x") == 1
    assert "other columns are named by data.columns" in capsys.readouterr().err


def test_settings_of_runs_before_limits_by_split_are_read():
    assert build(DataConfig, {"root": "a", "limit": None}) == DataConfig(root="a")


def test_numbers_among_choices_and_as_labels_are_texts_too(tmp_path):
    rows = [("1 + 1?", [0, 2, 1], 2), ("1 - 1?", [1, 0, 2], 0)]
    columns = Columns("q", "c", "y")
    for kind in (int, str):
        lines = [{"q": q, "c": list(map(kind, c)), "y": kind(y)} for q, c, y in rows]
        (tmp_path / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(DataError, match="can be read as from_0 and as names, with different"):
            read_records(tmp_path / "n.jsonl", columns=columns)
        records = read_records(tmp_path / "n.jsonl", columns=replace(columns, labels="names"))
        assert [record.choices[record.label] for record in records] == ["2", "0"]


def test_a_choice_that_stands_twice_decides_for_no_other_reading(tmp_path):
    rows = [("Which vowel?", ["b", "c", "a", "d"], "a"), ("pick", ["c", "d", "d", "b"], "d")]
    lines = [json.dumps(dict(zip("qcy", row, strict=True))) for row in rows]
    (tmp_path / "n.jsonl").write_text("\n".join(lines) + "\n")
    columns = Columns("q", "c", "y")
    with pytest.raises(DataError, match="can be read as letters and as names"):
        read_records(tmp_path / "n.jsonl", columns=columns)
    records = read_records(tmp_path / "n.jsonl", columns=replace(columns, labels="letters"))
    assert [record.label for record in records] == [0, 3]


def test_texts_of_parquet_files_and_of_the_hub(tmp_path):
    rows = [{"prompt": "hi", "completion": " yo"}, {"prompt": "a", "completion": " b"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    copy = str(hub_copy(tmp_path / "hub", {"train": rows}))
    from_hub = DataSource(hub="some/name", hub_path=copy).read()["train"]
    for texts in (read_records(tmp_path / "x.parquet"), from_hub):
        assert [(text.prompt, text.completion) for text in texts] == [("hi", " yo"), ("a", " b")]


def test_texts_in_columns_of_other_names(tmp_path):
    rows = [
        {"nr": 3, "instruction": "Say hi", "input": "to Ann", "output": "Hi, Ann."},
        {"nr": 4, "instruction": "Say bye", "input": "", "output": ""},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.csv").write_text(
        'nr,instruction,input,output\n3,Say hi,to Ann,"Hi, Ann."\n4,Say bye,,\n'
    )
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    columns = Columns(id="nr", prompt="{instruction}:{input}", completion="output")
    expected = [
        Completion("3", "Say hi:to Ann", "Hi, Ann."),
        Completion("4", "Say bye:", None),
    ]
    for ending in ("jsonl", "csv", "parquet"):
        assert read_completions(tmp_path / f"x.{ending}", columns) == expected
        assert DataSource(path=str(tmp_path / f"x.{ending}"), columns=columns).read() == {
            "train": expected
        }
    for unknown in (Columns(), Columns("instruction", label="output")):
        with pytest.raises(DataError, match=r"or of texts to go on with data\.columns\.prompt"):
            read_records(tmp_path / "x.jsonl", columns=unknown)
    with pytest.raises(DataError, match=r"no column 'result'; .*data.columns.completion says"):
        read_records(tmp_path / "x.jsonl", columns=replace(columns, completion="result"))
    with pytest.raises(ValueError, match="label is 'a', but prompt is 'b' and completion None"):
        Columns(label="a", prompt="b")


def test_a_class_that_is_likely_a_slip_is_told(tmp_path, caplog):
    names = ["very happy"] * 5 + ["sad"] * 4 + ["very hapy", "Sad", "Sad", "bad"]
    rows = "".join(f"text {n},{name}\n" for n, name in enumerate(names))
    (tmp_path / "train.csv").write_text("text,class\n" + rows)
    DataSource(path=str(tmp_path / "train.csv")).read()
    told = re.findall(
        r"has ('.*?') (\d+) times, a class of its own beside ('.*?') \((\d+)", caplog.text
    )
    assert told == [("'Sad'", "2", "'sad'", "4"), ("'very hapy'", "1", "'very happy'", "5")]


def test_a_text_and_its_class_are_a_layout_of_every_format(tmp_path):
    rows = [{"text": f"text {i}", "class": "ab"[i % 2], "more": i} for i in range(4)]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    pandas.DataFrame(rows).to_json(tmp_path / "a.JSONL", orient="records", lines=True)
    expected = [Record(str(i + 1), f"text {i}", ("a", "b"), i % 2) for i in range(4)]
    for name in ("a.csv", "a.parquet", "a.JSONL"):
        assert DataSource(path=str(tmp_path / name)).read()["train"] == expected, name
    # A name and its code: the name is what all formats take.
    both = pandas.DataFrame(rows).assign(label=[7, 9, 7, 9])
    both.to_csv(tmp_path / "c.csv", index=False)
    both.to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    for name in ("c.csv", "c.jsonl"):
        assert DataSource(path=str(tmp_path / name)).read()["train"] == expected, name
    # Of another split nothing may be known.
    (tmp_path / "root").mkdir()
    pandas.DataFrame(rows).to_json(tmp_path / "root/train.jsonl", orient="records", lines=True)
    (tmp_path / "root/test.jsonl").write_text('{"text": "new"}\n')
    splits = read_folder(tmp_path / "root")
    assert splits["test"] == [Record("1", "new", ("a", "b"))]
    assert splits["train"] == expected
    # As most data sets of the Hub have it.
    frame = pandas.DataFrame(rows).rename(columns={"class": "label"})
    frame.to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    assert DataSource(path=str(tmp_path / "b.jsonl")).read()["train"] == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([True, False], r"holds \[True, False\]: expected texts or whole .* names of False and"),
        ([1.0, 2.0], r"holds \[1\.0, 2\.0\]: expected texts or whole numbers; give data\.classes"),
    ],
)
def test_labels_that_are_no_names_are_named(tmp_path, labels, message):
    rows = [{"text": "x", "meta": {"spam": label}} for label in labels]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns(question="text", label="meta.spam")
    with pytest.raises(DataError, match=f"the column meta.spam {message}"):
        DataSource(path=str(path), columns=columns).read()
    named = DataSource(path=str(path), columns=columns, classes=("no", "yes")).read()["train"]
    assert [record.label for record in named] == ([1, 0] if labels[0] is True else [0, 1])


def test_the_classes_of_a_nested_column_are_known(tmp_path):
    rows = [{"text": "x", "meta": {"kind": kind}} for kind in ("b", "a", "b")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns(question="text", label="meta.kind")
    records = DataSource(path=str(path), columns=columns).read()["train"]
    assert [(record.choices, record.label) for record in records] == [
        (("a", "b"), 1),
        (("a", "b"), 0),
        (("a", "b"), 1),
    ]


def test_what_other_programs_write_for_nothing_is_told(tmp_path, caplog):
    path = tmp_path / "a.csv"
    path.write_text("text,class\nx,a\ny,b\nz,NaN\nu,null\nv,none\n")
    DataSource(path=str(path)).read()
    assert "the column class has ['NaN', 'null'], which become classes: empty these" in caplog.text


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ("text,class\nx,1\n", {"classes": ("a", "b")}, "numbers data.columns.labels=from_0"),
        ("text,class\nx,c\n", {"classes": ("a", "b")}, "or give data.classes, the names of all"),
        ("id,text,class\n7,x,a\n7,y,b\n", {}, "name another column by data.columns.id"),
    ],
)
def test_errors_of_labels_and_ids_say_what_helps(tmp_path, rows, settings, message):
    path = tmp_path / "a.csv"
    path.write_text(rows)
    with pytest.raises(DataError, match=message):
        DataSource(path=str(path), **settings).read()


def test_a_file_has_the_limit_of_the_split_that_it_is(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_records(9))
    assert len(DataSource(path=str(path), limit={"test": 4}).read_split("test")) == 4
    source = DataSource(path=str(path), limit={"train": 4})
    with pytest.raises(ValueError, match=r"data.limit.train is 4, and .* is one split, test: give"):
        source.read_split("test")


@pytest.mark.parametrize("prompt", ["letters", "classes"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_run_keeps_the_classes_and_how_labels_were_read(
    tmp_path, local_model, monkeypatch, capsys, ending, prompt
):
    """Files of later are read as those that trained it, or refused."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"the {word} runs", "class": word} for word in ["dog", "cat"] * 20 + ["blue"] * 10
    ]
    frame = pandas.DataFrame(rows)
    for name in ("own.csv", "new.csv"):
        frame.to_csv(name, index=False)
    for name in ("own.jsonl", "new.jsonl"):
        frame.to_json(name, orient="records", lines=True)
    model = [f"model.name={local_model}", f"model.prompt={prompt}", *FAST]
    assert scalabl("train", *model, f"data.path=own.{ending}", "run_dir=out") == 0
    settings = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert settings["data"]["classes"] == ["blue", "cat", "dog"]
    assert settings["data"]["columns"]["labels"] == "names"
    (tmp_path / "in.jsonl").write_text('{"question": "the dog runs"}\n')
    quiet = ["run=out", "progress=false"]
    assert scalabl("predict", *quiet, "input=in.jsonl", "output=o.jsonl") == 0
    answer = json.loads((tmp_path / "o.jsonl").read_text())
    assert answer["answer"] in ("blue", "cat", "dog")
    capsys.readouterr()
    metrics = []
    for name in ("new.csv", "new.jsonl"):
        assert scalabl("evaluate", *quiet, f"data.path={name}") == 0
        metrics.append(json.loads(capsys.readouterr().out)["nll"])
    assert metrics[0] == metrics[1]
    (tmp_path / "wrong.csv").write_text("text,class\nthe dog runs,dogs\n")
    assert scalabl("predict", *quiet, "input=wrong.csv", "output=w.jsonl") == 1
    error = capsys.readouterr().err
    assert "did you mean 'dog'?" in error
    assert "data.classes" not in error  # a run has its classes
    if prompt == "letters":  # which answer other questions too
        write_jsonl(tmp_path / "other.jsonl", make_records(4, choices=3))
        own = [*quiet, "data.path=other.jsonl", "data.columns.labels=from_0"]
        assert scalabl("evaluate", *own) == 0
        capsys.readouterr()
    # Codes of one's own are not the numbers of the sorted names.
    frame["class"] = frame["class"].map({"dog": 0, "cat": 1, "blue": 2})
    frame.to_json("codes.jsonl", orient="records", lines=True)
    assert scalabl("evaluate", *quiet, "data.path=codes.jsonl") == 1
    assert "class is 0: expected one of ['blue', 'cat', 'dog']" in capsys.readouterr().err
    again = [*model, f"data.path=own.{ending}", "run_dir=out", "resume=true"]
    assert scalabl("train", *again) == 0


def test_a_label_that_is_no_key_is_told_plainly(tmp_path):
    row = {"question": "q", "choices": ["x", "y"], "names": ["A", "B"], "label": "C"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="label is 'C': expected one of") as caught:
        DataSource(path=str(path), columns=Columns(keys="names")).read()
    assert "data.columns.labels" not in str(caught.value)
