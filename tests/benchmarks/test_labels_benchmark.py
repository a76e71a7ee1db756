"""benchmarks/quality/labels.py: rounds on a tiny encoder, and the table without training."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_records

from scalabl_pyro.prediction import Predictor, draw


@pytest.fixture
def labels(monkeypatch):
    from benchmarks.quality import labels

    monkeypatch.setattr(labels, "COUNT", 4)
    monkeypatch.setattr(labels, "ROUNDS", 3)
    return labels


class Bench:
    """Keeps rounds as the real one does."""

    def __init__(self, file, adapter) -> None:
        self.runs, self.asked = file, []
        self.readout = adapter.readout
        self.splits = {"train": adapter.encode(make_records(20))}

    def cached(self, name, run):
        lines = self.runs.read_text().splitlines() if self.runs.exists() else []
        finished = {k: v for line in lines for k, v in json.loads(line).items()}
        if name not in finished:
            self.asked.append(name)
            finished[name] = run()
            with self.runs.open("a") as file:
                file.write(json.dumps({name: finished[name]}) + "\n")
        return finished[name]


@pytest.fixture
def bench(labels, make_choice, tmp_path, monkeypatch):
    """Untrained posteriors in place of trained ones."""
    from scalabl_pyro import AutoSubspaceNormal, ScalaBLModel

    adapter = make_choice(projections="frozen_v")
    bench = Bench(tmp_path / "runs.jsonl", adapter)

    def trained(bench, bought, seed):
        model = ScalaBLModel(adapter, num_data=len(bought))
        guide = AutoSubspaceNormal(model)
        predictor = Predictor(adapter, draw(guide, 3, seed=seed))
        fitted = SimpleNamespace(predictor=predictor, model=model, guide=guide)
        return fitted, {"acc": [len(bought) / 20, 0.0], "nll": [1.0, 2.0]}

    monkeypatch.setattr(labels, "trained", trained)
    return bench


def test_rounds_buy_new_labels_and_go_on_where_they_stopped(labels, bench):
    scores = ["random", "bald", "entropy", "novelty"]
    firsts = {}
    for by in scores:
        outcomes = labels.rounds(bench, scores, by, 0)
        firsts[by] = outcomes[0]["bought"]
        ids = [*outcomes[0]["bought"], *outcomes[0]["chosen"][by], *outcomes[1]["chosen"]]
        assert len(ids) == len(set(ids)) == 12
        assert outcomes[-1]["chosen"] == []
        assert [each["acc"][0] for each in outcomes] == [0.2, 0.4, 0.6]
    assert all(first == firsts["random"] for first in firsts.values())
    asked = list(bench.asked)
    assert len(asked) == 1 + 2 * len(scores)
    labels.rounds(bench, scores, "novelty", 0)
    assert bench.asked == asked
    assert labels.start(bench, scores, 1)["bought"] != firsts["random"]


def test_differences_are_paired_by_seed(labels, monkeypatch):
    def rounds(bench, scores, by, seed):
        gain = {"random": 0.0, "bald": 0.25}[by]
        acc = [[0.5 + seed / 8, 0.25], [0.5 + seed / 8 + gain, 0.25 + gain]]
        return [{"acc": row, "nll": row} for row in acc]

    monkeypatch.setattr(labels, "rounds", rounds)
    figures = labels.table(None, {"random": 3, "bald": 2})
    assert figures["bald"]["seeds"] == 2
    assert figures["bald"]["minus random"]["acc"]["4"]["mean"] == 0
    assert figures["bald"]["minus random"]["acc"]["8"]["mean"] == pytest.approx(0.25)
    assert figures["bald"]["minus random"]["acc"]["mean after the first"]["high"] == pytest.approx(
        0.25
    )
    expected = torch.tensor([0.5, 0.625, 0.75, 0.25, 0.25, 0.25]).mean()
    assert figures["random"]["acc"]["8"]["mean"] == pytest.approx(float(expected))
    assert figures["random"]["minus random"] == {}
