"""The command and the snippets of docs/harnesses.md, on a run of a tiny model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, blocks, make_records, tiny_llama, write_jsonl

from scalabl_pyro import FitConfig
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.runs import train_run
from scalabl_pyro.runs.config import RunConfig
from scalabl_pyro.runs.data import DataConfig

PAGE = ROOT / "docs" / "harnesses.md"


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    """With runs/mine and a task of the name that the page uses, of questions in a file."""
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", make_records(8 + len(split)))
    train_run(
        RunConfig(
            model=ModelConfig(str(tmp_path / "model"), device="cpu"),
            lora=AdapterConfig(r=4, targets=("q_proj", "v_proj")),
            data=DataConfig(root=str(tmp_path / "data")),
            run_dir=str(tmp_path / "runs" / "mine"),
            fit=FitConfig(steps=2, batch_size=4),
            progress=False,
        )
    )
    files = {"data_files": {"test": str(tmp_path / "data" / "test.jsonl")}}
    task = {
        "task": "arc_easy",
        "dataset_path": "json",
        "dataset_kwargs": files | {"cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "arc_easy.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_command_and_python_evaluate_a_run(folder):
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra harness: there is no lm_eval")
    (command,) = blocks(PAGE, "bash")
    words = shlex.split(command.replace("arc_easy", str(folder / "tasks" / "arc_easy.yaml")))
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "scalabl ({'run': 'runs/mine'})" in done.stdout
    assert "|acc_norm|" in done.stdout.replace(" ", "")
    code = blocks(PAGE, "python")[0]
    task = yaml.safe_load((folder / "tasks" / "arc_easy.yaml").read_text())
    names: dict = {"task": task}
    assert 'tasks=["arc_easy"]' in code
    local = code.replace('tasks=["arc_easy"]', "tasks=[task]")
    exec(compile(local, "harnesses.md", "exec"), names)
    assert names["average"].predictor.num_draws == 20
    assert 0 <= names["results"]["results"]["arc_easy"]["acc,none"] <= 1
    assert lm_eval.__version__


def test_what_it_says_of_equal_predictions_is_measured():
    path = ROOT / "benchmarks" / "results" / "harness.json"
    figures = json.loads(path.read_text())["figures"]
    text = " ".join(PAGE.read_text().split())
    assert f"On the first {figures['n']} test questions of ARC-Easy" in text
    assert f"in {figures['dtype']}," in text
    equal = {figures[metric]["predictions_equal"] for metric in ("acc", "acc_norm")}
    assert equal == {figures["n"]}
    assert f"all {figures['n']} predictions agree, by `acc` and by `acc_norm`" in text


def test_its_python_estimates_uncertainty(folder):
    pytest.importorskip("lm_polygraph", reason="needs the extra harness: there is no lm_polygraph")
    names: dict = {}
    for number, code in enumerate(blocks(PAGE, "python")[1:]):
        exec(compile(code, f"harnesses.md, block {number}", "exec"), names)
    for estimator in ("PETmi", "PETepkl", "PESrmi"):
        estimations = names["manager"].estimations["sequence", estimator]
        assert len(estimations) == 2
        assert estimations == pytest.approx(names[estimator]()(names["stats"]).tolist(), abs=1e-6)
