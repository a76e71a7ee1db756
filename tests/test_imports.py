"""What an import of the package prints, and what it needs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scalabl_pyro"
NAMESPACES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_no_namespace_prints_or_warns_when_it_is_imported(tmp_path):
    """On a first day: arviz keeps the date of its last notice in a cache, which is empty here."""
    names = ", ".join(f"scalabl_pyro.{name}" for name in NAMESPACES)
    errors = [f"-Werror::{kind}" for kind in ("UserWarning", "FutureWarning", "RuntimeWarning")]
    done = subprocess.run(
        [sys.executable, *errors, "-c", f"import {names}"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FIRST_USE = """
import scalabl_pyro as sp
from peft import LoraConfig
from scalabl_pyro.data.world import world
questions = world().splits
lora = LoraConfig(r=2, target_modules=["q_proj"])
adapter = sp.from_pretrained("embedded", lora, questions["train"], prompt="classes")
train = adapter.encode(questions["train"][:8])
model = sp.ScalaBLModel(adapter, num_data=len(train))
guide = sp.AutoSubspaceNormal(model)
sp.fit(model, guide, train, sp.FitConfig(steps=2, lr_guide=1.0), progress=False)
predictor = sp.Predictor(adapter, sp.draw(guide, 3, seed=0))
sp.to_inference_data(predictor, train, model=model, guide=guide)
import arviz
"""


def test_the_first_use_warns_of_nothing(tmp_path):
    """As Python shows warnings to everybody, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    bars = re.compile(r"Loading weights: .*")
    assert (done.stdout, bars.sub("", done.stderr).strip()) == ("", "")


def test_of_bitsandbytes_one_message_is_left_out():
    code = (
        "import logging, scalabl_pyro\n"
        "log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "log.warning('Failed to load CPU gemm_4bit_forward from %s', 'nowhere')\n"
        "log.warning('something else')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "something else\n"


def imported(path: Path) -> set[str]:
    """The first names of all absolute imports of a file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).split(".")[0])
    return names


def canonical(requirement: str) -> str:
    """The name in a requirement, as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {canonical(requirement) for group in groups for requirement in group}
    homes = packages_distributions()
    modules = set().union(*map(imported, PACKAGE.rglob("*.py")))
    modules -= sys.stdlib_module_names | {"scalabl_pyro"}
    assert {"torch", "pyro", "numpy", "omegaconf"} <= modules, "the walk itself works"
    missing = {
        module
        for module in modules
        if not declared & {canonical(name) for name in homes.get(module, [module])}
    }
    assert not missing


def test_what_is_declared_is_tested_in_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line) for line in lines if not line.startswith("#")}
    assert {canonical(requirement) for requirement in project["dependencies"]} <= pinned


def test_what_another_file_imports_is_listed():
    """Each file's ``__all__`` is what the others may use."""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    listed = {
        path: set(ast.literal_eval(node.value))
        for path, tree in trees.items()
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and ast.unparse(node).startswith("__all__")
    }
    missing = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.ImportFrom) and node.level and node.module):
                continue
            base = path.parents[node.level - 1].joinpath(*node.module.split("."))
            source = base.with_suffix(".py")
            names = {alias.name for alias in node.names}
            if source in listed and names - listed[source]:
                missing[f"{source.name} for {path.name}"] = sorted(names - listed[source])
    assert missing == {}


def test_no_folder_imports_one_to_its_right():
    """The chain of CONTRIBUTING, read from it, against all imports of the package."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    chain = re.search(r"\n    (data → .*? commands)\n", text, re.DOTALL).group(1)
    groups = [g.replace(",", " ").split() for g in chain.split("→")]
    place = {name: i for i, group in enumerate(groups) for name in group}
    alone = {"arviz_versions", "distributed", "files", "pyro_svi", "registry", "rng"}
    place |= dict.fromkeys(alone | {"embedded"}, -1)
    place["pyro_svi"] = 0  # it may use those that serve all
    package = ROOT / "scalabl_pyro"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert place.keys() == folders | alone
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).parts
        module = parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.ImportFrom) and node.level and module in place):
                continue
            above = parts[: len(parts) - node.level]
            names = [name.name for name in node.names if name.name != "__version__"]
            others = [node.module] if node.module else names
            for other in (".".join([*above, other]).split(".")[0] for other in others):
                near = place[other] == place[module] and other != module
                assert place[other] <= place[module], f"{path} imports {other}"
                assert not near, f"{path} imports {other}, which stands beside it"
