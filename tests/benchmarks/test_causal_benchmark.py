"""benchmarks/quality/causal.py on a tiny model: trials, choices, rows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import make_records, write_jsonl

from scalabl_pyro.infer import FitConfig


@pytest.fixture
def causal():
    from benchmarks.quality import causal

    return causal


def test_every_row_has_one_to_three_trials_and_goes_beyond_those_at_an_edge(causal):
    for name, row in causal.ROWS.items():
        assert 1 <= len(row.trials) <= 3, name
        further = dict(row.beyond.values())
        assert row.beyond.keys() <= row.trials.keys() | further.keys()
        assert not row.trials.keys() & further.keys()
        assert all(other.startswith(name) for other in (*row.own, *row.same))


@pytest.fixture
def short(causal, monkeypatch, tmp_path):
    """Rows of two steps: MLE at a rate of 0 and of 0.1, V frozen at 0.1; two seeds."""
    for task, train, test in (("arc_easy", 24, 9), ("openbookqa", 30, 8)):
        for name, count in (("train", train), ("validation", 7), ("test", test)):
            write_jsonl(tmp_path / "data" / task / f"{name}.jsonl", make_records(count))
    rows = {}
    for name, rates in (("MLE", (0.0, 0.1)), ("V frozen", (0.1,))):
        row = causal.ROWS[name]
        every = 1 if name == "MLE" else 0
        trials = {
            label: replace(method, config=FitConfig(2, batch_size=4, lr=lr, eval_every=every))
            for (label, method), lr in zip(row.trials.items(), rates, strict=False)
        }
        rows[name] = replace(row, trials=trials, beyond={})
    monkeypatch.setattr(causal, "ROWS", rows)
    monkeypatch.setattr(causal, "SEEDS", range(2))
    return rows


def test_finished_runs_are_kept_and_each_row_is_tested_at_its_own_best_trial(
    causal, short, local_model, tmp_path, monkeypatch
):
    runs = tmp_path / "runs"
    bench = causal.Bench(str(local_model), str(tmp_path / "data"), "arc_easy", runs)
    figures = causal.table(bench, list(short))
    assert set(figures["test"]) == {
        "zero-shot",
        "MLE",
        "MLE, tempered",
        "MLE, early-stopped",
        "MLE, early-stopped, tempered",
        "V frozen",
        "V frozen, posterior mean",
    }
    for row in ("MLE", "MLE, tempered", "MLE, early-stopped"):
        trials = {label: nll[row] for label, nll in figures["trials"]["MLE"].items()}
        assert trials[figures["chosen"][row]] == min(trials.values())
    trials = figures["trials"]["MLE"].values()
    assert all(nll["MLE, early-stopped"] <= nll["MLE"] for nll in trials)
    assert all(nll["MLE, tempered"] <= nll["MLE"] + 1e-6 for nll in trials)
    mean, drawn = (figures["test"][f"V frozen{of}"] for of in (", posterior mean", ""))
    assert "auroc_wrong_mutual_information" in drawn
    assert "auroc_wrong_mutual_information" not in mean
    assert figures["minus MLE, tempered"]["V frozen"]["nll"]["mean"] == pytest.approx(
        drawn["nll"]["mean"] - figures["test"]["MLE, tempered"]["nll"]["mean"], abs=1e-9
    )
    again = causal.Bench(str(local_model), str(tmp_path / "data"), "arc_easy", runs)
    monkeypatch.setattr(again, "fit", None)  # nothing is run
    # As text, in which what is no number equals itself.
    assert json.dumps(causal.table(again, list(short))) == json.dumps(figures)


def test_the_picture_is_drawn_from_the_committed_runs(monkeypatch, tmp_path):
    from benchmarks.quality import causal_picture

    shown = {}
    plot = causal_picture.plot_reliability
    monkeypatch.setattr(causal_picture, "IMAGES", tmp_path)
    monkeypatch.setattr(
        causal_picture,
        "plot_reliability",
        lambda axis, runs: (plot(axis, runs), shown.update({len(shown): runs})),
    )
    causal_picture.main()
    assert (tmp_path / "causal.png").stat().st_size > 0
    figures = json.loads((causal_picture.RESULTS / "causal.json").read_text())["figures"]
    for row, runs in zip(
        ("MLE, fixed recipe", "V activations, 1,000 steps"), shown.values(), strict=True
    ):
        right = [(r.logits[0].argmax(-1) == r.labels).float().mean() for r in runs]
        expected = figures["arc_easy"]["test"][row]["acc"]["mean"]
        assert float(sum(right) / 5) == pytest.approx(expected, abs=1e-6)
