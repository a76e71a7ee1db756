"""benchmarks/quality/methods.py: its rows, its choices, and one family on tiny sizes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import make_records, tiny_bert_config, write_jsonl
from safetensors.torch import load_file
from transformers import BertForMultipleChoice


@pytest.fixture
def methods():
    from benchmarks.quality import methods

    return methods


def test_every_row_has_four_trials_or_one_more_beyond_an_edge_and_its_methods_exist(methods):
    for name, row in methods.ROWS.items():
        assert 1 <= len(row.labels) * len(row.derive) <= 5, name
        assert set(row.labels) <= methods.FAMILIES[row.family].keys()
    for family, settings in methods.FAMILIES.items():
        assert all(build().config.steps == methods.STEPS for build in settings.values()), family


def test_each_row_takes_the_trial_that_is_best_for_itself(methods, monkeypatch):
    def trial(bench, family, label, names):
        rank = methods.ALL["MLE"].index(label)
        best = {"mle": 1, "MLE, temperature": 3}
        return {f"{name}|": abs(rank - at) for name, at in best.items()}

    trained = []
    monkeypatch.setattr(methods, "trial", trial)
    monkeypatch.setattr(methods, "run_missing", lambda bench, chosen, seed: trained.append(chosen))
    monkeypatch.setattr(methods, "SEEDS", ())
    monkeypatch.setattr(methods, "aurocs", lambda bench, runs: {})
    figures, runs = methods.table(None, ["mle", "MLE, temperature"])
    labels = methods.ALL["MLE"]
    assert figures["chosen"] == {"mle": labels[1], "MLE, temperature": labels[3]}
    assert figures["edges"] == ["MLE, temperature"]
    assert runs == {"mle": [], "MLE, temperature": []}


def test_one_family_runs_and_is_kept(methods, monkeypatch, capsys, tmp_path, tokenizer):
    torch.manual_seed(1)
    model = BertForMultipleChoice(tiny_bert_config(hidden_size=32))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split, count in (("train", 16), ("validation", 4), ("test", 12)):
        write_jsonl(tmp_path / "data" / "openbookqa" / f"{split}.jsonl", make_records(count))
    for subject in ("physics", "chemistry"):
        place = tmp_path / "data" / "mmlu" / f"college_{subject}" / "test.jsonl"
        write_jsonl(place, make_records(5))
    monkeypatch.setattr(methods, "STEPS", 20)
    monkeypatch.setattr(methods, "SEEDS", range(2))
    rows = [name for name, row in methods.ROWS.items() if row.family == "MLE"]
    places = [f"--{name}={tmp_path / name}" for name in ("model", "data", "runs")]
    places.append("--dtype=float32")
    outputs = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["methods.py", *places, "--rows", *rows])
        methods.main()
        outputs.append(capsys.readouterr().out.splitlines())
    figures = [json.loads(lines[-1])["figures"] for lines in outputs]
    assert figures[0] == figures[1]
    assert list(figures[0]["metrics"]) == rows
    files = {path.stem for path in (tmp_path / "runs").glob("*.safetensors")}
    trials = {f"MLE {label} trial" for label in methods.ALL["MLE"]}
    assert set(figures[0]["float32"]) == files | trials
    assert all(line.startswith("running") for line in outputs[0][:1])
    assert not any(line.startswith("running") for line in outputs[1])
    # Against a loop over the files that the runs left.
    labels = torch.tensor([record.label for record in make_records(12)])
    row = "MLE, checkpoint ensemble"
    label = figures[0]["chosen"][row]
    nll = [
        -load_file(path)["log_probs"][torch.arange(12), labels].mean()
        for path in (tmp_path / "runs").glob(f"MLE_checkpoint_ensemble_{label}_seed_*.safetensors")
    ]
    assert len(nll) == 2
    assert figures[0]["metrics"][row]["test"]["nll"]["mean"] == pytest.approx(float(sum(nll) / 2))
    members = [
        load_file(tmp_path / "runs" / f"ensemble_of_5_{label}_seed_{seed}.safetensors")
        for label in [figures[0]["chosen"]["ensemble of 5"]]
        for seed in range(2)
    ]
    p = sum(m["log_probs"].exp() for m in members)[torch.arange(12), labels] / 2
    ensemble = figures[0]["metrics"]["ensemble of 5"]["test"]["nll"]
    assert ensemble["mean"] == pytest.approx(float(-p.log().mean()))
    assert {f"{what} by entropy" for what in ("wrong", "physics", "chemistry")} <= set(
        figures[0]["auroc"][row]
    )
    assert (tmp_path / "runs" / "report" / "report.html").exists()
