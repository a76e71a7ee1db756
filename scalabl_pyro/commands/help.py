"""``scalabl COMMAND --help``: a command's settings, as its files in ``configs/`` explain them."""

from __future__ import annotations

from importlib.resources import files
from textwrap import indent

from omegaconf import DictConfig, OmegaConf

__all__ = ["explain"]

CONFIGS = files("scalabl_pyro.configs")


def explain(command: str) -> str:
    """The settings of a command, with their defaults and what they mean."""
    sections = [_settings(f"{command}.yaml")]
    for entry in OmegaConf.create(_text(f"{command}.yaml")).defaults:
        if entry == "base":
            sections.append(_settings("base.yaml"))
        elif isinstance(entry, DictConfig) and "method" in entry:
            others = sorted(path.name for path in (CONFIGS / "method").iterdir())
            names = ", ".join(name.removesuffix(".yaml") for name in others)
            settings = _settings(f"method/{entry.method}.yaml").rstrip()
            sections.append(f"method:                    # {names}\n{indent(settings, '  ')}\n")
    sections.append(
        f"usage: scalabl {command} KEY=VALUE GROUP.KEY=VALUE …; what is ??? must be given\n"
        "Hydra's own options, such as --multirun and --cfg job: --hydra-help"
    )
    return "\n".join(sections)


def _text(name: str) -> str:
    return (CONFIGS / name).read_text(encoding="utf-8")


def _settings(name: str) -> str:
    """A file without the list of the files that it builds on."""
    blocks = _text(name).split("\n\n")
    comments = [line for line in blocks[0].splitlines() if line.startswith("#")]
    if "defaults:" in blocks[0]:
        blocks[0] = "\n".join(comments)
    return "\n\n".join(blocks)
