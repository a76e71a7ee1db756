"""One run after another: the posterior of a finished run is the prior of s in the next.

The function of s stays as the first run left it: the base model, V, B and heads, and the classes
and shots of the readout. The new run folder holds all of it, and the parameters of the prior too,
so that it is read without the first one.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from .config import RunConfig
from .folder import PosteriorInfo, Run, read_posterior_info, restore
from .places import resolved
from .reading import find_run, read_settings
from .settings import ConfigError

__all__ = ["class_names", "find_prior_run", "load_prior_run", "prior_fingerprint"]


def load_prior_run(config: RunConfig) -> Run:
    """The run ``prior_run``, its model loaded as ``config.model`` says.

    :raises ConfigError: if the settings contradict those of the run.
    :raises RunFolderError: if it is no complete run folder, or was made on other base weights.
    """
    folder, info = find_prior_run(config)
    settings = replace(read_settings(folder), model=config.model, lora=config.lora)
    return restore(folder, settings, info)


def prior_fingerprint(config: RunConfig) -> str:
    """A hash of the tensors of ``prior_run``, which a path does not pin down; ``""`` without it.

    :raises RunFolderError: if it is neither a folder nor on the Hub.
    """
    if config.prior_run is None:
        return ""
    folder, digest = find_run(config.prior_run), hashlib.sha256()
    for name in ("projections.safetensors", "posterior.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def class_names(config: RunConfig, info: PosteriorInfo) -> tuple[str, ...]:
    """Those given, or else those of ``prior_run``."""
    return config.data.classes or tuple(info.settings.get("data.classes", ()))


def find_prior_run(config: RunConfig) -> tuple[Path, PosteriorInfo]:
    """The folder of ``prior_run`` and what it says of itself, which the settings must not
    contradict."""
    folder = find_run(str(config.prior_run))
    info = read_posterior_info(folder)
    data = replace(config.data, classes=class_names(config, info))
    for attempt in replace(config, data=data).attempts():
        mine = resolved(attempt.function_settings())
        before = resolved(attempt.completed(info.settings))
        wrong = [
            f"{key} is {mine.get(key)!r}, expected {before.get(key)!r}"
            for key in sorted(mine.keys() | before.keys())
            if mine.get(key) != before.get(key)
        ]
        if wrong:
            raise ConfigError(
                f"prior_run is {config.prior_run!r}, whose model stays as it is:"
                f" {'; '.join(wrong)}; give these settings as that run's config.yaml has them"
            )
    return folder, info
