"""benchmarks/quality/unknown_causal.py on tiny models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_records, tiny_bert_config, write_jsonl
from transformers import BertModel

from scalabl_pyro.infer import FitConfig
from scalabl_pyro.prediction.mahalanobis import feature_distances

SIZES = {"test": 9, "chemistry": 4, "physics": 5, "openbookqa": 6}


@pytest.fixture
def encoder(tmp_path, tokenizer):
    folder = tmp_path / "encoder"
    BertModel(tiny_bert_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_every_row_has_every_score_of_every_question(local_model, encoder, tmp_path):
    from benchmarks.quality import unknown_causal
    from benchmarks.quality.unknown import run_file, subjects, table

    data = tmp_path / "data"
    for place, split, count in (
        ("arc_easy", "train", 24),
        ("arc_easy", "validation", 5),
        ("arc_easy", "test", SIZES["test"]),
        ("mmlu/college_chemistry", "test", SIZES["chemistry"]),
        ("mmlu/college_physics", "test", SIZES["physics"]),
        ("openbookqa", "train", 7),
        ("openbookqa", "test", SIZES["openbookqa"]),
    ):
        write_jsonl(data / place / f"{split}.jsonl", make_records(count))
    (runs := tmp_path / "runs").mkdir()
    bench = unknown_causal.Bench(str(local_model), str(data), runs)
    assert {name: len(bench.splits[name]) for name in ("test", *subjects(bench))} == SIZES
    rows = {
        name: replace(
            row,
            trials={
                label: replace(method, config=FitConfig(2, batch_size=4, eval_every=1))
                for label, method in row.trials.items()
            },
        )
        for name, row in unknown_causal.ROWS.items()
    }
    fixed = partial(unknown_causal.controls, bench, encoder)
    figures = table(bench, rows, fixed, 2, 3)["rows"]
    of_one = {"max_probability", "entropy", "tokens", "alike"}
    assert figures["MLE tempered"].keys() == of_one
    assert figures["MLE"].keys() == of_one | {"mahalanobis"}
    draws = {"mutual_information", "noise_to_signal"}
    assert figures["V activations"].keys() == of_one | {"mahalanobis"} | draws
    for scores in figures.values():
        for by_positive in scores.values():
            assert by_positive.keys() == {"wrong", *SIZES} - {"test"}
    # Distances are the same from a cached trunk and without one.
    method = rows["MLE"].trials["lr=0.001"]
    fitted = bench.fit(method, 0)
    plain = [bench.readout.encode(bench.splits[name].records) for name in ("train", "all")]
    expected = feature_distances(fitted.model.adapter, plain[0], plain[1:])[0]
    found = unknown_causal.distances(bench, fitted)["mahalanobis"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert run_file(bench, "MLE lr=0.001 seed 1").exists()
