"""Run folders that were damaged or edited after training: what is said of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import lora, make_records, scalabl, tiny_llama, write_jsonl
from omegaconf import OmegaConf
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from scalabl_pyro import load_run, predict
from scalabl_pyro.runs.reading import RunFolderError

SETTINGS = ["fit.steps=3", "fit.batch_size=4", "progress=false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data, a model, an adapter to start from, and two runs of two trials each."""
    from conftest import WORDS
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("runs")
    vocabulary = ["<pad>", "<unk>", *WORDS, "Answer", ":", ".", "A", "B", "C", "D"]
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokens = Tokenizer(model)
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_llama().save_pretrained(root / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(root / "model")
    started = get_peft_model(tiny_llama(), lora("q_proj", "v_proj", init_lora_weights=False))
    started.save_pretrained(root / "start")
    for name, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(root / "data" / f"{name}.jsonl", make_records(count))
    for seed in (0, 1):
        assert scalabl("train", *words_of(root, root / "runs" / f"mine-seed{seed}", seed)) == 0
    return root


def words_of(root: Path, run: Path, seed: int = 0) -> list[str]:
    trials = "trials=[{fit:{lr:0.01}},{fit:{lr:0.02}}]"
    where = [f"model.name={root / 'model'}", f"data.root={root / 'data'}", f"run_dir={run}"]
    return [*where, f"lora.start={root / 'start'}", f"seed={seed}", trials, *SETTINGS]


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "mine-seed0"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00[unclosed: {")


def listed(path: Path) -> None:
    path.write_text("- a list\n" if path.suffix == ".yaml" else "3")


def missing_key(path: Path) -> None:
    """The first of those that are needed."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        gone = sorted(tensors)[0]
        save_file({k: v for k, v in tensors.items() if k != gone}, path, {"format": "pt"})
    elif path.suffix == ".yaml":
        values = OmegaConf.to_container(OmegaConf.load(path))
        del values["model"]
        OmegaConf.save(OmegaConf.create(values), path)
    else:
        values = json.loads(path.read_text())
        del values["classes" if "classes" in values else "peft_type"]
        path.write_text(json.dumps(values))


def wrong_shape(path: Path) -> None:
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].dim())
    save_file(tensors | {name: tensors[name][:, :1].clone()}, path, {"format": "pt"})


def unknown_key(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"surprise": 1}))
    elif path.suffix == ".yaml":
        path.write_text(path.read_text() + "surprise: 1\n")
    else:
        save_file(load_file(path) | {"surprise": torch.ones(1)}, path, {"format": "pt"})


def of_another_run(path: Path) -> None:
    """All is there, and of the right shape."""
    tensors = load_file(path)
    save_file({name: value + 0.1 for name, value in tensors.items()}, path, {"format": "pt"})


BYTES, KEYS = [cut, empty, noise], [missing_key, unknown_key]
DAMAGES: dict[str, tuple[str, list[Callable[[Path], None]]]] = {
    "posterior.json": ("evaluate", [*BYTES, *KEYS, listed]),
    "config.yaml": ("evaluate", [*BYTES, *KEYS, listed]),
    "projections.safetensors": ("evaluate", [*BYTES, *KEYS, wrong_shape, of_another_run]),
    "posterior.safetensors": ("evaluate", [*BYTES, *KEYS, wrong_shape, of_another_run]),
    "adapter/adapter_config.json": ("distill", [*BYTES, missing_key, listed]),
    "adapter/adapter_model.safetensors": ("distill", [*BYTES, *KEYS, wrong_shape]),
    "predictions.safetensors": ("report", [*BYTES, missing_key, wrong_shape]),
    "metrics.json": ("resume", [*BYTES, listed]),
    "trials.json": ("resume", [*BYTES, listed]),
}


def words_for(command: str, trained: Path, run: Path) -> list[str]:
    questions = trained / "data" / "test.jsonl"
    return {
        "evaluate": ["evaluate", f"run={run}", f"data.root={trained / 'data'}", "progress=false"],
        "distill": ["distill", f"run={run}", f"input={questions}", "output=student", *SETTINGS],
        "report": ["report", f"runs={run.parent}", "out=page"],
        "resume": ["train", *words_of(trained, run), "resume=true"],
    }[command]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name, (_, damages) in DAMAGES.items() for damage in damages],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_file_is_named_with_what_to_do(
    trained, run, tmp_path, monkeypatch, capsys, name, damage
):
    monkeypatch.chdir(tmp_path)
    damage(run / name)
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert scalabl(*words_for(DAMAGES[name][0], trained, run)) == 1
    shown = capsys.readouterr().err
    (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    place = run / name
    assert str(place.parent if name.startswith("adapter/") else place) in line
    assert place.name in line
    assert re.search(r"copy (it|the run folder) again from where it was made", line)
    assert "traceback" not in line
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    "name", sorted(DAMAGES.keys() - {"trials.json", "predictions.safetensors"})
)
def test_a_missing_file_is_named(trained, run, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (run / name).unlink()
    capsys.readouterr()
    command = "export" if name == "metrics.json" else DAMAGES[name][0]
    words = words_for(command, trained, run) if command != "export" else []
    assert scalabl(*(words or ["export", f"run={run}", "output=exported"])) == 1
    shown = capsys.readouterr().err
    assert str(run / name) in shown or (name.startswith("adapter/") and str(run) in shown)


def test_a_run_from_before_hashes_were_kept_is_read(trained, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    values = json.loads((run / "posterior.json").read_text())
    assert values.pop("sha256").keys() == {"posterior.safetensors", "projections.safetensors"}
    (run / "posterior.json").write_text(json.dumps(values))
    assert scalabl(*words_for("evaluate", trained, run)) == 0


def test_what_is_beside_a_run_that_is_not_there_is_named(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent.parent)
    name = run.parent.name
    assert scalabl("export", f"run={name}/nope", "output=exported") == 1
    shown = capsys.readouterr().err
    assert f"there is no folder {name}/nope ({name} holds {run.name}" in shown
    (run.parent / "begun.unfinished").mkdir()
    assert scalabl("export", f"run={name}/begun", "output=exported") == 1
    assert "begun.unfinished: go on with resume=true" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["history.csv", "environment.json", "adapter/README.md"])
def test_what_nothing_reads_does_no_harm(trained, run, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    noise(run / name)
    assert scalabl(*words_for("evaluate", trained, run)) == 0


# ---------------------------------------------------------------------- edited settings


def edit(run: Path, key: str, value: object) -> None:
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, key, value)
    OmegaConf.save(config, run / "config.yaml")


@pytest.mark.parametrize(
    ("key", "value", "trained_with"),
    [
        ("lora.alpha", 32, "16"),
        ("lora.r", 2, "8"),
        ("lora.start", None, "start'"),
        ("method.projections", "unit", "'frozen_v'"),
        ("method.prior.name", "laplace", "'normal'"),
        ("method.guide.name", "delta", "'normal'"),
        ("model.prompt", "classes", "'letters'"),
        ("model.dtype", "bfloat16", "'float32'"),
        ("model.quantization", "8bit", "None"),
        ("model.chat", True, "False"),
        ("data.classes", ["x", "y", "z", "w"], "[]"),
    ],
)
def test_a_setting_that_contradicts_the_training_is_refused(run, key, value, trained_with):
    edit(run, key, value)
    with pytest.raises(ValueError, match=r"contradicts posterior\.json") as caught:
        load_run(run)
    message = str(caught.value)
    assert message.startswith(f"{run / 'config.yaml'} ")
    assert re.search(rf"{re.escape(key)} is {re.escape(repr(value))}, but was .*", message)
    assert trained_with in message.partition(f"{key} is")[2]


@pytest.mark.parametrize("key", ["method.perp", "lora.subspace", "model.normalise"])
def test_a_run_of_older_code_lacks_settings_that_came_later(run, key):
    """They are at their defaults."""
    split = load_run(run).encode(make_records(5))
    expected = predict(load_run(run).predictor, split).logits
    part, name = key.split(".")
    config = OmegaConf.load(run / "config.yaml")
    del config[part][name]
    OmegaConf.save(config, run / "config.yaml")
    posterior = json.loads((run / "posterior.json").read_text())
    del posterior["settings"][key]
    (run / "posterior.json").write_text(json.dumps(posterior))
    logits = predict(load_run(run).predictor, split).logits
    torch.testing.assert_close(logits, expected, atol=0, rtol=0)
    if key == "method.perp":
        edit(run, key, 2)
        with pytest.raises(ValueError, match=r"method\.perp is 2, but was 0 in training"):
            load_run(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eval_batch_size", 3),
        ("model.device", "cpu"),
        ("model.attention", "eager"),
        ("model.truncate", True),
        ("method.draws", 3),
        ("fit.steps", 99),
        ("lora.dropout", 0.5),
        ("seed", 7),
    ],
)
def test_a_setting_of_no_effect_may_be_changed(run, key, value):
    split = load_run(run).encode(make_records(5))
    expected = predict(load_run(run).predictor, split).logits
    edit(run, key, value)
    logits = predict(load_run(run).predictor, split).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`:UserWarning")
def test_a_model_that_was_moved_is_found_again(trained, run, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "moved")
    edit(run, "model.name", str(tmp_path / "moved"))
    split = load_run(run).encode(make_records(5))
    assert predict(load_run(run).predictor, split).logits.isfinite().all()


REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(trained, run, tmp_path, monkeypatch) -> Path:
    """The local cache of the Hub, in which ``me/mine`` has a branch and a tag."""
    repo = tmp_path / "cache" / "models--me--mine"
    shutil.copytree(run, repo / "snapshots" / REVISION)
    (repo / "refs").mkdir()
    for name in ("main", "v1"):
        (repo / "refs" / name).write_text(REVISION)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(trained)
    return repo / "snapshots" / REVISION


@pytest.mark.parametrize("name", ["me/mine", "me/mine@v1", f"me/mine@{REVISION}"])
def test_a_run_is_found_on_the_hub(hub, run, name, tmp_path):
    loaded, records = load_run(name), make_records(9)
    assert loaded.folder == hub
    logits = [predict(r.predictor, r.encode(records)).logits for r in (loaded, load_run(run))]
    assert torch.equal(*logits)
    assert torch.equal(logits[0], load_file(run / "predictions.safetensors")["test.logits"])
    assert scalabl("export", f"run={name}", f"output={tmp_path / 'out'}") == 0


@pytest.mark.parametrize("name", ["me/other", "me/mine@v2", "me/mi..ne"])
def test_a_run_that_is_nowhere_is_told_in_one_line(hub, name):
    with pytest.raises(RunFolderError, match=f"there is no folder {name}, and no run to be had"):
        load_run(name)


def test_a_folder_comes_before_the_hub(hub, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    run.rename(tmp_path / "me" / "mine")
    assert load_run("me/mine").folder == Path("me/mine")
