from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from conftest import scalabl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scalabl_pyro.commands import doctor
from scalabl_pyro.commands.doctor import DoctorConfig
from scalabl_pyro.embedded import model_path
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.runs import checks


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Name → state and text, by the columns of the table."""
    return {
        line[8:24].strip(): (line[:8].strip(), line[24:])
        for line in text.splitlines()
        if line[:8].strip() in ("ok", "absent", "broken")
    }


def test_doctor_says_what_works_here(capsys):
    assert scalabl("doctor") == 0
    shown = capsys.readouterr()
    by_name = rows(shown.out)
    assert list(by_name) == list(doctor.CHECKS)
    assert shown.err == ""
    assert f"torch {torch.__version__}" in by_name["versions"][1]
    assert by_name["embedded model"][0] == by_name["CPU"][0] == "ok"
    assert (by_name["CUDA"][0] == "ok") == torch.cuda.is_available()


@pytest.mark.parametrize("name", ["versions", "embedded model"])
def test_doctor_fails_only_if_the_basics_are_broken(name, capsys, monkeypatch):
    monkeypatch.setitem(doctor.CHECKS, name, lambda: {}["gone"])
    assert scalabl("doctor") == 1
    shown = capsys.readouterr()
    assert rows(shown.out)[name] == ("broken", "KeyError: 'gone': install scalabl_pyro again")
    assert shown.err.startswith(f"error: {name}: broken, see the table")


@pytest.mark.parametrize(
    ("name", "target", "value", "state", "fix"),
    [
        ("bitsandbytes", "find_spec", lambda name: None, "absent", "pip install"),
        (
            "bitsandbytes",
            "import_module",
            lambda name: 1 / 0,
            "broken",
            "leave model.quantization null",
        ),
        ("Hub", "constants.HF_HUB_OFFLINE", True, "absent", "HF_HUB_OFFLINE is set"),
        ("CUDA", "torch.version.cuda", None, "absent", "install another build"),
    ],
)
def test_doctor_names_the_fix(name, target, value, state, fix, capsys, monkeypatch):
    monkeypatch.setattr(f"scalabl_pyro.commands.doctor.{target}", value)
    assert scalabl("doctor") == 0
    row = rows(capsys.readouterr().out)[name]
    assert row[0] == state
    assert fix in row[1]


def model_rows(text: str) -> dict[str, tuple[str, str]]:
    """Those of the model's own table."""
    return {
        line[8:24].strip(): (line[:8].strip(), line[24:])
        for line in text.partition("\n\n")[2].splitlines()[1:]
        if line[:8].strip() in ("ok", "absent", "broken", "refused", "wrong")
    }


def test_doctor_tries_a_model(local_model, capsys):
    words = [f"model.name={local_model}", "lora.r=4", "model.dtype=bfloat16"]
    assert scalabl("doctor", *words) == 0
    shown = capsys.readouterr().out
    assert f"{local_model}, label_tokens, bfloat16" in shown
    by_check = model_rows(shown)
    assert list(by_check) == ["build", *checks.CHECKS]
    # lm_head is adapted in every half.
    assert {name: f for name, f in by_check.items() if f[0] != "ok"} == {}
    assert shown.endswith("all of it works\n")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model.name=/nope"], "there is no folder /nope"),
        (["lora.targets=[q_prj]"], "target_modules ['q_prj'] match no module"),
        (["lora.start=/nope"], "is no PEFT adapter"),
        (["model.chat=true"], "no chat template"),
        (["model.chat=true", "model.prompt=classes"], "no chat template"),
        (["model.readout=multiple_choice"], "AutoModelForMultipleChoice"),
    ],
)
def test_doctor_says_why_a_model_is_refused(local_model, capsys, words, reason):
    assert scalabl("doctor", f"model.name={local_model}", *words) == 1
    shown = capsys.readouterr()
    (name, (state, text)), *others = model_rows(shown.out).items()
    assert (name, state, others) == ("build", "refused", [])
    assert reason in text
    assert shown.err.startswith("error: build: refused with")
    assert "nothing else was tried" in shown.err
    assert "works" not in shown.out.partition("\n\n")[2]


def test_doctor_goes_on_behind_what_is_refused(local_model, capsys, monkeypatch):
    def refuses(*args):
        raise ValueError("not here")

    monkeypatch.setattr(checks, "save_adapter", refuses)
    assert scalabl("doctor", f"model.name={local_model}", "lora.r=4") == 0
    shown = capsys.readouterr().out
    assert model_rows(shown)["exported draw"] == ("refused", "not here")
    assert "refused, for the reasons in the table: exported draw; the rest works" in shown


@pytest.mark.parametrize("count", [2, 4, 8])
def test_classes_to_try_are_single_tokens(count):
    """In a form that they share, as the embedded tokenizer has red, but white in three pieces."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    config = DoctorConfig(ModelConfig("embedded", prompt="classes"), AdapterConfig(), count)
    chosen = doctor._choices(config)
    assert len(set(chosen)) == count
    before = tokenizer("Answer:").input_ids
    added = [
        [tokenizer(f"Answer:{space}{word}").input_ids[len(before) :] for word in chosen]
        for space in (" ", "")
    ]
    assert any([len(ids) for ids in rows] == [1] * count for rows in added)
    assert [word for word in chosen if word in doctor.COLOURS][:2] == ["red", "blue"]


def test_doctor_tries_classes_as_answers(capsys):
    words = ["model.prompt=classes", "lora.targets=[q_proj]", "lora.r=2"]
    assert scalabl("doctor", "model.name=embedded", *words) == 0
    assert capsys.readouterr().out.endswith("all of it works\n")


def test_a_tokenizer_of_few_words_is_refused_by_its_readout(local_model, capsys):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "Answer", "red"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )
    tokenizer.save_pretrained(local_model)
    assert scalabl("doctor", f"model.name={local_model}", "model.prompt=classes") == 1
    _, text = model_rows(capsys.readouterr().out)["build"]
    assert "the label words ['red', 'blue', 'green', 'white'] are not single" in text


def test_doctor_fails_if_a_model_computes_something_else(local_model, capsys, monkeypatch):
    monkeypatch.setattr(checks, "fit", lambda *args, **options: None)
    assert scalabl("doctor", f"model.name={local_model}", "lora.r=4") == 1
    shown = capsys.readouterr()
    assert model_rows(shown.out)["training"] == (
        "wrong",
        "s moved by 0e+00: no gradient reaches it",
    )
    assert shown.err.startswith("error: training: not as it must be with")


@pytest.mark.parametrize("classes", [1, 9])
def test_doctor_has_questions_of_some_choices_alone(capsys, classes):
    assert scalabl("doctor", "model.name=embedded", f"classes={classes}") == 1
    assert f"classes is {classes}: expected 2 to 8" in capsys.readouterr().err


def test_doctor_tries_whether_the_cache_can_be_written(monkeypatch):
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", "/proc/nope")
    state, text = doctor.CHECKS["Hub"]()
    assert (state, "set HF_HOME" in text) == ("broken", True)


def test_the_version_is_that_of_the_package(capsys):
    assert scalabl("--version") == 0
    assert capsys.readouterr().out == f"scalabl_pyro {version('scalabl_pyro')}\n"
