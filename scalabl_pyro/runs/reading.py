"""Files of a run folder, read so that a damaged one is named, with what to do about it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from yaml import YAMLError

from .config import RunConfig
from .places import placed
from .settings import ConfigError, build

__all__ = [
    "RunFolderError",
    "file_hash",
    "find_run",
    "read_fingerprints",
    "read_json",
    "read_places",
    "read_predictions",
    "read_settings",
    "read_settings_placed",
    "read_tensors",
    "read_trained_on",
    "weights_fingerprint",
]

#: owner/name on the Hub, with a branch, tag or commit behind an @
_ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\S+))?")
_ADVICE = "copy the run folder again from where it was made, or train the run again"


class RunFolderError(ValueError):
    """A run folder that is incomplete, damaged, of another format, or made on another model."""

    @classmethod
    def damaged(cls, path: Path, why: object) -> RunFolderError:
        """:param why: what is wrong with the file."""
        return cls(f"{path} is damaged: {' '.join(str(why).split())}; {_ADVICE}")


def find_run(name: str | Path) -> Path:
    """The folder of a run: a folder, or what the Hub has as ``owner/name`` or
    ``owner/name@revision``, which is then in the local cache.

    :raises RunFolderError: if there is neither.
    """
    folder, on_the_hub = Path(name), _ON_THE_HUB.fullmatch(str(name))
    begun = folder.with_name(folder.name + ".unfinished").exists()
    if folder.exists() or begun or on_the_hub is None:
        return folder
    repo, revision = on_the_hub.groups()
    try:
        return Path(snapshot_download(repo, revision=revision))
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"there is no folder {name}{_beside(folder)}, and no run to be had from the Hub by this"
            f" name: {' '.join(str(error).split())}"
        ) from error


def _beside(folder: Path) -> str:
    """What there is where the folder is not."""
    there = sorted(p.parent.name for p in folder.parent.glob("*/posterior.json"))
    return f" ({folder.parent} holds {', '.join(there[:8])})" if there else ""


def read_json(path: Path, kind: type = dict) -> Any:
    """:raises RunFolderError: if there is no such file, or it holds something else than one of
    this kind."""
    content = _existing(path).read_bytes()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RunFolderError.damaged(path, f"it is no JSON ({error})") from error
    if not isinstance(value, kind):
        raise RunFolderError.damaged(path, f"it holds a {type(value).__name__}, no {kind.__name__}")
    return value


def read_settings(folder: Path) -> RunConfig:
    """The settings in a folder's ``config.yaml``.

    :raises RunFolderError: if it is missing or damaged.
    """
    path = _existing(folder / "config.yaml")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        if not isinstance(values, dict):
            raise ConfigError(f"it holds a {type(values).__name__}, no mapping")
        return build(RunConfig, values)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ConfigError) as error:
        raise RunFolderError.damaged(path, error) from error


def read_settings_placed(folder: Path) -> RunConfig:
    """The same, with the files and folders where they are that it names from another folder.

    :raises RunFolderError: as :func:`read_settings`, and if ``places.json`` is damaged.
    """
    return placed(read_settings(folder), read_places(folder))


def read_places(folder: Path) -> dict[str, str]:
    """What the settings of a run name → where it was in training; nothing if it was written before
    that was kept, or all names hold everywhere.

    :raises RunFolderError: if ``places.json`` is damaged.
    """
    path = folder / "places.json"
    return dict(read_json(path)) if path.exists() else {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """:raises RunFolderError: if there is no such file, or it is damaged."""
    try:
        return load_file(_existing(path))
    except SafetensorError as error:
        raise RunFolderError.damaged(path, f"it is no safetensors file ({error})") from error


def read_fingerprints(folder: Path) -> dict[str, str]:
    """Hashes of the records that a run had, by split; none if it was written before they were kept.

    :raises RunFolderError: if ``data.json`` is damaged.
    """
    path = folder / "data.json"
    return dict(read_json(path)) if path.exists() else {}


def read_trained_on(folder: Path) -> set[str]:
    """Hashes of what the training records asked, see :func:`~scalabl_pyro.data.asked`; none if the
    run was written before they were kept.

    :raises RunFolderError: if ``trained_on.json`` is damaged.
    """
    path = folder / "trained_on.json"
    return set(read_json(path, list)) if path.exists() else set()


def weights_fingerprint(folder: Path) -> str:
    """A hash of the tensors that a run predicts with."""
    digest = hashlib.sha256()
    for name in ("projections.safetensors", "posterior.safetensors", "posterior.json"):
        path = folder / name
        if path.exists():
            digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_predictions(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What a run folder keeps of its predictions, by split and by the names in an
    :class:`~scalabl_pyro.prediction.Assessment`.

    :raises RunFolderError: if they are missing or damaged.
    """
    path = folder / "predictions.safetensors"
    by_split: dict[str, dict[str, Tensor]] = {}
    for name, value in read_tensors(path).items():
        split, _, part = name.rpartition(".")
        by_split.setdefault(split, {})[part] = value
    for split, parts in sorted(by_split.items()):
        shapes = {name: tuple(value.shape) for name, value in parts.items()}
        texts = {"log_probs", "entropy", "mutual_information", "lengths"}
        if shapes.keys() == texts and shapes["log_probs"][1:] == (int(parts["lengths"].sum()),):
            continue
        by_question = {name: shape for name, shape in shapes.items() if name != "logits"}
        # Older runs have no tokens, and some have no distances.
        known = by_question.keys() - {"tokens", "mahalanobis"} == {"labels"}
        N = shapes.get("logits", ())[1:2]
        if not (known and N and set(by_question.values()) == {N}):
            raise RunFolderError.damaged(
                path,
                f"{split} has {shapes}: expected logits (S, N, C), labels (N,), tokens (N,) and, if"
                " any, mahalanobis (N,)",
            )
    return by_split


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    folder = path.parent
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".unfinished")
        begun = f"; an unfinished run is in {unfinished}: go on with resume=true"
        raise RunFolderError(
            f"there is no run folder {folder}{begun if unfinished.exists() else ''}"
        )
    raise RunFolderError(f"{path} does not exist: {folder} is no complete run folder")
