"""benchmarks/quality/methods.py: its rows, its choices, and one family on tiny sizes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import make_records, tiny_bert_config, write_jsonl
from transformers import BertForMultipleChoice


@pytest.fixture
def methods():
    from benchmarks.quality import methods

    return methods


def test_every_row_has_four_trials_at_most_and_its_methods_exist(methods):
    for name, row in methods.ROWS.items():
        assert 1 <= len(row.labels) * len(row.derive) <= 4, name
        assert set(row.labels) <= methods.FAMILIES[row.family].keys()
    for family, settings in methods.FAMILIES.items():
        assert all(build().config.steps == methods.STEPS for build in settings.values()), family


def test_each_row_of_a_run_takes_what_is_best_for_itself(methods):
    class Bench:
        def cached(self, name, run):
            label, seed = name.removeprefix("MLE ").split(" seed ")
            rank = methods.ALL["MLE"].index(label)
            found = {}
            for row, best in (("MLE|", 1), ("MLE, temperature|", 3)):
                figures = dict.fromkeys(("acc", "ece", "nll", "mutual_information"), float(seed))
                found[row] = figures | {"validation_nll": abs(rank - best)}
            return found

    figures = methods.table(Bench(), ["MLE", "MLE, temperature"])
    labels = methods.ALL["MLE"]
    assert figures["chosen"] == {"MLE": labels[1], "MLE, temperature": labels[3]}
    assert figures["edges"] == ["MLE, temperature"]
    assert figures["test"]["MLE"]["nll"][0] == pytest.approx(2.0)


def test_one_family_runs_and_is_kept(methods, monkeypatch, capsys, tmp_path, tokenizer):
    torch.manual_seed(1)
    model = BertForMultipleChoice(tiny_bert_config(hidden_size=32))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split, count in (("train", 16), ("validation", 4), ("test", 6)):
        write_jsonl(tmp_path / "data" / "openbookqa" / f"{split}.jsonl", make_records(count))
    write_jsonl(tmp_path / "data" / "mmlu" / "college_physics" / "test.jsonl", make_records(5))
    monkeypatch.setattr(methods, "STEPS", 20)
    monkeypatch.setattr(methods, "SEEDS", range(2))
    rows = [name for name, row in methods.ROWS.items() if row.family == "MLE"]
    places = [f"--{name}={tmp_path / name}" for name in ("model", "data", "runs")]
    outputs = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["methods.py", *places, "--rows", *rows])
        methods.main()
        outputs.append(capsys.readouterr().out.splitlines())
    found = [json.loads(lines[-1])["figures"] for lines in outputs]
    assert found[0] == found[1]
    assert list(found[0]["test"]) == rows
    assert any(line.startswith("running") for line in outputs[0])
    assert not any(line.startswith("running") for line in outputs[1])
