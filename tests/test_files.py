"""Files that are written whole or not at all, and on the disk itself."""

from __future__ import annotations

import ast
import errno
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import scalabl_pyro
from scalabl_pyro.commands._jsonl import ResumableJsonl
from scalabl_pyro.files import json_text, put, whole_file, whole_folder, write_whole
from scalabl_pyro.infer import Checkpoints
from scalabl_pyro.infer.checkpoints import TrainingState

#: what names of unfinished files and folders end in
UNIQUE = re.compile(r"\.[0-9a-f]{4}\.part$")


@pytest.fixture
def events(monkeypatch):
    """What is brought to the disk, and what is renamed, in their order."""
    noted = []
    opened = {}
    sync, replace, open_ = os.fsync, os.replace, os.open

    def note_open(path, *args, **options):
        descriptor = open_(path, *args, **options)
        opened[descriptor] = UNIQUE.sub(".part", Path(path).name)
        return descriptor

    def note_sync(descriptor):
        noted.append(("sync", opened.get(descriptor)))
        sync(descriptor)

    def note_replace(source, target):
        noted.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    return noted


def test_a_file_is_on_the_disk_before_its_name_and_then_the_name(tmp_path, events):
    folder = tmp_path / "here"
    order = [("sync", "a.txt.part"), ("rename", "a.txt"), ("sync", "here")]
    write_whole(folder / "a.txt", "text")
    assert events == order
    assert (folder / "a.txt").read_text() == "text"
    events.clear()
    with whole_file(folder / "a.txt") as part:
        part.write_text("other")
    assert events == order
    assert [p.name for p in folder.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_who_may_read_a_file_of_tensors_is_as_of_any_other(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "any").touch()
        with whole_file(tmp_path / "one.safetensors") as part:
            save_file({"a": torch.ones(2)}, part)
        with whole_folder(tmp_path / "folder") as part:
            save_file({"a": torch.ones(2)}, part / "two.safetensors")
    finally:
        os.umask(before)
    modes = {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    assert modes == {0o666 & ~mask}


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fail():
        with whole_folder(tmp_path / "new") as part:
            (part / "a.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_so_is_all_that_is_in_a_folder(tmp_path, events):
    with whole_folder(tmp_path / "out") as part:
        (part / "inner").mkdir()
        (part / "inner" / "a.txt").touch()
        (part / "b.txt").touch()
    *synced, renamed, last = events
    assert {name for _, name in synced} == {"inner", "a.txt", "b.txt", "out.part"}
    assert {kind for kind, _ in synced} == {"sync"}
    assert (renamed, last) == (("rename", "out"), ("sync", tmp_path.name))


def test_so_are_checkpoints_and_lines(tmp_path, events):
    Checkpoints(tmp_path / "run").save(TrainingState(1, {"a": torch.ones(2)}, {}))
    name = "step-00000001.safetensors"
    assert events == [("sync", f"{name}.part"), ("rename", name), ("sync", "run")]
    with ResumableJsonl(tmp_path / "lines" / "a.jsonl", ["1"], {}) as file:
        file.write([{"id": "1"}])
    assert events[-3:] == [("sync", "a.jsonl.part"), ("rename", "a.jsonl"), ("sync", "lines")]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a.txt") as part:
        os.replace(tmp_path / "gone", part)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
    with pytest.raises(FileNotFoundError):
        put(tmp_path / "gone.part", tmp_path / "gone")


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["of the system", "of safetensors"])
def test_a_full_disk_is_told_with_what_was_to_be_written(tmp_path, error):
    for whole in (whole_file, whole_folder):
        told = pytest.raises(OSError, match=f"the disk is full: {tmp_path}/new could not be")
        with told as caught, whole(tmp_path / "new"):
            raise error
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(SafetensorError, match="another"), whole(tmp_path / "new"):
            raise SafetensorError("another")
        assert not list(tmp_path.iterdir())


def test_a_full_disk_in_the_midst_of_lines_says_how_to_go_on(tmp_path, monkeypatch):
    def full(descriptor):
        raise FULL[0]

    with ResumableJsonl(tmp_path / "a.jsonl", ["1", "2"], {}) as file:
        file.write([{"id": "1"}])
        with monkeypatch.context() as context:
            context.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="could not be written; make room, and the same comm"):
                file.write([{"id": "2"}])


def test_nothing_else_in_the_package_renames_a_file():
    package = Path(scalabl_pyro.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            # A string's replace takes other arguments than a path's; xarray's rename does not.
            alone = len(node.args) == 1 and not node.keywords
            xarray = path.name == "arviz_versions.py"
            if node.func.attr in ("rename", "replace") and alone and not xarray:
                raise AssertionError(f"{path}, line {node.lineno}: use scalabl_pyro.files")


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("indent", [None, 2])
def test_what_is_no_number_is_null(bad, indent):
    text = json_text({"a": bad, "b": [1.5, bad, (bad, {"c": bad})], "d": None}, indent=indent)
    decoded = json.loads(text, parse_constant=refuse)
    assert decoded == {"a": None, "b": [1.5, None, [None, {"c": None}]], "d": None}


def test_finite_values_are_written_as_by_json():
    value = {"a": [1, 2.5, True, "é"], "b": {}}
    assert json_text(value) == json.dumps(value)
    assert json_text(value, indent=1) == json.dumps(value, indent=1)


def test_what_others_named_so_stays_and_two_writers_do_not_meet(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").touch()

    def write(name, meanwhile=lambda: None):
        with whole_folder(out) as part:
            (part / name).touch()
            meanwhile()

    with pytest.raises(FileExistsError, match="out exists"):
        write("late", lambda: write("early"))
    assert [p.name for p in out.iterdir()] == ["early"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.part"]
    assert (tmp_path / "out.part" / "mine").exists()
    with whole_file(tmp_path / "file") as one, whole_file(tmp_path / "file") as two:
        one.write_text("first")
        two.write_text("second")
    assert (tmp_path / "file").read_text() == "first"  # whose context ended last
