"""The benchmark of prediction runs on tiny sizes, and again from what it kept."""

from __future__ import annotations

import math

from conftest import make_records, tiny_bert_config, write_jsonl
from test_benchmarks import last_line
from transformers import BertForMultipleChoice


def test_predict_reports_quality_and_cost_of_every_method(tmp_path, tokenizer):
    BertForMultipleChoice(tiny_bert_config(num_hidden_layers=4)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split, count in (("train", 16), ("validation", 4), ("test", 8)):
        write_jsonl(tmp_path / "data" / "openbookqa" / f"{split}.jsonl", make_records(count))
    write_jsonl(tmp_path / "data" / "mmlu" / "college_physics" / "test.jsonl", make_records(5))
    words = [f"--{name}={tmp_path / name}" for name in ("model", "data", "work")]
    figures = last_line("cost.predict", *words, "--dry-run", "--seeds", "0", "1")["figures"]
    for split in ("test", "ood"):
        rows = figures["quality"][split]
        assert {"batched S=4", "sobol S=2", "trunk 2 S=4", "linearised", "distilled"} < rows.keys()
        assert rows["batched S=4"]["error"][0] == 0.0
        assert rows["batched S=2"]["error"][0] > 0
        assert all(math.isfinite(row["nll"][0]) and row["cost_ratio"] > 0 for row in rows.values())
    assert math.isfinite(figures["cost"]["llama"]["trunk 3 S=4"]["overhead"])
    assert (tmp_path / "work" / "predict.png").stat().st_size > 0
