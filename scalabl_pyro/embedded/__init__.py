"""The embedded language model: a default that needs no network.

It was pretrained on the corpus of :mod:`scalabl_pyro.data.world` by
benchmarks/embedded/pretrain.py.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

__all__ = ["MODEL_HASH", "model_hash", "model_path"]

MODEL_HASH = "649979029ad3de54c63028ee45ccf4c68256cf9064f6854c04ffcff84110117f"


def model_path() -> Path:
    """The folder of the embedded model, in Hugging Face format."""
    return Path(str(files(__name__) / "model"))


def model_hash() -> str:
    """The sha256 of the embedded model's weights; ``MODEL_HASH`` if they are the frozen ones."""
    return hashlib.sha256((model_path() / "model.safetensors").read_bytes()).hexdigest()
