"""Novelty against the dense computation, its range and how it falls with data; its rival."""

from __future__ import annotations

import pytest
import torch
from conftest import make_records, whole

import scalabl_pyro as sp
from scalabl_pyro import ScalaBLModel, novelty
from scalabl_pyro.lora.adapter import SubspaceAdapter
from scalabl_pyro.prediction import weight_novelty
from scalabl_pyro.prediction.novelty import _products

WITH_A_MISSING_CHOICE = [*make_records(7), *make_records(4, choices=3), *make_records(2, choices=2)]


@pytest.fixture(params=["make_causal", "make_choice"])
def make(request):
    """Adapters whose logits are large enough for data to tell something."""

    def make(**options):
        adapter = request.getfixturevalue(request.param)(**options)
        with torch.no_grad():
            for name, parameter in adapter.state().items():
                if "classifier" in name:
                    parameter.mul_(1000)
        return adapter

    return make


def one_by_one(split, parameters, logits):
    """f (C',) of the choices that exist and ∂f/∂parameters (C', D), of each example alone."""
    for n, example in enumerate(split):
        f = logits(whole(split.select([n])))[0, : example.num_choices]
        rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in f]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        yield f.detach().double(), J.double()


def dense(train, test, precision):
    """The formula with all matrices in full; precision is (D,)."""
    H = precision.diag()
    for f, J in train:
        p = f.softmax(-1)
        H = H + J.mT @ (p.diag() - torch.outer(p, p)) @ J
    after, before = torch.linalg.inv(H), precision.reciprocal().diag()
    ratios = []
    for _, J in test:
        P = torch.eye(len(J)).double() - 1 / len(J)
        ratio = torch.trace(P @ J @ after @ J.mT @ P) / torch.trace(P @ J @ before @ J.mT @ P)
        ratios.append(float(ratio))
    return torch.tensor(ratios)


def dense_in_s(adapter, train, test, loc, precision):
    s = loc.clone().requires_grad_()
    each = [one_by_one(split, [s], lambda b: adapter(b, s)) for split in (train, test)]
    return dense(*each, precision)


def test_in_s_it_is_the_dense_computation(make):
    adapter = make(projections="frozen_v")
    train = adapter.encode(WITH_A_MISSING_CHOICE)
    test = adapter.encode([*make_records(5), *make_records(3, choices=2)])
    scale = torch.linspace(0.5, 2, adapter.init_loc.numel()).view(adapter.shape)
    prior = sp.make_prior(adapter.shape, "normal", scale=1.0)
    model = ScalaBLModel(adapter, num_data=len(train), prior=prior)
    loc = adapter.init_loc + 0.1
    scores = novelty(model, train, test, loc=loc, batch_size=3)
    expected = dense_in_s(adapter, train, test, loc, torch.ones(scale.numel()).double())
    assert scores.shape == (8,)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert 0.01 < float(scores.min()) < float(scores.max()) < 0.99

    model.prior = sp.make_prior(adapter.shape, "normal", scale=0.3)
    scores = novelty(model, train, test, loc=loc)
    expected = dense_in_s(
        adapter, train, test, loc, torch.full((scale.numel(),), 0.3**-2.0).double()
    )
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [{"svd": False}, {"projections": "frozen_v"}, {}])
def test_in_weights_it_is_the_dense_computation(make, form):
    adapter = make(**form)
    train = adapter.encode(WITH_A_MISSING_CHOICE)
    test = adapter.encode([*make_records(5), *make_records(3, choices=2)])
    s = None if "svd" in form else adapter.init_loc + 0.1
    adapter.set_dropout(0.5)
    adapter.train()  # as training leaves it; nothing is dropped here
    scores = weight_novelty(adapter, train, test, precision=0.5, s=s, batch_size=3)

    # Plain LoRA with A = diag(s)·V.
    plain = make(svd=False)
    with torch.no_grad():
        for name, parameter in plain.state().items():
            parameter.copy_(adapter.state()[name])
        if s is not None:
            for A, row in zip(plain.matrices.A.values(), s, strict=True):
                A.weight.mul_(row[:, None])
    weights = [m.weight for m in plain.matrices.linears.values()]
    each = [one_by_one(split, weights, plain) for split in (train, test)]
    expected = dense(*each, torch.full((sum(w.numel() for w in weights),), 0.5).double())
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert 0.01 < float(scores.min()) < float(scores.max()) < 0.99


@pytest.mark.parametrize("columns", [3, 4096, 9001])
def test_products_run_over_all_columns(columns):
    x, y = torch.randn(5, columns), torch.randn(3, columns)
    torch.testing.assert_close(_products(x, y), x.double() @ y.double().T)


def over(kind, adapter, train, test):
    if kind == "s":
        model = ScalaBLModel(adapter, num_data=len(train))
        return novelty(model, train, test, loc=adapter.init_loc)
    return weight_novelty(adapter, train, test, precision=1.0, s=adapter.init_loc)


@pytest.mark.parametrize("kind", ["s", "weights"])
def test_it_falls_with_every_example_at_the_same_weights(make_causal, kind):
    adapter = make_causal()
    everything = adapter.encode(make_records(12))
    test = adapter.encode(make_records(9))
    scores = [over(kind, adapter, everything.select(range(n)), test) for n in (1, 3, 6, 12)]
    for more, less in zip(scores[1:], scores, strict=False):
        assert (more <= less + 1e-6).all()
        assert (more < less - 1e-4).any()
    assert (scores[0] <= 1).all()
    assert (scores[-1] >= 0).all()
    # A question that was trained on is more familiar than one of which nothing was seen.
    own = over(kind, adapter, everything.select([0]), everything.select([0]))
    assert float(own) < float(scores[0].mean())


@pytest.mark.parametrize("kind", ["s", "weights"])
def test_where_the_data_tell_nothing_it_is_1(make_causal, kind):
    """With logits that are sure beyond rounding the curvature is 0, as it is without data."""
    adapter = make_causal(targets=("lm_head",))
    train, test = adapter.encode(make_records(4)), adapter.encode(make_records(5))

    class Sure(type(adapter.readout)):
        pushed = False

        def __call__(self, llm, inputs):
            f = super().__call__(llm, inputs)
            return f + 1e4 * torch.eye(4)[0] if self.pushed else f

    adapter.readout.__class__ = Sure
    adapter.readout.pushed = True
    torch.testing.assert_close(over(kind, adapter, train, test), torch.ones(5), rtol=0, atol=1e-6)


def test_where_nothing_moves_the_contrasts_there_is_no_ratio(make_causal):
    adapter = make_causal(filled=False)  # B is 0
    train = adapter.encode(make_records(4))
    assert over("s", adapter, train, train).isnan().all()


def test_what_is_refused(make_causal, records):
    adapter = make_causal()
    train = adapter.encode(records)
    model = ScalaBLModel(
        adapter, num_data=len(train), prior=sp.make_prior(adapter.shape, "laplace")
    )
    with pytest.raises(ValueError, match="needs a normal one"):
        novelty(model, train, train, loc=adapter.init_loc)
    model = ScalaBLModel(adapter, num_data=5)
    with pytest.raises(ValueError, match="num_data is 5"):
        novelty(model, train, train, loc=adapter.init_loc)
    with pytest.raises(ValueError, match=r"precision is 0\.0: expected a number above 0"):
        weight_novelty(adapter, train, train, precision=0.0)
    with pytest.raises(ValueError, match="projections is 'unit'"):
        weight_novelty(make_causal(projections="unit"), train, train, precision=1.0)


def test_the_adapter_is_left_as_it_was(make_choice, records):
    adapter: SubspaceAdapter = make_choice()
    train = adapter.encode(records)
    s = torch.randn(2, *adapter.shape)
    before = adapter(whole(train), s).detach()
    over("s", adapter, train, train)
    over("weights", adapter, train, train)
    assert torch.equal(adapter(whole(train), s), before)
    assert all(p.grad is None for p in adapter.peft_model.parameters())
