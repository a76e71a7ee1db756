"""The settings of a command that someone may have meant who wrote another one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ._configs import CONFIGS

__all__ = ["similar_settings"]


def similar_settings(wrong: str, command: str) -> list[str]:
    """Settings of the same name in another group, or else the one of the nearest spelling.

    :param wrong: a setting that does not exist, ``group.name``.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = compose(command.replace("-", "_"))
    names = list(_names(OmegaConf.to_container(settings)))
    moved = [n for n in names if n.endswith(f".{wrong}") or wrong.endswith(f".{n}")]
    if moved:
        return moved
    group, dot, name = wrong.rpartition(".")
    if [n for n in names if n.startswith(f"{group}.")] == [f"{group}.name"]:
        return []  # the options of what has this name, which go with a +
    beside = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[:2] == (group, dot)}
    near = difflib.get_close_matches(name, beside, n=1)
    return [beside[n] for n in near] or difflib.get_close_matches(wrong, names, n=1, cutoff=0.8)


def _names(values: Any, group: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _names(value, f"{group}{name}.")
        else:
            yield f"{group}{name}"
