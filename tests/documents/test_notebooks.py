"""Notebooks run, and are committed as they ran."""

from __future__ import annotations

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

#: what notebooks are run with, for the sake of time
SMALL = {"STEPS": 4, "DRAWS": 32, "REPLICATES": 2, "SEEDS": 1}


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


#: the first two run with every change, the others with ``-m slow``
RUN_NOTEBOOKS = [
    pytest.param(path, marks=() if path.stem[:2] in ("01", "02") else pytest.mark.slow)
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", RUN_NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path, request, monkeypatch):
    """As a stranger runs them, but with little training."""
    if path.stem == "06_a_real_model":
        monkeypatch.setenv("SMOLLM2", str(request.getfixturevalue("smollm2")))
        monkeypatch.setenv("ARC_EASY", str(request.getfixturevalue("shared") / "data/arc_easy"))
    notebook = nbformat.read(path, as_version=4)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for name, value in SMALL.items():
            cell.source = re.sub(rf"^{name} = \d+", f"{name} = {value}", cell.source, flags=re.M)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_short_and_committed_executed(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown"
    assert len(code) < 15
    assert all(cell.execution_count for cell in code), "commit the notebook executed"
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_warnings(path):
    """Nor anything else on stderr, and none that a notebook silences wholesale."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [o.text for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    assert not [
        cell.source for cell in code if re.search("simplefilter|filterwarnings", cell.source)
    ]
