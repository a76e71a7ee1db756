"""Inputs that mean nothing: each is one ValueError that shows the value or names what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lora, tiny_llama
from tokenizers import Regex, normalizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from scalabl_pyro import (
    FitConfig,
    KLSchedule,
    Predictor,
    Record,
    SubspaceAdapter,
    draw,
    entropy,
    evaluate,
    generate,
    mutual_information,
    noise_to_signal,
    predict,
)
from scalabl_pyro.commands.evaluate import EvaluateConfig
from scalabl_pyro.commands.predict import PredictConfig
from scalabl_pyro.data import (
    PROMPTS,
    Completion,
    DataSource,
    Split,
    check_split,
    disjoint,
    hold_out,
    read_completions,
    read_folder,
    read_records,
)
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.methods import ScalaBL
from scalabl_pyro.prediction import (
    auroc,
    average,
    calibration_band,
    crossed_interval,
    ece,
    ece_floor,
    half_width,
    paired_difference,
    per_question,
    score,
)
from scalabl_pyro.prediction.generation import Decoding
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.readouts.completion_tokens import CompletionTokens
from scalabl_pyro.readouts.heads import MultipleChoice, SequenceClassification
from scalabl_pyro.runs.data import DataConfig
from scalabl_pyro.runs.predictors import PredictionConfig

NAN, INF = math.nan, math.inf
GOOD = {"id": "1", "question": "why?", "choices": ["a", "b"], "label": 1}
HEADER = "question,choice_1,choice_2,label\n"
Call = Callable[["Tools"], Any]


@dataclass
class Tools:
    """What a case is tried on."""

    folder: Path
    tokenizer: PreTrainedTokenizerFast

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def silent(self) -> PreTrainedTokenizerFast:
        """It drops what is no letter."""
        self.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[^a-zA-Z :]"), "")
        return self.tokenizer

    def labels(self, words: Any = ("red", "blue"), **options: Any) -> LabelTokens:
        return LabelTokens(
            self.tokenizer, PROMPTS["classes"], words, **{"max_length": 64} | options
        )

    def adapter(self) -> SubspaceAdapter:
        return SubspaceAdapter(tiny_llama(), lora("q_proj"), self.labels())

    def completions(self, **options: Any) -> CompletionTokens:
        options = {"num_classes": 32, "max_length": 64, "end_token": False} | options
        return CompletionTokens(self.tokenizer, **options)


def record(**change: Any) -> Call:
    return lambda tools: Record(**GOOD | change)


def line(change: Any) -> Call:
    text = change if isinstance(change, str | bytes) else json.dumps(GOOD | change)
    return lambda tools: read_records(tools.file("x.jsonl", text))


def table(text: str | bytes, classes: tuple[str, ...] = ()) -> Call:
    return lambda tools: read_records(tools.file("x.csv", text), classes)


def prompt(text: str) -> Call:
    return lambda tools: read_completions(tools.file("x.jsonl", text))


def settings(kind: type, /, **values: Any) -> Call:
    return lambda tools: kind(**values)


def chat(template: str | None) -> Call:
    def call(tools: Tools) -> None:
        tools.tokenizer.chat_template = template
        tools.labels(chat=True)

    return call


def measured(measure: Callable[[Tensor], Any], bad: float) -> Call:
    logits = torch.zeros(3, 4, 2)
    logits[0, 3, 1] = bad
    return lambda tools: measure(logits)


def drawn(bad: float | tuple[int, ...]) -> Call:
    def call(tools: Tools) -> None:
        adapter = tools.adapter()
        draws = torch.ones(3, *adapter.shape) if isinstance(bad, float) else torch.ones(bad)
        if isinstance(bad, float):
            draws[1, 0, 0] = bad
        Predictor(adapter, draws)

    return call


def predicted(**options: Any) -> Call:
    def call(tools: Tools) -> None:
        adapter = tools.adapter()
        split = adapter.readout.encode([Record("q", "the cat", ("red", "blue"))])
        predict(Predictor(adapter, torch.ones(4, *adapter.shape)), split, **options)

    return call


def told(*prompts: Any, **decoding: Any) -> Call:
    return lambda tools: generate(Predictor(tools.adapter()), *prompts, Decoding(**decoding))


def two(*confidences: float) -> Tensor:
    return torch.tensor([[c, 1 - c] for c in confidences])


RIGHT = torch.tensor([0, 1])
CASES: dict[str, dict[str, tuple[Call, str]]] = {
    "record": {
        "id empty": (record(id=""), "id is ''"),
        "id number": (record(id=7), "id is 7"),
        "id none": (record(id=None), "id is None"),
        "question blank": (record(question=" \t\n"), r"question is ' \t\n'"),
        "question bytes": (record(question=b"why"), "question is b'why'"),
        "question invisible": (record(question="\u200b\u2060"), "question is '\\u200b\\u2060'"),
        "question half a character": (record(question="\udc00"), "question is '\\udc00'"),
        "choices one": (record(choices=["a"]), "choices is ['a']"),
        "choices none": (record(choices=None), "choices is None"),
        "choices text": (record(choices="yes"), "choices is 'yes'"),
        "choices bytes": (record(choices=b"yes"), "choices is b'yes'"),
        "choices dict": (record(choices={"A": "x", "B": "y"}), "choices is {'A': 'x', 'B': 'y'}"),
        "choices set": (record(choices={"x"}), "choices is {'x'}"),
        "choices numbers": (record(choices=[1, 2]), "choices holds 1"),
        "choices nested": (record(choices=[["a"], ["b"]]), "choices holds ['a']"),
        "choices blank": (record(choices=["a", "\u00a0"]), "choices holds '\\xa0'"),
        "label hidden": (record(label=-1), "label is -1"),
        "label one-based": (record(label=2), "label is 2"),
        "label letter": (record(label="A"), "label is 'A'"),
        "label bool": (record(label=True), "label is True"),
        "label float": (record(label=1.0), "label is 1.0"),
        "label nan": (record(label=NAN), "label is nan"),
    },
    "completion": {
        "prompt": (lambda tools: Completion("1", ""), "prompt is ''"),
        "prompt list": (lambda tools: Completion("1", ["a"]), "prompt[0] is 'a'"),
        "invisible": (lambda tools: Completion("1", "\ufeff"), "prompt is '\\ufeff'"),
        "completion": (lambda tools: Completion("1", "a", 3), "completion is 3"),
        "id": (lambda tools: Completion(1, "a"), "id is 1"),
    },
    "jsonl": {
        "torn": (line('{"id": "1"'), "x.jsonl, line 1"),
        "number": (line("3"), "found int"),
        "null": (line("null"), "found NoneType"),
        "latin-1": (line(b'{"id": "\xe9"}'), "x.jsonl, line 1"),
        "utf-16": (line("{}".encode("utf-16")), "x.jsonl, line 1"),
        "key twice": (line('{"id": "1", "id": "2"}'), "key 'id' occurs twice"),
        "key twice within": (line('{"id": {"a": 1, "a": 2}}'), "key 'a' occurs twice"),
        "digits": (line('{"label": ' + "9" * 5000 + "}"), "x.jsonl, line 1"),
        "brackets": (line("[" * 100_000), "x.jsonl, line 1"),
        "nan": (line('{"id": "1", "question": "q", "choices": ["a", "b"], "label": NaN}'), "nan"),
        "id twice": (line(2 * (json.dumps(GOOD) + "\n")), "id '1' occurs twice"),
        "choices dict": (line({"choices": {"A": "x", "B": "y"}}), "choices is {'A': 'x'"),
        "choices null": (line({"choices": [None, "a"]}), "choices holds None"),
        "label high": (line({"label": 3}), "label is 3"),
        "hidden": (line({"label": -1}), "label is -1"),
        "empty": (line(""), "holds no records"),
        "prompts": (prompt('{"promt": "a"}'), "'promt'"),
        "prompts list": (prompt("[]"), "found list"),
        "prompts null": (prompt('{"prompt": null}'), "prompt is None"),
        "prompts twice": (prompt('{"prompt": "a", "prompt": "b"}'), "key 'prompt' occurs twice"),
        "prompts empty": (prompt("\n"), "holds no records"),
    },
    "csv": {
        "empty": (table(""), "holds no header"),
        "header alone": (table(HEADER), "holds no records"),
        "semicolons": (table(HEADER.replace(",", ";")), "';' separates the columns"),
        "one choice": (table("question,choice_1\n"), "choice_2"),
        "cells": (table(HEADER + "q,a\n"), "2 cells, but the header has 4"),
        "label": (table(HEADER + "q,a,b,C\n"), "label is 'C'"),
        "label float": (table(HEADER + "q,a,b,0.0\n"), "label is '0.0'"),
        "label high": (table(HEADER + "q,a,b,3\n"), "label is 3"),
        "label hidden": (table(HEADER + "q,a,b,-1\n"), "label is -1"),
        "quotes": (table(HEADER + 'q,"a,b,1\n'), "line 2: not CSV"),
        "encoding": (table(HEADER.encode() + b"\xff,a,b,0\n"), "line 2: not UTF-8"),
        "classes unknown": (table("text,class\na,b\n"), "the classes are not known"),
        "class": (table("text,class\na,yse\n", ("yes", "no")), "class is 'yse'"),
        "classes alike": (table("text,class\na,b\n", ("no", "no\u200b")), "'no\\u200b'"),
        "classes twice": (table("text,class\na,b\n", ("no", "no")), "'no'"),
        "text": (table("text,class\n\u200b,yes\n", ("yes", "no")), "question is '\\u200b'"),
        "long blank": (table(HEADER + " " * 200_000 + ",a,b,0\n"), "question is '   "),
    },
    "source": {
        "file": (lambda tools: read_records(tools.folder / "no.jsonl"), "no.jsonl: no such file"),
        "folder": (lambda tools: read_folder(tools.folder / "no"), "no: expected a folder"),
        "ending": (lambda tools: read_records(tools.file("x.parquet", "")), "x.parquet"),
        "split": (lambda tools: check_split({"train": []}, "tset"), "'tset'"),
        "held out": (lambda tools: hold_out([Record(**GOOD)], 0.5, seed=0), "0.5 of 1"),
        "held out nan": (lambda tools: hold_out([Record(**GOOD)] * 9, NAN, seed=0), "nan of 9"),
        "held out all": (lambda tools: hold_out([Record(**GOOD)] * 9, 1.0, seed=0), "1.0 of 9"),
        "overlap": (
            lambda tools: disjoint({"train": [Record(**GOOD)], "test": [Record(**GOOD)]}),
            "every question of train",
        ),
        "no records": (lambda tools: Split([], [], lambda x: x), "holds no records"),
        "none": (settings(DataSource), "data.path is None"),
        "two": (settings(DataSource, path="a", root="b"), "data.root is 'b'"),
        "task": (settings(DataSource, task="arc_hard"), "'arc_hard'"),
        "copy": (settings(DataSource, root="a", hub_path="b"), "data.hub_path"),
        "one class": (settings(DataSource, root="a", classes=("x",)), "['x']"),
        "classes": (settings(DataSource, root="a", classes=("x", "x")), "['x', 'x']"),
        "classes alike": (settings(DataSource, root="a", classes=("x y", "x\u00a0y")), "x\\xa0y"),
        "limit": (settings(DataConfig, root="a", limit={"test": 0}), "data.limit.test is 0"),
        "fraction": (settings(DataConfig, root="a", validation_fraction=NAN), "is nan"),
    },
    "settings": {
        "steps": (settings(FitConfig, steps=0), "steps is 0"),
        "lr": (settings(FitConfig, lr=-1.0), "lr is -1.0"),
        "lr nan": (settings(FitConfig, lr=NAN), "lr is nan"),
        "warmup": (settings(FitConfig, warmup=2.0), "warmup is 2.0"),
        "clip_norm": (settings(FitConfig, clip_norm=0.0), "clip_norm is 0.0"),
        "decay": (settings(FitConfig, decay="step"), "decay is 'step'"),
        "keep": (settings(FitConfig, keep="best"), "keep is 'best'"),
        "weight": (settings(KLSchedule, weight=0.0), "weight is 0.0"),
        "weight nan": (settings(KLSchedule, weight=NAN), "weight is nan"),
        "shape": (settings(KLSchedule, shape="round"), "shape is 'round'"),
        "budget": (settings(FitConfig, kl_budget=-3.0), "kl_budget is -3.0"),
        "readout": (settings(ModelConfig, name="x", readout="vision"), "readout is 'vision'"),
        "dtype": (settings(ModelConfig, name="x", dtype="fp8"), "dtype is 'fp8'"),
        "normalise": (settings(ModelConfig, name="x", normalise="none"), "normalise is 'none'"),
        "kappa": (settings(ModelConfig, name="x", temperature="none"), "temperature is 'none'"),
        "chat": (
            settings(ModelConfig, name="x", readout="multiple_choice", chat=True),
            "chat is True",
        ),
        "perp_scale": (settings(ScalaBL, perp_scale=2.0), "perp_scale is 2.0"),
        "device": (settings(ModelConfig, name="x", device="gpu"), "device is 'gpu'"),
        "rank": (settings(AdapterConfig, r=0), "r is 0"),
        "alpha": (settings(AdapterConfig, alpha=NAN), "alpha is nan"),
        "dropout": (settings(AdapterConfig, dropout=1.0), "dropout is 1.0"),
        "targets": (settings(AdapterConfig, targets=()), "targets is empty"),
        "subspace": (settings(AdapterConfig, subspace="pca"), "subspace is 'pca'"),
        "tokens": (settings(Decoding, max_new_tokens=0), "max_new_tokens is 0"),
        "temperature": (settings(Decoding, temperature=0.0), "temperature is 0.0"),
        "temperature inf": (settings(Decoding, temperature=INF), "temperature is inf"),
        "top_p": (settings(Decoding, top_p=NAN), "top_p is nan"),
        "top_k": (settings(Decoding, top_k=-1), "top_k is -1"),
        "greedy": (settings(Decoding, top_k=5), "top_k is 5"),
        "draws": (settings(PredictionConfig, draws=0), "draws is 0"),
        "kind": (settings(PredictionConfig, kind="halton"), "kind is 'halton'"),
        "trunk": (settings(PredictionConfig, trunk=NAN), "trunk is nan"),
        "tolerance": (settings(PredictionConfig, tolerance=NAN), "tolerance is nan"),
        "predict": (settings(PredictConfig, run="", input="", output="", batch_size=0), "is 0"),
        "evaluate": (settings(EvaluateConfig, run="", data=None, batch_size=-1), "is -1"),
    },
    "tokenizer": {
        "two tokens": (lambda tools: tools.labels(["red cat", "blue"]), "red cat"),
        "same tokens": (lambda tools: tools.labels(["zzz", "yyy"]), "['zzz', 'yyy']"),
        "form": (lambda tools: tools.labels(form="both"), "form is 'both'"),
        "no template": (chat(None), "no chat template"),
        "template without text": (chat("Hello :"), "'Answer:'"),
        "template of another case": (chat("{{ messages[0].content | upper }}"), "'Answer:'"),
        "template that fails": (chat("{{ raise_exception('only systems') }}"), "only systems"),
        "template that is none": (chat("{{ messages[0].content"), "'Answer:'"),
        "no end token": (lambda tools: tools.completions(end_token=True), "no end token"),
        "choices": (
            lambda tools: tools.labels().encode([Record("q", "x", ("a", "b", "c"))]),
            "record 'q' has the choices ['a', 'b', 'c']",
        ),
        "long": (
            lambda tools: tools.labels().encode([Record("q", "cat " * 99, ("red", "blue"))]),
            "the context of 64 tokens (longest: 101, of record 'q')",
        ),
        "long choice": (
            lambda tools: MultipleChoice(
                tools.tokenizer, num_classes=2, max_length=8, truncate=True
            ).encode([Record("q", "a", ("a", "dog " * 9))]),
            "the choice 'dog dog",
        ),
        "long completion": (
            lambda tools: tools.completions(truncate=True, max_length=8).encode(
                [Completion("q", "the", " cat" * 9)]
            ),
            "has 9 tokens",
        ),
        "no completion": (
            lambda tools: tools.completions().encode([Completion("q", "the")]),
            "record 'q' has no completion",
        ),
        "nothing": (
            lambda tools: SequenceClassification(
                tools.silent(), num_classes=2, max_length=8
            ).encode([Record("q", "123", ("a", "b"))]),
            "record 'q' becomes [[]]",
        ),
        "nothing to go on": (
            lambda tools: (tools.silent(), told(["123"], max_new_tokens=2)(tools)),
            "'123'",
        ),
    },
    "metrics": {
        **{
            f"{name} of {bad}": (measured(measure, bad), "example 3 hold NaN or infinity")
            for name, measure in {
                "average": average,
                "entropy": entropy,
                "mutual information": mutual_information,
                "noise to signal": noise_to_signal,
                "half width": half_width,
                "evaluate": lambda logits: evaluate(logits, torch.zeros(4, dtype=torch.long)),
                "per question": lambda x: per_question(x, torch.zeros(4, dtype=torch.long)),
            }.items()
            for bad in (NAN, INF)
        },
        "one draw": (lambda tools: half_width(torch.zeros(1, 4, 2)), "(1, 4, 2)"),
        "no draw": (lambda tools: average(torch.zeros(0, 4, 2)), "(0, 4, 2)"),
        "no example": (lambda tools: evaluate(torch.zeros(3, 0, 2), RIGHT[:0]), "(3, 0, 2)"),
        "shape": (lambda tools: average(torch.zeros(4, 2)), "(4, 2)"),
        "no labels": (lambda tools: evaluate(torch.zeros(1, 2, 2), None), "a label in every"),
        "labels": (lambda tools: evaluate(torch.zeros(1, 2, 2), RIGHT - 1), "labels holds -1"),
        "labels high": (lambda tools: evaluate(torch.zeros(1, 2, 2), RIGHT + 1), "labels holds 2"),
        "labels few": (lambda tools: evaluate(torch.zeros(1, 3, 2), RIGHT), "(2,)"),
        "labels float": (lambda tools: ece(two(0.6, 0.7), RIGHT.float()), "torch.float32"),
        "logits": (lambda tools: ece(torch.tensor([[2.0, -1.0]]), RIGHT[:1]), "[2.0, -1.0]"),
        "sum": (lambda tools: ece(torch.tensor([[0.5, 0.1]]), RIGHT[:1]), "row 0"),
        "nan": (lambda tools: ece(torch.tensor([[NAN, 0.5]]), RIGHT[:1]), "[nan, 0.5]"),
        "bins": (lambda tools: ece(two(0.6, 0.7), RIGHT, bins=0), "bins is 0"),
        "floor bins": (lambda tools: ece_floor(two(0.6), bins=-1), "bins is -1"),
        "floor draws": (lambda tools: ece_floor(two(0.6), draws=0), "draws is 0"),
        "band level": (lambda tools: calibration_band(two(0.6), level=1.0), "level is 1.0"),
        "band draws": (lambda tools: calibration_band(two(0.6), draws=0), "draws is 0"),
        "floor nothing": (lambda tools: ece_floor(torch.zeros(0, 2)), "(0, 2)"),
        "auroc shapes": (lambda tools: auroc(torch.zeros(3), RIGHT.bool()), "(3,)"),
        "auroc nan": (lambda tools: auroc(torch.tensor([0.0, NAN]), RIGHT.bool()), "nan at 1"),
        "interval": (lambda tools: crossed_interval(torch.zeros(5)), "(5,)"),
        "interval nan": (
            lambda tools: crossed_interval(torch.tensor([[0.0, 1.0], [INF, 0.0]])),
            "inf at seed 1, question 0",
        ),
        "interval level": (lambda tools: crossed_interval(two(0.6), level=95.0), "level is 95.0"),
        "pairs": (lambda tools: paired_difference(torch.ones(2, 3), torch.ones(3, 2)), "(3, 2)"),
    },
    "draws": {
        "nan": (drawn(NAN), "the first of which is 1"),
        "infinite": (drawn(-INF), "the first of which is 1"),
        "none": (drawn((0, 2, 4)), "no draw"),
        "one s": (drawn((2, 4)), "(2, 4)"),
        "rank": (drawn((3, 2, 5)), "(3, 2, 5)"),
        "number": (lambda tools: draw(None, 0, seed=0), "number of draws is 0"),
        "kind": (lambda tools: draw(None, 2, seed=0, kind="halton"), "'halton'"),
        **{
            f"temperature {t}": (
                lambda tools, t=t: Predictor(tools.adapter(), temperature=t),
                f"temperature is {t}",
            )
            for t in (0.0, -2.0, NAN, INF)
        },
        "tolerance": (predicted(tolerance=-0.1), "tolerance is -0.1"),
        "tolerance nan": (predicted(tolerance=NAN), "tolerance is nan"),
        "batch size": (predicted(batch_size=0), "batch_size is 0"),
        "prompts": (told("the cat"), "'the cat'"),
        "prompt": (told(["the cat", " "], max_new_tokens=2), "prompt 1: prompt is ' '"),
        "prompt type": (told([3]), "prompt 0: prompt is 3"),
        "room": (told(["the cat"], max_new_tokens=63), "max_new_tokens 63"),
        "scored text": (
            lambda tools: score(Predictor(tools.adapter()), "ab", "cd"),
            "prompts is the text 'ab'",
        ),
        "scored texts": (
            lambda tools: score(Predictor(tools.adapter()), ["a"], "c"),
            "completions is the text 'c'",
        ),
        "scored pairs": (
            lambda tools: score(Predictor(tools.adapter()), ["a", "b"], ["c"]),
            "2 prompts and 1 completions",
        ),
        "scored": (
            lambda tools: score(Predictor(tools.adapter()), ["the"], [""]),
            "completion is ''",
        ),
    },
}
FLAT = {f"{group}: {name}": case for group, row in CASES.items() for name, case in row.items()}


@pytest.mark.parametrize("name", FLAT)
def test_bad_input_is_an_error_that_shows_it(tmp_path, tokenizer, name):
    call, shown = FLAT[name]
    with pytest.raises(ValueError, match=r"\w") as raised:
        call(Tools(tmp_path, tokenizer))
    assert shown in str(raised.value)


def test_there_are_many():
    assert len(FLAT) >= 150
