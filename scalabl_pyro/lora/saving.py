"""Writing an adapter as PEFT has it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import whole_folder
from .layers import PERP

if TYPE_CHECKING:
    from .adapter import SubspaceAdapter

__all__ = ["guard_saving", "save_adapter", "save_peft", "write_adapter"]

WEIGHTS = "adapter_model.safetensors"
#: methods of PEFT's model that write or merge A and B as they stand
_WITHOUT_S = ("save_pretrained", "push_to_hub", "merge_adapter", "merge_and_unload")


def guard_saving(peft_model: PeftModel, holds_s: Callable[[], bool]) -> None:
    """Let PEFT's own ways to save and to merge refuse an adapter whose s they would lose.

    :param holds_s: whether s is part of the matrices now.
    """
    for name in _WITHOUT_S:
        setattr(peft_model, name, partial(_with_s, getattr(peft_model, name), holds_s))


def _with_s(
    method: Callable[..., Any], holds_s: Callable[[], bool], *args: Any, **options: Any
) -> Any:
    if not holds_s():
        raise ValueError(
            f"{method.__name__} of PEFT's model would lose s, which acts beside A and B: write an"
            " adapter by sp.save_adapter(adapter, guide.median()['s'], folder); or take the model"
            " of `with adapter.folded(s) as peft_model`"
        )
    return method(*args, **options)


def save_adapter(adapter: SubspaceAdapter, s: Tensor, folder: str | Path) -> None:
    """Write one ordinary PEFT adapter, A = diag(s)·V (or R·V) and B, which PEFT alone can load.

    :param s: (M, r), such as ``guide.median()["s"]`` or a draw; or (M, r + k) with s_perp, and the
        adapter then has rank r + k.
    :param folder: must not exist; written whole or not at all.
    :raises ValueError: if s has another shape.
    :raises FileExistsError: if the folder exists.
    """
    with whole_folder(Path(folder)) as part:
        write_adapter(adapter, s, part)


def write_adapter(
    adapter: SubspaceAdapter, s: Tensor, folder: Path, *, drop: Collection[str] = ()
) -> None:
    """As :func:`save_adapter`, into a folder that is written whole by itself.

    :param drop: adapted modules to leave out.
    """
    with adapter.folded(s) as peft_model:
        tensors = save_peft(peft_model, folder)
        perp = zip(
            adapter.layers if adapter.perp else (), adapter.perp_A, adapter.perp_B, strict=True
        )
        for module, A, B in perp:
            for part, more, dim in (("lora_A", A, 0), ("lora_B", B, 1)):
                name = f"base_model.model.{module}.{part}.weight"
                tensors[name] = torch.cat([tensors[name], more.weight.detach().cpu()], dim)
    (folder / "README.md").unlink()  # PEFT's template; the exported folder has a card of its own
    if not (drop or adapter.perp):
        return
    remaining = {
        name: value
        for name, value in tensors.items()
        if not any(name.startswith(f"base_model.model.{module}.lora_") for module in drop)
    }
    write_weights(remaining, folder)
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text())
    if drop:
        names = {module.rpartition(".")[2] for module in adapter.layers if module not in drop}
        values["target_modules"] = sorted(names)
    if adapter.perp:
        # PEFT divides α by the rank, or its root, and the scaling is to stay what it was.
        rank = adapter.rank + adapter.perp
        values |= {"r": rank, "rank_pattern": {}}
        values["lora_alpha"] = adapter.scaling * (rank**0.5 if values["use_rslora"] else rank)
    config.write_text(json.dumps(values, indent=2) + "\n")


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
