"""Errors of the command line: one line, told before the work, and nothing left behind."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conftest import FAST, make_records, only_line, scalabl, write_jsonl

import scalabl_pyro.commands.predict as predict_command
from scalabl_pyro import load_run

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit.kl.weight=0"], "KL weight is 0.0"),
        (["fit.kl.shape=round"], "fit.kl.shape is 'round'"),
        (["fit.steps=0"], "error: fit.steps is 0: expected a finite number from 1 on"),
        (["method.draws=-1"], "error: method.draws is -1"),
        (["method.projections=frozen"], "error: method.projections is 'frozen'"),
        (["method=mle", "method.projections=unit"], "error: method.projections is 'unit'"),
        (["method=blob", "+method.projections=free"], "no setting method.projections"),
        (["+method.drawz=1"], "no setting method.drawz; did you mean method.draws"),
        (["trials=[{fit:{steps:0}}]"], "error: fit.steps is 0"),
        (["seed=-1"], "seed is -1: expected 0 to 2^32"),
        (["seed=4294967296"], "seed is 4294967296: expected 0 to 2^32 − 1"),
        ([f"run_dir={'x' * 250}"], "of 250 characters is too long"),
        (["run_dir=${nope}"], "nope"),
        (["fit.stepz=1"], "error: there is no setting fit.stepz; did you mean fit.steps?"),
        (
            ["columns.question=q"],
            "no setting columns.question; did you mean data.columns.question?",
        ),
        (["method.guide.blocks=1"], "use +method.guide.blocks=1"),
        (["method=mle", "method.draws=1"], "no setting method.draws with the method given"),
        (["method.prior.scale=2"], "+method.prior.scale=2"),
        (["method=mle", "fit.kl_budget=5"], "fit.kl_budget is 5.0, and method mle has no KL"),
        (["+fit.kl.wait=1"], "no setting fit.kl.wait; did you mean fit.kl.weight"),
        (["fit.steps=many"], "fit.steps is 'many'"),
        (["model.name=???"], "model.name is needed"),
        (["model.name=no/where"], "there is a network: hf download no/where. (transformers says"),
        (["model.name=/no"], "there is no folder /no. Name a folder that holds config.json and"),
        (["model.readout=vision"], "error: model.readout is 'vision'"),
        (["lora.targets=[]"], "error: lora.targets is empty"),
        (["lora.dropout=2"], "error: lora.dropout is 2.0: expected a probability below 1"),
        (
            ["lora.layers=[1,99]"],
            "layers_to_transform holds [99], but LlamaForCausalLM has 2 blocks",
        ),
        (["lora.start=/nope"], "lora.start is '/nope': '/nope' is no PEFT adapter"),
        (["lora.targets=[query]"], r"target_modules ['query'] match no module"),
        (["data.root=nowhere"], "nowhere: expected a folder"),
        (["data.path=x.jsonl"], "give exactly one"),
        (["run_dir=."], "run folder . exists"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(
    local_model, data, tmp_path, capsys, words, message
):
    before = sorted(tmp_path.rglob("*"))
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", *where, *FAST, *words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.projections=fixed"], "give lora.start, a trained adapter"),
        (["method.name=mle"], "there is no setting method.core; expected one of ['projections']"),
        (["data.root=null", "data.task=embeded"], "error: there is no data set 'embeded'"),
        (["method.prior.name=cauchy"], "method.prior.name is 'cauchy'"),
    ],
)
def test_wrong_settings_are_named_in_full(local_model, data, capsys, words, message):
    assert scalabl("train", f"model.name={local_model}", f"data.root={data}", *words) == 1
    assert message in capsys.readouterr().err


def test_one_text_for_a_list_is_refused(run):
    with pytest.raises(ValueError, match="inputs is the text 'sky': expected a list"):
        load_run(run).predict_proba("sky")


def test_a_run_that_is_not_there_or_not_finished_is_no_damaged_one(capsys, monkeypatch):
    words = ["input=in.jsonl", "output=out.jsonl"]
    assert scalabl("predict", "run=nope", *words) == 1
    assert only_line(capsys) == "error: there is no run folder nope"
    Path("nope.unfinished").mkdir()
    assert scalabl("predict", "run=nope", *words) == 1
    assert "an unfinished run is in nope.unfinished: go on with resume=true" in only_line(capsys)
    Path("nope").mkdir()
    assert scalabl("predict", "run=nope", *words) == 1
    assert "nope is no complete run folder" in only_line(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.heads=[nope]"], "modules_to_save ['nope'] match no module of LlamaForCausalLM"),
        (["+method.config=3"], "method.config is no setting"),
        (["method=scalable"], "error: there is no method 'scalable'; did you mean method=scalabl?"),
        (["method=vi"], "error: there is no method 'vi'; expected one of ['blob', 'blob_tfb', "),
        (["protocol=own"], "error: there is no protocol 'own'; expected one of ['bag', 'ours', "),
        (
            ["lora.targets=q_proj"],
            "; one text is a pattern of whole names, a list such as [q_proj]",
        ),
        (["fit.batch_size=0"], "fit.batch_size is 0: expected a finite number from 1 on"),
        (["run_dir=/proc/nope/x"], "/proc/nope/x cannot be written, for /proc takes no new file"),
    ],
)
def test_settings_that_would_be_lost_are_refused(local_model, data, capsys, words, message):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", *where, *FAST, *words) == 1
    assert message in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_told_before_the_work(run, data, capsys, monkeypatch):
    monkeypatch.setattr(predict_command, "predict", lambda *args, **options: 1 / 0)
    write_jsonl(data / "in.jsonl", make_records(2))
    where = [f"run={run}", "output=/proc/nope/x", "progress=false"]
    for command, of in (
        ("evaluate", f"data.root={data}"),
        ("predict", f"input={data}/in.jsonl"),
        ("distill", f"input={data}/in.jsonl"),
    ):
        assert scalabl(command, *where, of) == 1
        assert "/proc/nope/x cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["predict.load_run", "_quiet.quiet_libraries", "export.load_run"])
def test_an_interruption_is_one_line(run, capsys, monkeypatch, where):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"scalabl_pyro.commands.{where}", interrupted)
    command = "export" if where.startswith("export") else "predict"
    given = [] if command == "export" else ["input=in.jsonl"]
    assert scalabl(command, f"run={run}", *given, "output=o.jsonl") == 130
    then = "nothing was written" if command == "export" else "the same command goes on"
    assert only_line(capsys) == f"error: interrupted; {then}"


def test_a_sweep_ends_in_one_line_for_a_run_that_failed(local_model, data, capsys, monkeypatch):
    monkeypatch.setattr(
        "scalabl_pyro.runs.training.make_adapter", lambda *args, **options: {}["gone"]
    )
    where = [f"model.name={local_model}", f"data.root={data}"]
    assert scalabl("train", "--multirun", *where, *FAST, "method=mle", "seed=0,1") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: KeyError: gone; ")
    assert "Traceback" not in "".join(lines)
    assert "in <lambda>" in log_of(lines[-1])
    assert "HYDRA_FULL_ERROR" not in os.environ


def log_of(line: str) -> str:
    path = Path(re.search(r"the traceback is in (\S+\.log)$", line).group(1))
    text = path.read_text()
    path.unlink()
    return text


@pytest.mark.parametrize(
    "error",
    [
        KeyError("lost"),
        TypeError("two\nlines"),
        AssertionError(),
        RecursionError("too deep"),
        ValueError("of another library"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad byte"),
    ],
    ids=repr,
)
def test_any_error_is_one_line_with_its_traceback_in_a_file(run, capsys, monkeypatch, error):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(predict_command, "load_run", fails)
    assert scalabl("predict", f"run={run}", "input=in.jsonl", "output=o.jsonl") == 1
    line = only_line(capsys)
    assert line.startswith(f"error: {type(error).__name__}: ")
    assert "check the files and settings" in line
    log = log_of(line)
    assert log.startswith("scalabl predict ")
    assert "in fails" in log


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_pyros_dump_does_not_bury_an_error_of_the_model(
    local_model, data, capsys, monkeypatch, kind
):
    def fails(*args, **options):
        raise kind("the cause itself")

    monkeypatch.setattr("scalabl_pyro.models.model.ScalaBLModel.observe", fails)
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", *where, *FAST, "fit.lr_guide=1") == 1
    line = only_line(capsys)
    assert line.startswith(f"error: {kind.__name__}: the cause itself; ")
    assert "Trace Shapes" in log_of(line)


@pytest.mark.parametrize("length", [245, 253, 256, 300])
def test_a_name_that_is_too_long_is_told_before_the_work(run, data, capsys, monkeypatch, length):
    for module in ("evaluate", "distill", "predict", "export"):
        monkeypatch.setattr(f"scalabl_pyro.commands.{module}.load_run", lambda path: 1 / 0)
    where = [f"run={run}", f"output={'x' * length}"]
    for command, *words in (
        ("evaluate", f"data.root={data}"),
        ("distill", "input=in.jsonl"),
        ("predict", "input=in.jsonl"),
        ("export",),
    ):
        assert scalabl(command, *where, *words) == 1
        assert f"of {length} characters is too long" in only_line(capsys)


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_table_that_cannot_be_written_is_told_before_the_work(command, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("/proc/nope/x", "file"):
        assert scalabl(command, f"out={out}") == 1
        assert "cannot be written" in only_line(capsys)
