"""What leaves a trunk for the examples of a split, computed once: in memory, or in a folder that
runs of the same model share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data import Batch, Example, Split
from ..files import whole_file
from .trunk import CACHED, Trunk, bytes_of

__all__ = ["cached_split"]

#: how far what a file holds may be from what the model computes, as a share of its norm
_ROUNDING = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class _CachedExample(Example):
    """An example with the hidden states of its attended tokens, row after row.

    :param hidden: (T, H).
    """

    hidden: Tensor


def cached_split(
    trunk: Trunk,
    split: Split,
    run: Callable[[Batch], Any],
    *,
    batch_size: int,
    folder: Path | None = None,
    trained: Iterable[nn.Parameter] = (),
) -> Split:
    """The same split, whose batches also carry what leaves the trunk.

    :param run: runs the model on a batch.
    :param folder: where it is kept, a file for each trunk and split, whose name is a hash of both;
        the first batch is computed anyway, and compared.
    :param trained: what is no part of the trunk, whatever its place: LoRA matrices and heads.
    :returns: hidden states are on the CPU, (T, H) for each row of tokens.
    :raises ValueError: if there is no trunk, it holds something that is trained, the split is
        cached already, or a file is damaged or of other weights.
    """
    if not trunk.depth:
        raise ValueError(f"there is no trunk to compute once: {trunk.why_not}")
    if isinstance(split.examples[0], _CachedExample):
        raise ValueError(
            "the split holds what leaves a trunk already: expected one as the readout encodes it"
        )
    chunks = list(split.batches(batch_size))
    # With gradients on, the first batch tells whether a trained parameter has a part in it.
    with torch.enable_grad():
        first = _leaving(trunk, chunks[0], run)
        trunk.check_untrained([hidden for hidden in first if hidden.requires_grad])
    first = [hidden.detach().cpu() for hidden in first]

    @torch.no_grad()
    def compute() -> list[Tensor]:
        later = (h.cpu() for chunk in chunks[1:] for h in _leaving(trunk, chunk, run))
        return [*first, *later]

    if folder is None:
        hidden = compute()
    else:
        made_by = f"{version('torch')} {version('transformers')} {first[0].dtype}"
        digest = hashlib.sha256(f"{made_by} {trunk.fingerprint(trained)}".encode())
        for example in split.examples:  # one by one, so that how they are padded does not matter
            for name, value in sorted(split.collate([example]).inputs.items()):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(bytes_of(value))
        hidden = _kept(folder / f"{digest.hexdigest()[:32]}.safetensors", first, compute)
    examples = [
        _CachedExample(**{f.name: getattr(example, f.name) for f in fields(Example)}, hidden=states)
        for example, states in zip(split.examples, hidden, strict=True)
    ]
    return Split(split.records, examples, partial(_collate, split.collate, trunk.depth))


def _leaving(trunk: Trunk, chunk: Split, run: Callable[[Batch], Any]) -> list[Tensor]:
    """(T, H) of each example, its attended tokens row after row."""
    batch = chunk.collate(chunk.examples)
    mask = batch.inputs["attention_mask"].bool()  # (B, [C,] T)
    leaving = trunk.leaving(partial(run, batch), trunk.depth)
    if leaving is None:
        raise ValueError(
            f"a block of {trunk.model_name} returns more than hidden states, and cannot be replaced"
            " by what it returned once"
        )
    hidden = leaving.hidden.unflatten(0, mask.shape[:-1])  # (B, [C,] T, H)
    return [states[where] for states, where in zip(hidden, mask.to(hidden.device), strict=True)]


def _collate(
    collate: Callable[[Sequence[Any]], Batch], depth: int, examples: Sequence[Any]
) -> Batch:
    batch = collate(examples)
    mask = batch.inputs["attention_mask"].bool()
    tokens = torch.cat([example.hidden for example in examples])
    # No attended position looks at a padded one, whose hidden states stay zero.
    hidden = tokens.new_zeros(*mask.shape, tokens.shape[-1])  # (B, [C,] T, H)
    hidden[mask] = tokens
    return replace(batch, inputs=batch.inputs | {f"{CACHED}{depth - 1}": hidden})


def _kept(path: Path, first: Sequence[Tensor], compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What the file holds, or what is computed and then kept in it; one process computes it, and
    others wait."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                hidden = compute()
                lengths = torch.tensor([len(states) for states in hidden])
                with whole_file(path) as part:
                    save_file({"hidden": torch.cat(hidden), "lengths": lengths}, part)
                return hidden
    try:
        held = load_file(path)
        hidden = list(held["hidden"].split(held["lengths"].tolist()))
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and it is made again") from error
    known, now = torch.cat(hidden[: len(first)]).float(), torch.cat(list(first)).float()
    if known.shape != now.shape or not (known - now).norm() <= _ROUNDING * now.norm():
        raise ValueError(
            f"{path} holds what another model computes: remove it, and it is made again"
        )
    return hidden
