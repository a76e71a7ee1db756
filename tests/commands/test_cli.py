from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import (
    FAST,
    make_records,
    predictions_of,
    scalabl,
    tiny_bert_config,
    tiny_llama,
    write_jsonl,
)
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertForSequenceClassification, BertModel

import scalabl_pyro.commands.predict as predict_command
from scalabl_pyro import FitConfig, KLSchedule, Record, load_run, predict
from scalabl_pyro.commands._configs import CONFIGS
from scalabl_pyro.commands._input import begun_for
from scalabl_pyro.commands.cli import COMMANDS
from scalabl_pyro.data import read_folder
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import make_adapter
from scalabl_pyro.methods import METHODS, ScalaBL
from scalabl_pyro.prediction import metrics
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.runs.config import RunConfig
from scalabl_pyro.runs.data import DataConfig
from scalabl_pyro.runs.folder import RunFolderError
from scalabl_pyro.runs.settings import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path):
    for name, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    return tmp_path / "data"


@pytest.fixture
def run(local_model, data, tmp_path, capsys):
    """A finished run folder."""
    where = [f"model.name={local_model}", f"data.root={data}", f"run_dir={tmp_path / 'run'}"]
    assert scalabl("train", *where, *FAST, "fit.lr=0.1") == 0
    capsys.readouterr()
    return tmp_path / "run"


FEW = ["method.members=2", "method.share=1"]
WORDS = {"checkpoint_ensemble": FEW, "swag": FEW}


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"last_layer_laplace"}))
def test_train_evaluate_predict(local_model, data, tmp_path, capsys, method):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", f"method={method}", *where, *FAST, *WORDS.get(method, [])) == 0
    trained = json.loads(capsys.readouterr().out)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names - {"posterior.safetensors"} == {
        "README.md", "adapter", "config.yaml", "cost.json", "data.json", "environment.json",
        "history.csv", "metrics.json", "posterior.json", "predictions.safetensors",
        "projections.safetensors", "trained_on.json",
    }  # fmt: skip
    without_draws = {"mle", "map", "temperature", "mc_dropout", "zero_shot"}
    assert ("posterior.safetensors" in names) == (method not in without_draws)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["test"] == trained["test"]
    with (tmp_path / "out" / "history.csv").open() as file:
        rows = {"ensemble": 20, "zero_shot": 0}.get(method, 4)
        assert len(list(csv.DictReader(file))) == rows

    assert (
        scalabl("evaluate", "run=out", f"data.root={data}", "output=m.json", "progress=false") == 0
    )
    assert json.loads(capsys.readouterr().out) == trained["test"]
    assert json.loads((tmp_path / "m.json").read_text()) == trained["test"]

    unlabelled = [Record(r.id, r.question, r.choices) for r in make_records(9)]
    write_jsonl(tmp_path / "in.jsonl", unlabelled)
    assert scalabl("predict", "run=out", "input=in.jsonl", "output=o.jsonl", "progress=false") == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [record.id for record in unlabelled]
    for row, record in zip(rows, unlabelled, strict=True):
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert row["answer"] == record.choices[row["label"]]
        assert row["choices"] == list(record.choices)
        assert row["entropy"] > 0
        assert row["mutual_information"] >= 0
        assert row["noise_to_signal"] >= 0


def test_two_runs_with_one_seed_give_the_same_metrics_to_the_bit(local_model, data, capsys):
    outputs = []
    for name in ("a", "b"):
        where = [f"model.name={local_model}", f"data.root={data}", f"run_dir={name}"]
        assert scalabl("train", *where, *FAST) == 0
        outputs.append(json.loads(capsys.readouterr().out) | {"run": ""})
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("words", [["method=mle"], ["--multirun", "method=mle"]], ids=" ".join)
def test_a_run_keeps_the_command_that_made_it(local_model, data, words):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", *where, *FAST, *words) == 0
    command = json.loads(Path("out/environment.json").read_text())["command"]
    assert command == ["scalabl", "train", *where, *FAST, *words]


def test_a_folder_without_validation_holds_some_of_train_out(local_model, data, capsys):
    (data / "validation.jsonl").unlink()
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", *where, *FAST, "data.validation_fraction=0.25") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"run", "test", "validation"}
    assert json.loads(Path("out/posterior.json").read_text())["num_data"] == 12


def test_posterior_mean_differs_from_the_average(run, data, capsys):
    assert scalabl("evaluate", f"run={run}", f"data.root={data}", "progress=false") == 0
    average = json.loads(capsys.readouterr().out)
    words = ["prediction.name=median", "progress=false"]
    assert scalabl("evaluate", f"run={run}", f"data.root={data}", *words) == 0
    mean = json.loads(capsys.readouterr().out)
    assert mean["mutual_information"] < 1e-6 < 1e-5 < average["mutual_information"]


def test_the_adapter_folder_is_plain_peft_at_the_posterior_mean(run):
    loaded = load_run(run)
    adapter, mean = loaded.predictor.adapter, loaded.guide.median()["s"]
    split = loaded.readout.encode(make_records(5))
    batch = split.collate(list(split))
    plain = PeftModel.from_pretrained(tiny_llama(), run / "adapter").eval()
    expected = loaded.readout(plain.get_base_model(), batch.inputs)
    torch.testing.assert_close(adapter(batch, mean), expected, atol=1e-5, rtol=1e-5)


def test_real_causal_lm_reloads_to_the_bit(shared, tmp_path, capsys):
    lines = (shared / "data" / "openbookqa" / "train.jsonl").read_text().splitlines()
    for name, part in (("train", lines[:40]), ("validation", lines[40:50]), ("test", lines[50:70])):
        (tmp_path / "obqa").mkdir(exist_ok=True)
        (tmp_path / "obqa" / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    model = shared / "models" / "stories260k"
    words = [f"model.name={model}", "data.root=obqa", "run_dir=out", *FAST]
    assert scalabl("train", *words) == 0
    before = predictions_of(Path("out"))["test"].logits
    loaded = load_run("out")
    split = loaded.readout.encode(read_folder("obqa")["test"])
    assert torch.equal(before, predict(loaded.predictor, split).logits)
    words = ["input=obqa/test.jsonl", "output=o.jsonl", "progress=false"]
    assert scalabl("predict", "run=out", *words) == 0
    assert len(Path("o.jsonl").read_text().splitlines()) == 20
    capsys.readouterr()
    trained = json.loads(Path("out/metrics.json").read_text())["test"]
    assert scalabl("evaluate", "run=out", "data.root=obqa", "progress=false") == 0
    assert json.loads(capsys.readouterr().out) == trained


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
        (["method=mle", "method.draws=1"], "no setting method.draws beside the others"),
        (["method.prior.scale=2"], "+method.prior.scale=2"),
        (["method=mle", "fit.kl_budget=5"], "fit.kl_budget is 5.0, and method mle has no KL"),
        (["+fit.kl.wait=1"], "no setting fit.kl.wait; did you mean fit.kl.weight"),
        (["fit.steps=many"], "fit.steps is 'many'"),
        (["model.name=???"], "model.name is needed"),
        (["model.name=no/where"], "model 'no/where' not found"),
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


def test_hydra_refuses_unknown_keys(capsys):
    assert scalabl("train", "fit.stepz=3") == 1
    assert "stepz" in capsys.readouterr().err


def test_unknown_commands_show_the_usage(capsys):
    assert scalabl("fly") == 2
    assert "usage: scalabl COMMAND" in capsys.readouterr().err
    assert scalabl("--help") == 0


def settings(config):
    """The names of a configuration's settings and groups, nested ones too."""
    for field in dataclasses.fields(config):
        yield field.name
        kind = get_type_hints(config)[field.name]
        yield from settings(kind) if dataclasses.is_dataclass(kind) else ()


#: columns of the other kind of records than a command reads
OTHER_COLUMNS = {
    "select": {"prompt", "completion"},
    "generate": {"question", "choices", "label", "keys", "labels", "completion"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_setting(command, capsys):
    assert scalabl(command, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"# scalabl {command}: ")
    assert "defaults:" not in shown
    assert "hydra/" not in shown
    documented = set(re.findall(r"^ *(\w+):", shown, re.MULTILINE))
    config, _ = COMMANDS[command].load()
    # Of a model, an adapter or training, memory, distill and doctor use a part.
    nested = command not in ("memory", "distill", "doctor")
    names = settings(config) if nested else [field.name for field in dataclasses.fields(config)]
    assert set(names) - OTHER_COLUMNS.get(command, set()) <= documented
    if command == "train":
        assert {"guide", "prior", "elbo", "draws"} <= documented


@pytest.mark.parametrize(
    "code",
    [
        "import scalabl_pyro",
        *(
            f"import sys; sys.argv = {['scalabl', *words]}\n"
            "from scalabl_pyro.commands.cli import main\n"
            "try: main()\nexcept SystemExit as end: assert not end.code"
            for words in (
                ["--help"],
                ["--version"],
                ["train", "--help"],
                ["compare", "-cn=tune", "--help"],
            )
        ),
    ],
)
def test_help_and_the_package_itself_import_nothing_slow(code):
    slow = ("torch", "transformers", "peft", "pyro", "hydra", "datasets", "numpy")
    check = f"import sys; found = [name for name in {slow} if name in sys.modules]"
    code = f"{code}\n{check}; assert not found, found"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_explains_another_method(capsys):
    assert scalabl("train", "method=blob", "--help") == 0
    shown = capsys.readouterr().out
    assert "prior_scale:" in shown
    assert "init_loc" not in shown
    assert "num_particles" not in shown
    assert scalabl("train", "method=blub", "--help") == 2
    assert "method is blub: expected one of ['blob'" in capsys.readouterr().err


def test_flags_of_hydra_may_follow_overrides(local_model, data, tmp_path):
    words = [f"model.name={local_model}", f"data.root={data}", "method=mle", *FAST]
    assert scalabl("train", *words, "--multirun", "seed=0,1") == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"mle-seed0", "mle-seed1"}


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


def test_help_explains_another_file_of_settings(capsys):
    assert scalabl("compare", "--config-name", "tune", "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# scalabl compare --config-name tune: ")
    assert shown.index("name: ???") < shown.index("name: embedded"), "its own come first"
    assert "batch_size:" in shown
    assert scalabl("compare", "--config-name=tun", "--help") == 2
    assert "--config-name is tun: expected one of ['base', 'compare'" in capsys.readouterr().err


def test_metrics_are_not_written_over(run, data, capsys):
    Path("m.json").write_text("kept")
    assert scalabl("evaluate", f"run={run}", f"data.root={data}", "output=m.json") == 1
    assert "the output m.json exists" in capsys.readouterr().err
    assert Path("m.json").read_text() == "kept"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_of_another_format_is_refused(run):
    edit_json(run / "posterior.json", format=99)
    with pytest.raises(RunFolderError, match="has format 99, but this version reads format 4"):
        load_run(run)


def test_a_checkpoint_of_another_model_is_refused(run, local_model):
    other = tiny_llama()
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    other.save_pretrained(local_model)
    with pytest.raises(RunFolderError, match="made on other weights"):
        load_run(run)


def test_predict_refuses_to_overwrite(run, tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", make_records(2))
    (tmp_path / "o.jsonl").write_text("mine")
    assert scalabl("predict", f"run={run}", "input=in.jsonl", "output=o.jsonl") == 1
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "o.jsonl").read_text() == "mine"


@pytest.mark.parametrize("name", METHODS)
def test_default_settings_are_those_of_the_classes(capsys, name):
    """The files in configs/ say what the classes say, but for what a run must choose itself."""
    words = ["model.name=x", "data.task=embedded", "run_dir=y", f"method={name}"]
    assert scalabl("train", "--cfg", "job", *words) == 0
    values = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out), resolve=True)
    method = dict(values["method"])
    assert METHODS[method.pop("name")](**method) == METHODS[name]()
    expected = RunConfig(
        ModelConfig("x"),
        AdapterConfig(),
        DataConfig(task="embedded"),
        run_dir="y",
        method={"name": name},
    )
    assert build(RunConfig, values) == expected
    assert expected.fit == METHODS[name].config


def test_the_shared_training_settings_are_those_of_the_class():
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / "base.yaml"))
    assert build(FitConfig, values["fit"]) == FitConfig()
    assert build(KLSchedule, values["fit"]["kl"]) == KLSchedule()
    assert values["fit"].keys() == asdict(FitConfig()).keys()
    assert {path.stem for path in (CONFIGS / "method").glob("*.yaml")} == set(METHODS)


def test_a_run_keeps_settings_that_were_left_out():
    """Another version may have other defaults."""
    options = ModelConfig("x"), AdapterConfig(), DataConfig(task="embedded"), "y"
    config = RunConfig(*options, method={"name": "scalabl", "draws": 3})
    assert config.method["draws"] == 3
    assert config.method["projections"] == ScalaBL().projections
    assert RunConfig(*options, method=config.method) == config
    assert not config.method.keys() & {"config", "eval_batch_size", "progress"}


def test_a_classifier_on_a_csv_of_texts_remembers_its_class_names(tmp_path, tokenizer, capsys):
    torch.manual_seed(0)
    BertModel(tiny_bert_config()).save_pretrained("bert")
    BertForSequenceClassification(tiny_bert_config(num_labels=2)).save_pretrained("headed")
    tokenizer.save_pretrained("headed")
    tokenizer.save_pretrained("bert")
    rows = [f"the cat runs {i} times,{('red', 'blue', 'green')[i % 3]}" for i in range(30)]
    Path("texts.csv").write_text("\n".join(["text,class", *rows]) + "\n")
    Path("new.csv").write_text("text\nthe dog sings\na bird sleeps\n")
    words = [
        "model.name=bert",
        "model.readout=sequence_classification",
        "lora.targets=[query,value]",
    ]
    words += ["lora.heads=[classifier]", "data.path=texts.csv", "run_dir=out", *FAST]
    assert scalabl("train", *words, "lora.heads=[]") == 1
    error = capsys.readouterr().err
    assert "would stay random: train them whole, as by lora.heads=[classifier]" in error
    zero_shot = ["model.name=bert", "model.readout=sequence_classification", "progress=false"]
    assert scalabl("evaluate", *zero_shot, "data.path=texts.csv") == 1
    told = capsys.readouterr().err
    assert "would stay random, and nothing is trained here: give a checkpoint" in told
    assert "lora.heads=[" not in told
    assert scalabl("train", *words, "model.name=headed") == 1
    assert "has a head with num_labels 2, but the data needs 3" in capsys.readouterr().err
    assert scalabl("train", *words) == 0
    assert scalabl("predict", "run=out", "input=new.csv", "output=o.jsonl", "progress=false") == 0
    answers = [json.loads(line)["answer"] for line in Path("o.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    assert set(answers) <= {"red", "blue", "green"}
    assert scalabl("evaluate", "run=out", "data.path=texts.csv", "progress=false") == 0


def test_train_keeps_the_trial_with_the_lowest_validation_nll(local_model, data, capsys):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    trials = "trials=[{fit:{lr:1.0e+30}},{fit:{lr:0.1}},{method:{name:mle},fit:{lr:0.0}}]"
    assert scalabl("train", *where, *FAST, trials) == 0
    printed = json.loads(capsys.readouterr().out)
    nll = [trial["validation_nll"] for trial in printed["trials"]]
    assert nll[0] is None  # diverged
    assert printed["validation"]["nll"] == min(nll[1:])
    assert json.loads(Path("out/trials.json").read_text()) == printed["trials"]
    config = OmegaConf.load("out/config.yaml")
    assert config.fit.lr == printed["trials"][nll.index(min(nll[1:]))]["trial"]["fit"]["lr"]
    assert load_run("out").predictor is not None

    assert scalabl("train", *where, *FAST, "trials=[{lora:{r:2}}]", "run_dir=other") == 1
    assert "a trial overrides ['lora']: expected method and fit" in capsys.readouterr().err


def test_trials_hold_one_model_in_memory_at_a_time(local_model, data, monkeypatch):
    made, alive = [], []

    def make(*args, **options):
        alive.append(sum(model() is not None for model in made))
        adapter = make_adapter(*args, **options)
        made.append(weakref.ref(adapter.peft_model))
        return adapter

    monkeypatch.setattr("scalabl_pyro.runs.training.make_adapter", make)
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", *where, *FAST, "trials=[{fit:{lr:0.1}},{fit:{lr:0.0}}]") == 0
    assert alive == [0, 0, 0]  # two trials, and the better one again


@pytest.mark.parametrize(
    "words",
    [
        ["method.guide.name=multivariate_normal", "+method.guide.per_module=true"],
        ["method.guide.name=delta", "method.prior.name=laplace"],
        ["method.prior.name=horseshoe", "method.elbo.num_particles=2"],
        ["method.prior.name=learned_normal", "method.projections=unit", "method.scale_B=0.1"],
        ["method.prior.name=log_normal", "method.projections=frozen_v", "fit.kl_budget=5"],
    ],
    ids=" ".join,
)
def test_guides_priors_and_projections_are_swapped_by_a_word(local_model, data, capsys, words):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", *where, *FAST, *words) == 0
    trained = json.loads(capsys.readouterr().out)
    assert scalabl("evaluate", "run=out", f"data.root={data}", "progress=false") == 0
    assert json.loads(capsys.readouterr().out) == trained["test"]


def test_what_a_prior_learned_is_kept_with_the_run(local_model, data):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", *where, *FAST, "method.prior.name=learned_normal") == 0
    scale = load_run("out").model.prior.scale
    assert not torch.allclose(scale, torch.ones_like(scale), atol=1e-3)
    saved = load_file("out/posterior.safetensors")["prior.scale_unconstrained"]
    torch.testing.assert_close(torch.nn.functional.softplus(saved), scale, atol=1e-6, rtol=1e-6)


def test_inference_on_s_alone_starts_from_a_trained_adapter(local_model, data, tmp_path, capsys):
    where = [f"model.name={local_model}", f"data.root={data}", "fit.lr=0.1"]
    assert scalabl("train", "method=mle", *where, *FAST, "run_dir=point") == 0
    before = load_file("point/projections.safetensors")
    start = ["lora.start=point/adapter", "method.projections=fixed", "method.guide.init_scale=1e-6"]
    capsys.readouterr()
    start += ["lora.r=3", "lora.heads=[lm_head]", "fit.lr_guide=1e-9"]
    assert scalabl("train", *where, *FAST, *start, "run_dir=bayes") == 0
    out, told = capsys.readouterr()
    trained = json.loads(out)
    overruled = re.findall(r"(\S+) has no effect with lora.start", told)
    assert overruled == ["lora.r", "lora.heads"]
    point, bayes = (predictions_of(tmp_path / name)["test"].logits for name in ("point", "bayes"))
    torch.testing.assert_close(bayes, point.expand_as(bayes), atol=1e-3, rtol=1e-3)
    (tmp_path / "point").rename(tmp_path / "gone")
    assert scalabl("evaluate", "run=bayes", f"data.root={data}", "progress=false") == 0
    assert json.loads(capsys.readouterr().out) == trained["test"]
    posterior = load_file("bayes/posterior.safetensors")
    assert set(before) == set(load_file("bayes/projections.safetensors"))
    assert posterior["guide.loc_unconstrained"].shape == posterior["s"].shape[1:]


@pytest.mark.parametrize(
    "words",
    [
        ["prediction.draws=4", "prediction.kind=sobol"],
        ["prediction.draws=6", "prediction.kind=antithetic", "prediction.tolerance=0.5"],
        ["prediction.name=linearised", "prediction.draws=200"],
        ["prediction.trunk=0.5"],
    ],
    ids=" ".join,
)
def test_other_ways_to_predict(run, data, capsys, words):
    where = [f"run={run}", f"data.root={data}", "progress=false"]
    assert scalabl("evaluate", *where) == 0
    saved = json.loads(capsys.readouterr().out)
    assert scalabl("evaluate", *where, *words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["nll"] == pytest.approx(saved["nll"], abs=0.3)
    assert printed["nll"] != saved["nll"]


def test_bad_ways_to_predict_are_refused(run, data, capsys, local_model):
    where = [f"run={run}", f"data.root={data}", "progress=false"]
    for words, message in {
        ("prediction.name=mean",): "prediction.name is 'mean'",
        ("prediction.kind=sobol",): "give prediction.draws",
        (
            "prediction.name=median",
            "prediction.tolerance=0.1",
        ): "takes no draws, trunk or tolerance",
        ("prediction.draws=0",): "prediction.draws is 0",
        ("prediction.trunk=2",): "prediction.trunk is 2.0",
    }.items():
        assert scalabl("evaluate", *where, *words) == 1
        assert message in capsys.readouterr().err
    point = ["method=mle", f"model.name={local_model}", f"data.root={data}", "run_dir=point"]
    assert scalabl("train", *point, *FAST) == 0
    assert scalabl("evaluate", "run=point", f"data.root={data}", "prediction.name=median") == 1
    assert "no posterior over s" in capsys.readouterr().err


def test_what_needs_draws_of_s_says_so_of_a_run_without(local_model, data, tmp_path, capsys):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", "method=ensemble", "method.members=2", *where, *FAST) == 0
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "prompt": "the cat"}) + "\n")
    for words in (
        ["evaluate", "run=out", f"data.root={data}", "prediction.name=median"],
        ["export", "run=out", "output=exported"],
        ["generate", "run=out", "input=in.jsonl", "output=o.jsonl"],
    ):
        assert scalabl(*words) == 1
        message = capsys.readouterr().err
        assert "no posterior over s" in message or "method ensemble predicts by" in message
    assert "report, evaluate, predict, select, distill and show-prompts alone" in message
    assert not (tmp_path / "exported").exists()
    questions = write_jsonl(tmp_path / "questions.jsonl", make_records(9))
    words = ["run=out", f"input={questions}", "output=student", "fit.steps=2"]
    assert scalabl("distill", *words, "fit.lr=1e-5", "progress=false") == 0
    unlabelled = write_jsonl(tmp_path / "unlabelled.jsonl", make_records(9, labelled=False))
    assert scalabl("select", "run=out", f"input={unlabelled}", "output=s.jsonl", "count=2") == 0


def test_predict_goes_on_where_it_was_killed(run, tmp_path, capsys, monkeypatch):
    write_jsonl(tmp_path / "in.jsonl", make_records(9))
    words = [f"run={run}", "input=in.jsonl", "progress=false", "batch_size=2"]
    assert scalabl("predict", *words, "output=whole.jsonl") == 0
    calls = []
    original = predict_command.predict

    def ends(*args, **kwargs):
        calls.append(None)
        if len(calls) > 3:
            raise RuntimeError("pulled the plug")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(predict_command, "predict", ends)
        assert scalabl("predict", *words, "output=out.jsonl") == 1
    assert scalabl("predict", *words, "output=out.csv") == 1
    message = "what is written are JSON Lines: expected a name such as out.jsonl"
    assert message in capsys.readouterr().err
    part = tmp_path / "out.jsonl.part"
    assert len(part.read_text().splitlines()) == 6
    part.write_bytes(part.read_bytes() + b'{"id": "torn')
    assert scalabl("predict", *words, "output=out.jsonl", "prediction.name=median") == 1
    assert "was begun with other settings" in capsys.readouterr().err
    # The same ids with other choices, and the same folder with another run.
    asked = tmp_path / "in.jsonl"
    before = asked.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    turned = [row | {"choices": row["choices"][::-1]} for row in rows]
    asked.write_text("".join(json.dumps(row) + "\n" for row in turned))
    assert scalabl("predict", *words, "output=out.jsonl") == 1
    assert "'records': " in capsys.readouterr().err
    asked.write_text(before)
    weights = Path(words[0].removeprefix("run=")) / "projections.safetensors"
    tensors = load_file(weights)
    save_file({name: value + 1 for name, value in tensors.items()}, weights)
    assert scalabl("predict", *words, "output=out.jsonl") == 1
    assert "'weights': " in capsys.readouterr().err
    save_file(tensors, weights)
    assert scalabl("predict", *words, "output=out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert [p.name for p in tmp_path.glob("out.jsonl*")] == ["out.jsonl"]


def test_predict_encodes_each_record_once_and_averages_each_chunk_once(run, monkeypatch):
    write_jsonl(Path("in.jsonl"), make_records(9))
    seen, averaged = [], []
    encode, average = LabelTokens.encode, metrics.average
    with monkeypatch.context() as patch:
        patch.setattr(LabelTokens, "encode", lambda r, x: (seen.extend(x), encode(r, x))[1])
        patch.setattr(metrics, "average", lambda x: (averaged.append(len(x)), average(x))[1])
        words = [f"run={run}", "input=in.jsonl", "output=o.jsonl", "batch_size=4"]
        assert scalabl("predict", *words, "progress=false") == 0
    assert [record.id for record in seen] == [f"q{n}" for n in range(9)]
    assert len(averaged) == 3


@pytest.mark.parametrize("done", [1, 5, 6, 8])
def test_predictions_that_go_on_inside_a_chunk_are_the_same_to_the_bit(run, tmp_path, done):
    """Rounding depends on what runs together, so that chunks begin where they began."""
    write_jsonl(tmp_path / "in.jsonl", make_records(11))
    words = [f"run={run}", "input=in.jsonl", "progress=false", "batch_size=4"]
    seen = []

    def recorded(predictor, split, **options):
        seen.append([record.id for record in split.records])
        return predict(predictor, split, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_command, "predict", recorded)
        assert scalabl("predict", *words, "output=whole.jsonl") == 0
        lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
        chunks = seen[:]

        def ends(*args, **options):
            raise RuntimeError("pulled the plug")

        patch.setattr(predict_command, "predict", ends)
        assert scalabl("predict", *words, "output=out.jsonl") == 1
        settings = settings_of(run) | begun_for(load_run(run), make_records(11))
        part = predict_command.ResumableJsonl("out.jsonl", [f"q{i}" for i in range(11)], settings)
        with part as file:
            file.write(json.loads(line) for line in lines[:done])
        seen.clear()
        patch.setattr(predict_command, "predict", recorded)
        assert scalabl("predict", *words, "output=out.jsonl") == 0
    assert seen == chunks[done // 4 :]
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(lines)


def settings_of(run):
    method = dataclasses.asdict(predict_command.PredictConfig("", "", "").prediction)
    return {"run": str(run), "prediction": method, "batch": 4}


@pytest.mark.parametrize("where", ["s", "lora_A", "lora_B"])
def test_a_run_that_is_not_finite_answers_nothing(run, tmp_path, capsys, where):
    path = run / ("posterior.safetensors" if where == "s" else "projections.safetensors")
    tensors = load_file(path)
    name = next(n for n in tensors if n == where or f".{where}." in n)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path)
    write_jsonl(tmp_path / "in.jsonl", make_records(3))
    assert scalabl("predict", f"run={run}", "input=in.jsonl", "output=o.jsonl") == 1
    assert f"{path} holds NaN or infinity in ['{name}']" in capsys.readouterr().err
    assert not list(tmp_path.glob("o.jsonl*"))


def test_predict_proba_takes_records(run, data):
    trained = load_run(run)
    records = read_folder(data)["test"]
    logits = predictions_of(run)["test"].logits
    probs = trained.predict_proba(records)
    torch.testing.assert_close(probs, logits.softmax(-1).mean(0), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="differ from record to record"):
        trained.predict_proba(["the cat runs"])


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


def test_records_that_trained_the_run_are_told(run, data, capsys):
    """Whatever the order of their choices, their labels and their ids."""
    train = read_folder(data)["train"][:5]
    turned = [Record(f"x{n}", r.question, r.choices[::-1], 0) for n, r in enumerate(train)]
    write_jsonl(Path("mixed.jsonl"), [*turned, *make_records(20)[16:19]])
    assert scalabl("evaluate", f"run={run}", "data.path=mixed.jsonl", "progress=false") == 0
    assert "5 of 8 records trained the run: these metrics" in capsys.readouterr().err
    words = [f"run={run}", "input=mixed.jsonl", "output=o.jsonl", "progress=false"]
    words += ["conformal=lac", "coverage=0.5"]
    assert scalabl("predict", *words, "calibration=mixed.jsonl") == 0
    assert (
        "5 of 8 records trained the run: what they say of coverage holds" in capsys.readouterr().err
    )
    for split in ("validation", "test"):
        where = [f"data.root={data}", f"split={split}", "progress=false"]
        assert scalabl("evaluate", f"run={run}", *where) == 0
        assert "trained the run" not in capsys.readouterr().err


@pytest.mark.parametrize("missing", [slice(2, 3), slice(None)], ids=["one", "all"])
def test_records_without_a_label_are_named_before_any_pass(
    run, local_model, data, capsys, monkeypatch, missing
):
    records = make_records(4)
    records[missing] = [dataclasses.replace(r, label=None) for r in records[missing]]
    first = records[missing][0].id
    write_jsonl(Path("q.jsonl"), records)
    write_jsonl(data / "test.jsonl", records)

    def runs(*args, **options):
        raise AssertionError("the model ran")

    monkeypatch.setattr("scalabl_pyro.prediction.assessment.predict", runs)
    for what in (f"run={run}", f"model.name={local_model}"):
        for where, place in (("data.path=q.jsonl", "q.jsonl"), (f"data.root={data}", "split test")):
            assert scalabl("evaluate", what, where, "progress=false") == 1
            assert f"{place}: record '{first}' has no label" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error(local_model):
    code = f"{sys.executable} -m scalabl_pyro memory model.name={local_model} tokens=8 | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout == "{"
    assert "Broken pipe" not in done.stderr


def test_a_command_that_is_not_there_is_named(capsys):
    assert scalabl("nothing") == 2
    assert "there is no command 'nothing'" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["method=mle", "fit.kl.weight=3"], ["fit.kl"]),
        (["method=map", "fit.lr_guide=1"], []),
        (["method=blob", "+method.lr_kl=0.01", "fit.kl.weight=3"], ["fit.kl"]),
        (["method=blob", "fit.kl.weight=3"], []),
        (["method=ivon", "fit.lr_guide=1", "fit.eps=0.1"], ["fit.lr_guide", "fit.eps"]),
        (["method=zero_shot", "fit.lr=1"], ["fit.lr"]),
    ],
    ids=str,
)
def test_settings_of_fit_without_effect_are_told(local_model, data, capsys, words, names):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out", "progress=false"]
    short = [] if "method=zero_shot" in words else ["fit.steps=2"]
    assert scalabl("train", *where, *short, *words) == 0
    told = re.findall(r"(\S+) has no effect with method (\w+)", capsys.readouterr().err)
    method = words[0].removeprefix("method=")
    assert told == [(name, method) for name in sorted(names, key=names.index)]


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


def test_each_of_two_checkouts_on_one_path_reads_its_own_configs(tmp_path):
    """The second checkout is a copy whose default seed differs."""
    for folder in ("scalabl_pyro", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.pyc"))
    yaml = tmp_path / "configs" / "train.yaml"
    yaml.write_text(re.sub(r"^seed: 0", "seed: 77", yaml.read_text(), flags=re.MULTILINE))
    code = "import sys; from scalabl_pyro.commands.cli import main; main()"
    for first, other, seed in ((tmp_path, ROOT, 77), (ROOT, tmp_path, 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, "train", "--cfg", "job", "--package", "seed"],
            env=os.environ | {"PYTHONPATH": f"{first}{os.pathsep}{other}"},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path.parent,
        )
        assert done.stdout.split() == [str(seed)], done.stderr


@pytest.mark.parametrize("where", ["predict.load_run", "_quiet.quiet_libraries"])
def test_an_interruption_is_one_line(run, capsys, monkeypatch, where):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"scalabl_pyro.commands.{where}", interrupted)
    assert scalabl("predict", f"run={run}", "input=in.jsonl", "output=o.jsonl") == 130
    assert only_line(capsys).startswith("error: interrupted; ")


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


def only_line(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


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


@pytest.mark.parametrize("value", [".inf", "inf", ".INF"])
def test_infinity_as_help_and_yaml_write_it(local_model, data, value):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", *where, *FAST, "method=mle", f"fit.clip_norm={value}") == 0
    assert OmegaConf.load("out/config.yaml").fit.clip_norm == float("inf")


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
