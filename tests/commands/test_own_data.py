"""The path of a stranger: a table, a prompt and class names of one's own, one command each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyro.infer
import pytest
import torch
from conftest import FAST, WORDS, make_records, scalabl, tiny_llama, whole
from omegaconf import OmegaConf
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from scalabl_pyro import Predictor, ScalaBLModel, load_run
from scalabl_pyro.commands._input import own_records, read_input
from scalabl_pyro.data import Columns, read_records
from scalabl_pyro.infer.chains import mcmc

CLASSES = ["red", "the dog sleeps", "a tree"]  # one, three and two tokens
TEMPLATE = "{choices} : {question}"


def reviews(count: int) -> list[dict]:
    return [
        {
            "review_text": f"{WORDS[n % 5 + 2]} {WORDS[n // 5]}",
            "about": {"key": f"r{n}", "kind": WORDS[n % 4 + 8]},
            "stars": CLASSES[n % 3],
        }
        for n in range(count)
    ]


def shown(row: dict) -> str:
    """The template, filled by hand."""
    return f"{', '.join(sorted(CLASSES))} : {row['about']['kind']} . {row['review_text']}"


@pytest.fixture
def run(tmp_path, chat_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("model")
    chat_tokenizer.save_pretrained("model")
    datasets.Dataset.from_list(reviews(30)).to_parquet("reviews.parquet")
    words = [
        "model.name=model",
        "model.readout=choice_likelihood",
        "model.prompt=classes",
        f"model.template={TEMPLATE}",
        "model.shots=2",
        "model.chat=true",
        "data.path=reviews.parquet",
        'data.columns.question="{about.kind} . {review_text}"',
        "data.columns.label=stars",
        "data.columns.id=about.key",
        "lora.targets=[q_proj,v_proj]",
        "run_dir=run",
    ]
    assert scalabl("train", *words, *FAST) == 0
    return load_run("run")


def test_it_trains_predicts_and_generates(run, capsys):
    """Probabilities are those of plain PEFT: the adapter, the chat template, a cross entropy."""
    asked = [{k: v for k, v in row.items() if k != "stars"} for row in reviews(34)[30:]]
    datasets.Dataset.from_list(asked).to_parquet("new.parquet")
    words = ["run=run", "input=new.parquet", "output=answers.jsonl", "progress=false"]
    assert scalabl("predict", *words, "prediction.name=median") == 0  # by the run's columns
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["r30", "r31", "r32", "r33"]

    tokenizer = AutoTokenizer.from_pretrained("model")
    llm = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    llm = PeftModel.from_pretrained(llm, "run/adapter").eval()
    kappa = float(run.readout.kappa(run.predictor.adapter.peft_model.get_base_model()).detach())
    shots = run.readout.prompt.shots
    by_id = {row["about"]["key"]: row for row in reviews(30)}
    turns = []
    for shot in shots:
        row = by_id[shot.id]
        turns += [
            {"role": "user", "content": shown(row)},
            {"role": "assistant", "content": row["stars"]},
        ]
    assert len(turns) == 4
    for row, answer in zip(asked, answers, strict=True):
        messages = [*turns, {"role": "user", "content": shown(row)}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        scores = [log_prob(llm, tokenizer, prompt, name) / len(name) for name in sorted(CLASSES)]
        expected = (kappa * torch.tensor(scores)).softmax(-1).tolist()
        assert answer["probabilities"] == pytest.approx(expected, abs=1e-5)

    capsys.readouterr()
    settings = ["decoding.max_new_tokens=4", "progress=false"]
    assert scalabl("generate", "run=run", "prompt=the cat runs", *settings) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "the cat runs"


@torch.no_grad()
def log_prob(llm, tokenizer, prompt: str, answer: str) -> float:
    start = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = [*start, *tokenizer(answer, add_special_tokens=False).input_ids]
    logits = llm(torch.tensor([ids])).logits[0]
    targets = torch.tensor(ids[len(start) :])
    return -float(cross_entropy(logits[len(start) - 1 : -1], targets, reduction="sum"))


def test_files_are_read_by_the_runs_columns_if_they_have_them_and_else_as_they_are(run, capsys):
    row = reviews(31)[30]
    text = f"{row['about']['kind']} . {row['review_text']}"
    files = {
        "as_trained": {k: v for k, v in row.items() if k != "stars"},
        "labelled": row,
        "of_the_package": {"id": "r30", "question": text, "choices": sorted(CLASSES)},
        "named": {"Text": text, "Number": "r30"},
    }
    own = {"named": ["columns.question=Text", "columns.id=Number"]}
    answers = []
    for name, cells in files.items():
        Path(f"{name}.jsonl").write_text(json.dumps(cells) + "\n")
        words = [f"input={name}.jsonl", f"output={name}.answers", "progress=false"]
        assert scalabl("predict", "run=run", *words, *own.get(name, [])) == 0, name
        answers.append(json.loads(Path(f"{name}.answers").read_text()))
    assert all(answer == answers[0] for answer in answers[1:])
    assert answers[0]["id"] == "r30"
    capsys.readouterr()
    Path("other.jsonl").write_text(json.dumps({"Text": text, "Number": 1}) + "\n")
    assert scalabl("predict", "run=run", "input=other.jsonl", "output=none") != 0
    said = capsys.readouterr().err
    assert "Text" in said
    assert "data.columns" not in said


def run_records():
    columns = Columns(question="{about.kind} . {review_text}", label="stars", id="about.key")
    return read_records("reviews.parquet", tuple(sorted(CLASSES)), columns)[:8]


def test_nuts_predictive_and_predictor_agree(run):
    """The draws of a chain give the same logits by Pyro's Predictive and by ours."""
    adapter = run.predictor.adapter
    split = run.encode(run_records())
    model = ScalaBLModel(adapter, num_data=len(split))
    chains = mcmc(
        model, split, num_samples=6, warmup_steps=12, num_chains=1, progress=False, max_tree_depth=4
    )
    s = chains.draws.flatten(0, 1)
    batch = replace(whole(split), labels=None)
    predictive = pyro.infer.Predictive(model, {"s": s}, return_sites=["_RETURN"])
    with torch.no_grad():
        logits = predictive(batch)["_RETURN"]
    torch.testing.assert_close(logits, Predictor(adapter, s).logits(batch), atol=1e-5, rtol=1e-5)
    assert len(torch.unique(s, dim=0)) > 1


@pytest.mark.parametrize("label", ["label", "Key"])
def test_a_run_reads_later_labels_as_it_decided_to_read_its_own(
    tmp_path, local_model, capsys, monkeypatch, label
):
    """Numbers from 1 to 4 count from 1; those from 1 to 3 might as well count from 0."""
    monkeypatch.chdir(tmp_path)
    records = make_records(60)
    row = [{"question": r.question, "choices": r.choices, label: r.label + 1} for r in records]
    for name, rows in (("train", row[:40]), ("later", [r for r in row[40:] if r[label] < 4])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model.name={local_model}", "data.path=train.jsonl", "run_dir=run", *FAST]
    words += [] if label == "label" else [f"data.columns.label={label}"]
    assert scalabl("train", *words) == 0
    assert OmegaConf.load("run/config.yaml").data.columns.labels == "from_1"
    capsys.readouterr()
    assert scalabl("train", *words, "resume=true") == 0  # the settings are the same
    capsys.readouterr()
    asked = ["run=run", "input=later.jsonl", "progress=false", "conformal=lac", "coverage=0.5"]
    assert scalabl("predict", *asked, "output=a", "calibration=later.jsonl") == 0
    assert "can be read as" not in capsys.readouterr().err
    run = load_run("run")
    expected = [r for r in records[40:] if r.label < 3]
    read = read_input("later.jsonl", run, Columns())
    assert [record.label for record in read] == [record.label for record in expected]
    assert own_records(run, "train")  # by the labels that it had
    read = read_input("later.jsonl", run, Columns(labels="from_0"))
    assert [record.label for record in read] == [record.label + 1 for record in expected]


@pytest.mark.parametrize("kind", ["path", "root", "hub"])
def test_evaluate_reads_data_by_the_runs_columns_if_they_have_them(run, tmp_path, capsys, kind):
    test = Path("eval/test.parquet")
    test.parent.mkdir()
    datasets.Dataset.from_list(reviews(30)).to_parquet(test)
    where = {
        "path": [f"data.path={test}"],
        "root": ["data.root=eval"],
        "hub": ["data.hub=owner/name", "data.hub_path=eval"],
    }[kind]
    columns = [
        'data.columns.question="{about.kind} . {review_text}"',
        "data.columns.label=stars",
        "data.columns.id=about.key",
    ]
    said = []
    for words in (columns, []):
        capsys.readouterr()
        assert scalabl("evaluate", "run=run", *where, *words, "progress=false") == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]
    # A file of our own fields is read by them.
    rows = [
        {"id": row["about"]["key"], "question": shown(row).split(" : ")[1], "label": row["stars"]}
        for row in reviews(30)
    ]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scalabl("evaluate", "run=run", "data.path=own.jsonl", "progress=false") == 0
    assert json.loads(capsys.readouterr().out) == said[0]
