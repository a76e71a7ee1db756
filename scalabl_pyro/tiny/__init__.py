"""The embedded world and the tiny language model pretrained on it: a default without network."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

from scalabl_pyro.tiny.world import COLOURS, World, prompt, world

__all__ = [
    "COLOURS",
    "MODEL_HASH",
    "WORLD_HASH",
    "World",
    "model_hash",
    "model_path",
    "prompt",
    "world",
    "world_hash",
]

WORLD_HASH = "0055f5cb5a3c0eb5721fd557bedf26ee27f4d65f8ad938a359e227313a1b8b66"
MODEL_HASH = "649979029ad3de54c63028ee45ccf4c68256cf9064f6854c04ffcff84110117f"


def model_path() -> Path:
    """The folder of the embedded model, in Hugging Face format."""
    return Path(str(files(__name__) / "model"))


def model_hash() -> str:
    """The sha256 of the embedded model's weights; ``MODEL_HASH`` if they are the frozen ones."""
    return hashlib.sha256((model_path() / "model.safetensors").read_bytes()).hexdigest()


def world_hash(seed: int = 0) -> str:
    """The sha256 of a world's canonical JSON; ``WORLD_HASH`` for seed 0 if the code is frozen."""
    corpus, splits = world(seed)
    rows = {
        name: [[record.id, record.question, record.choices, record.label] for record in records]
        for name, records in splits.items()
    }
    content = {"corpus": corpus, "splits": rows}
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
