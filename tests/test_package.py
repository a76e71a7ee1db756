"""What is installed: the wheel and the source distribution hold all that a run needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, write_jsonl

import scalabl_pyro as sp
from scalabl_pyro.data.world import world

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"scalabl_pyro-{sp.__version__}"

FOLDERS = ("scalabl_pyro", "configs", "tests", "docs", "benchmarks", "notebooks")

#: a module that stands for a machine without a network
OFFLINE = """
import socket
def refuse(self, address):
    raise OSError(f"no network: {address}")
socket.socket.connect = refuse
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_of(*folders: str) -> set[str]:
    """The files below these folders, but for what Python writes."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(f.relative_to(ROOT)) for f in files if "__pycache__" not in f.parts}


def test_the_citation_is_of_this_version_and_names_the_method():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # needed by CFF 1.2.0
    assert str(citation["version"]) == sp.__version__
    assert citation["license"] == PROJECT["license"]
    method = citation["preferred-citation"]
    names = [author["family-names"] for author in method["authors"]]
    readme = (ROOT / "README.md").read_text()
    assert f"{', '.join(names[:-1])} and {names[-1]}" in readme
    assert method["url"] in readme
    assert method["url"] == PROJECT["urls"]["Paper"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("built")
    paths = (path for path in ROOT.iterdir() if path.is_file() or path.name in FOLDERS)
    (tree := out / "tree").mkdir()
    for path in paths:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, tree / path.name)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run(sys.executable, "-c", code, cwd=tree)
    wheel = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", f"--wheel-dir={out}"]
    run(sys.executable, "-m", "pip", *wheel, out / f"{NAME}.tar.gz")
    return out


@pytest.mark.slow
def test_the_source_distribution_holds_the_whole_tree(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not files_of(*FOLDERS) - names
    assert {"LICENSE", "CITATION.cff", "CHANGELOG.md", "Makefile", "constraints.txt"} <= names


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_configurations_and_the_embedded_model(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = files_of("scalabl_pyro") | {f"scalabl_pyro/{name}" for name in files_of("configs")}
    assert names == package
    assert "scalabl_pyro/embedded/model/model.safetensors" in names


@pytest.mark.slow
def test_the_wheel_trains_in_an_environment_of_its_own_without_a_network(built, tmp_path):
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    installed = Path(
        run(python, "-c", "import sysconfig as s; print(s.get_path('purelib'))").strip()
    )
    # Its dependencies are this environment's. A path file of one that it names is not followed, so
    # that an editable install of the repository is out of reach.
    (installed / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    (installed / "offline.py").write_text(OFFLINE)
    (installed / "offline.pth").write_text("import offline\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(*pip, built / f"{NAME}-py3-none-any.whl")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "hub")}  # nothing that was downloaded before
    options = {"cwd": tmp_path, "env": env}

    code = (
        "import scalabl_pyro, scalabl_pyro.configs as c; print(scalabl_pyro.__file__, c.__file__)"
    )
    places = run(python, "-c", code, **options).split()
    assert places == [str(installed / f"scalabl_pyro/{n}__init__.py") for n in ("", "configs/")]

    scalabl = home / "bin" / "scalabl"
    assert sp.__version__ in run(scalabl, "--version", **options)
    train = ["model.name=embedded", "model.prompt=classes", "data.task=embedded"]
    train += ["lora.targets=[q_proj,v_proj]", "fit.steps=2", "data.limit.test=8", "run_dir=run"]
    run(scalabl, "train", *train, "progress=false", **options)
    assert json.loads((tmp_path / "run/metrics.json").read_text())
    write_jsonl(tmp_path / "questions.jsonl", world().splits["test"][:3])
    files = ["input=questions.jsonl", "output=answers.jsonl"]
    run(scalabl, "predict", "run=run", *files, "progress=false", **options)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
