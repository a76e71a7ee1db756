"""``scalabl COMMAND --help``: a command's settings, as its files in ``configs/`` explain them."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import indent
from typing import cast

from omegaconf import DictConfig, OmegaConf

from ._configs import CONFIGS

__all__ = ["explain"]


def explain(command: str, config: str | None = None, method: str | None = None) -> str:
    """The settings of a command, with their defaults and what they mean.

    :param config: the file in ``configs/`` that they are in, if not the command's own.
    :param method: whose settings to show, if not the default's.
    :raises ValueError: if there is no such file or method.
    """
    named = "" if config is None else f" --config-name {config}"
    usage = (
        f"usage: scalabl {command}{named} KEY=VALUE GROUP.KEY=VALUE …; what is ??? must be given\n"
        "Hydra's own options, such as --multirun and --cfg job: --hydra-help"
    )
    file = command.replace("-", "_") if config is None else config
    return "\n".join([*_sections(file, method), usage])


def _sections(name: str, chosen: str | None) -> Iterator[str]:
    """A file and those that it builds on, each of which it changes."""
    yield _settings(f"{name}.yaml")
    settings = cast(DictConfig, OmegaConf.create(_text(f"{name}.yaml")))
    for entry in settings.get("defaults", []):
        if entry in ("base", "compare", "model", "train"):
            yield from _sections(entry, chosen)
        elif isinstance(entry, DictConfig) and "method" in entry:
            others = sorted(path.name for path in (CONFIGS / "method").iterdir())
            names = ", ".join(name.removesuffix(".yaml") for name in others)
            method = _settings(f"method/{chosen or entry.method}.yaml").rstrip()
            yield f"method:                    # {names}\n{indent(method, '  ')}\n"


def _text(name: str) -> str:
    if not (CONFIGS / name).is_file():
        folder, _, file = name.rpartition("/")
        there = (path.name.rpartition(".") for path in (CONFIGS / folder).iterdir())
        known = sorted(stem for stem, _, ending in there if ending == "yaml")
        asked = folder or "--config-name"
        raise ValueError(f"{asked} is {file.removesuffix('.yaml')}: expected one of {known}")
    return (CONFIGS / name).read_text(encoding="utf-8")


def _settings(name: str) -> str:
    """A file without the list of the files that it builds on."""
    blocks = _text(name).split("\n\n")
    comments = [line for line in blocks[0].splitlines() if line.startswith("#")]
    if "defaults:" in blocks[0]:
        blocks[0] = "\n".join(comments)
    return "\n\n".join(blocks)
