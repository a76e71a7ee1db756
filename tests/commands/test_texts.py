"""Completions and conversations on the command line, and base models without training."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TURNS, make_records, scalabl, tiny_llama, tokens_of_the_last_turn, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scalabl_pyro import load_run
from scalabl_pyro.data import read_completions
from scalabl_pyro.prediction import score_split

FAST = ["fit.steps=4", "fit.batch_size=4", "fit.lr_guide=0.3", "fit.lr=0.1", "progress=false"]
WORDS = ["cat", "dog", "bird", "tree"]


pytestmark = pytest.mark.usefixtures("in_tmp")


def write_rows(path: str, rows: list[dict]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chat_model(tmp_path, chat_tokenizer):
    """A model folder whose tokenizer has a chat template."""
    tiny_llama().save_pretrained(tmp_path / "chat")
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def conversations(count: int) -> list[dict]:
    """With one turn of the assistant, or two."""
    rows = []
    for n in range(count):
        last = {"role": "assistant", "content": f"a {WORDS[n % 4]} runs"}
        asked = {"role": "user", "content": f"{WORDS[n // 4 % 4]} {WORDS[n % 3]} sings"}
        rows.append({"messages": [*(TURNS[:2] if n % 2 else []), asked, last]})
    return rows


@pytest.fixture
def chat_run(chat_model, capsys):
    """A run that was trained on conversations."""
    write_rows("data/train.jsonl", conversations(16))
    write_rows("data/test.jsonl", [{"messages": TURNS}, {"messages": TURNS[:2]}])
    where = [f"model.name={chat_model}", "data.root=data", "run_dir=run", "method.draws=3"]
    readout = ["model.readout=completion_tokens", "model.chat=true"]
    readout.append("lora.targets=[q_proj,lm_head]")
    assert scalabl("train", *where, *readout, *FAST) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_on_conversations_is_measured_as_plain_peft_measures_it(chat_run, capsys):
    """One adapter a draw, as exported; token by token over the assistant's last turn."""
    assert scalabl("export", "run=run", "output=out") == 0
    assert json.loads(Path("out/manifest.json").read_text())["prompt"] == {"chat": True}
    tokenizer = AutoTokenizer.from_pretrained("chat")
    adapters = sorted(Path("out").glob("draw_*"))
    assert len(adapters) == 3
    each = []
    for folder in adapters:
        model = AutoModelForCausalLM.from_pretrained("chat", dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(folder)).eval()
        rows = []
        for messages in (TURNS, TURNS[:2]):
            ids, mask = tokens_of_the_last_turn(tokenizer, messages)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double()
            for place in [t for t, m in enumerate(mask) if m]:
                rows.append(logits[place - 1].softmax(-1)[ids[place]])
        each.append(torch.stack(rows))
    probabilities = torch.stack(each).mean(0)
    nll_token = -float(probabilities.log().mean())
    assert chat_run["test"]["nll_token"] == pytest.approx(nll_token, abs=1e-5)
    assert chat_run["test"]["nll"] == pytest.approx(nll_token * 6 / 2, abs=1e-5)
    assert chat_run["test"]["perplexity"] == pytest.approx(math.exp(nll_token), rel=1e-5)
    assert chat_run["test"]["mutual_information"] > 0
    capsys.readouterr()
    assert scalabl("evaluate", "run=run", "data.root=data", "progress=false") == 0
    assert json.loads(capsys.readouterr().out) == chat_run["test"]
    saved = load_file("run/predictions.safetensors")
    assert saved["test.lengths"].tolist() == [4, 2]
    torch.testing.assert_close(
        saved["test.log_probs"].double(), torch.stack(each).log(), atol=1e-4, rtol=1e-4
    )


def test_a_chat_run_answers_from_the_rendered_conversation(chat_run, capsys, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained("chat")
    inputs = []
    plain = type(tiny_llama()).generate

    def spy(self, **options):
        inputs.append(options["input_ids"][0].tolist())
        return plain(self, **options)

    monkeypatch.setattr(type(tiny_llama()), "generate", spy)
    few = ["decoding.max_new_tokens=4", "progress=false"]
    assert scalabl("generate", "run=run", "prompt=a bird, sings: 'the' {cat} ${x}", *few) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt"] == "a bird, sings: 'the' {cat} ${x}"
    assert {"completion", "log_prob", "spread", "token_mutual_information"} <= answer.keys()
    assert answer["finish_reason"] in ("stop", "length")
    messages = [{"role": "user", "content": answer["prompt"]}]
    assert (
        inputs[0] == tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    )
    assert scalabl("generate", "run=run", f"messages={json.dumps(TURNS[:3])}", *few) == 0
    assert json.loads(capsys.readouterr().out)["messages"] == TURNS[:3]
    expected = tokenizer.apply_chat_template(TURNS[:3], add_generation_prompt=True).input_ids
    assert inputs[1] == expected
    write_rows("in.jsonl", [{"messages": TURNS[:3]}, {"id": "x", "prompt": "the dog"}])
    assert scalabl("generate", "run=run", "input=in.jsonl", "output=o.jsonl", *few) == 0
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["1", "x"]
    assert all(row["tokens"] for row in rows)


def test_given_answers_are_scored(chat_run, capsys):
    write_rows("in.jsonl", [{"messages": TURNS}, {"messages": TURNS[:2]}])
    assert scalabl("predict", "run=run", "input=in.jsonl", "output=o.jsonl", "progress=false") == 0
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [[t["token"] for t in row["tokens"]] for row in rows] == [
        ["sings", "the", "blue", "<end>"],
        ["runs", "<end>"],
    ]
    assert -sum(row["log_prob"] for row in rows) / 2 == pytest.approx(
        chat_run["test"]["nll"], abs=1e-5
    )


def prompts(count: int) -> list[dict]:
    return [
        {"prompt": f"the {WORDS[n % 4]} {WORDS[n // 4 % 4]}", "completion": f" runs {WORDS[n % 3]}"}
        for n in range(count)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("method", ["scalabl", "mle", "zero_shot", "ensemble", "blob", "tfb"])
def test_methods_learn_completions(chat_model, capsys, method, kind):
    """Without a template: a prompt is read as it stands."""
    if kind == "csv":
        with Path("texts.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(prompts(16))
    else:
        write_rows("texts.jsonl", prompts(16))
    where = [f"model.name={chat_model}", f"data.path=texts.{kind}", "run_dir=run"]
    words = ["model.readout=completion_tokens", f"method={method}", "lora.targets=[q_proj,lm_head]"]
    assert scalabl("train", *where, *words, *FAST) == 0
    trained = json.loads(capsys.readouterr().out)["validation"]
    assert trained["tokens"] == 3  # two words and the end token
    write_rows("test.jsonl", prompts(5))
    assert scalabl("evaluate", "run=run", "data.path=test.jsonl", "progress=false") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"] / 3), rel=1e-5)
    assert (metrics["mutual_information"] is None) == (method in ("mle", "zero_shot"))
    if method == "zero_shot":
        assert metrics["nll"] == pytest.approx(by_the_base_model(prompts(5)), abs=1e-5)


def test_posterior_weights_give_the_average_of_the_draws_probabilities_of_a_text(chat_run, capsys):
    """log 1/S Σ_k p_k(Y), from the draws one by one; equal weights average each token."""
    write_rows("known.jsonl", prompts(5))
    run = load_run("run")
    draws = run.predictor.draws
    assert len(draws) > 1
    split = run.encode(read_completions("known.jsonl", known=True))
    each = torch.tensor(
        [
            [text.log_prob for text in score_split(replace(run.predictor, draws=s[None]), split)]
            for s in draws
        ],
        dtype=torch.float64,
    )
    expected = each.logsumexp(0) - math.log(len(draws))
    where = ["run=run", "input=known.jsonl", "progress=false"]
    found = {}
    for weights in ("posterior", "equal"):
        words = [*where, f"output={weights}.jsonl", f"prediction.weights={weights}"]
        assert scalabl("predict", *words) == 0
        rows = [json.loads(line) for line in Path(f"{weights}.jsonl").read_text().splitlines()]
        found[weights] = [row["log_prob"] for row in rows]
    assert found["posterior"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert found["equal"] != pytest.approx(expected.tolist(), abs=1e-4)
    capsys.readouterr()
    words = ["evaluate", "run=run", "data.path=known.jsonl", "progress=false"]
    assert scalabl(*words, "prediction.weights=posterior") == 0
    nll = json.loads(capsys.readouterr().out)["nll"]
    assert nll == pytest.approx(-float(expected.mean()), abs=1e-4)
    assert scalabl(*words, "prediction.weights=posterior", "prediction.name=median") == 1
    assert "of several draws, and prediction.name is 'median'" in capsys.readouterr().err
    assert scalabl(*words, "prediction.weights=posterior", "prediction.draws=1") == 1
    assert "of several draws, and there is one" in capsys.readouterr().err
    assert scalabl(*words, "prediction.weights=mine") == 1
    assert "prediction.weights is 'mine': expected one of" in capsys.readouterr().err


def test_texts_are_read_by_a_column_map_and_later_ones_by_the_runs(chat_model, capsys):
    """As the same texts in columns of our own names."""
    for name, first, last in (("train", 0, 16), ("validation", 16, 20), ("test", 20, 25)):
        rows = prompts(25)[first:last]
        own = [{"ask": row["prompt"], "say": row["completion"]} for row in rows]
        write_rows(f"own/{name}.jsonl", own)
        write_rows(f"plain/{name}.jsonl", rows)
    readout = ["model.readout=completion_tokens", "lora.targets=[q_proj,lm_head]"]
    words = [f"model.name={chat_model}", *readout, "run_dir=run", "data.root=own"]
    columns = ["data.columns.prompt=ask", "data.columns.completion=say"]
    assert scalabl("train", *words, *columns, *FAST) == 0
    trained = json.loads(capsys.readouterr().out)["test"]
    for root in ("own", "plain"):
        assert scalabl("evaluate", "run=run", f"data.root={root}", "progress=false") == 0
        assert json.loads(capsys.readouterr().out) == trained
    where = ["run=run", "progress=false"]
    for root in ("own", "plain"):
        words = [*where, f"input={root}/test.jsonl"]
        assert scalabl("predict", *words, f"output={root}.scores") == 0
        few = "decoding.max_new_tokens=2"
        assert scalabl("generate", *words, f"output={root}.texts", few) == 0
    for kind in ("scores", "texts"):
        assert Path(f"own.{kind}").read_text() == Path(f"plain.{kind}").read_text()
    write_rows("third.jsonl", [{"q": row["prompt"]} for row in prompts(25)[20:]])
    words = [*where, "input=third.jsonl", "output=third.texts", "decoding.max_new_tokens=2"]
    capsys.readouterr()
    assert scalabl("generate", *words) == 1
    error = capsys.readouterr().err
    assert "or of texts to go on with columns.prompt, or of conversations" in error
    assert "found ['q']" in error
    assert scalabl("generate", *words, "columns.prompt=q") == 0
    texts, expected = (Path(f"{name}.texts").read_text() for name in ("third", "plain"))
    assert texts == expected


def test_a_text_without_a_completion_is_named_with_its_file(chat_model, chat_run, capsys):
    write_rows("open.jsonl", [*prompts(3), {"prompt": "the cat"}])
    write_rows("open/test.jsonl", [{"messages": TURNS[:1]}])
    base = [f"model.name={chat_model}", "model.readout=completion_tokens"]
    for words, place in (
        (["train", *base, "data.path=open.jsonl", "run_dir=x", *FAST], "open.jsonl: record '4'"),
        (["evaluate", *base, "data.path=open.jsonl"], "open.jsonl: record '4'"),
        (["evaluate", "run=run", "data.path=open.jsonl"], "open.jsonl: record '4'"),
        (["evaluate", "run=run", "data.root=open"], "the split test of open: record '1' has no"),
        (["predict", "run=run", "input=open.jsonl", "output=o"], "open.jsonl, line 4: record '4'"),
    ):
        assert scalabl(*words) == 1
        assert place in capsys.readouterr().err


def by_the_base_model(rows: list[dict]) -> float:
    """Nats a completion, by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained("chat")
    model = AutoModelForCausalLM.from_pretrained("chat", dtype=torch.float32)
    total = 0.0
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = [*prompt, *tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=labels).loss
        total += float(loss) * (len(ids) - len(prompt))
    return total / len(rows)


def test_a_base_model_is_evaluated_on_completions(chat_model, capsys):
    write_rows("test.jsonl", prompts(5))
    words = [f"model.name={chat_model}", "model.readout=completion_tokens", "progress=false"]
    assert scalabl("evaluate", *words, "data.path=test.jsonl", "output=m.json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["nll"] == pytest.approx(by_the_base_model(prompts(5)), abs=1e-5)
    assert json.loads(Path("m.json").read_text()) == metrics


def test_a_base_model_is_evaluated_on_letters(chat_model, capsys):
    """Against a softmax over the letters' logits, by plain transformers."""
    records = make_records(9)
    write_jsonl(Path("data/test.jsonl").absolute(), records)
    words = [f"model.name={chat_model}", "data.root=data", "progress=false"]
    assert scalabl("evaluate", *words) == 0
    metrics = json.loads(capsys.readouterr().out)
    tokenizer = AutoTokenizer.from_pretrained("chat")
    model = AutoModelForCausalLM.from_pretrained("chat", dtype=torch.float32)
    letters = tokenizer.convert_tokens_to_ids(list("ABCD"))
    log_probs = []
    for record in records:
        lines = [f"{letter}. {c}" for letter, c in zip("ABCD", record.choices, strict=True)]
        text = "\n".join([record.question, *lines, "Answer:"])
        with torch.no_grad():
            logits = model(tokenizer(text, return_tensors="pt").input_ids).logits[0, -1, letters]
        log_probs.append(logits.log_softmax(-1)[record.label])
    assert metrics["nll"] == pytest.approx(-float(torch.stack(log_probs).mean()), abs=1e-5)


def choice_scores(records) -> torch.Tensor:
    """(N, 4), log p of each choice's words a character, by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained("chat")
    model = AutoModelForCausalLM.from_pretrained("chat", dtype=torch.float32)
    scores = []
    for record in records:
        prompt = tokenizer(f"Question: {record.question}\nAnswer:").input_ids
        for choice in record.choices:
            answer = tokenizer(f" {choice}").input_ids
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
            log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            scores.append(log_probs[range(len(answer)), answer].sum() / len(choice))
    return torch.stack(scores).view(-1, 4).double()


def test_a_base_model_is_evaluated_by_the_likelihood_of_choices(chat_model, capsys):
    """κ is 1, or the one with the lowest NLL on train, by a search of our own."""
    best = choice_scores(make_records(16)).argmax(-1).tolist()
    labels = [b if n % 4 else (b + 1) % 4 for n, b in enumerate(best)]  # it is right on most
    train = [replace(r, label=b) for r, b in zip(make_records(16), labels, strict=True)]
    test = make_records(9)
    write_jsonl(Path("data/train.jsonl").absolute(), train)
    write_jsonl(Path("data/test.jsonl").absolute(), test)
    words = [f"model.name={chat_model}", "data.root=data", "progress=false"]
    words.append("model.readout=choice_likelihood")
    labels = torch.tensor([record.label for record in test])

    def nll(kappa, scores, labels):
        return float(torch.nn.functional.cross_entropy(kappa * scores, labels))

    assert scalabl("evaluate", *words, "model.temperature=none") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["nll"] == pytest.approx(nll(1.0, choice_scores(test), labels), abs=1e-5)
    assert scalabl("evaluate", *words) == 0
    fitted = json.loads(capsys.readouterr().out)
    # What is also asked in test is left out of train.
    asked = {(r.question, frozenset(r.choices)) for r in test}
    known = [r for r in train if (r.question, frozenset(r.choices)) not in asked]
    scores, answers = choice_scores(known), torch.tensor([r.label for r in known])
    kappa = min(torch.logspace(-2, 4, 4001).tolist(), key=lambda k: nll(k, scores, answers))
    assert 0.1 < kappa < 1000
    assert fitted["nll"] == pytest.approx(nll(kappa, choice_scores(test), labels), abs=2e-3)
    Path("data/train.jsonl").unlink()
    assert scalabl("evaluate", *words) == 1
    assert "fits κ to the split train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.task=embedded"], "run is None and model.name None: give exactly one"),
        (["run=x", "model.name=y", "data.task=embedded"], "run is 'x' and model.name 'y'"),
        (["run=x", "model.chat=true", "data.task=embedded"], "without model.name: give it too"),
        (["model.name=y", "prediction.draws=3", "data.task=embedded"], "no posterior over s"),
    ],
)
def test_bad_settings_of_evaluate_are_refused(capsys, words, message):
    assert scalabl("evaluate", *words) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "input is None, prompt is None, messages is None: give exactly one"),
        (["prompt=a", "input=b"], "input is 'b', prompt is 'a'"),
        (["input=b"], "output is null: give output=FILE.jsonl"),
        (["messages=[{role: user}]"], "messages is '[{role: user}]', no JSON"),
        (["messages=[]"], "messages is []: expected a list of messages, one or more"),
        (["prompt="], "prompt is ''"),
    ],
)
def test_bad_settings_of_generate_are_refused(capsys, words, message):
    assert scalabl("generate", "run=nowhere", *words) == 1
    assert message in capsys.readouterr().err


def test_what_reads_choices_and_what_reads_texts_say_so(chat_model, capsys):
    write_rows("texts.jsonl", prompts(16))
    write_rows("open.jsonl", [{"messages": TURNS[:3]}] * 1 + [{"messages": TURNS[:1]}])
    where = [f"model.name={chat_model}", "run_dir=run", *FAST]
    texts = [*where, "data.path=texts.jsonl"]
    reads = "model.readout=completion_tokens"
    for words, message in (
        (texts, "reads questions with choices: set model.readout=completion_tokens"),
        ([*texts, reads, "method=temperature"], "method temperature learns answers among choices"),
        ([*where, reads, "model.chat=true", "data.path=open.jsonl"], "its last message is of the"),
    ):
        assert scalabl("train", *words) == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert scalabl("compare", f"model.name={chat_model}", reads, "data.task=embedded") == 1
    assert "the table is of answers among choices" in capsys.readouterr().err
    assert not Path("run").exists()


def test_decisions_about_texts_are_refused(chat_run, capsys):
    write_rows("in.jsonl", [{"messages": TURNS}])
    for name, value in (("abstain_below", 0.5), ("conformal", "lac"), ("risk", 0.1)):
        words = ["input=in.jsonl", "output=o.jsonl", f"{name}={value}"]
        assert scalabl("predict", "run=run", *words) == 1
        assert f"{name} is {value!r}, which decides about answers" in capsys.readouterr().err
    assert not Path("o.jsonl").exists()


def test_ways_to_predict_that_texts_do_not_have_are_refused(chat_run, capsys):
    for words in (["prediction.name=linearised"], ["prediction.tolerance=0.1"]):
        assert scalabl("evaluate", "run=run", "data.root=data", *words) == 1
        assert "of a run that reads texts: expected average or median" in capsys.readouterr().err
    assert scalabl("evaluate", "run=run", "data.root=data", "prediction.name=median") == 0
    assert json.loads(capsys.readouterr().out)["mutual_information"] is None
    assert load_run("run").readout.num_classes == 32


@pytest.mark.parametrize("command", ["distill", "select"])
def test_commands_for_choices_refuse_a_run_on_texts(chat_run, capsys, command):
    words = ["run=run", "input=in.jsonl", "output=out"]
    assert scalabl(command, *words, *(["count=1"] if command == "select" else [])) == 1
    assert "run reads texts: expected a run that answers among choices" in capsys.readouterr().err
