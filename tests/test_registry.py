"""One factory by name: what is wrong is said before, and errors inside are left as they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from scalabl_pyro import AutoSubspaceNormal, Predictor, ScalaBLModel, draw
from scalabl_pyro.guides import GUIDES, check_guide
from scalabl_pyro.infer import make_elbo
from scalabl_pyro.models.priors import PRIORS, make_prior
from scalabl_pyro.prediction.draws import KINDS
from scalabl_pyro.registry import named
from scalabl_pyro.runs.predictors import WAYS, PredictionConfig, make_predictor


def box(size, *, colour="red"):
    if colour == "none":
        raise TypeError("a bug inside")
    return size, colour


def open_ended(**options):
    return options


THINGS = {"box": box, "open": open_ended}


def test_things_are_made_by_name():
    assert named(THINGS, "thing", "box", 3, colour="blue") == (3, "blue")
    assert named(THINGS, "thing", "open", anything=1) == {"anything": 1}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (("bag", 3), {}, r"thing.name is 'bag': expected one of \['box', 'open'\]"),
        (("box", 3), {"lid": 1}, r"thing box has no option \['lid'\]: expected some of \['colour'"),
        (("box",), {}, r"the thing box takes \['size', 'colour'\]: missing a required argument"),
    ],
)
def test_unknown_names_and_options_are_refused_before_the_call(given, options, message):
    with pytest.raises(ValueError, match=message):
        named(THINGS, "thing", *given, **options)


def test_an_error_inside_is_not_taken_for_a_bad_option(monkeypatch):
    with pytest.raises(TypeError, match="a bug inside"):
        named(THINGS, "thing", "box", 3, colour="none")

    def broken(shape, scale=1.0):
        return len(scale)

    monkeypatch.setitem(PRIORS, "broken", broken)
    with pytest.raises(TypeError, match="has no len"):
        make_prior((1, 1), "broken")


def test_options_of_a_prior_that_a_function_gives_are_that_functions():
    with pytest.raises(ValueError, match=r"laplace has no option \['loc'\]: expected .*\['scale'"):
        make_prior((1, 1), "laplace", loc=1.0)


def test_options_of_an_elbo_are_known():
    with pytest.raises(ValueError, match=r"elbo trace has no option \['alpha'\]"):
        make_elbo("trace", alpha=0.5)
    with pytest.raises(ValueError, match=r"elbo\.max_plate_nesting is no option"):
        make_elbo("trace", max_plate_nesting=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "normal", "init_scale": "wide"}, r"guide\.init_scale is 'wide'"),
        ({"name": "normal", "init_loc": 3}, r"guide\.init_loc is 3"),
        ({"name": "multivariate_normal", "per_module": "no"}, r"guide\.per_module is 'no'"),
        ({"name": "low_rank_multivariate_normal", "rank": 1.5}, r"guide\.rank is 1\.5"),
    ],
)
def test_options_of_a_guide_are_typed_before_there_is_a_model(options, message):
    with pytest.raises(ValueError, match=message):
        check_guide(**options)


def test_every_guide_takes_its_own_defaults():
    for name in GUIDES:
        check_guide(name, init_scale=1)


def test_a_kind_of_draws_is_a_function_and_an_entry(model, monkeypatch):
    def halved(guide, num_draws, seed, batch):
        return guide.sample(num_draws) / 2

    monkeypatch.setitem(KINDS, "halved", halved)
    guide = AutoSubspaceNormal(model)
    draws, plain = (draw(guide, 3, seed=1, kind=kind) for kind in ("halved", "independent"))
    assert torch.equal(draws, plain / 2)
    assert PredictionConfig(draws=3, kind="halved").kind == "halved"


def test_a_way_to_predict_is_a_function_and_an_entry(make_causal, monkeypatch):
    monkeypatch.setitem(
        WAYS, "first", lambda predictor, median, draws: Predictor(predictor.adapter, draws[:1])
    )
    adapter = make_causal()
    guide = AutoSubspaceNormal(ScalaBLModel(adapter, num_data=3))
    predictor = Predictor(adapter, draw(guide, 4, seed=0))
    run = SimpleNamespace(guide=guide, predictor=predictor, subspace_predictor=lambda: predictor)
    first = make_predictor(run, PredictionConfig(name="first"))
    assert torch.equal(first.draws, predictor.draws[:1])
    mean = make_predictor(run, PredictionConfig(name="median"))
    assert torch.equal(mean.draws[0], guide.median()["s"])
