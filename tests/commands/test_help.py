"""What the command line says of itself: help, settings and their defaults."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from typing import get_type_hints

import pytest
from conftest import ROOT, scalabl
from omegaconf import OmegaConf

from scalabl_pyro import FitConfig, KLSchedule
from scalabl_pyro.commands._configs import CONFIGS
from scalabl_pyro.commands.cli import COMMANDS
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.methods import METHODS
from scalabl_pyro.runs.config import RunConfig
from scalabl_pyro.runs.data import DataConfig
from scalabl_pyro.runs.settings import build

pytestmark = pytest.mark.usefixtures("in_tmp")


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


def test_help_explains_another_file_of_settings(capsys):
    assert scalabl("compare", "--config-name", "tune", "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# scalabl compare --config-name tune: ")
    assert shown.index("name: ???") < shown.index("name: embedded"), "its own come first"
    assert "batch_size:" in shown
    assert scalabl("compare", "--config-name=tun", "--help") == 2
    assert "--config-name is tun: expected one of ['base', 'compare'" in capsys.readouterr().err


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


def test_a_reader_that_has_enough_is_no_error(local_model):
    code = f"{sys.executable} -m scalabl_pyro memory model.name={local_model} tokens=8 | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout == "{"
    assert "Broken pipe" not in done.stderr


@pytest.mark.parametrize("words", ["--help", "train --help"])
def test_help_that_nobody_reads_or_that_does_not_fit_is_no_traceback(words):
    """A reader that is gone, a full disk, and a terminal without Greek letters."""
    for code, status in ((f"{words} | true", {0, 1}), (f"{words} > /dev/full", {1})):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -u -m scalabl_pyro {code}; exit ${{PIPESTATUS[0]}}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in status
        assert "Traceback" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "scalabl_pyro", *words.split()],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_command_that_is_not_there_is_named(capsys):
    assert scalabl("nothing") == 2
    assert "there is no command 'nothing'" in capsys.readouterr().err


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
