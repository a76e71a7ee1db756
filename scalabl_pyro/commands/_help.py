"""``scalabl COMMAND --help``: a command's settings, as its files in ``configs/`` explain them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from textwrap import indent
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from ._configs import CONFIGS

__all__ = ["explain", "similar_settings"]


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
    return "\n".join([*map(_section, _files(_file(command, config), method)), usage])


def similar_settings(wrong: str, command: str, config: str | None = None) -> list[str]:
    """The settings of a command that someone may have meant who wrote another one.

    :param wrong: a setting that does not exist, ``group.name``.
    :param config: as for :func:`explain`.
    :returns: those of the same name in another group; or else the one of the nearest spelling, in
        its own group if there is one.
    """
    names = [
        name
        for file in _files(_file(command, config), None)
        for name in _names(OmegaConf.to_container(OmegaConf.create(_text(file))))
    ]
    moved = {n for n in names if n.endswith(f".{wrong}") or wrong.endswith(f".{n}")}
    if moved:
        return sorted(moved)
    group, dot, name = wrong.rpartition(".")
    beside = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[:2] == (group, dot)}
    near = difflib.get_close_matches(name, beside, n=1)
    return [beside[n] for n in near] or difflib.get_close_matches(wrong, names, n=1, cutoff=0.8)


def _file(command: str, config: str | None) -> str:
    return command.replace("-", "_") if config is None else config


def _files(name: str, chosen: str | None) -> Iterator[str]:
    """A file and those that it builds on, each of which it changes."""
    yield f"{name}.yaml"
    settings = cast(DictConfig, OmegaConf.create(_text(f"{name}.yaml")))
    for entry in settings.get("defaults", []):
        if entry in ("base", "compare", "model", "train"):
            yield from _files(entry, chosen)
        elif isinstance(entry, DictConfig) and "method" in entry:
            yield f"method/{chosen or entry.method}.yaml"


def _names(values: Any, group: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _names(value, f"{group}{name}.")
        elif name != "defaults":
            yield f"{group}{name}"


def _section(file: str) -> str:
    if not file.startswith("method/"):
        return _settings(file)
    others = sorted(path.name for path in (CONFIGS / "method").iterdir())
    names = ", ".join(name.removesuffix(".yaml") for name in others)
    method = _settings(file).rstrip()
    return f"method:                    # {names}\n{indent(method, '  ')}\n"


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
