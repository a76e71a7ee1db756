"""benchmarks/quality/subspace.py without its training runs: trials, choices, paired differences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

LABELS = torch.tensor([0, 1, 1, 0])


@pytest.fixture
def subspace():
    from benchmarks.quality import subspace

    return subspace


class Bench:
    """Answers every run. Activations are surer of the right answer than random, in each seed."""

    splits: ClassVar = {"test": SimpleNamespace(labels=LABELS)}

    def __init__(self) -> None:
        self.asked: list[str] = []

    def cached(self, name: str, run: object) -> dict:
        self.asked.append(name)
        row, _ = name.split(" ", 1)
        if name.endswith("trial"):
            return {"nll": 0.0 if "lr=0.002" in name else 1.0}
        right = {"random": 0.5, "activations": 0.75, "weights": 0.5}[row]
        right += 0.01 * int(name.split()[-1])
        rows = torch.full((4, 2), 1 - right)
        rows[torch.arange(4), LABELS] = right
        return {
            "kl": 2.0,
            "log_probabilities": rows.log().tolist(),
            "auroc": {"entropy": {"wrong": 0.6}},
        }


def test_all_rows_share_one_setting_or_have_the_best_of_three(subspace):
    for label, method in subspace.TRIALS.items():
        config = method(10).config
        assert label == f"lr={config.lr:g} kl_weight={config.kl.weight:g}"
    bench = Bench()
    same = subspace.table(bench, ["random", "activations"], "same", 2)
    assert same["chosen"] == {"random": subspace.SAME, "activations": subspace.SAME}
    assert bench.asked == [
        f"{row} {subspace.SAME} seed {seed}"
        for seed in range(2)
        for row in ("random", "activations")
    ]
    chosen = subspace.table(bench, ["random"], "chosen", 1)
    assert chosen["chosen"] == {"random": "lr=0.002 kl_weight=10"}
    assert bench.asked[-1] == "random lr=0.002 kl_weight=10 seed 0"


def test_differences_are_paired_by_seed(subspace):
    figures = subspace.table(Bench(), ["random", "activations", "weights"], "same", 5)
    logs = [
        (torch.tensor(0.75 + 0.01 * k).log(), torch.tensor(0.5 + 0.01 * k).log()) for k in range(5)
    ]
    expected = -sum(float(a - b) for a, b in logs) / 5
    assert figures["minus random"]["activations"]["nll"]["mean"] == pytest.approx(
        expected, abs=1e-6
    )
    assert figures["minus random"]["weights"]["nll"]["mean"] == 0
    assert figures["test"]["random"]["kl"] == 2.0
    assert figures["test"]["random"]["auroc"] == {"entropy": {"wrong": 0.6}}
    # One confidence c for all: labels drawn from it are right in k of 4, E|k/4 − c| in the mean.
    assert 0.1 < figures["test"]["random"]["ece_floor"] < 0.3
