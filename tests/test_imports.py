"""What an import of the package prints, and what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_of_bitsandbytes_one_message_is_left_out():
    code = (
        "import logging, scalabl_pyro.lora\n"
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
