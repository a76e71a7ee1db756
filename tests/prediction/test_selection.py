"""Which records to label next."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from conftest import make_records
from torch.autograd.functional import jacobian

import scalabl_pyro as sp
from scalabl_pyro.data import DataError
from scalabl_pyro.prediction import SELECTION_SCORES, Predictor


@pytest.fixture
def predictor(make_causal):
    adapter = make_causal()
    return Predictor(adapter, adapter.init_loc + torch.randn(4, *adapter.shape))


POOL = make_records(12, labelled=False)


def by_hand(predictor, record):
    """Entropy of the mean, and what is left of it without the mean entropy; one at a time."""
    split = predictor.adapter.readout.encode([record])
    with torch.no_grad():
        rows = [predictor.adapter(split.collate(list(split)), s)[0] for s in predictor.draws]
    each = torch.stack(rows).softmax(-1)
    mean = each.mean(0)
    total = -(mean * mean.log()).sum()
    return {"entropy": total, "bald": total + (each * each.log()).sum(-1).mean()}


@pytest.mark.parametrize("by", ["bald", "entropy"])
def test_the_highest_scores_come_first(predictor, by):
    expected = {r.id: float(by_hand(predictor, r)[by]) for r in POOL}
    order = sorted(POOL, key=lambda r: -expected[r.id])
    selection = sp.select(predictor, POOL, 5, by=by, batch_size=5)
    assert list(selection.records) == order[:5]
    assert selection.scores.tolist() == pytest.approx([expected[r.id] for r in order[:5]], abs=1e-5)
    assert list(sp.select(predictor, POOL, 12, by=by).records) == order


def test_novelty_is_that_of_dense_matrices(make_causal):
    """Derivatives by autograd, one output at a time; matrices over all D coordinates."""
    adapter = make_causal(projections="frozen_v")
    train = adapter.encode(make_records(5))
    model = sp.ScalaBLModel(adapter, num_data=5, prior=dist.Normal(0.0, 0.7))
    guide = sp.AutoSubspaceNormal(model, init_loc=torch.randn(adapter.shape))
    loc = guide.median()["s"]

    def derivatives(record):
        split = adapter.readout.encode([record])
        batch = split.collate(list(split))
        J = jacobian(lambda s: adapter(batch, s.view_as(loc))[0], loc.flatten())
        return adapter(batch, loc)[0].detach().double(), J.double()

    precision = torch.eye(loc.numel()).double() / 0.7**2
    after = precision.clone()
    for record in train.records:
        f, J = derivatives(record)
        p = f.softmax(-1)
        after += J.mT @ (p.diag() - torch.outer(p, p)) @ J
    P = torch.eye(4).double() - 0.25
    expected = {}
    for record in POOL:
        contrasts = P @ derivatives(record)[1]
        left, all_ = (
            (contrasts @ matrix.inverse() @ contrasts.mT).trace() for matrix in (after, precision)
        )
        expected[record.id] = float(left / all_)
    order = sorted(POOL, key=lambda r: -expected[r.id])
    predictor = Predictor(adapter, sp.draw(guide, 2, seed=0))
    options = {"model": model, "guide": guide, "train": train}
    selection = sp.select(predictor, POOL, 5, by="novelty", batch_size=3, **options)
    assert list(selection.records) == order[:5]
    assert selection.scores.tolist() == pytest.approx([expected[r.id] for r in order[:5]], abs=1e-4)
    for name in options:
        with pytest.raises(ValueError, match="give model, guide and train"):
            sp.select(predictor, POOL, 5, by="novelty", **options | {name: None})


def test_where_nothing_depends_on_s_nothing_is_novel(make_causal):
    adapter = make_causal(filled=False)
    model = sp.ScalaBLModel(adapter, num_data=5)
    options = {"guide": sp.AutoSubspaceNormal(model), "train": adapter.encode(make_records(5))}
    selection = sp.select(Predictor(adapter), POOL, 2, by="novelty", model=model, **options)
    assert selection.records == tuple(POOL[:2])
    assert selection.scores.tolist() == [0, 0]


def test_random_follows_its_seed(predictor):
    first, again, other = (sp.select(predictor, POOL, 12, by="random", seed=s) for s in (0, 0, 1))
    assert first.records == again.records
    assert first.records != other.records
    assert {r.id for r in first.records} == {r.id for r in POOL}


def test_labelled_records_are_left_out(predictor):
    mixed = [*make_records(4), *[r for r in POOL if r.id not in {"q0", "q1", "q2", "q3"}]]
    selection = sp.select(predictor, mixed, 8, by="entropy")
    assert {r.id for r in selection.records} == {f"q{i}" for i in range(4, 12)}
    with pytest.raises(DataError, match="count is 9, but of 12 records 8 have no label"):
        sp.select(predictor, mixed, 9)


def test_a_score_is_a_function_and_an_entry(predictor, monkeypatch):
    monkeypatch.setitem(
        SELECTION_SCORES, "longest", lambda pool: torch.tensor(pool.split.lengths) * 1.0
    )
    selection = sp.select(predictor, POOL, 3, by="longest")
    lengths = predictor.adapter.readout.encode(POOL).lengths
    assert selection.scores.tolist() == sorted(lengths, reverse=True)[:3]


def test_bad_requests_are_refused(predictor):
    with pytest.raises(ValueError, match="count is 0"):
        sp.select(predictor, POOL, 0)
    with pytest.raises(ValueError, match=r"by is 'bold': expected one of \['bald', 'entropy'"):
        sp.select(predictor, POOL, 1, by="bold")
    one = Predictor(predictor.adapter, predictor.draws[:1])
    with pytest.raises(ValueError, match="by is 'bald', but the predictor has 1 draw"):
        sp.select(one, POOL, 1)
    assert len(sp.select(one, POOL, 2, by="entropy").records) == 2
