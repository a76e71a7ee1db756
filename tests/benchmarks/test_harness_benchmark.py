"""benchmarks/correctness/harness.py on a tiny model: both sides agree, and it counts right."""

from __future__ import annotations

import pytest
import torch
from conftest import make_records, tiny_llama

pytest.importorskip("lm_eval", reason="needs the extra harness: there is no lm_eval")

from benchmarks.correctness import harness


def test_both_sides_agree_on_questions_with_choices_of_any_number(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    records = [*make_records(8), *make_records(4, choices=2)]
    options = (str(tmp_path), records, "float32", 3)
    mine, (other, metrics) = harness.ours(*options), harness.theirs(*options)
    assert mine.shape == (12, 4)
    assert (mine == float("-inf")).sum() == 8
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    figures = harness.compared(records, mine, other, metrics)
    assert figures["largest_difference_of_log_p"] < 1e-4
    for metric in ("acc", "acc_norm"):
        assert figures[metric]["predictions_equal"] == 12
        assert figures[metric]["ours"] == pytest.approx(figures[metric]["hf"])


def test_other_predictions_are_counted():
    records = make_records(3, choices=2)
    mine = torch.tensor([[-1.0, -5.0]] * 3)
    other = torch.tensor([[-1.0, -5.0], [-1.0, -5.0], [-5.0, -1.0]])
    figures = harness.compared(records, mine, other, {"acc": 0.5, "acc_norm": 0.5})
    assert figures["largest_difference_of_log_p"] == 4
    assert figures["acc"]["predictions_equal"] == 2
    right = sum(record.label == 0 for record in records) / 3
    assert figures["acc"]["ours"] == pytest.approx(right)
    assert figures["acc"]["standard_error"] == pytest.approx((right * (1 - right) / 3) ** 0.5)
