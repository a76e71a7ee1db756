from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_records, scalabl, write_jsonl
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def train(tmp_path, local_model, monkeypatch):
    """``scalabl train`` on a tiny model and made-up questions, into the folder ``runs``."""
    for name, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    monkeypatch.chdir(tmp_path)

    def run(*words: str, option: str = "--run") -> int:
        where = [f"model.name={local_model}", "data.root=data"]
        fast = ["fit.steps=2", "fit.batch_size=4", "progress=false"]
        return scalabl("train", option, *where, *fast, *words)

    return run


def written(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.*")}


def test_a_sweep_skips_finished_runs_and_makes_one_table(train, tmp_path, capsys):
    assert train("method=mle", "seed=1") == 0
    first = written(tmp_path / "runs")
    sweep = ["method=mle,scalabl", "seed=0,1", "resume=true"]
    assert train(*sweep, option="--multirun") == 0
    names = ["mle-seed0", "mle-seed1", "scalabl-seed0", "scalabl-seed1"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names
    assert first.items() <= written(tmp_path / "runs").items()

    capsys.readouterr()
    assert scalabl("report") == 0
    assert (tmp_path / "runs/report/table.txt").read_text().strip() in capsys.readouterr().out
    table = json.loads((tmp_path / "runs/report/table.json").read_text())
    assert table["chosen"]["mle"]["method"] == {"name": "mle", "projections": "free"}
    nll = [
        json.loads((tmp_path / "runs" / name / "metrics.json").read_text())["test"]["nll"]
        for name in names
    ]
    for row, values in (("mle", nll[:2]), ("scalabl", nll[2:])):
        of_row = table["metrics"][row]["test"]["nll"]
        assert of_row["mean"] == pytest.approx(sum(values) / 2)
        assert of_row["standard_error"] > abs(values[0] - values[1]) / 2, "questions are in it"
    paired = table["minus_mle"]["scalabl"]["test"]["nll"]["mean"]
    assert paired == pytest.approx((nll[2] - nll[0] + nll[3] - nll[1]) / 2, abs=1e-6)


def test_a_finished_run_is_resumed_as_it_is_but_not_with_other_settings(train, tmp_path, capsys):
    trials = "trials=[{fit:{lr:0.01}},{fit:{lr:0.1}}]"
    words = ["method=mle", "run_dir=runs/a", trials]
    assert train(*words) == 0
    metrics = json.loads(capsys.readouterr().out)
    before = written(tmp_path / "runs/a")
    (tmp_path / "runs/a.unfinished").mkdir()  # a kill came before its removal
    assert train(*words, "resume=true") == 0
    assert json.loads(capsys.readouterr().out) == metrics
    assert written(tmp_path / "runs/a") == before
    assert not (tmp_path / "runs/a.unfinished").exists()
    assert train(*words, "resume=true", "lora.r=2") == 1
    assert "has other settings (lora.r: 2, was 8): choose another" in capsys.readouterr().err
    assert train(*words) == 1
    assert "the run folder runs/a exists" in capsys.readouterr().err


def test_a_run_of_a_sweep_that_fails_leaves_the_others_to_go_on(train, tmp_path, capsys):
    targets = "lora.targets=[nowhere],[q_proj]"
    words = ["method=mle", targets, "run_dir=runs/${lora.targets.0}"]
    assert train(*words, option="--multirun") == 1
    assert "lora.targets=[nowhere]" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["q_proj"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (["method=scalabl", "seed=1"], r"different seeds, {'mle': [0], 'scalabl': [1]}"),
        (
            ["method=mle", "seed=1", "lora.r=2"],
            "other settings than runs/mle-seed0 (lora.r: 2, was",
        ),
        (
            ["method=scalabl", "data.root=other"],
            "the rows have different data, {'mle': {'data.root': '",
        ),
    ],
)
def test_runs_that_make_no_table_are_refused(train, tmp_path, capsys, second, message):
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    assert train("method=mle") == 0
    assert train(*second) == 0
    assert scalabl("report") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs/report").exists()


def test_one_folder_of_data_under_two_names_is_the_same_data(train, tmp_path):
    (tmp_path / "other").symlink_to("data")
    assert train("method=mle") == 0
    assert train("method=scalabl", "data.root=other") == 0
    assert scalabl("report") == 0


@pytest.mark.parametrize("old", ["mle-seed0", "mle-seed1", "scalabl-seed0"])
def test_runs_from_before_the_data_decided_make_a_table_with_newer_ones(train, tmp_path, old):
    for name in ("train", "validation", "test"):
        records = make_records(16)
        rows = "".join(f"{record.question},{'ab'[i % 2]}\n" for i, record in enumerate(records))
        (tmp_path / "data" / f"{name}.jsonl").unlink()
        (tmp_path / "data" / f"{name}.csv").write_text(f"text,class\n{name} {rows}")
    for words in (["method=mle", "seed=0"], ["method=mle", "seed=1"], ["method=scalabl"]):
        assert train(*words) == 0
    settings = tmp_path / "runs" / old / "config.yaml"
    before = OmegaConf.load(settings)
    assert list(before.data.classes) == ["a", "b"]
    before.data.classes, before.data.columns.labels = [], "auto"
    OmegaConf.save(before, settings)
    shutil.copytree(tmp_path / "runs/scalabl-seed0", tmp_path / "runs/scalabl-seed1")
    later = OmegaConf.load(tmp_path / "runs/scalabl-seed1/config.yaml")
    later.seed = 1
    OmegaConf.save(later, tmp_path / "runs/scalabl-seed1/config.yaml")
    assert scalabl("report") == 0


def changed(split: str, **fields: object) -> None:
    """Another first record of a split, at the same place."""
    path = Path("data") / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= fields
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("split", "fields"), [("test", {"question": "what else"}), ("train", {"label": 3})]
)
def test_records_that_were_changed_in_their_place_are_noticed(train, capsys, split, fields):
    assert train("method=mle") == 0
    changed(split, **fields)
    assert train("method=mle", "resume=true") == 1
    assert f"had other records of ['{split}']" in capsys.readouterr().err
    assert train("method=scalabl") == 0
    assert scalabl("report") == 1
    assert f"had other records of '{split}' than runs/mle-seed0" in capsys.readouterr().err
    assert not Path("runs/report").exists()


@pytest.mark.parametrize("name", ["a (1)", "ä b", "a,b", "a=b", "it's"])
def test_places_may_have_any_name(train, name):
    """As a shell hands them over; Hydra has its own grammar for these."""
    assert train("method=mle", f"run_dir=runs/{name}") == 0
    questions = Path(f"{name}.jsonl")
    questions.write_text(Path("data/test.jsonl").read_text())
    words = [f"run=runs/{name}", f"input={questions}", f"output=o {questions}", "progress=false"]
    assert scalabl("predict", *words) == 0
    assert Path(f"o {questions}").exists()


def test_a_table_of_nothing_or_of_unfinished_runs_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert scalabl("report") == 1
    assert "runs is runs: expected a folder that holds run folders" in capsys.readouterr().err
    (tmp_path / "compared/runs/mle").mkdir(parents=True)
    (tmp_path / "compared/runs/mle/metrics.json").write_text("{}")
    assert scalabl("report", "runs=compared") == 1
    assert "a folder that holds run folders, as compared/runs does" in capsys.readouterr().err
    (tmp_path / "runs/mle-seed0.unfinished").mkdir(parents=True)
    assert scalabl("report") == 1
    assert "unfinished runs, ['mle-seed0.unfinished']" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_on_ray_survives_a_kill():
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs the extra sweeps")
    command = [sys.executable, "-m", "benchmarks.robustness.ray_sweep", "--steps=100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["table_equal"]
    assert figures["runs_bit_equal"]
    killed = figures["after_kill"]
    assert killed["table_equal"]
    assert killed["runs_bit_equal"]
    assert killed["finished_before"]
    assert killed["recomputed_runs"] == []
    assert killed["checkpoints_before"] > 0
    assert killed["recomputed_checkpoints"] == 0
    assert figures["given_again"]["changed_files"] == []


def test_two_runs_of_one_row_and_seed_or_one_without_a_test_split_make_no_table(
    train, tmp_path, capsys
):
    assert train("method=mle") == 0
    first = tmp_path / "runs/mle-seed0"
    shutil.copytree(first, tmp_path / "runs/mle")
    assert scalabl("report") == 1
    assert "would be the same row and seed" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "runs/mle")
    metrics = json.loads((first / "metrics.json").read_text())
    del metrics["test"]
    (first / "metrics.json").write_text(json.dumps(metrics))
    assert scalabl("report") == 1
    assert "has no test split" in capsys.readouterr().err
