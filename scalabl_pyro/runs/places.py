"""Where the files and folders are that a run's settings name, for commands in another folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..embedded import MODELS

if TYPE_CHECKING:
    from .config import RunConfig

__all__ = ["place", "placed", "relative_places", "resolved"]

#: settings that name a file or a folder, or something on the Hub
PLACES = ("model.name", "lora.start", "data.path", "data.root", "data.hub_path", "prior_run")


def relative_places(settings: Mapping[str, Any]) -> dict[str, str]:
    """What settings name as seen from the current folder → where it is.

    :param settings: of a run, by their full names.
    """
    names = [settings[key] for key in PLACES if settings.get(key) is not None]
    return {
        name: str(Path(name).absolute())
        for name in names
        if not Path(name).is_absolute() and Path(name).exists()
    }


def place(name: str | None, places: Mapping[str, str]) -> Any:
    """Where something was that a setting names, if it still is there and is not found by the name
    itself; else the name, by which what was moved along with a run is found."""
    if name is None or name not in places or not Path(places[name]).exists():
        return name
    found = Path(name).exists() and Path(name).samefile(places[name])
    return name if found else places[name]


def placed(config: RunConfig, places: Mapping[str, str]) -> RunConfig:
    """The same settings, to be read in another folder than the one that they were given in.

    :param places: see :func:`relative_places`.
    """
    model, lora, data = config.model, config.lora, config.data
    if model.name not in MODELS:
        model = replace(model, name=place(model.name, places))
    lora = replace(lora, start=place(lora.start, places))
    data = replace(
        data,
        path=place(data.path, places),
        root=place(data.root, places),
        hub_path=place(data.hub_path, places),
    )
    prior_run = place(config.prior_run, places)
    return replace(config, model=model, lora=lora, data=data, prior_run=prior_run)


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings by their full names, of which those that name the same file or folder in
    two ways are equal."""
    there = {
        key: str(Path(settings[key]).resolve())
        for key in PLACES
        if settings.get(key) is not None and Path(settings[key]).exists()
    }
    return dict(settings) | there
