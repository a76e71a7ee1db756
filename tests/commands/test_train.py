"""``scalabl train``: what it writes, keeps and chooses."""

from __future__ import annotations

import csv
import json
import re
import weakref
from pathlib import Path

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
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertModel

from scalabl_pyro import Record, load_run, predict
from scalabl_pyro.data import read_folder
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import make_adapter
from scalabl_pyro.methods import METHODS, ScalaBL
from scalabl_pyro.runs.config import RunConfig
from scalabl_pyro.runs.data import DataConfig

pytestmark = pytest.mark.usefixtures("in_tmp")


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


def test_flags_of_hydra_may_follow_overrides(local_model, data, tmp_path):
    words = [f"model.name={local_model}", f"data.root={data}", "method=mle", *FAST]
    assert scalabl("train", *words, "--multirun", "seed=0,1") == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"mle-seed0", "mle-seed1"}


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


@pytest.mark.parametrize("value", [".inf", "inf", ".INF"])
def test_infinity_as_help_and_yaml_write_it(local_model, data, value):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", *where, *FAST, "method=mle", f"fit.clip_norm={value}") == 0
    assert OmegaConf.load("out/config.yaml").fit.clip_norm == float("inf")
