"""The average of a server's adapters, against a local server that speaks the API."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import FAST, ROOT, blocks, make_records, scalabl, write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM

from scalabl_pyro import load_run, predict
from scalabl_pyro.runs import ServedAverage, ServerError


@pytest.fixture
def run(tmp_path, local_model, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 12), ("validation", 6), ("test", 7)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count, choices=3))
    words = [f"model.name={local_model}", "data.root=data", "lora.targets=[q_proj,v_proj]"]
    far_apart = ["fit.lr=0.3", "method.guide.init_scale=1.0", "method.draws=3"]
    assert scalabl("train", *words, "run_dir=run", *FAST, *far_apart) == 0
    assert scalabl("export", "run=run", "output=out") == 0
    return tmp_path / "run"


def models(base: str) -> dict[str, PeftModel]:
    """The base model and each exported draw, as a server loads them: plain PEFT."""
    llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    by_name = {"base": llm.eval()}
    for folder in sorted(Path("out").glob("draw_*")):
        llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        by_name[folder.name] = PeftModel.from_pretrained(llm, str(folder)).eval()
    return by_name


@contextmanager
def serving(models: dict, *, spell=lambda i: f"token_id:{i}", most=1000, answers=None):
    """A server for completions of one token.

    :param spell: names a token.
    :param most: how many log-probabilities it tells at most.
    :param answers: how many prompts it answers; all if left out.
    """

    class Handler(BaseHTTPRequestHandler):
        def send(self, code: int, body: dict) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.send(200, {"data": [{"id": name} for name in models]})

        @torch.no_grad()
        def do_POST(self) -> None:
            assert self.path == "/v1/completions"
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (asked["max_tokens"], asked["temperature"]) == (1, 0)
            if asked["model"] not in models:
                return self.send(404, {"error": f"no model {asked['model']}"})
            choices = []
            for index, prompt in enumerate(asked["prompt"][:answers]):
                logits = models[asked["model"]](torch.tensor([prompt])).logits[0, -1]
                count = min(asked["logprobs"], most, len(logits))
                top = logits.log_softmax(-1).topk(count)
                pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                told = {"top_logprobs": [{spell(i): value for i, value in pairs}]}
                choices.append({"index": index, "logprobs": told})
            return self.send(200, {"choices": choices[::-1]})  # in no order that is promised

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("by", ["ids", "texts"])
def test_the_served_average_is_that_of_predict(run, local_model, by):
    loaded = load_run(run)
    records = [*make_records(7, choices=3), *make_records(2, choices=2, labelled=False)[:1]]
    records = [r for r in records if r.id != "q0"] + records[-1:]
    expected = predict(loaded.predictor, records)
    tokenizer = loaded.readout.tokenizer
    spell = (lambda i: f"token_id:{i}") if by == "ids" else (lambda i: tokenizer.decode([i]))
    with serving(models(str(local_model)), spell=spell) as url:
        client = ServedAverage(run, url, logprobs=100)
        predictions = client.predict(records)
    assert client.draws == ("draw_00", "draw_01", "draw_02")
    assert predictions.logits.shape == expected.logits.shape
    torch.testing.assert_close(predictions.probabilities, expected.probabilities, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        predictions.mutual_information, expected.mutual_information, atol=1e-4, rtol=0
    )
    assert predictions.mutual_information.max() > 1e-3


def test_the_client_of_the_documentation_asks_a_server(run, local_model):
    code = blocks(ROOT / "docs" / "serving.md", "python")[1]
    write_jsonl(Path("questions.jsonl"), make_records(4, choices=3, labelled=False))
    with serving(models(str(local_model))) as url:
        # The tiny model has not learned that a letter follows.
        code = code.replace('"http://localhost:8000/v1"', f'"{url}", logprobs=100')
        code = code.replace("runs/first", "run")
        names: dict = {}
        exec(compile(code, "serving.md", "exec"), names)
    assert names["answers"].probabilities.shape == (4, 3)


def test_chosen_draws_alone_are_asked(run, local_model):
    records = make_records(5, choices=3)
    bank = load_run(run).predictor
    with serving(models(str(local_model))) as url:
        predictions = ServedAverage(run, url, draws=["draw_02"], logprobs=100).predict(records)
    expected = predict(bank, records).logits[2:]
    torch.testing.assert_close(
        predictions.logits.softmax(-1), expected.softmax(-1), atol=1e-4, rtol=0
    )


def test_what_a_server_leaves_out_is_not_counted_as_nothing(run, local_model):
    with serving(models(str(local_model)), most=3) as url:
        client = ServedAverage(run, url)
        with pytest.raises(ServerError, match=r"'q0': the label words \[.*raise logprobs above 20"):
            client.predict(make_records(5, choices=3))


def test_servers_that_do_not_answer_are_told(run, local_model):
    everything = models(str(local_model))
    with serving(everything, answers=2) as url:
        with pytest.raises(ServerError, match="answers 2 of 5 prompts at draw_00"):
            ServedAverage(run, url, draws=["draw_00"]).predict(make_records(5, choices=3))
        with pytest.raises(ServerError, match=r"refuses \(404\): .*no model draw_09"):
            ServedAverage(run, url, draws=["draw_09"]).predict(make_records(5, choices=3))
    with pytest.raises(ServerError, match=r"/v1/models gives no answer: .*refused"):
        ServedAverage(run, url)
    with (
        serving({"base": everything["base"]}) as url,
        pytest.raises(ValueError, match=r"no adapter is called draw_00 .*: give draws=\[…\]"),
    ):
        ServedAverage(run, url)


def test_other_readouts_are_refused(tmp_path, local_model, run):
    words = [f"model.name={local_model}", "data.root=data", "lora.targets=[q_proj]"]
    readout = "model.readout=choice_likelihood"
    assert scalabl("train", *words, "run_dir=other", readout, *FAST) == 0
    with pytest.raises(ValueError, match="other reads ChoiceLikelihood: expected a run with"):
        ServedAverage("other", "http://127.0.0.1:1/v1")
