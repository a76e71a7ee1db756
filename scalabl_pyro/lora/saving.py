"""Writing an adapter as PEFT has it."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from .layers import PERP

__all__ = ["save_peft", "write_weights"]

WEIGHTS = "adapter_model.safetensors"


def save_peft(peft_model: PeftModel, folder: Path) -> dict[str, Tensor]:
    """Write an ordinary PEFT adapter: its matrices as they are now, and its heads.

    :param peft_model: of a context :meth:`~scalabl_pyro.lora.SubspaceAdapter.folded`.
    :returns: the tensors that were written; those of s_perp, which PEFT does not know, are not
        among them.
    """
    # The base model's own embeddings are never part of an adapter.
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    saved = load_file(folder / WEIGHTS)
    tensors = {name: value for name, value in saved.items() if f".{PERP}." not in name}
    if tensors.keys() != saved.keys():
        write_weights(tensors, folder)
    return tensors


def write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Replace the tensors of an adapter that was written."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
