"""Jacobians against automatic differentiation of each example alone; how many passes they take."""

from __future__ import annotations

import pytest
import torch
from conftest import fill_lora_B, lora, make_records, tiny_llama, whole
from torch.autograd.functional import jacobian as by_torch

from scalabl_pyro import ScalaBLModel, SubspaceAdapter
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.infer.kfac import kfac, logit_moments
from scalabl_pyro.infer.laplace_approximation import ggn
from scalabl_pyro.lora.jacobian import jacobian
from scalabl_pyro.readouts import ChoiceLikelihood


@pytest.fixture
def make_separate(tokenizer):
    """Choice likelihood of a model that gets a row for each choice."""

    def make(**options):
        readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
        readout.packed = False
        torch.manual_seed(1)
        adapter = SubspaceAdapter(tiny_llama(), lora("q_proj", "v_proj"), readout, **options)
        fill_lora_B(adapter)
        return adapter

    return make


@pytest.fixture
def make_packed(make_separate):
    def make(**options):
        adapter = make_separate(**options)
        adapter.readout.packed = True
        return adapter

    return make


KINDS = {"make_choice": 1, "make_separate": 1, "make_packed": 4, "make_causal": 4}


@pytest.fixture(params=KINDS)
def made(request):
    return request.getfixturevalue(request.param), KINDS[request.param]


def encoded(adapter, *, choices=4):
    return adapter.readout.encode(make_records(5, choices=choices))


def passes(adapter):
    """A list that every backward pass through the first matrix B makes longer."""
    calls = []
    B = next(iter(adapter.matrices.B.values()))
    B.register_full_backward_hook(lambda *_: calls.append(None))
    return calls


def test_it_is_that_of_each_example_alone(made):
    make, expected_passes = made
    adapter = make()
    batch = whole(encoded(adapter))
    loc = adapter.init_loc + 0.1 * torch.randn(adapter.shape)
    expected = by_torch(lambda s: adapter(batch, s), loc)  # (B, C, M, r)
    assert expected.abs().max() > 1e-3
    seen = passes(adapter)
    f, J = jacobian(adapter, batch, loc)
    assert len(seen) == expected_passes
    torch.testing.assert_close(f, adapter(batch, loc).detach())
    torch.testing.assert_close(J, expected, atol=1e-5, rtol=1e-4)


def test_missing_choices_have_no_slope(made):
    adapter = made[0]()
    batch = whole(encoded(adapter, choices=3))
    f, J = jacobian(adapter, batch, adapter.init_loc)
    assert f[:, 3].isneginf().all()
    assert not J[:, 3].any()
    expected = by_torch(lambda s: adapter(batch, s)[:, :3], adapter.init_loc)
    torch.testing.assert_close(J[:, :3], expected, atol=1e-5, rtol=1e-4)


def test_the_curvature_is_that_of_these_jacobians(made):
    adapter = made[0]()
    batch = whole(encoded(adapter))
    loc = adapter.init_loc
    p = adapter(batch, loc).detach().double().softmax(-1)
    J = by_torch(lambda s: adapter(batch, s), loc).flatten(2).double()
    expected = torch.zeros(loc.numel(), loc.numel(), dtype=torch.float64)
    for n in range(len(batch)):
        expected += J[n].mT @ (p[n].diag() - torch.outer(p[n], p[n])) @ J[n]
    model = ScalaBLModel(adapter, num_data=len(batch))
    curvature = ggn(model, batch, loc)
    assert (curvature - expected).norm() < 1e-4 * expected.norm()


def test_kronecker_factors_take_as_many_passes_and_are_sums_over_classes(made):
    """G = Σ g gᵀ, with g by a loop over examples and classes, of which each is run alone."""
    make, expected_passes = made
    adapter = make(svd=False)
    split = encoded(adapter)
    seen = passes(adapter)
    factors = kfac(adapter, split, rank=1000, batch_size=5)
    assert len(seen) == expected_passes
    logit_moments(adapter, whole(split), factors, dict.fromkeys(factors, 0.5))
    assert len(seen) == 2 * expected_passes

    name, B = list(adapter.matrices.B.items())[-1]
    outputs = []
    handle = B.register_forward_hook(lambda _, args, output: outputs.append(output))
    expected = torch.zeros(B.out_features, B.out_features)
    for example in split:
        f = adapter(split.collate([example]))[0]
        p = f.detach().softmax(-1)
        for c in range(4):
            along = p[c].sqrt() * (f[c] - (p * f).sum())
            (g,) = torch.autograd.grad(along, outputs[-1], retain_graph=True)
            expected += g.flatten(0, -2).mT @ g.flatten(0, -2)
    handle.remove()
    G = factors[name].g.mT @ factors[name].g
    assert expected.any()
    assert (G - expected).norm() < 1e-3 * expected.norm()
