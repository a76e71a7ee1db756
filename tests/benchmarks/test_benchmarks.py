"""Benchmarks run on tiny sizes and end with one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def last_line(script: str, *words: str) -> dict:
    command = [sys.executable, "-m", f"benchmarks.{script}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_train_step_reports_ratios():
    contents = last_line("cost.train_step", "--pairs=3", "--hidden=64", "--blocks=1", "--tokens=4")
    assert contents["figures"]["step_ratio"] > 0
    low, high = contents["figures"]["step_ratio_95"]
    assert low <= high
    assert set(contents["figures"]["pyro_ms"]) == {"57", "129"}
    assert {"torch", "pyro-ppl"} <= contents["versions"].keys()
    assert contents["command"].startswith("python -m benchmarks.cost.train_step")


def test_startup_is_measured_in_turns_with_another_checkout():
    figures = last_line("cost.startup", "--repeats=1", f"--against={ROOT}")["figures"]
    assert figures["repeats"] == 1
    for row in figures["cpu_seconds"].values():
        assert set(row) == {"here", "against"}
        assert min(row.values()) >= 0


def test_committed_results_say_how_they_were_made():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        contents = json.loads(path.read_text())
        assert {"command", "versions", "hardware"} <= contents.keys(), path.name
