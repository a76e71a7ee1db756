"""``trunk_cache=FOLDER``: what leaves the blocks that no run trains is computed once for all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_records, scalabl, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from scalabl_pyro.commands.compare import CompareConfig
from scalabl_pyro.lora import trunk_cache
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.runs import DataConfig, training

FAST = ["fit.steps=4", "fit.batch_size=4", "fit.lr=0.1", "fit.lr_guide=0.3", "progress=false"]
UPPER = ["lora.layers=[1]", "lora.targets=[q_proj,v_proj]"]


@pytest.fixture
def train(local_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))

    def run(run_dir, *words, fails=False):
        where = [f"model.name={local_model}", "data.root=data", f"run_dir={run_dir}"]
        assert scalabl("train", *where, *FAST, *UPPER, "model.dtype=float32", *words) == fails
        return capsys.readouterr().err if fails else Path(run_dir)

    return run


def metrics(run):
    return json.loads((run / "metrics.json").read_text())


def kept():
    return {path: path.stat().st_mtime_ns for path in Path("cache").glob("*.safetensors")}


@pytest.mark.parametrize(
    "words",
    [
        ["method=scalabl", "lora.subspace=activations", "fit.eval_every=2", "fit.keep=best"],
        ["method=mle"],
        ["method=tfb"],
        ["method=laplace_lora"],
        ["method=temperature"],
        ["method=scalabl", "model.readout=choice_likelihood"],
    ],
    ids=lambda words: words[-1],
)
def test_a_run_is_that_without_the_cache(train, words):
    plain = train("plain", *words)
    cached = train("cached", *words, "trunk_cache=cache")
    for split, figures in metrics(plain).items():
        for name in ("nll", "brier", "entropy"):
            assert metrics(cached)[split][name] == pytest.approx(figures[name], abs=1e-5)
    saved, expected = (load_file(run / "projections.safetensors") for run in (cached, plain))
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-4)
    costs = [json.loads((run / "cost.json").read_text())["training"] for run in (cached, plain)]
    assert costs[0]["forward"] < costs[1]["forward"]
    if words == ["method=mle"]:  # of two blocks one runs
        assert costs[0]["forward"] == costs[1]["forward"] / 2


def test_runs_share_what_was_computed_once(train, monkeypatch):
    train("a", "trunk_cache=cache", "method=mle")
    files = kept()
    assert len(files) == 2, "training and validation"
    train("b", "trunk_cache=cache", "seed=1", "fit.lr=0.2")
    assert kept() == files
    write_jsonl(Path("data/train.jsonl"), make_records(15))
    train("c", "trunk_cache=cache")
    assert len(kept()) == 3
    write_jsonl(Path("data/train.jsonl"), make_records(16))
    train("d", "trunk_cache=cache", "model.prompt=letters", "model.template='{question} {choices}'")
    assert len(kept()) == 5, "other prompts"
    train("e", "trunk_cache=cache", "model.dtype=bfloat16")
    assert len(kept()) == 7
    for n, package in enumerate(("torch", "transformers"), 1):
        newer = {package: "99.0"}
        with monkeypatch.context() as patch:
            patch.setattr(trunk_cache, "version", lambda name, newer=newer: newer.get(name, "1.0"))
            train(f"f{n}", "trunk_cache=cache")
        assert len(kept()) == 7 + 2 * n, "other versions"
    assert not list(Path("cache").glob("*.part"))


def test_another_model_has_files_of_its_own(train, local_model):
    """Whatever differs: a number that no parameter begins with, or a setting."""
    train("a", "trunk_cache=cache", "method=mle")
    other = AutoModelForCausalLM.from_pretrained(local_model)
    with torch.no_grad():
        other.get_input_embeddings().weight[-1, -1] += 1.0
    other.save_pretrained("other")
    for path in Path(local_model).glob("*token*"):
        shutil.copy(path, "other")
    train("b", "trunk_cache=cache", "method=mle", "model.name=other")
    assert len(kept()) == 4
    settings = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    train("c", "trunk_cache=cache", "method=mle", "model.name=other")
    assert len(kept()) == 6
    # Of what is above the trunk nothing matters.
    plain = AutoModelForCausalLM.from_pretrained(local_model)
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight[-1, -1] += 1.0
    plain.save_pretrained("above")
    for path in Path(local_model).glob("*token*"):
        shutil.copy(path, "above")
    train("d", "trunk_cache=cache", "method=mle", "model.name=above")
    assert len(kept()) == 6


def test_a_run_goes_on_with_another_cache_or_none(train, local_model, monkeypatch):
    """In a folder that holds all files already, which need not be written."""
    train("whole", "trunk_cache=cache")
    files = kept()
    for path in Path("cache").glob("*.lock"):
        path.unlink()
    Path("cache").chmod(0o500)
    where = [f"model.name={local_model}", "data.root=data", "run_dir=a", "checkpoint.every=1"]
    words = ["train", *where, *FAST, *UPPER, "model.dtype=float32", "resume=true"]

    def pulled(*args, **options):
        raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_run", pulled)
        assert scalabl(*words, "trunk_cache=cache") == 1
    absolute = Path("cache").absolute()
    Path("cache").chmod(0o700)
    assert scalabl(*words, f"trunk_cache={absolute}") == 0
    assert scalabl(*words) == 0, "a finished run stays"
    assert kept() == files
    for name in ("nll", "entropy"):
        for split, figures in metrics(Path("whole")).items():
            assert metrics(Path("a"))[split][name] == pytest.approx(figures[name], abs=1e-6)


def test_rows_of_a_comparison_share_it_and_are_the_same_runs_without_it():
    settings = {
        "model": ModelConfig("embedded"),
        "lora": AdapterConfig(),
        "data": DataConfig(task="embedded"),
        "out": "out",
        "methods": {"mle": [{"method": {"name": "mle"}}]},
    }
    (trial,) = settings["methods"]["mle"]
    runs = [
        CompareConfig(**settings, trunk_cache=folder).run_config("mle", trial, seed=0)
        for folder in ("cache", "/elsewhere", None)
    ]
    assert [run.trunk_cache for run in runs] == ["cache", "/elsewhere", None]
    assert len({run.run_dir for run in runs}) == 1
    assert not runs[0].differences(runs[2])


def test_a_file_that_is_damaged_or_of_other_weights_is_refused(train):
    train("a", "trunk_cache=cache")
    for path in kept():
        whole = path.read_bytes()
        save_file(
            {n: 2 * x if x.is_floating_point() else x for n, x in load_file(path).items()}, path
        )
        error = train("b", "trunk_cache=cache", fails=True)
        assert f"{path} holds what another model computes: remove it" in error
        path.write_bytes(whole[: len(whole) // 2])
        error = train("b", "trunk_cache=cache", fails=True)
        assert f"{path} is damaged" in error
        path.write_bytes(whole)
    assert {p.name for p in Path().iterdir()} == {"a", "cache", "data", "model"}
    train("b", "trunk_cache=cache")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.layers=[]"], "there is no trunk to compute once: "),
        (["lora.base_dropout=true"], "base_dropout is on"),
        (["trunk_cache=data/train.jsonl"], "expected a folder that can be written"),
        (["trunk_cache=''"], "expected a folder, or null"),
        (["lora.heads=[embed_tokens]"], "the trunk holds parameters that are trained"),
    ],
)
def test_a_trunk_that_cannot_be_kept_is_refused_before_training(train, words, message):
    error = train("a", "trunk_cache=cache", *words, fails=True)
    assert "trunk_cache is '" in error
    assert message in error
    assert not list(Path().glob("a*"))
