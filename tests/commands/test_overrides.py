"""Words of a command as Hydra reads them, by Hydra's own parser."""

from __future__ import annotations

import json

import pytest
from conftest import FAST, make_records, scalabl
from hydra.core.override_parser.overrides_parser import OverridesParser

from scalabl_pyro.commands._overrides import as_hydra_reads, unreadable


def read(word, *, sweep=False):
    (override,) = OverridesParser.create().parse_overrides([as_hydra_reads(word, sweep=sweep)])
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return override.value()


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("data.classes=[größer,sehr groß,kleiner]", ["größer", "sehr groß", "kleiner"]),
        ("data.columns.question=Größe", "Größe"),
        ("data.columns.choices=[Ä,'Ö,x',b]", ["Ä", "Ö,x", "b"]),
        ('data.columns.question="{Straße} {b}"', "{Straße} {b}"),
        ("trunk_cache=größe (x), y=1/cache", "größe (x), y=1/cache"),
        ("runs=[runs/größe (x),runs/k0]", ["runs/größe (x)", "runs/k0"]),
        ("run_dir=runs/${method.name}", "runs/${method.name}"),
        ("fit.lr=0.001", 0.001),
    ],
)
def test_values_are_read_as_they_were_written(word, value):
    assert read(word) == value


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("data.root=größe (x),b", ["'größe (x)'", "b"]),
        ("model.prompt=letters,wörter", ["letters", "'wörter'"]),
        ("seed=range(0,3)", ["0", "1", "2"]),
    ],
)
def test_commas_part_the_values_of_a_sweep(word, values):
    assert read(word, sweep=True) == values


def test_what_cannot_be_read_is_named_with_the_fix(capsys, tmp_path):
    assert unreadable(["fit.steps=3", "a.b=c=d"]) == "a.b=c=d"
    assert scalabl("train", "fit.steps=3", "data.columns.question=a=b", "model.name=x") == 1
    shown = capsys.readouterr().err
    assert "cannot read data.columns.question=a=b: quote a value that holds" in shown
    assert "hydra.cc" not in shown
    assert scalabl("compare", "+methods.größe=[{method:{name:mle}}]") == 1
    assert "names of settings are of ASCII letters" in capsys.readouterr().err


def test_class_names_need_no_quotes(tmp_path, local_model, monkeypatch, capsys):
    """A run trains and predicts with classes and folders of other letters."""
    monkeypatch.chdir(tmp_path)
    labels = ("größer", "kleiner")
    rows = [
        {"text": record.question, "class": labels[n % 2]}
        for n, record in enumerate(make_records(12))
    ]
    (folder := tmp_path / "größe (x)").mkdir()
    for split, part in (("train", rows), ("test", rows[:4])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    words = ("data.root=größe (x)", "data.classes=[kleiner,größer]", f"model.name={local_model}")
    words += ("run_dir=runs/é", "lora.targets=[q_proj]", "model.readout=choice_likelihood", *FAST)
    assert scalabl("train", *words) == 0, capsys.readouterr().err
    assert scalabl("predict", "run=runs/é", "input=größe (x)/test.jsonl", "output=ö.jsonl") == 0
    assert '"choices": ["kleiner", "größer"]' in (tmp_path / "ö.jsonl").read_text()
