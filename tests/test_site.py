"""The documentation as a site: it builds without a warning, and what its pages say is run."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from pkgutil import resolve_name
from urllib.parse import unquote, urlsplit

import pytest
import torch
from conftest import ROOT, blocks, make_records, scalabl, write_jsonl

ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):`~?(scalabl_pyro\.[\w.]+)`")


def test_references_in_docstrings_lead_to_something():
    files = sorted((ROOT / "scalabl_pyro").rglob("*.py"))
    names = {name for path in files for name in ROLE.findall(path.read_text())}
    assert len(names) > 30
    for name in names:
        resolve_name(name)


@pytest.mark.usefixtures("in_tmp")
def test_the_answers_to_questions_are_true():
    """The blocks of the FAQ, one after the other."""
    names: dict = {}
    for number, code in enumerate(blocks(ROOT / "docs" / "faq.md", "python")):
        exec(compile(code, f"faq.md, block {number}", "exec"), names)
    assert names["trace"].stochastic_nodes == ["s", "data"]
    assert names["trace"].observation_nodes == ["label"]
    assert names["loss"].isfinite()
    labels = names["labels"]
    assert labels.shape == (50, 32)
    assert set(labels.unique().tolist()) <= {0, 1, 2, 3}
    assert names["draws"].shape == (50, *names["adapter"].shape)
    likelihood = names["data"].log_likelihood["label"]
    assert dict(likelihood.sizes) == {"chain": 1, "draw": 50, "example": 32}
    converted = names["converted"].log_likelihood["label"]
    assert dict(converted.sizes) == {"chain": 1, "draw": 50, "data": 32}
    one, adapter = names["one"], names["adapter"]
    assert one.mutual_information.abs().max() < 1e-6
    test = adapter.encode(names["questions"]["test"][:5])
    with torch.no_grad():
        plain = adapter(test.collate(list(test)), names["guide"].median()["s"]).softmax(-1)
    torch.testing.assert_close(one.probabilities, plain)
    kept = names["kept"]
    batch = test.collate(list(test))
    torch.testing.assert_close(kept.logits(batch), adapter(batch, kept.draws))


def test_the_commands_about_scaling_run(tmp_path, local_model, monkeypatch):
    for name, count in (("train", 20), ("test", 6)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    monkeypatch.chdir(tmp_path)
    train = ["train", f"model.name={local_model}", "data.root=data", "run_dir=runs/small"]
    fast = ["fit.steps=2", "fit.batch_size=4", "lora.targets=[q_proj,v_proj]", "progress=false"]
    assert scalabl(*train, *fast) == 0
    lines = [
        line
        for block in blocks(ROOT / "docs" / "scaling.md", "bash")
        for line in block.splitlines()
        if not line.startswith("#")
    ]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line.replace("MODEL", str(local_model)).replace("FOLDER", "data"))[1:]
        rest = "lora.targets=[q_proj,v_proj]" if words[0] == "memory" else "progress=false"
        assert scalabl(*words, rest) == 0, line


class Page(HTMLParser):
    """What a page links to, and the places that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for name in ("href", "src") if (value := values.get(name))]
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path):
    needed = ("mkdocs", "material", "mkdocstrings_handlers", "nbconvert", "latex2mathml")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the extra docs: there is no {', '.join(missing)}")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path: Page(path) for path in tmp_path.rglob("*.html") if path.name != "404.html"}
    assert {"index.html", "faq.html", "settings.html"} <= {path.name for path in pages}
    for path, page in pages.items():
        for link in page.links:
            place = urlsplit(link)
            if place.scheme or place.netloc:
                continue
            target = (path.parent / unquote(place.path)).resolve() if place.path else path
            assert target.is_file(), f"{path.name} links to {link}, which does not exist"
            anchor = unquote(place.fragment)
            if anchor and target in pages:
                assert anchor in pages[target].anchors, f"{path.name}: there is no {link}"
