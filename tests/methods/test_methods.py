from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_records, tiny_llama, whole
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from scalabl_pyro import FitConfig, KLSchedule, ScalaBLModel, evaluate, predict
from scalabl_pyro.guides import GUIDES
from scalabl_pyro.infer.checkpoints import CheckpointConfig, Checkpoints
from scalabl_pyro.infer.training import FitResult
from scalabl_pyro.methods import (
    MAP,
    METHODS,
    MLE,
    Fitted,
    LaplaceLoRA,
    ScalaBL,
    TemperatureScaling,
    ZeroShot,
)

CONFIG = FitConfig(steps=3, batch_size=4, kl=KLSchedule(0.1))
DRAWS = {
    "ensemble": 5,
    "laplace_lora": 100,
    "last_layer_laplace": 100,
    "checkpoint_ensemble": 2,
} | dict.fromkeys(
    ("scalabl", "reference", "mc_dropout", "tfb", "blob", "blob_tfb", "swag", "ivon", "dalorra"), 10
)
METHOD_OPTIONS = {
    "map": {"config": FitConfig(steps=3, batch_size=4, weight_decay=0.1)},
    "checkpoint_ensemble": {"members": 2, "share": 1.0},
    "swag": {"members": 2, "share": 1.0},
}
#: average over the last iterates
NOT_THE_BEST = ("checkpoint_ensemble", "swag", "ivon")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("validated", [False, True])
def test_every_method_fits_predicts_and_repeats(make_choice, make_causal, records, name, validated):
    # Without training there is no head to answer by.
    make = make_causal if name == "zero_shot" else make_choice
    config = replace(CONFIG, clip_norm=METHODS[name].config.clip_norm)
    options = {"config": config, "progress": False} | METHOD_OPTIONS.get(name, {})
    if validated:
        options["config"] = FitConfig(
            steps=4,
            batch_size=4,
            eval_every=2,
            keep="last" if name in NOT_THE_BEST else "best",
            weight_decay=options["config"].weight_decay,
            clip_norm=METHODS[name].config.clip_norm,
        )
    split = make().readout.encode(records)
    logits = []
    for _ in range(2):
        fitted = METHODS[name](**options).fit(make, split, split, seed=3)
        assert fitted.predictor.num_draws == DRAWS.get(name, 1)
        logits.append(predict(fitted.predictor, split).logits)
    assert torch.equal(*logits)
    assert set(evaluate(logits[0], split.labels)) >= {"acc", "ece", "nll", "brier"}
    if name == "zero_shot":
        assert fitted.result.history == []
    else:
        assert ("validation_nll" in fitted.result.history[1]) == validated


def test_zero_shot_is_the_base_model(make_causal, records):
    """Letters by plain transformers; the adapter is there, and changes nothing."""
    adapter = make_causal(filled=False)
    split = adapter.readout.encode(records)
    fitted = ZeroShot(progress=False).fit(lambda **_: adapter, split, None, seed=0)
    answers = predict(fitted.predictor, split).logits[0]
    llm, tokenizer = tiny_llama(), adapter.readout.tokenizer
    for record, logits in zip(records, answers, strict=True):
        ids = tokenizer(adapter.readout.prompt.render(record), return_tensors="pt").input_ids
        with torch.no_grad():
            expected = llm(ids).logits[0, -1, adapter.readout.label_ids]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", ["make_choice", "make_classifier"])
def test_zero_shot_refuses_heads_that_wait_for_training(make, records, request):
    make = request.getfixturevalue(make)
    split = make().readout.encode(records)
    with pytest.raises(ValueError, match=r"the heads \['classifier.*'\] are untrained"):
        ZeroShot(progress=False).fit(make, split, None, seed=0)


class Unplugged(RuntimeError):
    pass


class PlugPulled(Checkpoints):
    """Ends training after the first checkpoint of step 2."""

    def part(self, name):
        return PlugPulled(self.folder / name, self.config)

    def save(self, state):
        super().save(state)
        if state.step == 2:
            raise Unplugged


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"zero_shot"}))  # which has no step
def test_every_method_goes_on_to_the_bit(make_choice, records, tmp_path, name):
    config = replace(CONFIG, clip_norm=METHODS[name].config.clip_norm)
    options = {"config": config, "progress": False} | METHOD_OPTIONS.get(name, {})
    split = make_choice().readout.encode(records)
    method = METHODS[name](**options)
    expected = method.fit(make_choice, split, split, seed=3)
    often = CheckpointConfig(every=1)
    cut = PlugPulled(tmp_path, often)
    with pytest.raises(Unplugged):
        method.fit(make_choice, split, split, seed=3, checkpoints=cut)
    resumed = method.fit(
        make_choice, split, split, seed=3, checkpoints=Checkpoints(tmp_path, often)
    )
    assert resumed.result == expected.result
    logits = [predict(fitted.predictor, split).logits for fitted in (resumed, expected)]
    assert torch.equal(*logits)


# tfb moves what it was trained at.
@pytest.mark.parametrize(
    "name", sorted(DRAWS.keys() - {"ensemble", "checkpoint_ensemble", "tfb", "blob_tfb"})
)
def test_draws_are_of_the_seed_that_predictions_are_asked_for(make_choice, records, name):
    """The same posterior, and other draws of it."""
    config = FitConfig(steps=2, batch_size=12, clip_norm=METHODS[name].config.clip_norm)
    options = {"config": config, "progress": False} | METHOD_OPTIONS.get(name, {})
    method = METHODS[name](**options)
    adapter = make_choice(**method.form())
    split = adapter.readout.encode(records)
    model = method.make_model(adapter, num_data=len(split))
    posterior = method.make_optimizer(model) or method.make_guide(model)
    if name == "swag":  # whose posterior is a path
        for _ in range(2):
            for p in adapter.named_parameters().values():
                p.grad = torch.randn_like(p)
            posterior.step()

    def logits(seed):
        predictor = method.make_predictor(model, posterior, seed=seed)
        guide = posterior if isinstance(model, ScalaBLModel) else None
        fitted = Fitted(predictor, FitResult([], 2), model, guide)
        return predict(method.finish(fitted, split, split, seed=seed).predictor, split).logits

    first = logits(1)
    assert torch.equal(logits(1), first)
    assert not torch.equal(logits(2), first)


@pytest.mark.parametrize("name", ["blob", "ivon"])
def test_draws_of_weights_are_normal_at_their_seed(make_choice, records, name):
    """mean + sd·ε, with ε of a generator at the seed."""
    method = METHODS[name](draws=3)
    adapter = make_choice(svd=False)
    model = method.make_model(adapter, num_data=12)
    posterior = method.make_optimizer(model) or method.make_guide(model)
    weights = method.make_predictor(model, posterior, seed=7).weights
    means = {n: p.detach() for n, p in adapter.named_parameters().items()}
    generator = torch.Generator().manual_seed(7)
    if name == "blob":
        means = {n: p for n, p in means.items() if ".lora_A." in n}
        deviations = posterior.rho.detach().square()
        noise = torch.randn(3, len(deviations), generator=generator)
        sizes = [p.numel() for p in means.values()]
        parts = (deviations * noise).split(sizes, 1)
    else:  # h starts at 1, and δ is 1 / (N·0.2²)
        sigma = (12 * (1 + 1 / (12 * 0.2**2))) ** -0.5
        parts = [sigma * torch.randn(3, *p.shape, generator=generator) for p in means.values()]
    assert weights.keys() == means.keys()
    for (n, mean), part in zip(means.items(), parts, strict=True):
        torch.testing.assert_close(weights[n], mean + part.view(3, *mean.shape))


@pytest.mark.parametrize("guide", GUIDES)
def test_scalabl_takes_any_guide(make_causal, records, guide):
    split = make_causal().readout.encode(records)
    priors = {"relaxed_bernoulli": {"name": "relaxed_bernoulli"}}
    prior = priors.get(guide, {"name": "normal"})
    method = ScalaBL(CONFIG, progress=False, guide={"name": guide}, prior=prior, draws=3)
    fitted = method.fit(make_causal, split, None, seed=0)
    draws = 1 if guide == "delta" else 3  # a point is drawn once
    assert predict(fitted.predictor, split).logits.shape == (draws, len(split), 4)


def test_scalabl_predicts_at_its_median_without_draws(make_causal, records):
    split = make_causal().readout.encode(records)
    fitted = ScalaBL(CONFIG, progress=False, draws=0).fit(make_causal, split, None, seed=0)
    assert fitted.predictor.num_draws == 1
    assert torch.equal(fitted.predictor.draws[0], fitted.guide.median()["s"])


def logits_by_peft(fitted, split):
    with torch.no_grad():
        return fitted.predictor.adapter.peft_model(**whole(split).inputs).logits.double()


def best_temperature_by_scipy(logits, labels):
    nll = lambda t: float(cross_entropy(logits / t, labels))  # noqa: E731
    return minimize_scalar(nll, bounds=(0.1, 20), options={"xatol": 1e-6}).x


@pytest.fixture
def over_confident(make_choice, records):
    """A model that is too sure of questions that it was not trained on, and these questions."""
    readout = make_choice().readout
    split = readout.encode(records)
    config = FitConfig(steps=40, batch_size=4, lr=0.2)
    plain = MLE(config, progress=False).fit(make_choice, split, None, seed=0)
    unseen = make_records(100)
    logits = logits_by_peft(plain, readout.encode(unseen))
    labels = torch.distributions.Categorical(logits=logits / 2).sample().tolist()
    unseen = [replace(r, label=label) for r, label in zip(unseen, labels, strict=True)]
    return config, plain, split, readout.encode(unseen)


def test_temperature_scaling_lowers_the_validation_nll_and_keeps_answers(
    make_choice, over_confident
):
    config, plain, split, validation = over_confident
    scaled = TemperatureScaling(config, progress=False).fit(make_choice, split, validation, seed=0)
    best = best_temperature_by_scipy(logits_by_peft(plain, validation), validation.labels)
    assert scaled.predictor.temperature == pytest.approx(best, rel=1e-4)
    assert 1.2 < best < 5
    before, after = (predict(f.predictor, validation).logits for f in (plain, scaled))
    nll = [evaluate(x, validation.labels)["nll"] for x in (before, after)]
    assert nll[1] < nll[0]
    assert torch.equal(before.argmax(-1), after.argmax(-1))
    again = TemperatureScaling(config).temper(scaled, validation)
    assert again.predictor.temperature == pytest.approx(best, rel=1e-4)


def test_the_best_step_can_be_tempered(make_choice, over_confident):
    """Early stopping and then a temperature, both by validation: at the weights of that step."""
    _, _, split, validation = over_confident
    best = FitConfig(steps=12, batch_size=4, lr=0.5, eval_every=1, keep="best")
    early = MLE(best, progress=False).fit(make_choice, split, validation, seed=0)
    scaled = TemperatureScaling(best, progress=False).fit(make_choice, split, validation, seed=0)
    assert scaled.result.best_step == early.result.best_step < 12
    before, after = (predict(f.predictor, split).logits for f in (early, scaled))
    temperature = scaled.predictor.temperature
    expected = best_temperature_by_scipy(logits_by_peft(early, validation), validation.labels)
    assert temperature == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(after * temperature, before)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLE(FitConfig(weight_decay=0.1)), "use method map"),
        (lambda: MAP(FitConfig()), "weight_decay above 0"),
        (lambda: ScalaBL(guide={"name": "flow"}), "guide.name is 'flow'"),
        (lambda: ScalaBL(draws=-1), "draws is -1"),
        (
            lambda: ScalaBL(prior={"name": "normal", "width": 1}),
            "normal has no option \\['width'\\]",
        ),
        (lambda: ScalaBL(prior={"name": "cauchy"}), "prior.name is 'cauchy'"),
        (lambda: ScalaBL(guide={"name": "normal", "rank": 2}), "no option \\['rank'\\]"),
        (lambda: ScalaBL(elbo={"name": "iwae"}), "elbo.name is 'iwae'"),
        (lambda: ScalaBL(elbo={"name": "trace", "num_particles": 1.5}), "num_particles is 1.5"),
        (lambda: ScalaBL(elbo={"name": "renyi"}), "num_particles is 1: .* 2 or more for renyi"),
        (lambda: ScalaBL(prior={"name": "learned_normal", "per_module": "no"}), "is 'no'"),
        (lambda: LaplaceLoRA(projections="frozen_v"), "laplace_lora needs free"),
        (lambda: LaplaceLoRA(modules="first"), "modules is 'first': expected all or last"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_only_a_restore_of_its_own_could_read_is_refused(make_choice):
    with pytest.raises(ValueError, match=r"MLE must override restore, to read \['weights.a'\]"):
        MLE(CONFIG).restore(make_choice(), {"weights.a": torch.zeros(1)}, temperature=1.0, seed=0)


def test_a_temperature_is_of_one_model(make_causal, records):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    fitted = ScalaBL(CONFIG, progress=False).fit(lambda **_: adapter, split, None, seed=0)
    with pytest.raises(ValueError, match="an average over 10 draws"):
        TemperatureScaling(CONFIG).temper(fitted, split)


def test_temperature_needs_a_validation_split(make_choice, records):
    split = make_choice().readout.encode(records)
    with pytest.raises(ValueError, match="needs a validation split"):
        TemperatureScaling(CONFIG, progress=False).fit(make_choice, split, None, seed=0)


def test_s_of_a_fresh_adapter_that_stays_as_it_is_is_refused(make_causal):
    adapter = make_causal(projections="fixed", filled=False)
    with pytest.raises(ValueError, match="nothing depends on s: projections is 'fixed' and B is 0"):
        ScalaBL().make_model(adapter, num_data=4)
    *_, last = adapter.matrices.B.values()  # one B that is not 0 depends on its s
    torch.nn.init.ones_(last.weight)
    ScalaBL().make_model(adapter, num_data=4)


def test_projections_are_the_methods_own(make_choice, records):
    split = make_choice().readout.encode(records)
    for method, moves in (
        (MLE(CONFIG, progress=False), True),
        (MLE(CONFIG, progress=False, projections="frozen_v"), False),
        (ScalaBL(CONFIG, progress=False), False),
        (ScalaBL(CONFIG, progress=False, projections="unit"), True),
    ):
        before: list[dict[str, torch.Tensor]] = []

        def make(*, before=before, **form):
            adapter = make_choice(**form)
            before.append({name: p.detach().clone() for name, p in adapter.state().items()})
            return adapter

        after = method.fit(make, split, None, seed=0).model.adapter.state()
        moved = {
            kind: any(not torch.equal(p, before[0][n]) for n, p in after.items() if kind in n)
            for kind in (".lora_A.", ".lora_B.")
        }
        assert moved == {".lora_A.": moves, ".lora_B.": True}, method


def test_a_point_estimate_has_no_s_whose_scale_could_be_fixed(make_choice, records):
    split = make_choice().readout.encode(records)
    with pytest.raises(ValueError, match="expected free or frozen_v"):
        MLE(CONFIG, projections="unit").fit(make_choice, split, None, seed=0)
