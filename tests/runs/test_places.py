"""Runs that are used, gone on with and built on in another folder than that of their training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import FAST, make_records, scalabl, write_jsonl
from omegaconf import OmegaConf

import scalabl_pyro.runs.training as training
from scalabl_pyro.commands._input import own_records
from scalabl_pyro.runs import RunConfig, build, load_run
from scalabl_pyro.runs.places import placed, relative_places

WORDS = ["model.name=chatm", "data.root=fold", "lora.start=adapter", "method.projections=fixed"]


@pytest.fixture
def home(tmp_path, local_model, monkeypatch):
    """A folder with a model, data and a trained adapter, which is the current one; and another."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    local_model.rename(tmp_path / "chatm")
    home.mkdir()
    (tmp_path / "chatm").rename(home / "chatm")
    for name, count in (("train", 12), ("validation", 6), ("test", 7)):
        write_jsonl(home / "fold" / f"{name}.jsonl", make_records(count))
    monkeypatch.chdir(home)
    words = ["model.name=chatm", "data.root=fold", "run_dir=before", "method=mle", *FAST]
    assert scalabl("train", *words, "lora.targets=[q_proj,v_proj]") == 0
    shutil.copytree("before/adapter", "adapter")
    return home


@pytest.fixture
def run(home):
    assert scalabl("train", *WORDS, *FAST, "run_dir=runs/mine") == 0
    return home / "runs/mine"


def evaluated(capsys, *words) -> float:
    capsys.readouterr()
    assert scalabl("evaluate", *words, "progress=false") == 0
    return json.loads(capsys.readouterr().out)["nll"]


def test_a_run_is_used_from_another_folder(run, home, capsys, monkeypatch):
    saved = json.loads((run / "metrics.json").read_text())["test"]["nll"]
    assert OmegaConf.load(run / "config.yaml").model.name == "chatm"  # as it was given
    monkeypatch.chdir(home.parent / "elsewhere")
    assert evaluated(capsys, f"run={run}", f"data.root={home}/fold") == saved
    loaded = load_run(run)
    assert len(own_records(loaded, "train")) == len(own_records(load_run(run), "train")) > 0
    assert scalabl("show-prompts", f"run={run}") == 0
    shown = capsys.readouterr().out
    assert make_records(12)[0].question in shown
    # What has the same name in that folder is another.
    write_jsonl(Path("fold/train.jsonl"), make_records(3))
    Path("chatm").mkdir()
    assert evaluated(capsys, f"run={run}", f"data.root={home}/fold") == saved
    assert own_records(load_run(run), "train") == own_records(loaded, "train")


def test_a_run_that_is_moved_along_with_what_it_names_is_found(run, home, capsys, monkeypatch):
    saved = json.loads((run / "metrics.json").read_text())["test"]["nll"]
    moved = home.parent / "moved"
    home.rename(moved)
    monkeypatch.chdir(moved)
    assert evaluated(capsys, "run=runs/mine", "data.root=fold") == saved
    assert own_records(load_run("runs/mine"), "train")


def test_a_finished_run_is_resumed_and_built_on_from_another_folder(run, home, monkeypatch):
    monkeypatch.chdir(home.parent / "elsewhere")
    relative = ["model.name=../home/chatm", "data.root=../home/fold", "lora.start=../home/adapter"]
    same = [*relative, WORDS[-1], *FAST]
    assert scalabl("train", *same, f"run_dir={run}", "resume=true") == 0
    write_jsonl(Path("next/train.jsonl"), make_records(9))
    words = [w for w in same if not w.startswith("data.root")]
    words += ["data.root=next", "run_dir=second", f"prior_run={run}"]
    assert scalabl("train", *words) == 0


def test_an_unfinished_run_is_resumed_from_another_folder(home, monkeypatch, capsys):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    words = [*FAST, "checkpoint.every=1", WORDS[-1]]
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_run", killed)
        assert scalabl("train", *WORDS, *words, "run_dir=cut") != 0
    monkeypatch.chdir(home.parent / "elsewhere")
    paths = [f"model.name={home}/chatm", f"data.root={home}/fold", f"lora.start={home}/adapter"]
    where = [f"run_dir={home}/cut", "resume=true"]
    other = write_jsonl(Path("fold/train.jsonl"), make_records(9)).parent
    capsys.readouterr()
    assert scalabl("train", paths[0], f"data.root={other}", paths[2], *words, *where) == 1
    assert f"data.root: '{other.resolve()}', was '{home}/fold'" in capsys.readouterr().err
    assert scalabl("train", *paths, *words, *where) == 0
    assert (home / "cut/metrics.json").exists()


def test_names_that_hold_everywhere_stay_as_they_are(home, monkeypatch):
    values = {"model": {"name": "embedded"}, "lora": {}, "data": {"root": str(home / "fold")}}
    config = build(RunConfig, values | {"run_dir": "x"})
    assert relative_places(config.flat()) == {}
    Path("embedded").mkdir()  # which the name of the model does not mean
    places = relative_places(config.flat())
    monkeypatch.chdir(home.parent)
    assert placed(config, places) == config
