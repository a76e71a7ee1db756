"""Several threads on one adapter, as behind an API."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import torch
from conftest import whole

from scalabl_pyro import predict
from scalabl_pyro.prediction.predictor import Predictor


def test_threads_get_what_each_would_get_alone(make_causal, records):
    adapter = make_causal()
    batch = whole(adapter.encode(records))
    values = [torch.full((3, *adapter.shape), float(value)) for value in (0, 2, 8)]
    alone = [adapter(batch, s) for s in values]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda s: adapter(batch, s), values * 20))
    for index, logits in enumerate(together):
        assert torch.equal(logits, alone[index % 3])


def test_threads_predict_with_draws_of_their_own(make_causal, records):
    adapter = make_causal()
    banks = [torch.randn(4, *adapter.shape) for _ in range(2)]
    alone = [predict(Predictor(adapter, draws), records).logits for draws in banks]

    def run(index: int) -> torch.Tensor:
        with adapter.folded(banks[index][0]):  # other matrices, which no other thread must see
            pass
        return predict(Predictor(adapter, banks[index]), records).logits

    with ThreadPoolExecutor(2) as threads:
        for index, logits in enumerate(threads.map(run, [0, 1] * 10)):
            assert torch.equal(logits, alone[index % 2])


def test_a_copy_has_a_lock_of_its_own(make_causal, records):
    adapter = make_causal()
    batch = whole(adapter.encode(records))
    copy = deepcopy(adapter)
    with adapter.bound(None), ThreadPoolExecutor(1) as thread:  # holds the lock of the original
        done = thread.submit(copy, batch)
        assert torch.equal(done.result(timeout=60), copy(batch))
