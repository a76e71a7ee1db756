"""The benchmark for GPU machines runs without one, on what a bare machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: what the package itself needs, and a machine with torch, transformers, peft and pyro-ppl lacks
MISSING = ["arviz", "datasets", "hydra", "matplotlib", "omegaconf", "pydantic"]
RUN = """
import runpy, sys
sys.modules.update(dict.fromkeys({missing}))  # importing one of them fails
sys.argv = ["gpu.py", *{words}]
runpy.run_module("benchmarks.cost.gpu", run_name="__main__", alter_sys=True)
"""


def test_a_dry_run_on_a_bare_machine_reports_every_part():
    words = ["--dry-run", "--pairs=3", "--rounds=2", "--train-tokens=8", "--tokens", "4", "8"]
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(missing=MISSING, words=words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    contents = json.loads(done.stdout.splitlines()[-1])
    assert {"cpu", "gpu"} <= contents["hardware"].keys()
    assert contents["figures"].keys() == {"tiny", "tiny_4bit"}
    for size, weights in (("tiny", "bfloat16"), ("tiny_4bit", "4bit")):
        figures = contents["figures"][size]
        assert figures["weights"] == weights
        assert figures["modules"] == 9  # q_proj and v_proj of four blocks, and lm_head
        low, high = figures["train"]["step_ratio_95"]
        assert 0 < low <= figures["train"]["step_ratio"] <= high
        assert figures["predict"].keys() == {"4_tokens", "8_tokens"}
        for predicted in figures["predict"].values():
            assert predicted["draws"] == 10
            for form in ("batched", "loop", "trunk"):
                assert predicted[form] > 0
                assert len(predicted[f"{form}_95"]) == 2
