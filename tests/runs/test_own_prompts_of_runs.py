"""A run keeps its own template, shots and system message, and needs no training data for them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_records, scalabl, write_jsonl
from omegaconf import OmegaConf
from safetensors.torch import load_file

from scalabl_pyro import load_run, predict
from scalabl_pyro.data import DataSource, Prompt, read_folder
from scalabl_pyro.lora.config import ModelConfig

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' . ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'tree :' }}{% endif %}"
)
FAST = ["lora.targets=[q_proj]", "fit.steps=2", "fit.batch_size=4", "progress=false"]


@pytest.fixture
def words(tmp_path, local_model, tokenizer, monkeypatch) -> list[str]:
    """A training run without its prompt."""
    monkeypatch.chdir(tmp_path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(local_model)
    for name, count in (("train", 16), ("validation", 7), ("test", 6)):
        write_jsonl(Path("data", f"{name}.jsonl"), make_records(count))
    config = json.loads(Path("model/config.json").read_text()) | {"max_position_embeddings": 256}
    Path("model/config.json").write_text(json.dumps(config))
    settings = json.loads(Path("model/tokenizer_config.json").read_text())
    Path("model/tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 256}))
    return [f"model.name={local_model}", "data.root=data", *FAST]


OWN = [
    r"model.template=bird . {question}\n{choices} Answer:",
    "model.shots=2",
    "model.chat=true",
    "model.system=the cat",
]


@pytest.mark.parametrize("readout", ["label_tokens", "choice_likelihood"])
def test_a_run_with_a_prompt_of_its_own_reloads_and_predicts_the_same(words, readout, capsys):
    assert scalabl("train", *words, *OWN, f"model.readout={readout}", "run_dir=run") == 0
    trained = json.loads(capsys.readouterr().out)["test"]
    train, test = (read_folder("data")[name] for name in ("train", "test"))
    Path("data/train.jsonl").unlink()
    run = load_run("run")
    prompt = run.readout.prompt
    assert prompt.template == "bird . {question}\n{choices} Answer:"
    assert (prompt.system, len(prompt.shots)) == ("the cat", 2)
    assert set(prompt.shots) <= set(train)
    saved = load_file("run/predictions.safetensors")["test.logits"]
    assert torch.equal(predict(run.predictor, test).logits, saved)
    source = "data.path=data/test.jsonl"
    assert scalabl("evaluate", "run=run", source, "progress=false") == 0
    assert json.loads(capsys.readouterr().out) == trained
    where = ["input=data/test.jsonl", "output=o.jsonl", "progress=false"]
    assert scalabl("predict", "run=run", *where) == 0
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    expected = predict(run.predictor, test).probabilities
    for row, p in zip(rows, expected, strict=True):
        assert row["probabilities"] == pytest.approx(
            p[: len(row["probabilities"])].tolist(), abs=1e-5
        )

    assert scalabl("export", "run=run", "output=exported") == 0
    prompt_of_manifest = json.loads(Path("exported/manifest.json").read_text())["prompt"]
    letters = readout == "label_tokens"
    assert prompt_of_manifest == {
        "template": "bird . {question}\n{choices} Answer:",
        "letters": letters,
        "gap": False,
        "chat": True,
        "add_special_tokens": False,
        "system": "the cat",
        "shots": [
            {
                "user": prompt.render(shot),
                "assistant": "ABCD"[shot.label] if letters else shot.choices[shot.label],
            }
            for shot in prompt.shots
        ],
    }


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (r"model.template={question}, it's {choices}:\n", "{question}, it's {choices}:\n"),
        ("""model.template='"{question} [a, b] "{choices}"'""", '"{question} [a, b] "{choices}"'),
        ("model.template='{question} {choices}'", "{question} {choices}"),
        ('model.template="{question} = {choices}"', "{question} = {choices}"),
        ("model.template={question}\\\\nabla {choices}\\", "{question}\\\nabla {choices}\\"),
        ("model.template=prompt.txt", "Tell me: {question}\n{choices} \\nabla"),
        ("model.template=null", None),
    ],
)
def test_a_template_on_the_command_line_is_the_text_as_it_stands(words, capsys, word, value):
    Path("prompt.txt").write_text("Tell me: {question}\n{choices} \\nabla\n")
    assert scalabl("show-prompts", *words, word, "--cfg", "job") == 0
    settings = OmegaConf.create(capsys.readouterr().out)
    config = ModelConfig(**OmegaConf.to_container(settings)["model"])
    assert config.template == value


def test_shots_stay_the_same_with_the_seed_and_leave_the_other_splits_alone(words):
    shots = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert scalabl("train", *words, "model.shots=3", f"seed={seed}", f"run_dir={name}") == 0
        shots.append(json.loads(Path(name, "posterior.json").read_text())["classes"]["shots"])
    assert shots[0] == shots[1] != shots[2]
    train = {(r.id, r.question) for r in read_folder("data")["train"]}
    assert all((row["id"], row["question"]) in train for rows in shots for row in rows)


def test_a_run_from_before_there_were_templates_and_shots_loads(words):
    assert scalabl("train", *words, "run_dir=run") == 0
    saved = load_file("run/predictions.safetensors")["test.logits"]
    config = OmegaConf.to_container(OmegaConf.load("run/config.yaml"))
    for name in ("template", "shots", "system"):
        del config["model"][name]
    OmegaConf.save(OmegaConf.create(config), "run/config.yaml")
    info = json.loads(Path("run/posterior.json").read_text())
    del info["classes"]["shots"]
    Path("run/posterior.json").write_text(json.dumps(info))
    run = load_run("run")
    assert run.readout.prompt == Prompt("{question}\n{choices}\nAnswer:", letters=True)
    records = DataSource(root="data").read_split("test")
    assert torch.equal(predict(run.predictor, records).logits, saved)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["model.template="], "model.template is ''"),
        (["model.template={passage}"], "there is no field {passage}: a record gives {question}"),
        (["model.template={question} ${run_dir}"], "expected a text without '${'"),
        (["model.template=none.txt"], "model.template is 'none.txt': expected a text"),
        (["model.shots=17"], "shots is 17, but the training split has 16 records"),
        (["model.shots=-1"], "model.shots is -1: expected 0 or more"),
        (["model.system=be brief"], "model.system is 'be brief', but chat is false"),
        (["model.readout=multiple_choice", "model.shots=1"], "model.shots is 1 with readout"),
        (
            ["model.readout=choice_likelihood", "model.prompt=gap"],
            "expected one '_' and text behind it",
        ),
    ],
)
def test_a_bad_prompt_is_one_line_before_any_work(words, capsys, given, message):
    shutil.rmtree("run", ignore_errors=True)
    assert scalabl("train", *words, *given, "run_dir=run") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(Path().glob("run*"))


def test_a_system_message_that_the_chat_template_leaves_out_is_one_line(
    words, tokenizer, local_model, capsys
):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(local_model)
    settings = ["model.chat=true", "model.system=be brief"]
    assert scalabl("train", *words, *settings, "run_dir=run") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "system is 'be brief', but the tokenizer's chat template does not write it" in line
    assert not list(Path().glob("run*"))


# ---------------------------------------------------------------------- show-prompts


def test_show_prompts_needs_the_tokenizer_alone(words, local_model, capsys):
    (local_model / "model.safetensors").unlink()
    assert scalabl("show-prompts", *words, *OWN, "split=test") == 0
    shown = capsys.readouterr().out
    records = read_folder("data")["test"]
    assert shown.count("--- test, record ") == 3
    first = records[0]
    options = [f"{letter} . {text}" for letter, text in zip("ABCD", first.choices, strict=True)]
    assert f"bird . {first.question} {' '.join(options)} Answer :" in shown
    assert "shots    2 of the 16 records of train" in shown
    assert "the chat template" in shown
    assert f"{' ABCD'[first.label + 1]}'  (right)" in shown
    assert not Path("run").exists()


def test_show_prompts_tells_what_is_cut_and_what_is_refused(words, local_model, capsys):
    records = [
        replace(r, question=f"{r.question} " + "the cat runs " * n)
        for n, r in enumerate(make_records(3))
    ]
    write_jsonl(Path("data/test.jsonl"), records)
    settings = json.loads(Path("model/tokenizer_config.json").read_text())
    Path("model/tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 22}))
    assert scalabl("show-prompts", *words, "split=test") == 0
    assert "too long by 4 tokens: refused, unless model.truncate=true" in capsys.readouterr().out
    assert scalabl("show-prompts", *words, "split=test", "model.truncate=true") == 0
    shown = capsys.readouterr().out
    assert "cut: nothing" in shown
    assert "cut: 4 tokens, " in shown
    assert scalabl("show-prompts", *words, "split=dev") == 1
    assert "there is no split 'dev'" in capsys.readouterr().err


def test_show_prompts_of_a_run_shows_what_it_was_trained_on(words, local_model, capsys):
    """The same as its training settings show, without them and without a weight."""
    assert scalabl("show-prompts", *words, *OWN, "split=test") == 0
    before = capsys.readouterr().out
    assert scalabl("train", *words, *OWN, "run_dir=run") == 0
    (local_model / "model.safetensors").unlink()
    capsys.readouterr()
    for where in (["split=test"], ["data.root=data", "split=test"], ["data.path=data/test.jsonl"]):
        assert scalabl("show-prompts", "run=run", "split=test", *where) == 0
        assert capsys.readouterr().out == before
    unlabelled = [replace(r, label=None) for r in read_folder("data")["test"]]
    write_jsonl(Path("new.jsonl"), unlabelled)
    Path("data/train.jsonl").unlink()
    assert scalabl("show-prompts", "run=run", "input=new.jsonl") == 0
    expected = before.replace("--- test,", "--- new.jsonl,").replace("  (right)", "")
    assert capsys.readouterr().out == expected
    assert scalabl("show-prompts", "run=run") == 1
    assert "the train split of the run cannot be read" in capsys.readouterr().err


def test_show_prompts_of_a_run_reads_by_its_columns(words, local_model, capsys):
    for name, records in read_folder("data").items():
        rows = [{"ref": r.id, "stem": r.question, "x": r.choices, "gold": r.label} for r in records]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path("other").mkdir(exist_ok=True)
        Path("other", f"{name}.jsonl").write_text(lines)
    columns = ["id=ref", "question=stem", "choices=x", "label=gold"]
    settings = ["data.root=other", *(f"data.columns.{column}" for column in columns)]
    assert scalabl("train", words[0], *FAST, *settings, "run_dir=run") == 0
    first = read_folder("data")["test"][0]
    for where in (["input=other/test.jsonl"], ["data.root=other", "split=test"], ["split=test"]):
        capsys.readouterr()
        assert scalabl("show-prompts", "run=run", *where) == 0
        shown = capsys.readouterr().out
        assert f"record {first.id!r}" in shown
        assert f"| {first.question} A . {first.choices[0]}" in shown
    renamed = Path("other/test.jsonl").read_text().replace('"stem"', '"asked"')
    Path("renamed.jsonl").write_text(renamed)
    named = [
        f"columns.{column}" for column in ("id=ref", "question=asked", "choices=x", "label=gold")
    ]
    assert scalabl("show-prompts", "run=run", "input=renamed.jsonl", *named) == 0
    assert capsys.readouterr().out == shown.replace("test, record", "renamed.jsonl, record")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the setting model.name is needed, or run"),
        (["model.name=x"], "data.path is None, data.root is None"),
        (["model.name=x", "data.root=data", "input=i.jsonl"], "a file for a run"),
        (["run=run", "model.chat=true"], "run is 'run', which keeps its own"),
        (["run=run", "input=i.jsonl", "data.root=data"], "data is given too: give one of them"),
        (["run=run", "columns.label=x"], "columns is given, and no input, whose columns they are"),
        (["run=run", "data.limit.test=3"], "settings of data are given without a source"),
        (["run=run", "data.columns.label=x"], "which says something about data.path"),
        (["run=nowhere"], "nowhere"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_show_prompts_of_something_else_is_refused(words, capsys, given, message):
    assert scalabl("show-prompts", *given) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
