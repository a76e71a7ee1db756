"""A run that goes on from the posterior of another."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pyro
import pytest
import torch
from conftest import FAST, make_records, scalabl, tiny_llama, write_jsonl
from pyro.infer import TraceMeanField_ELBO
from safetensors.torch import load_file

import scalabl_pyro as sp
from scalabl_pyro.data import read_records
from scalabl_pyro.data.world import world

EMBEDDED = ["model.name=embedded", "model.prompt=classes", "lora.targets=[q_proj,v_proj]"]
STEPS = ["fit.steps=4", "fit.batch_size=4", "fit.lr_guide=0.1", "progress=false"]
ELBO = "method.elbo.name=trace_mean_field"


def write_tasks(root: Path, records) -> None:
    for name in ("first", "second"):
        for split, count in (("train", 8), ("validation", 4), ("test", 4)):
            taken, records = records[:count], records[count:]
            write_jsonl(root / name / f"{split}.jsonl", taken)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Data of two tasks, and a run on the first."""
    root = tmp_path_factory.mktemp("tasks")
    write_tasks(root, world().splits["train"])
    words = [*EMBEDDED, ELBO, *STEPS, f"data.root={root}/first", f"run_dir={root}/runs/first"]
    assert scalabl("train", *words) == 0
    return root


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    shutil.copytree(trained, tmp_path / "tasks")
    monkeypatch.chdir(tmp_path / "tasks")
    return Path("runs")


def second(*words: str) -> int:
    own = ["data.root=second", "run_dir=runs/second", "prior_run=runs/first"]
    return scalabl("train", *EMBEDDED, ELBO, *STEPS, *own, *words)


def posterior(run: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of the guide, or of the prior, under the names that the guide has for them."""
    prefix = {"guide": "guide.", "prior": "prior.posterior."}[name]
    tensors = load_file(run / "posterior.safetensors")
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits_of(folder: Path) -> torch.Tensor:
    """Of the test split, as the run saved them."""
    return load_file(folder / "predictions.safetensors")["test.logits"]


def test_s_alone_moves_and_the_first_run_is_not_needed_any_more(folder):
    assert second() == 0
    projections = [
        load_file(folder / run / "projections.safetensors") for run in ("first", "second")
    ]
    assert equal(*projections)
    before, after = (posterior(folder / run, "guide") for run in ("first", "second"))
    assert not any(torch.equal(before[name], after[name]) for name in before)
    cost = json.loads((folder / "second/cost.json").read_text())
    assert cost["trained"] == sum(value.numel() for value in before.values())

    shutil.rmtree(folder / "first")
    run = sp.load_run("runs/second")
    assert run.config.prior_run == "runs/first"
    split = run.encode(read_records("second/test.jsonl"))
    assert torch.equal(sp.predict(run.predictor, split).logits, logits_of(folder / "second"))
    p = run.model.prior().base_dist
    torch.testing.assert_close(p.loc, before["loc_unconstrained"])
    expected = torch.nn.functional.softplus(before["scale_unconstrained"])
    torch.testing.assert_close(p.scale, expected)


@pytest.mark.parametrize("how", ["prior", "start"])
def test_what_trained_the_run_before_trained_this_one_too(folder, capsys, how):
    """One of its validation records trained the first run, one of test, and six of train."""
    first = read_records("first/train.jsonl")
    own = read_records("second/train.jsonl")
    test = read_records("second/test.jsonl")
    write_jsonl(Path("second/test.jsonl"), [*test[:3], first[0]])
    write_jsonl(Path("second/train.jsonl"), [*own[:2], *first[1:7]])
    write_jsonl(Path("second/validation.jsonl"), [first[7], *own[2:5]])
    if how == "prior":
        assert second() == 0
    else:
        start = ["lora.start=runs/first/adapter", "data.root=second", "run_dir=runs/second"]
        assert scalabl("train", *EMBEDDED, ELBO, *STEPS, *start) == 0
    told = capsys.readouterr().err
    before = "trained the run that this one goes on from"
    assert f"1 of the 4 records of validation {before}: what is chosen by them" in told
    assert f"1 of the 4 records of test {before}: what is said of them is too good" in told
    # An adapter is trained further, and no prior is made of it.
    counted = f"6 of the 8 records of train {before}: the posterior counts them twice" in told
    assert counted == (how == "prior")
    write_jsonl(Path("asked.jsonl"), [*first, *own[:2], *own[5:8]])
    assert scalabl("evaluate", "run=runs/second", "data.path=asked.jsonl", "progress=false") == 0
    assert "10 of 13 records trained the run" in capsys.readouterr().err


def test_by_hand_in_python_it_is_the_same_to_the_bit(folder):
    assert second() == 0
    run = sp.load_run("runs/first")
    adapter, guide = run.predictor.adapter, run.guide
    pyro.set_rng_seed(0)
    adapter.freeze()
    train = adapter.encode(read_records("second/train.jsonl"))
    model = sp.ScalaBLModel(adapter, num_data=len(train), prior=guide.as_prior())
    config = sp.FitConfig(steps=4, batch_size=4, lr_guide=0.1)
    elbo = TraceMeanField_ELBO(max_plate_nesting=1)
    sp.fit(model, guide, train, config, elbo=elbo, seed=0, progress=False)
    assert equal(dict(guide.state_dict()), posterior(folder / "second", "guide"))


@pytest.mark.parametrize(
    ("words", "low", "high"),
    [
        (["fit.lr_guide=0"], 0.0, 0.0),
        (["fit.kl.weight=1e6"], 0.0, 0.05),
        (["fit.kl.weight=1e-3"], 1.0, 100.0),
    ],
    ids=["no step", "a large KL weight", "a small one"],
)
def test_where_the_data_have_no_say_the_posterior_stays(folder, words, low, high):
    """In units of the first posterior's standard deviations."""
    assert second("fit.steps=40", "fit.kl.shape=constant", *words) == 0
    before, after = (posterior(folder / run, "guide") for run in ("first", "second"))
    scale = torch.nn.functional.softplus(before["scale_unconstrained"])
    moved = (after["loc_unconstrained"] - before["loc_unconstrained"]) / scale
    assert low <= float(moved.abs().max()) <= high
    spread = torch.nn.functional.softplus(after["scale_unconstrained"])
    assert float((spread / scale - 1).abs().max()) <= high


def test_a_resumed_run_is_the_same_to_the_bit(folder, capsys, monkeypatch):
    assert second("checkpoint.every=2") == 0
    shutil.move(folder / "second", folder / "whole")
    original, calls = TraceMeanField_ELBO.loss_and_grads, []

    def ends(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("pulled the plug")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TraceMeanField_ELBO, "loss_and_grads", ends)
        assert second("checkpoint.every=2") == 1
    shutil.copytree(folder / "first", folder / "kept")
    shutil.copy(folder / "whole/posterior.safetensors", folder / "first")  # trained once more
    assert second("checkpoint.every=2", "resume=true") == 1
    assert "began with other tensors than those of its prior_run" in capsys.readouterr().err
    shutil.rmtree(folder / "first")
    shutil.move(folder / "kept", folder / "first")
    assert second("checkpoint.every=2", "resume=true") == 0
    assert equal(*(posterior(folder / run, "guide") for run in ("whole", "second")))
    with (folder / "second/history.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


OTHERS = {
    "lora.r=4": "lora.r is 4, expected 8; give these settings as that run's config.yaml has them",
    "lora.targets=[q_proj]": "lora.targets is ['q_proj'], expected ['q_proj', 'v_proj']",
    "model.prompt=letters": "model.prompt is 'letters', expected 'classes'",
    "model.readout=choice_likelihood": "expected 'label_tokens'",
    "model.dtype=bfloat16": "model.dtype is 'bfloat16', expected 'float32'",
    "method.guide.name=multivariate_normal": "method.guide.name is 'multivariate_normal', expected",
    "method.prior.name=laplace": "method.prior.name is 'laplace', expected 'normal'",
    "trials=[{},{method:{projections:free}}]": "is 'free', expected 'frozen_v'",
    "prior_run=runs/none": "there is no folder runs/none (runs holds first), and no run to be",
    "prior_run=second": "second/posterior.json does not exist",
}


@pytest.mark.parametrize("words", OTHERS)
def test_settings_that_contradict_the_run_are_refused(folder, capsys, words):
    assert second(words) == 1
    assert OTHERS[words] in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["first"]


def test_another_method_is_refused(folder, capsys):
    words = [*EMBEDDED, "data.root=second", "prior_run=runs/first", "method=mle"]
    assert scalabl("train", *words) == 1
    error = capsys.readouterr().err
    assert "method mle has no posterior that could be a prior: expected one of" in error


def test_other_choices_than_those_of_the_run_are_refused(folder, capsys):
    records = [sp.Record(f"{n}", f"What is {n}?", ("red", "blue"), n % 2) for n in range(8)]
    write_jsonl(Path("two/train.jsonl"), records)
    assert second("data.root=two") == 1
    assert "the classes are ['red', 'blue', 'green', 'yellow']" in capsys.readouterr().err


def test_another_base_model_is_refused(local_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path, make_records(32))
    words = ["lora.targets=[q_proj]", *FAST]
    first = [*words, f"model.name={local_model}", "data.root=first", "run_dir=first-run"]
    assert scalabl("train", *first) == 0
    shutil.copytree(local_model, "other")
    llm = tiny_llama()
    torch.nn.init.normal_(llm.model.embed_tokens.weight)
    llm.save_pretrained("other")
    later = [*words, "data.root=second", "run_dir=second-run", "prior_run=first-run"]
    assert scalabl("train", "model.name=other", *later) == 1
    error = capsys.readouterr().err
    assert f"set model.name to the model it was trained on, {str(local_model)!r}" in error
    shutil.copytree(local_model, "copy")
    assert scalabl("train", "model.name=copy", *later) == 0


KINDS = {
    "with a latent scale": ["method.prior.name=horseshoe", "method.guide.name=multivariate_normal"],
    "on part of the line": ["method=dalorra"],
    "of unit norm, with s_perp": ["method.projections=unit", "method.perp=2"],
    "with numbers of the readout": ["model.readout=choice_likelihood"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_three_tasks_in_turn(local_model, tmp_path, monkeypatch, kind):
    """Each kind of run goes on, twice, and is read when all that came before is gone."""
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path, make_records(32))
    words = [*KINDS[kind], *FAST, f"model.name={local_model}", "lora.targets=[q_proj]"]
    assert scalabl("train", *words, "data.root=first", "run_dir=a") == 0
    assert scalabl("train", *words, "data.root=second", "run_dir=b", "prior_run=a") == 0
    states = [dict(sp.load_run(run).guide.of_s_alone().state_dict()) for run in ("a", "b")]
    assert equal(states[0], posterior(Path("b"), "prior"))
    shutil.copytree("a", "kept")
    shutil.rmtree("a")
    assert scalabl("train", *words, "data.root=first", "run_dir=c", "prior_run=b") == 0
    shutil.rmtree("b")
    assert equal(states[1], posterior(Path("c"), "prior"))
    assert not equal(states[1], posterior(Path("c"), "guide"))
    assert equal(*(load_file(Path(run) / "projections.safetensors") for run in ("kept", "c")))
    run = sp.load_run("c")
    split = run.encode(read_records("first/test.jsonl"))
    assert torch.equal(sp.predict(run.predictor, split).logits, logits_of(Path("c")))


def test_the_shots_of_the_first_run_stay(local_model, tmp_path, monkeypatch, capsys):
    """They are part of the function of s, and so are shown by show-prompts too."""
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path, make_records(32))
    words = [*FAST, f"model.name={local_model}", "lora.targets=[q_proj]", "model.shots=1"]
    assert scalabl("train", *words, "data.root=first", "run_dir=a") == 0
    shown = []
    for own in (["data.root=first"], ["data.root=second", "prior_run=a"], ["data.root=second"]):
        capsys.readouterr()
        assert scalabl("show-prompts", *words, *own) == 0
        shown.append(re.search(r"^shots .*: (q\d+)$", capsys.readouterr().out, re.M)[1])
    assert shown[1] == shown[0] != shown[2]
    assert scalabl("train", *words, "data.root=second", "run_dir=b", "prior_run=a") == 0
    assert sp.load_run("b").classes.shots == sp.load_run("a").classes.shots
