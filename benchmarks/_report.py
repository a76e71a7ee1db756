"""What every benchmark shares: its last line is one JSON object, which ``--save`` also writes."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from scalabl_pyro.files import json_text, write_whole

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
PACKAGES = ("torch", "pyro-ppl", "transformers", "peft")


def report(
    script: str,
    figures: dict[str, Any],
    *,
    save: bool,
    name: str | None = None,
    folder: Path = RESULTS,
) -> None:
    """Print figures, command, versions and hardware as JSON; write <folder>/<name>.json if asked.

    :param script: as ``python -m`` takes it, after ``benchmarks.``.
    :param name: of the file, where it is not the script's.
    """
    name = name or script.rpartition(".")[2]
    contents = {
        "figures": figures,
        "command": shlex.join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "hardware": _hardware(),
    }
    if save:
        write_json(folder / f"{name}.json", contents)
    print(json_text(contents))


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    write_whole(path, json_text(value, indent=1) + "\n")


def _hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = f"{names[0]}, {len(names)} cores" if names else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "gpu": gpus, "threads": torch.get_num_threads()}
