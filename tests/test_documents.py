"""Every snippet and command of README and CONTRIBUTING, and every notebook, runs."""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import nbformat
import numpy as np
import pytest
import torch
from conftest import keeps_the_contract, make_records, scalabl, write_jsonl
from nbclient import NotebookClient
from pyro.nn import PyroParam

import scalabl_pyro.models.model as model_file
from scalabl_pyro import (
    FitConfig,
    Predictor,
    ScalaBLModel,
    draw,
    fit,
    guides,
    predict,
    priors,
    to_inference_data,
)
from scalabl_pyro.methods import MLE, ScalaBL, temperature
from scalabl_pyro.methods.base import PointMethod

ROOT = Path(__file__).resolve().parents[1]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "README.md", "python"))))
def test_python_in_the_readme_runs(number):
    names: dict[str, object] = {}
    exec(compile(blocks(ROOT / "README.md", "python")[number], "README.md", "exec"), names)
    assert names["predictor"].draws.shape == (10, 10, 8)
    assert 0 < names["loss"] / len(names["train"]) < 10


def test_commands_in_the_readme_run(tmp_path, local_model, monkeypatch):
    """The commands as printed, on a local model and data, with short training."""
    for name, count in (("train", 20), ("test", 6)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    write_jsonl(tmp_path / "questions.jsonl", make_records(3, labelled=False))
    (tmp_path / "prompts.jsonl").write_text('{"id": "1", "prompt": "the cat"}\n')
    rows = [f"the cat runs {i} times,{('red', 'blue')[i % 2]}" for i in range(200)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,class", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    commands = [
        line
        for block in blocks(ROOT / "README.md", "bash")
        for line in block.splitlines()
        if line.startswith("scalabl ")
    ]
    assert len(commands) == 13
    for command in commands:
        for old, new in {
            "Qwen/Qwen2.5-0.5B": str(local_model),
            "MODEL_FOLDER": str(local_model),
            "FOLDER": "data",
        }.items():
            command = command.replace(old, new)
        words = shlex.split(command)
        if words[1] not in ("export", "memory"):
            words += ["progress=false"]
        if words[1] in ("train", "compare", "distill"):
            words += ["fit.steps=2", "fit.batch_size=4"]
        if words[1] in ("train", "compare"):
            words += ["lora.targets=[q_proj,v_proj]"]
        if words[1] == "generate":
            words += ["decoding.max_new_tokens=4"]
        if words[1] == "memory":
            words += ["lora.targets=[q_proj,v_proj]", "classes=2"]
        if words[1] == "compare":
            words += ["seeds=[0]", "jobs=1"]
        assert scalabl(*words[1:]) == 0, command
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "texts.jsonl").exists()
    assert (tmp_path / "runs/mine-exported/draw_09").is_dir()
    assert (tmp_path / "runs/mine-distilled/adapter_config.json").exists()
    assert (tmp_path / "runs/mine-compared/table.csv").exists()
    assert (tmp_path / "runs/reviews/metrics.json").exists()


CALIBRATION = {
    "MLE": "MLE",
    "MLE, temperature": "MLE tempered",
    "MLE, A frozen": "MLE, A frozen",
    "MLE, stopped by validation NLL": "MLE early-stopped",
    "MAP": "MAP",
    "the published algorithm (`reference`), 10 draws": "reference",
    "**ScalaBL**, 10 draws": "frozen V",
    "ScalaBL with V free, 10 draws": "tempered ELBO",
    "ScalaBL with V free, posterior mean": "its posterior mean",
    "MLE as ScalaBL with V free, but for s": "MLE at lr 2e-3",
}


def test_the_readmes_table_of_calibration_is_that_of_the_benchmark():
    saved = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text())
    text = (ROOT / "README.md").read_text().split("**Real questions.**")[1]
    lines = [
        line for line in text.split("**The embedded world**")[0].splitlines() if line[:1] == "|"
    ]
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines[2:])
    assert rows.keys() == CALIBRATION.keys()
    for title, cells in rows.items():
        expected = []
        for steps in ("400", "800"):
            found = saved["figures"][steps]["test"].get(CALIBRATION[title])
            if found is None:
                expected += ["–"] * 3
                continue
            expected += [f"{100 * m:.1f} ± {100 * e:.1f}" for m, e in (found["acc"], found["ece"])]
            expected.append("{:.3f} ± {:.3f}".format(*found["nll"]))
        assert cells.split(" | ") == expected, title


def test_the_paired_differences_in_the_readme_are_those_of_the_benchmark():
    saved = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text())
    text = " ".join((ROOT / "README.md").read_text().split())
    for row in ("MLE", "MLE early-stopped"):
        for steps in ("400", "800"):
            found = saved["figures"][steps]["frozen V minus"][row]
            expected = [f"{100 * m:+.1f} ± {100 * e:.1f}" for m, e in (found["ece"], found["acc"])]
            expected.append("{:+.3f} ± {:.3f}".format(*found["nll"]))
            for figure in expected:
                assert figure.replace("-", "−") in text, (row, steps)


OBJECTIVES = {
    "V frozen, KL weight (the default)": "frozen V",
    "V and B free, KL weight": "tempered ELBO",
    "V and B free, β = 1": "plain ELBO",
    "V and B free, KL budget C": "KL budget",
    "rows of V of unit norm, KL weight": "unit-norm V",
    "Gaussian prior on B, KL weight": "prior on B",
    "published algorithm": "reference",
    "MLE on 800 questions, then s alone on the other 200": "trained, then s on fresh data",
    "MLE": "MLE",
    "MLE with A frozen": "MLE, A frozen",
    "MLE, stopped by validation NLL": "MLE early-stopped",
}


def test_the_table_of_objectives_is_that_of_the_benchmark():
    saved = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text())
    text = (ROOT / "docs" / "method.md").read_text().split("chosen at 400 / 800 | ACC %")[1]
    lines = text.split("\n\n")[0].splitlines()[2:]
    rows = {cells[0]: cells[2:5] for cells in (line.strip("| ").split(" | ") for line in lines)}
    assert rows.keys() == OBJECTIVES.keys()
    for title, cells in rows.items():
        both = [saved["figures"][s]["test"].get(OBJECTIVES[title]) for s in ("400", "800")]
        for cell, key, scale, digits in zip(
            cells, ("acc", "ece", "nll"), (100, 100, 1), (1, 1, 3), strict=True
        ):
            expected = [
                "–" if found is None else " ± ".join(f"{scale * x:.{digits}f}" for x in found[key])
                for found in both
            ]
            assert cell.split(" / ") == expected, (title, key)


def test_make_targets_in_the_readme_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"^make (\w+)", "\n".join(blocks(ROOT / "README.md", "bash")), re.MULTILINE)
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run_and_are_committed_executed(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "commit the notebook executed"
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)
    for cell in code:
        for name, value in (("STEPS", 4), ("DRAWS", 30)):
            cell.source = re.sub(rf"^{name} = \d+", f"{name} = {value}", cell.source, flags=re.M)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()


def run_snippet(start: str, names: dict[str, object]) -> None:
    """Run the block of CONTRIBUTING that begins so, among the names of the file it is meant for."""
    (code,) = [b for b in blocks(ROOT / "CONTRIBUTING.md", "python") if b.startswith(start)]
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)


def test_the_guide_of_contributing_keeps_the_contract(make_causal, records, monkeypatch):
    names = dict(vars(guides.base), PyroParam=PyroParam)
    run_snippet("class AutoSubspaceTiedNormal", names)
    monkeypatch.setitem(guides.GUIDES, "tied", names["AutoSubspaceTiedNormal"])
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = guides.make_guide(model, "tied", init_scale=0.25)
    assert sum(p.numel() for p in guide.parameters()) == adapter.shape[0] * (adapter.rank + 1)
    assert draw(guide, 4000, seed=0).std(0).mean() == pytest.approx(0.25, rel=0.02)
    exact = torch.distributions.kl_divergence(guide.get_posterior(), model.prior())
    assert guide.kl(model.prior()) == pytest.approx(exact.item(), rel=1e-4)
    assert draw(guide, 8, seed=0, kind="sobol").shape == (8, *adapter.shape)
    fit(model, guide, split, FitConfig(steps=2), progress=False)


def test_the_guide_of_contributing_that_is_not_normal_keeps_it_too(
    make_causal, records, monkeypatch
):
    names = dict(vars(guides.base), PyroParam=PyroParam)
    run_snippet("class AutoSubspaceStudentT", names)
    monkeypatch.setitem(guides.GUIDES, "student_t", names["AutoSubspaceStudentT"])
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = guides.make_guide(model, "student_t", init_scale=0.25, df=5.0)
    keeps_the_contract(guide, model, init_scale=0.25)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    history = fit(model, guide, split, FitConfig(steps=2), progress=False).history
    assert np.isfinite(history[-1]["kl"])
    assert not [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]
    method = ScalaBL(FitConfig(steps=2), progress=False, guide={"name": "student_t"}, draws=3)
    fitted = method.fit(make_causal, split, None, seed=0)
    assert predict(fitted.predictor, split).logits.shape == (3, len(split), 4)
    with pytest.raises(ValueError, match="no map from normal noise"):
        draw(guide, 8, seed=0, kind="sobol")


def test_the_priors_of_contributing_run(make_causal, records, monkeypatch):
    monkeypatch.setattr(priors, "PRIORS", dict(priors.PRIORS))
    run_snippet("PRIORS[", vars(priors))
    names = dict(vars(priors))
    run_snippet("class SharedScaleNormal", names)
    adapter = make_causal()
    split = adapter.readout.encode(records)
    for prior in (
        priors.make_prior(adapter.shape, "student_t", df=3.0),
        names["SharedScaleNormal"](adapter.shape),
    ):
        model = ScalaBLModel(adapter, num_data=len(split), prior=prior)
        guide = guides.make_guide(model, "multivariate_normal")
        before = {n: p.detach().clone() for n, p in guide.named_parameters()}
        fit(model, guide, split, FitConfig(steps=2), progress=False)
        assert not [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]


def test_the_likelihood_of_contributing_trains(make_causal, records):
    names = dict(vars(model_file))
    run_snippet("class NoisyLabels", names)
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = names["NoisyLabels"](adapter, num_data=len(split))
    guide = guides.make_guide(model)
    fit(model, guide, split, FitConfig(steps=2, batch_size=4), progress=False)
    predictor = Predictor(adapter, draw(guide, 3, seed=0))
    found, plain = (
        to_inference_data(predictor, split, model=m).log_likelihood["label"].values
        for m in (model, None)
    )
    np.testing.assert_allclose(found, np.log(0.9 * np.exp(plain) + 0.1 / 4), rtol=1e-4)


def test_the_method_of_contributing_fits(make_choice, records):
    names = dict(vars(temperature))
    names |= {"dataclass": dataclass, "PointMethod": PointMethod, "ClassVar": ClassVar}
    run_snippet("@dataclass", names)
    split = make_choice().readout.encode(records)
    fitted = names["Cool"](FitConfig(steps=2), progress=False).fit(make_choice, split, None, seed=0)
    plain = MLE(FitConfig(steps=2), progress=False).fit(make_choice, split, None, seed=0)
    logits = predict(fitted.predictor, split).logits
    torch.testing.assert_close(2 * logits, predict(plain.predictor, split).logits)


def test_no_folder_imports_one_to_its_right():
    """The chain of CONTRIBUTING, read from it, against all imports of the package."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    chain = re.search(r"\n    (data → .*? commands)\n", text, re.DOTALL).group(1)
    groups = [g.replace(",", " ").split() for g in chain.split("→")]
    place = {name: i for i, group in enumerate(groups) for name in group}
    place |= {"embedded": -1, "distributed": -1, "files": -1, "registry": -1}
    package = ROOT / "scalabl_pyro"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert place.keys() == folders | {"distributed", "files", "registry"}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).parts
        module = parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.ImportFrom) and node.level and module in place):
                continue
            above = parts[: len(parts) - node.level]
            others = [node.module] if node.module else [name.name for name in node.names]
            for other in (".".join([*above, other]).split(".")[0] for other in others):
                near = place[other] == place[module] and other != module
                assert place[other] <= place[module], f"{path} imports {other}"
                assert not near, f"{path} imports {other}, which stands beside it"
