"""``scalabl distill``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import make_records, only_line, scalabl, write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM

from scalabl_pyro import Record, load_run, predict
from scalabl_pyro.data import read_folder

pytestmark = pytest.mark.usefixtures("in_tmp")


def test_distill_writes_a_plain_adapter(run, data, local_model, capsys):
    unlabelled = [Record(r.id, r.question, r.choices) for r in make_records(16)]
    write_jsonl(Path("in.jsonl"), unlabelled)
    words = [f"run={run}", "input=in.jsonl", "output=student", "progress=false"]
    assert scalabl("distill", *words, "fit.steps=30", "fit.batch_size=8", "fit.lr=0.01") == 0
    summary = json.loads(capsys.readouterr().out)
    assert 0 <= summary["kl_after"] < summary["kl_before"]
    assert json.loads(Path("student/distilled.json").read_text())["records"] == 16

    trained = load_run(run)
    batch = trained.readout.encode(read_folder(data)["test"])
    average = predict(trained.predictor, batch).logits.softmax(-1).mean(0)
    readout = trained.readout
    with torch.no_grad():
        llm = AutoModelForCausalLM.from_pretrained(local_model)
        student = PeftModel.from_pretrained(llm, "student").eval().get_base_model()
        whole = batch.collate(list(batch))
        single = readout(student, whole.inputs).softmax(-1)
    torch.testing.assert_close(single, average, atol=0.1, rtol=0)
    assert scalabl("distill", *words) == 1
    assert "student exists" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "lr"), [(2, 5.0), (30, 1.0)])
def test_a_student_that_got_worse_is_not_written(run, capsys, steps, lr):
    write_jsonl(Path("in.jsonl"), make_records(16, labelled=False))
    words = [f"run={run}", "input=in.jsonl", "output=student", "progress=false"]
    assert scalabl("distill", *words, f"fit.steps={steps}", f"fit.lr={lr}") == 1
    line = only_line(capsys)
    assert line.startswith(f"error: after {steps} steps the student is further from the average")
    after, before = map(float, re.search(r"KL (\S+) against (\S+) nats", line).groups())
    assert after > before > 0
    assert f"Lower fit.lr, which is {lr:g}" in line
    assert f"the adapter in {run / 'adapter'}" in line
    assert not list(Path().glob("student*"))
