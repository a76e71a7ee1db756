"""``scalabl predict unfamiliar=…``: how unlike the training data a record is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_records, scalabl, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import scalabl_pyro as sp
import scalabl_pyro.commands.predict as predict_command
from scalabl_pyro import Record
from scalabl_pyro.data import read_records

FAST = ["fit.steps=4", "fit.batch_size=4", "fit.lr=0.1", "fit.lr_guide=0.3", "progress=false"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 40), ("validation", 19), ("test", 12)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    write_jsonl(tmp_path / "in.jsonl", make_records(30, labelled=False))
    return tmp_path / "data"


@pytest.fixture
def train(local_model, data, capsys):
    def run(*words, run_dir="run"):
        where = [f"model.name={local_model}", f"data.root={data}", f"run_dir={run_dir}"]
        assert scalabl("train", *where, *FAST, "model.dtype=float32", *words) == 0
        capsys.readouterr()
        return Path(run_dir)

    return run


def predicted(*words, run="run", output="o.jsonl"):
    settings = [f"run={run}", "input=in.jsonl", f"output={output}", "progress=false", *words]
    assert scalabl("predict", *settings) == 0
    return [json.loads(line) for line in Path(output).read_text().splitlines()]


def features_by_hand(local_model, run, records):
    """The mean of the last hidden states of plain PEFT, which holds the posterior mean."""
    base = AutoModelForCausalLM.from_pretrained(local_model, dtype=torch.float32)
    backbone = PeftModel.from_pretrained(base, run / "adapter").eval().base_model.model.model
    ids = [torch.tensor(example.rows["input_ids"]) for example in sp.load_run(run).encode(records)]
    with torch.no_grad():
        return np.stack([backbone(i).last_hidden_state[0].mean(0).double().numpy() for i in ids])


def distances_by_hand(known, features):
    """With the covariance of Ledoit and Wolf 2004, in loops."""
    centred = known - known.mean(0)
    N, H = centred.shape
    S = sum(np.outer(row, row) for row in centred) / N
    target = np.trace(S) / H * np.eye(H)
    noise = sum(np.sum((np.outer(row, row) - S) ** 2) for row in centred) / N**2
    share = min(1.0, noise / np.sum((S - target) ** 2))
    inverse = np.linalg.inv(share * target + (1 - share) * S)
    apart = features - known.mean(0)
    return np.array([np.sqrt(row @ inverse @ row) for row in apart])


def as_high(known, score):
    return (1 + sum(other >= score for other in known)) / (len(known) + 1)


@pytest.mark.parametrize("method", ["scalabl", "mle"])
def test_distances_are_those_of_plain_features(train, local_model, data, method):
    run = train(f"method={method}")
    plain = predicted(output="plain.jsonl")
    rows = predicted("unfamiliar=mahalanobis")
    known, validation, new = (
        features_by_hand(local_model, run, read_records(path))
        for path in (data / "train.jsonl", data / "validation.jsonl", "in.jsonl")
    )
    expected, theirs = distances_by_hand(known, new), distances_by_hand(known, validation)
    for row, old, distance in zip(rows, plain, expected, strict=True):
        assert row["mahalanobis"] == pytest.approx(distance, rel=1e-3)
        near = np.abs(theirs - distance) < 1e-3 * distance
        if not near.any():
            assert row["mahalanobis_p"] == pytest.approx(as_high(theirs, distance), abs=1e-6)
        assert {k: v for k, v in row.items() if "mahalanobis" not in k} == old
    assert len({row["mahalanobis_p"] for row in rows}) > 5


def test_novelty_is_compared_with_that_of_other_records_too(train, data):
    run = sp.load_run(train())
    splits = [
        read_records(path) for path in (data / "train.jsonl", data / "test.jsonl", "in.jsonl")
    ]
    train_split, test, new = map(run.encode, splits)
    loc = run.guide.median()["s"]
    known, expected = (
        sp.novelty(run.model, train_split, split, loc=loc, batch_size=1).tolist()
        for split in (test, new)
    )
    rows = predicted("unfamiliar=novelty", f"calibration={data / 'test.jsonl'}")
    for row, share in zip(rows, expected, strict=True):
        assert row["novelty"] == pytest.approx(share, rel=1e-4)
        if not any(abs(share - other) < 1e-4 for other in known):
            assert row["novelty_p"] == pytest.approx(as_high(known, share), abs=1e-6)


def test_records_that_only_p_compares_with_need_no_labels(train, data, capsys):
    train()
    write_jsonl(Path("unlabelled.jsonl"), make_records(25, labelled=False))
    rows = predicted("unfamiliar=mahalanobis", "calibration=unlabelled.jsonl")
    assert json.loads(capsys.readouterr().out)["calibration"] == {"records": 25}
    assert all(round(row["mahalanobis_p"] * 26, 3) % 1 == 0 for row in rows)
    words = ["unfamiliar=mahalanobis", "calibration=unlabelled.jsonl", "risk=0.9"]
    assert scalabl("predict", "run=run", "input=in.jsonl", "output=n.jsonl", *words) == 1
    assert "record 'q0' has no label" in capsys.readouterr().err


def test_an_interrupted_file_is_gone_on_with_for_the_same_comparison_alone(
    train, data, capsys, monkeypatch
):
    train()
    words = ["unfamiliar=mahalanobis", "batch_size=7"]
    whole = predicted(*words, output="whole.jsonl")
    original, calls = predict_command.predict, []

    def ends(*args, **options):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("pulled the plug")
        return original(*args, **options)

    settings = ["run=run", "input=in.jsonl", "output=o.jsonl", "progress=false", *words]
    with monkeypatch.context() as patch:
        patch.setattr(predict_command, "predict", ends)
        assert scalabl("predict", *settings) == 1
    for other in ("unfamiliar=novelty", f"calibration={data / 'test.jsonl'}"):
        assert scalabl("predict", *settings, other) == 1
        assert "was begun with other settings" in capsys.readouterr().err
    assert predicted(*words) == whole


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("mle", ["unfamiliar=age"], "unfamiliar is 'age': expected one of ['mahalanobis', 'nov"),
        ("mle", ["unfamiliar=novelty"], "method mle has no posterior over s: use unfamiliar=maha"),
        ("tfb", ["unfamiliar=novelty"], "has no posterior over s: take a run of method scalabl"),
        ("ensemble", ["unfamiliar=mahalanobis"], "method ensemble predicts by several models: le"),
        ("blob", ["unfamiliar=mahalanobis"], "method blob predicts by several models: leave it"),
    ],
)
def test_what_a_run_does_not_have_is_refused_by_name(train, capsys, method, words, message):
    train(f"method={method}", *(["method.members=2"] if method == "ensemble" else []))
    Path("data/train.jsonl").unlink()  # which is not the reason
    assert scalabl("predict", "run=run", "input=in.jsonl", "output=o.jsonl", *words) == 1
    assert message in capsys.readouterr().err
    assert not list(Path().glob("o.jsonl*"))


def test_runs_keep_the_distances_of_other_data_for_the_table(train, local_model, data):
    plain = load_file(train(run_dir="plain") / "predictions.safetensors")
    assert not any("mahalanobis" in name for name in plain), "nothing is to be told from test"
    write_jsonl(data / "unseen.jsonl", make_records(9))
    run = train()
    saved = load_file(run / "predictions.safetensors")
    known = features_by_hand(local_model, run, read_records(data / "train.jsonl"))
    for name in ("test", "unseen"):
        features = features_by_hand(local_model, run, read_records(data / f"{name}.jsonl"))
        expected = torch.tensor(distances_by_hand(known, features)).float()
        torch.testing.assert_close(saved[f"{name}.mahalanobis"], expected, rtol=1e-3, atol=1e-3)
    assert "validation.mahalanobis" not in saved
    # What they cost is no part of a prediction.
    costs = [json.loads((Path(each) / "cost.json").read_text()) for each in ("plain", "run")]
    assert costs[0]["prediction"]["forward"] == costs[1]["prediction"]["forward"]
    several = train("method=ensemble", "method.members=2", run_dir="several")
    assert "unseen.mahalanobis" not in load_file(several / "predictions.safetensors")
    assert scalabl("report", "runs=[run]", "out=page") == 0
    table = json.loads(Path("page/table.json").read_text())
    pairs = [
        (a > b) + (a == b) / 2
        for a, m in zip(saved["unseen.mahalanobis"], saved["unseen.tokens"], strict=True)
        for b, n in zip(saved["test.mahalanobis"], saved["test.tokens"], strict=True)
        if abs(m - n) <= 2
    ]
    area = table["auroc_of_mahalanobis"]["run"]["unseen"]["mean"]
    assert area == pytest.approx(float(sum(pairs)) / len(pairs), abs=1e-6)


def test_a_run_is_kept_where_there_are_no_distances(train, data, capsys):
    """There is nothing to be told apart from, or no variance to measure by."""
    write_jsonl(data / "unseen.jsonl", make_records(9))
    test = (data / "test.jsonl").rename(data / "test.kept")
    run = train(run_dir="no-test")
    assert not any("mahalanobis" in name for name in load_file(run / "predictions.safetensors"))
    test.rename(data / "test.jsonl")
    alike = [Record(f"a{n}", "the red cat", ("yes", "no", "dog", "bird"), 1) for n in range(4)]
    write_jsonl(data / "train.jsonl", alike)
    where = ["model.name=model", "data.root=data", "run_dir=alike", "model.dtype=float32"]
    assert scalabl("train", *where, *FAST) == 0
    assert "the run keeps no Mahalanobis distances" in capsys.readouterr().err
    assert (Path("alike") / "metrics.json").exists()


@pytest.mark.parametrize("words", [["data.limit.validation=5"], []], ids=["few", "many"])
def test_a_p_that_cannot_be_low_is_told(train, capsys, words):
    train(*words)
    predicted("unfamiliar=mahalanobis")
    assert ("p is 1/6 or more, as it compares with 5 records" in capsys.readouterr().err) == bool(
        words
    )


def test_records_that_trained_the_run_are_told(train, data, capsys):
    train()
    where = ["run=run", f"input={data / 'train.jsonl'}", "output=o.jsonl", "progress=false"]
    assert scalabl("predict", *where, "unfamiliar=mahalanobis") == 0
    assert "40 of 40 records trained the run: mahalanobis compares" in capsys.readouterr().err


def test_training_data_that_are_gone_are_named(train, data, capsys):
    train()
    (data / "train.jsonl").unlink()
    words = ["run=run", "input=in.jsonl", "output=o.jsonl", "unfamiliar=mahalanobis"]
    assert scalabl("predict", *words, f"calibration={data / 'test.jsonl'}") == 1
    error = capsys.readouterr().err
    assert "unfamiliar is 'mahalanobis', but the train split of the run cannot be read" in error
    assert "leave it out" in error
