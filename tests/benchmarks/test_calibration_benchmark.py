"""benchmarks/calibration.py without its training runs: trials, choices, means."""

from __future__ import annotations

import pytest


@pytest.fixture
def calibration():
    from benchmarks.quality import calibration

    return calibration


class Bench:
    """Answers every run: trials by their place, seeds by their number."""

    def __init__(self, rows: dict) -> None:
        self.rows = rows
        self.asked: list[str] = []

    def cached(self, name: str, run: object) -> dict:
        self.asked.append(name)
        run_of = name.split(" ", 1)[1]  # "MLE early-stopped lr=…" begins with the row "MLE" too
        row = max((row for row in self.rows if run_of.startswith(f"{row} ")), key=len)
        if name.endswith("trial"):
            labels = list(self.rows[row].trials)
            label = name.removesuffix(" trial").split(f" {row} ")[1]
            return {"nll": float(labels.index(label) != len(labels) - 1)}  # the last one is best
        seed = float(name.split()[-1])
        keys = ("acc", "ece", "nll", "brier", "mutual_information", "mi_auroc_wrong")
        return {row: dict.fromkeys(keys, seed)}


def test_every_row_builds_its_methods_and_every_longer_trial_exists(calibration):
    for name, row in calibration.ROWS.items():
        assert 1 <= len(row.trials) <= (8 if name == "frozen V" else 5), name
        for build in row.trials.values():
            assert build(10).config.steps == 10
    for name, labels in calibration.LONGER.items():
        assert set(labels) <= set(calibration.ROWS[name].trials), name


def test_the_best_trial_runs_on_all_seeds_and_no_other_does(calibration):
    bench = Bench(calibration.ROWS)
    figures = calibration.table(bench, ["plain ELBO", "frozen V"], calibration.STEPS)
    last = list(calibration.ROWS["frozen V"].trials)[-1]
    assert figures["chosen"]["frozen V"] == last
    tested = [name for name in bench.asked if "frozen" in name and "seed" in name]
    assert tested == [f"400 frozen V {last} seed {seed}" for seed in range(5)]
    mean, error = figures["test"]["frozen V"]["nll"]
    assert mean == pytest.approx(2.0)
    assert error == pytest.approx((2.5 / 5) ** 0.5)  # the variance of 0 … 4 is 2.5
    assert figures["frozen V minus"]["plain ELBO"]["nll"] == (0.0, 0.0)


def test_longer_runs_try_less(calibration):
    bench = Bench(calibration.ROWS)
    figures = calibration.table(bench, ["MLE", "MLE early-stopped"], 2 * calibration.STEPS)
    assert [name for name in bench.asked if "trial" in name] == [
        "800 MLE lr=0.0001 trial",
        "800 MLE lr=0.0002 trial",
        "800 MLE lr=0.0003 trial",
        "800 MLE early-stopped lr=0.001 trial",
        "800 MLE early-stopped lr=0.003 trial",
    ]
    assert figures["chosen"]["MLE early-stopped"] == "lr=0.003"
