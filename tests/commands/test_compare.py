from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import make_records, predictions_of, scalabl, write_jsonl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from scalabl_pyro import Predictions
from scalabl_pyro.commands._configs import CONFIGS
from scalabl_pyro.commands.compare import CompareConfig
from scalabl_pyro.methods import METHODS
from scalabl_pyro.runs.settings import build


@pytest.fixture
def compare(tmp_path, local_model, monkeypatch):
    """``scalabl compare`` on a tiny model and made-up questions, in this process's folder."""
    for name, count in (("train", 16), ("validation", 8), ("test", 9), ("unseen", 7)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> int:
        where = [f"model.name={local_model}", "data.task=null", "data.root=data", "out=out"]
        fast = ["model.prompt=letters", "fit.steps=3", "fit.batch_size=4", "progress=false"]
        return scalabl("compare", *where, *fast, "jobs=1", *words)

    return run


def test_compare_chooses_on_validation_skips_what_is_done_and_reports(compare, tmp_path, capsys):
    methods = [
        "methods.mle=[{method:{name:mle},fit:{lr:0.0}},{method:{name:mle},fit:{lr:0.1}}]",
        "methods.scalabl=[{method:{name:scalabl,draws:3},fit:{lr:0.01}}]",
        "~methods.map",
        "~methods.mle_tempered",
        "~methods.zero_shot",
    ]
    assert compare("seeds=[0]", *methods) == 0
    first = {
        p.name: (p / "metrics.json").stat().st_mtime_ns
        for p in (tmp_path / "out").glob("*/*-seed*")
    }
    assert len(first) == 2 + 1 + 1
    assert compare("seeds=[0,1]", *methods) == 0
    second = {
        p.name: (p / "metrics.json").stat().st_mtime_ns
        for p in (tmp_path / "out").glob("*/*-seed*")
    }
    assert first.items() <= second.items()
    assert len(second) == len(first) + 2

    write_jsonl(tmp_path / "data/test.jsonl", make_records(10))
    assert compare("seeds=[0]", *methods) == 0
    assert len(list((tmp_path / "out").glob("*/*-seed*"))) == len(second) + 4, "other data"
    write_jsonl(tmp_path / "data/test.jsonl", make_records(9))
    assert compare("seeds=[0,1]", *methods) == 0

    table = json.loads((tmp_path / "out/table.json").read_text())
    trials = {t["trial"]["fit"]["lr"]: t["validation_nll"] for t in table["trials"]["mle"]}
    assert table["chosen"]["mle"]["fit"]["lr"] == min(trials, key=trials.get)
    seeds = [
        json.loads((p / "metrics.json").read_text())["unseen"]["nll"]
        for p in sorted((tmp_path / "out/runs").iterdir())
        if p.name.startswith("scalabl") and p.name in second
    ]
    nll = table["metrics"]["scalabl"]["unseen"]["nll"]
    assert nll["mean"] == pytest.approx(sum(seeds) / 2)
    # Over questions too, and so more than over seeds alone.
    assert nll["standard_error"] > abs(seeds[0] - seeds[1]) / 2
    assert nll["low"] < nll["mean"] < nll["high"]
    assert 0 <= table["auroc_of_entropy"]["mle"]["unseen"]["mean"] <= 1
    assert 0 <= table["minus_mle"]["scalabl"]["test"]["nll"]["p"] <= 1
    floor = table["ece_floor"]["mle"]["test"]
    assert 0 <= floor["low"] < floor["mean"] < floor["high"] <= 1
    shown = (tmp_path / "out/table.txt").read_text()
    assert "over seeds and questions" in shown.splitlines()[0]
    assert f"({100 * floor['mean']:.1f})" in shown
    assert (tmp_path / "out/comparison.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "out/table.csv").open() as file:
        assert len([line for line in csv.DictReader(file) if line["split"]]) == 2 * 2 * 5
    # Three steps of four questions; three draws.
    assert table["cost"]["mle"]["training"]["backward"] == 3 * 4
    assert table["cost"]["scalabl"]["prediction"]["forward"] == 3
    page = (tmp_path / "out/report.html").read_text()
    links = re.findall(r'href="(runs/[^"]+)"', page)
    assert len(links) == 2 * 2
    assert all((tmp_path / "out" / link / "README.md").exists() for link in links)
    assert "fit.lr=0.1" in page, "a trial"
    assert (tmp_path / "out/table.txt").read_text().strip() in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_comparison_without_a_test_split_is_refused_before_any_run(compare, tmp_path, capsys):
    (tmp_path / "data/test.jsonl").unlink()
    assert compare("seeds=[0]") == 1
    message = capsys.readouterr().err
    assert "there is no split 'test'" in message
    assert "a folder with a file for each split (data.root)" in message
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named(compare, capsys):
    assert compare("seeds=[0]", "lora.targets=[nowhere]") == 1
    error = capsys.readouterr().err
    assert "failed: target_modules ['nowhere'] match no module" in error
    assert "finished runs are kept" in error


def test_predictions_of_a_run_are_kept(compare, tmp_path):
    others = ["~methods.map", "~methods.mle", "~methods.mle_tempered", "~methods.zero_shot"]
    words = ["methods.scalabl=[{method:{name:scalabl,draws:3},fit:{lr:0.01}}]", *others]
    assert compare("seeds=[0]", *words) == 0
    (folder,) = (tmp_path / "out/runs").iterdir()
    predictions = predictions_of(folder)
    assert set(predictions) == {"validation", "test", "unseen"}
    assert isinstance(predictions["test"], Predictions)
    assert predictions["test"].logits.shape == (3, 9, 4)
    assert torch.equal(predictions["unseen"].labels, torch.arange(7) % 4)
    assert math.isfinite(float(predictions["test"].logits.sum()))


def test_the_base_model_is_the_first_row(compare, tmp_path, local_model, capsys):
    """With the figures that evaluate gives of it."""
    rest = [f"~methods.{name}" for name in ("map", "mle_tempered", "scalabl")]
    assert compare("seeds=[0]", "methods.mle=[{method:{name:mle}}]", *rest) == 0
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert list(table["metrics"]) == ["zero_shot", "mle"]
    assert "zero_shot − mle" in (tmp_path / "out/table.txt").read_text()
    capsys.readouterr()
    words = [f"model.name={local_model}", "data.root=data", "progress=false"]
    assert scalabl("evaluate", *words) == 0
    alone = json.loads(capsys.readouterr().out)
    for metric in ("acc", "nll", "brier", "ece"):
        mean = table["metrics"]["zero_shot"]["test"][metric]["mean"]
        assert mean == pytest.approx(alone[metric], abs=1e-6)


def test_a_base_model_without_a_head_is_left_out(compare, capsys):
    words = ["model.readout=sequence_classification", "lora.heads=[score]", "seeds=[0]"]
    others = [f"~methods.{name}" for name in ("map", "mle", "mle_tempered", "scalabl")]
    assert compare(*words, *others) == 1
    error = capsys.readouterr().err
    assert "the row zero_shot is left out: the heads ['score'] are untrained" in error
    assert "methods is {}: expected one trial or more" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=[1,1]"], "expected different numbers"),
        (["seeds=[1,100]"], "tuning_seed 100 is among the seeds"),
        (["methods.mle=[]"], "expected one trial or more"),
        (["methods.mle=[{method:{name:mle},lr:1}]"], "overrides ['lr']"),
        (["methods.mle=[{method:{name:mla}}]"], "method.name is 'mla'"),
        (["methods.mle=[{method:{name:mle},fit:3}]"], "methods.mle has fit 3: expected a mapping"),
        (["+methods.blob=[{method:{name:blob}}]"], "methods.blob has a trial without fit.kl"),
        (["+methods.own=[{method:{name:reference},fit:{lr:1}}]"], "without fit.clip_norm"),
        (["+methods.own=[{method:{name:swag}}]"], "train takes is {'decay': 'constant'}"),
    ],
)
def test_bad_comparisons_are_refused(compare, tmp_path, capsys, words, message):
    assert compare(*words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_trial_that_diverges_is_passed_over(compare, tmp_path, capsys):
    rest = [f"~methods.{name}" for name in ("map", "mle_tempered", "scalabl", "zero_shot")]
    rest.append("seeds=[0]")
    diverge = "{method:{name:mle},fit:{lr:1.0e+30}}"
    assert compare(f"methods.mle=[{diverge},{{method:{{name:mle}}}}]", *rest) == 0
    trials = json.loads((tmp_path / "out/table.json").read_text())["trials"]["mle"]
    assert trials[0]["validation_nll"] is None
    assert trials[1]["validation_nll"] > 0
    capsys.readouterr()
    assert compare(f"methods.mle=[{diverge},{diverge}]", *rest, "out=other") == 1
    assert "training diverged in every row, ['mle']; lower lr" in capsys.readouterr().err
    assert not (tmp_path / "other/report.html").exists()


def test_what_is_wrong_with_the_data_is_told_once(compare, tmp_path, capfd):
    rest = ["~methods.map", "~methods.mle_tempered", "~methods.scalabl", "~methods.zero_shot"]
    tested = [replace(record, id=f"again {record.id}") for record in make_records(9)[:2]]
    write_jsonl(tmp_path / "data" / "train.jsonl", [*make_records(16), *tested])
    assert compare("seeds=[0,1]", *rest) == 0
    told = capfd.readouterr().err
    assert told.count("left out") == 1
    assert "left out 2 questions of train that are also in test" in told


def test_rows_that_diverge_leave_the_others_their_report(compare, tmp_path, capsys):
    rest = ["~methods.map", "~methods.mle_tempered", "~methods.scalabl", "~methods.zero_shot"]
    broken = "+methods.broken=[{method:{name:mle},fit:{lr:1.0e+30}}]"
    trials = "+methods.tried=[{method:{name:mle},fit:{lr:1e30}},{method:{name:mle},fit:{lr:2e30}}]"
    assert compare(broken, trials, *rest, "seeds=[0,1]") == 1
    told = capsys.readouterr().err
    assert (
        "training diverged in the rows ['broken', 'tried'], which are left out of the rep" in told
    )
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert list(table["metrics"]) == ["mle"]
    assert table["lost"] == ["broken", "tried"]
    assert [trial["validation_nll"] for trial in table["trials"]["tried"]] == [None, None]
    for name in ("report.html", "table.md", "table.txt"):
        text = (tmp_path / "out" / name).read_text()
        assert "eft out, as their training diverged: broken, tried" in text, name
    # What is there is a row of one name and two seeds for a report on the folder too.
    assert scalabl("report", "runs=out/runs", "out=again") == 0
    (row,) = json.loads((tmp_path / "again/table.json").read_text())["metrics"].values()
    assert row == table["metrics"]["mle"]


def test_another_adapter_to_start_from_is_another_run(compare, tmp_path, local_model):
    rest = ["~methods.map", "~methods.mle_tempered", "~methods.scalabl", "~methods.zero_shot"]
    words = ["train", f"model.name={local_model}", "data.root=data", "progress=false"]
    words += ["method=mle", "fit.steps=2"]
    counts = []
    for lr in (0.01, 0.1):
        assert scalabl(*words, f"fit.lr={lr}", f"run_dir=start-{lr}") == 0
        shutil.rmtree(tmp_path / "start", ignore_errors=True)
        shutil.copytree(tmp_path / f"start-{lr}" / "adapter", tmp_path / "start")
        assert compare("lora.start=start", "seeds=[0]", *rest) == 0
        counts.append(len(list((tmp_path / "out/runs").iterdir())))
    assert counts == [1, 2]


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Otherwise kill -9 would leave a worker that holds the lock of its run."""
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from scalabl_pyro.commands._quiet import quiet_worker\n"
        "if __name__ == '__main__':\n"
        "    context = get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, context, initializer=quiet_worker, initargs=(1,))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.kill()
        # The worker holds the other end of the pipe, which closes when both have ended.
        assert process.communicate(timeout=60)[0] == ""


def test_every_method_is_a_row_of_one_comparison():
    """But the one that needs a head, which the embedded model has none of."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = OmegaConf.to_container(compose("methods"), resolve=True)
    config = build(CompareConfig, settings)
    names = {trial["method"]["name"] for row in config.methods.values() for trial in row}
    assert names == METHODS.keys() - {"last_layer_laplace"}
    assert all(len(row) == 1 for row in config.methods.values()), "nothing is tuned"
    assert len(config.seeds) == 3
