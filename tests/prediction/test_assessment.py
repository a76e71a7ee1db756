"""What is told of a labelled split."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import make_records

from scalabl_pyro.data import DataError
from scalabl_pyro.prediction.assessment import assess


def test_a_record_without_a_label_is_named_before_any_pass(predictor, monkeypatch):
    records = make_records(4)
    records[2] = replace(records[2], label=None)
    split = predictor.adapter.readout.encode(records)

    def runs(*args):
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(predictor), "logits", runs)
    with pytest.raises(DataError, match="record 'q2' has no label: give it one"):
        assess(predictor, split)
