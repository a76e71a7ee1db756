from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from conftest import scalabl

from scalabl_pyro.commands import doctor


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
    found = rows(shown.out)
    assert list(found) == list(doctor.CHECKS)
    assert shown.err == ""
    assert f"torch {torch.__version__}" in found["versions"][1]
    assert found["embedded model"][0] == found["CPU"][0] == "ok"
    assert (found["CUDA"][0] == "ok") == torch.cuda.is_available()


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
    found = rows(capsys.readouterr().out)[name]
    assert found[0] == state
    assert fix in found[1]


def test_doctor_tries_whether_the_cache_can_be_written(monkeypatch):
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", "/proc/nope")
    state, text = doctor.CHECKS["Hub"]()
    assert (state, "set HF_HOME" in text) == ("broken", True)


def test_the_version_is_that_of_the_package(capsys):
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert scalabl("--version") == 0
    assert capsys.readouterr().out == f"scalabl_pyro {project['version']}\n"
