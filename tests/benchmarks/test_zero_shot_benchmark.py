"""benchmarks/quality/zero_shot.py on a tiny model."""

from __future__ import annotations

import math

import pytest
from conftest import make_records, write_jsonl

WAYS = ("characters", "tokens", "none", "unconditional")


def test_zero_shot_figures_of_every_size(local_model, tmp_path):
    from benchmarks.quality.zero_shot import zero_shot

    for name, count in (("train", 40), ("test", 30)):
        write_jsonl(tmp_path / "data" / "task" / f"{name}.jsonl", make_records(count))
    figures = zero_shot(str(local_model), str(tmp_path / "data"), "task")
    assert (figures["n"], figures["n_kappa"]) == (30, 40)
    for normalise in WAYS:
        row = figures[normalise]
        assert 0 <= row["acc"] <= 1
        assert row["kappa"] > 0
        assert row["nll"] == pytest.approx(math.log(4), abs=0.2)  # a model that knows nothing
    nll = {figures[normalise]["nll"] for normalise in WAYS}
    assert len(nll) == 4
