"""benchmarks/quality/causal.py on a tiny model: zero-shot figures, trials, choices, rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from conftest import make_records, write_jsonl

from scalabl_pyro.infer.svi import FitConfig


@pytest.fixture
def causal():
    from benchmarks.quality import causal

    return causal


def test_zero_shot_figures_of_every_size(causal, local_model, tmp_path):
    for name, count in (("train", 40), ("test", 30)):
        write_jsonl(tmp_path / "data" / "task" / f"{name}.jsonl", make_records(count))
    figures = causal.zero_shot(str(local_model), str(tmp_path / "data"), "task")
    assert (figures["n"], figures["n_kappa"]) == (30, 40)
    for normalise in ("characters", "tokens", "none"):
        found = figures[normalise]
        assert 0 <= found["acc"] <= 1
        assert found["kappa"] > 0
        assert found["nll"] == pytest.approx(math.log(4), abs=0.2)  # a model that knows nothing
    nll = {figures[normalise]["nll"] for normalise in ("characters", "tokens", "none")}
    assert len(nll) == 3


def test_every_row_has_one_to_three_trials_and_derives_a_row(causal):
    for name, row in causal.ROWS.items():
        assert 1 <= len(row.trials) <= 3, name
        assert all(method.config.steps == causal.STEPS for method in row.trials.values())
        assert len(row.derive) == 1
        assert all(other.startswith(name) for other in row.derive)


def test_finished_runs_are_kept_and_the_best_trial_is_tested(
    causal, local_model, tmp_path, monkeypatch
):
    for name, count in (("train", 24), ("validation", 7), ("test", 9)):
        write_jsonl(tmp_path / "data" / "task" / f"{name}.jsonl", make_records(count))
    short = {}
    for name in ("MLE", "V frozen"):
        trials = {
            label: replace(method, config=FitConfig(steps=2, batch_size=4, lr=lr))
            for (label, method), lr in zip(
                causal.ROWS[name].trials.items(), (0.0, 0.1), strict=False
            )
        }
        short[name] = replace(causal.ROWS[name], trials=trials)
    monkeypatch.setattr(causal, "ROWS", short)
    monkeypatch.setattr(causal, "SEEDS", range(2))
    runs = tmp_path / "runs.jsonl"
    bench = causal.Bench(str(local_model), str(tmp_path / "data"), "task", runs)
    figures = causal.table(bench, list(short))
    assert set(figures["test"]) == {
        "MLE",
        "MLE, tempered",
        "V frozen",
        "V frozen, posterior mean",
    }
    for name in short:
        assert figures["trials"][name][figures["chosen"][name]] == min(
            figures["trials"][name].values()
        )
    assert figures["test"]["V frozen"]["mutual_information"][0] > 0
    assert figures["test"]["V frozen, posterior mean"]["mutual_information"] == (0.0, 0.0)
    assert len(runs.read_text().splitlines()) == 2 * (2 + 2)
    again = causal.Bench(str(local_model), str(tmp_path / "data"), "task", runs)
    monkeypatch.setattr(again, "fit", None)  # nothing is run
    # As text, in which what is no number equals itself.
    assert json.dumps(causal.table(again, list(short))) == json.dumps(figures)
