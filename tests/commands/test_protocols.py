"""Protocols: what each sets, against the published settings as they are told."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
from conftest import CHAT, ROOT, blocks, make_records, scalabl, write_jsonl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

from scalabl_pyro.commands._configs import CONFIGS
from scalabl_pyro.commands.compare import CompareConfig
from scalabl_pyro.data.world import world
from scalabl_pyro.methods import METHODS
from scalabl_pyro.runs.config import RunConfig
from scalabl_pyro.runs.settings import build

PROTOCOLS = sorted(path.stem for path in (CONFIGS / "protocol").glob("*.yaml"))


def composed(command: str, *words: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = compose(command, ["model.name=x", "data.task=embedded", *words])
    return OmegaConf.to_container(settings, resolve=True)


def check_published(config: RunConfig, *, chat: bool) -> None:
    """5,000 steps of four at 1e-4, the last one, with nothing chosen; r = 8, α = 16."""
    model, lora, fit = config.model, config.lora, config.fit
    assert (model.readout, model.prompt, model.dtype) == ("label_tokens", "letters", "bfloat16")
    assert model.chat is chat
    assert (lora.r, lora.alpha, lora.dropout, lora.heads, lora.layers) == (8, 16, 0.0, (), ())
    assert lora.targets == ("q_proj", "v_proj", "lm_head")
    assert (fit.steps, fit.batch_size, fit.accumulation) == (5000, 4, 1)
    assert (fit.lr, fit.lr_guide, fit.eps) == (1e-4, 1e-4, 1e-6)
    assert (fit.warmup, fit.decay, fit.clip_norm) == (0.06, "linear", math.inf)
    assert (fit.eval_every, fit.keep, fit.kl_budget) == (0, "last", None)
    assert not config.trials


@pytest.mark.parametrize("protocol", ["paper", "bag"])
@pytest.mark.parametrize("method", METHODS)
def test_train_takes_the_settings_of_a_protocol_with_every_method(protocol, method):
    """Whatever the method sets for itself otherwise."""
    values = composed("train", f"protocol={protocol}", f"method={method}")
    config = build(RunConfig, values)
    check_published(config, chat=protocol == "bag")
    alone = build(RunConfig, composed("train", f"method={method}"))
    assert config.method == alone.method
    assert config.fit.kl == alone.fit.kl


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method=swag"], ["fit.decay is 'linear', and the one that method swag is made for is"]),
        (["method=ivon"], ["fit.lr is 0.0001, and the one that method ivon is made for is 0.1"]),
        (["method=swag", "fit.decay=cosine"], []),
        (["method=mle", "protocol=paper"], []),
        (["method=swag", "protocol=ours"], []),
        (["method=ivon", "protocol=ours", "fit.lr=0.02"], []),
        (
            ["method=mle", "trials=[{method:{name:swag}},{method:{name:swag},fit:{decay:cosine}}]"],
            ["fit.decay is 'linear', and the one that method swag is made for is 'constant'"],
        ),
    ],
    ids=lambda x: " ".join(x),
)
def test_settings_that_are_not_made_for_a_method_are_told(monkeypatch, capsys, words, told):
    monkeypatch.setattr("scalabl_pyro.commands.train.train_run", lambda config: {})
    protocol = [] if any("protocol" in word for word in words) else ["protocol=paper"]
    assert scalabl("train", "model.name=x", "data.task=embedded", *protocol, *words) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "is made for" in line]
    assert len(lines) == len(told)
    for line, expected in zip(lines, told, strict=True):
        assert expected in line


def test_scalabl_as_published():
    values = composed("train", "protocol=paper", "method=reference")
    assert build(RunConfig, values).method == {
        "name": "reference",
        "init_scale": 0.05,
        "prior_scale": 1.0,
        "lr_kl": 0.2,
        "draws": 10,
    }


@pytest.mark.parametrize("command", ["train", "compare", "tune", "methods", "show_prompts"])
def test_ours_is_the_default_and_sets_nothing(command):
    assert PROTOCOLS == ["bag", "ours", "paper"]
    assert composed(command) == composed(command, "protocol=ours")
    assert not OmegaConf.load(CONFIGS / "protocol" / "ours.yaml")


@pytest.mark.parametrize("protocol", ["paper", "bag"])
def test_compare_trains_every_row_at_the_settings_of_a_protocol(protocol):
    config = build(CompareConfig, composed("compare", f"protocol={protocol}"))
    assert config.seeds == (0, 1, 2, 3)
    assert config.out == f"runs/{protocol}"
    published = {"mle", "map", "mc_dropout", "ensemble", "laplace_lora", "blob", "reference"}
    names = {trial["method"]["name"] for row in config.methods.values() for trial in row}
    assert names == published | {"zero_shot", "temperature", "scalabl"}
    for name, row in config.methods.items():
        (trial,) = row
        run = config.run_config(name, trial, 0)
        check_published(run, chat=protocol == "bag")
        assert run.fit.weight_decay == (0.1 if name == "map" else 0.0)
        assert run.method.get("projections", "free") == "free", "A moves too, as published"


def test_the_published_algorithm_trains_on_the_embedded_model(tmp_path, monkeypatch):
    """With few steps, after which q is about where it starts: σ is from U(0.05/√2, 0.05)."""
    monkeypatch.chdir(tmp_path)
    records = world().splits["train"]
    for name, part in (("train", slice(8)), ("validation", slice(8, 12)), ("test", slice(12, 16))):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", records[part])
    words = ["model.name=embedded", "model.prompt=classes", "lora.targets=[q_proj,v_proj]"]
    words += ["data.root=data", "run_dir=out", "fit.steps=2", "progress=false"]
    assert scalabl("train", "protocol=paper", "method=reference", *words) == 0
    scale = load_file("out/posterior.safetensors")["guide.log_scale_unconstrained"].exp().flatten()
    low, high = 0.05 / 2**0.5, 0.05
    assert low * 0.999 < float(scale.min()) < float(scale.max()) < high * 1.001
    levels = (scale - low) / (high - low)
    # Of a uniform variable the mean of D has the standard deviation 1 / √(12 D).
    assert abs(float(levels.mean()) - 0.5) < 4 / math.sqrt(12 * len(scale))
    assert load_file("out/predictions.safetensors")["validation.logits"].shape == (10, 4, 4)
    assert json.loads(Path("out/metrics.json").read_text()).keys() == {"validation", "test"}


def test_the_commands_of_the_documentation_train(tmp_path, local_model, tokenizer, monkeypatch):
    """Those of docs/comparison.md as printed, with few steps and, of the rows, one."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<end>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(local_model)
    for name, count in (("train", 12), ("validation", 6), ("test", 5)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "comparison.md", "bash")
    train, compare = block.splitlines()
    less = ["fit.steps=2", "lora.targets=[q_proj]", "progress=false"]
    others = composed("compare", "protocol=bag")["methods"].keys() - {"reference"}
    few = ["seeds=[0]", "jobs=1", *(f"~methods.{name}" for name in others)]
    for command, words in ((train, less), (compare, [*less, *few])):
        text = command.replace("Qwen/Qwen2.5-0.5B-Instruct", str(local_model))
        text = text.replace("Qwen/Qwen2.5-0.5B", str(local_model)).replace("FOLDER", "data")
        assert scalabl(*shlex.split(text)[1:], *words) == 0, command
    table = json.loads(Path("runs/bag/table.json").read_text())
    assert table["metrics"].keys() == {"reference"}
    (run,) = Path("runs/bag/runs").glob("reference-*")
    config = OmegaConf.load(run / "config.yaml")
    assert (config.model.chat, config.fit.steps, config.fit.eps) == (True, 2, 1e-6)
