"""One file for what was trained: projections, draws and temperature, for the same base model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import new_path, whole_file
from ..lora.adapter import SubspaceAdapter
from .predictor import Predictor

__all__ = ["load_predictor", "save_predictor"]

_PREFIX = "projections."
#: of readouts, those that have them: by these a text and its score are what they are
_SETTINGS = ("chat", "form", "normalise", "temperature", "truncate")


def save_predictor(predictor: Predictor, path: str | Path) -> None:
    """Write the projections, the draws of s and the temperature, whole or not at all.

    A file of safetensors, of a few MB; the base model is named by a hash alone. A run folder of
    ``scalabl train`` knows more: settings, metrics, the guide, and how to make the adapter.

    :param path: a new file.
    :raises FileExistsError: if it exists.
    :raises TypeError: if it is another kind of predictor.

    Usage::

        sp.save_predictor(predictor, "posterior.safetensors")
        # elsewhere, with an adapter that is made in the same way
        adapter = sp.from_pretrained("embedded", lora, records, subspace="random")
        predictor = sp.load_predictor("posterior.safetensors", adapter)
    """
    if not isinstance(predictor, Predictor):
        raise TypeError(
            f"predictor is a {type(predictor).__name__}: expected a Predictor of s; runs of"
            " other methods are kept by scalabl train"
        )
    adapter = predictor.adapter
    tensors = {f"{_PREFIX}{name}": p for name, p in adapter.state().items()} | predictor.state()
    known = _identity(adapter) | {"temperature": float(predictor.temperature)}
    with whole_file(new_path(Path(path))) as part:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            part,
            {name: json.dumps(value) for name, value in known.items()},
        )


@torch.no_grad()
def load_predictor(path: str | Path, adapter: SubspaceAdapter) -> Predictor:
    """The predictor that was saved, with its projections put into an adapter.

    :param adapter: made with the same base model, LoRA settings, readout, ``projections`` and
        ``core``. Where its V comes from is of no effect: take ``subspace="random"``, which needs no
        pass.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is no such file, or of another adapter.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of safetensors, or damaged: {error}") from error
    identity = _identity(adapter)
    if not {*identity, "temperature"} <= metadata.keys():
        raise ValueError(f"{path} was not written by save_predictor")
    known = {name: json.loads(metadata[name]) for name in (*identity, "temperature")}
    for name, here in identity.items():
        if known[name] != here:
            raise ValueError(
                f"{path} is of an adapter whose {name} is {known[name]}, and here it is {here}:"
                " make the adapter as it was made"
            )
    state = adapter.state()
    for name, parameter in state.items():
        parameter.copy_(tensors[f"{_PREFIX}{name}"])
    return Predictor(adapter, tensors.get("s"), temperature=known["temperature"])


def _identity(adapter: SubspaceAdapter) -> dict[str, object]:
    """By what an adapter is told from another one, as JSON."""
    shapes = {name: list(parameter.shape) for name, parameter in adapter.state().items()}
    readout = adapter.readout
    prompt = getattr(readout, "prompt", None)  # conversations have none
    return {
        "readout": type(readout).__name__,
        "number of classes": readout.num_classes,
        "class names": list(readout.class_names),
        "prompt": None if prompt is None else json.loads(json.dumps(asdict(prompt))),
        "readout's settings": {name: getattr(readout, name, None) for name in _SETTINGS},
        "adapted modules": list(adapter.module_names),
        "shape of s": list(adapter.shape),
        "scaling": adapter.scaling,
        "unit norm": adapter.unit,
        "projections": shapes,
        "base model": adapter.base_fingerprint(),  # last: its names tell which layers are adapted
    }
