"""Links lead somewhere, and the README is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import DOCUMENTS, FENCE, ROOT, blocks


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = FENCE.sub("", path.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(path):
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", path.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_relative_to(ROOT), target
        assert file.exists(), f"{path.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{file.name} has no heading #{anchor}"


def test_the_readme_is_short():
    words = FENCE.sub("", (ROOT / "README.md").read_text()).split()
    assert len(words) <= 800


def test_make_targets_in_the_readme_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"^make (\w+)", "\n".join(blocks(ROOT / "README.md", "bash")), re.MULTILINE)
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)
