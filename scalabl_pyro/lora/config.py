"""Which language model, and which of its layers are adapted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from peft import LoraConfig

from ..data import PROMPTS, Record
from ..readouts import READOUTS, Classes, ReadoutConfig
from ..readouts.base import check_records
from .dtypes import DTYPES, resolved
from .start import read_config, start_fingerprint
from .subspace import SUBSPACES

__all__ = ["AdapterConfig", "ModelConfig"]


@dataclass(frozen=True, slots=True)
class ModelConfig(ReadoutConfig):
    """Which language model, and how its answer is read: the settings of the readout too.

    :param name: a folder, a name on the Hub, or ``embedded`` or ``minilm``, see
        :mod:`scalabl_pyro.embedded`.
    :param readout: a name in ``READOUTS``: ``label_tokens``, ``choice_likelihood``,
        ``completion_tokens``, ``sequence_classification`` or ``multiple_choice``.
    :param dtype: of the frozen weights: ``float32``, ``bfloat16`` or ``float16``; ``auto`` becomes
        ``bfloat16`` where the device has instructions for it, and ``float32`` elsewhere.
    :param quantization: of the frozen linear layers, by bitsandbytes: ``4bit`` (NF4 with double
        quantisation; Dettmers et al. 2023, arXiv 2305.14314) or ``8bit`` (Dettmers et al. 2022,
        arXiv 2208.07339). Embeddings, the output layer and heads stay in ``dtype``, in which 4-bit
        layers compute; 8-bit layers round their inputs too, batch by batch.
    :param device: ``auto`` takes a GPU if there is one.
    :param device_map: spreads the layers over several GPUs instead: ``auto``, ``balanced``,
        ``balanced_low_0`` or ``sequential``.
    :param attention: implementation in ``transformers``, such as ``sdpa`` or ``eager``.
    :param revision: branch, tag or commit of a name on the Hub; a folder is read as it is.
    :param shard: where several processes train together, spread the frozen weights over them.
    :raises ValueError: if a value is not one of those listed, or the readout takes no such setting.
    """

    name: str
    readout: str = "label_tokens"
    dtype: str = "float32"
    quantization: str | None = None
    device: str = "auto"
    device_map: str | None = None
    attention: str | None = None
    revision: str = "main"
    shard: bool = False

    def __post_init__(self) -> None:
        allowed: dict[str, list[Any]] = {
            "readout": sorted(READOUTS),
            "dtype": list(DTYPES),
            "quantization": [None, "4bit", "8bit"],
            "device_map": [None, "auto", "balanced", "balanced_low_0", "sequential"],
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {values}")
        readout = READOUTS[self.readout]
        if self.prompt == "auto":
            object.__setattr__(self, "prompt", readout.default_prompt)
        ReadoutConfig.__post_init__(self)
        if PROMPTS[self.prompt].gap and self.readout != "choice_likelihood":
            raise ValueError(
                f"prompt is {self.prompt!r} with readout {self.readout!r}: expected"
                " readout=choice_likelihood, which puts each choice into the gap"
            )
        left_out = {field.name: field.default for field in fields(ReadoutConfig)}
        for name in ("template", "shots", "system", "chat", "normalise", "temperature"):
            if getattr(self, name) != left_out[name] and name not in readout.takes:
                able = [key for key, kind in sorted(READOUTS.items()) if name in kind.takes]
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} with readout {self.readout!r}, which"
                    f" reads no such thing: leave it out, or take one of {able}"
                )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device is {self.device!r}: expected auto, cpu, cuda or cuda:N")
        gpu = self.device != "cpu" and torch.cuda.is_available()
        object.__setattr__(self, "dtype", resolved(self.dtype, cpu=not gpu))

    def classes(self, records: Sequence[Record], *, shots: Sequence[Record] = ()) -> Classes:
        """The classes that these records need: those of all splits that will be read.

        :param shots: the records that prompts show, of the training split, as many as
            :attr:`shots` says.
        :raises TypeError: if they are something else than a list of records.
        :raises DataError: if there are no records, or the prompt cannot put them.
        :raises ValueError: if there are more or fewer shots.
        """
        if len(shots) != self.shots:
            raise ValueError(
                f"shots is {self.shots}, but {len(shots)} records are given to be shown: give as"
                " many, as draw_shots does"
            )
        check_records(records)
        classes = READOUTS[self.readout].classes(records, prompt=self.prompt)
        return replace(classes, shots=tuple(shots))


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """LoRA: rank r, scaling α, target modules, dropout, and heads that are trained whole.

    :param r: rank, and the number of coordinates of s in a module.
    :param alpha: α; ΔW is scaled by α/r.
    :param targets: ends of the names of linear layers; or one string, ``all-linear`` or a regular
        expression that whole names match.
    :param dropout: of LoRA's input, in training.
    :param heads: names of modules that are trained whole, such as a classifier.
    :param layers: indices of the blocks to adapt; all of them if empty.
    :param start: a trained PEFT adapter, a folder or a name on the Hub, to start from; rank,
        scaling, targets, dropout, layers and heads are then its own.
    :param base_dropout: also train with the base model's own dropout.
    :param gradient_checkpointing: less memory for more time: the backward pass computes the
        activations of each block again.
    :param subspace: where V comes from, a name in ``SUBSPACES`` (see
        :func:`~scalabl_pyro.lora.set_subspace`): ``random``, ``activations`` or ``weights``;
        ``auto`` is ``activations`` where V is frozen and fresh, and ``random`` elsewhere.
    :raises ValueError: if a value is out of range.
    """

    r: int = 8
    alpha: int = 16
    targets: tuple[str, ...] | str = ("q_proj", "v_proj", "lm_head")
    dropout: float = 0.0
    heads: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    start: str | None = None
    base_dropout: bool = False
    gradient_checkpointing: bool = False
    subspace: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "heads", tuple(self.heads))
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.r < 1:
            raise ValueError(f"r is {self.r}: expected a rank of 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}: expected a number above 0")
        if not self.targets:
            raise ValueError("targets is empty: expected the name of a linear layer, or several")
        if isinstance(self.targets, str) and self.layers:
            raise ValueError(
                f"layers is {list(self.layers)}, but targets is the string {self.targets!r}: name"
                " the blocks in that expression, or give targets as a list"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: expected a probability below 1")
        if self.subspace not in ("auto", *SUBSPACES):
            raise ValueError(
                f"subspace is {self.subspace!r}: expected one of {['auto', *sorted(SUBSPACES)]}"
            )
        if self.subspace not in ("auto", "random") and self.start is not None:
            raise ValueError(
                f"subspace is {self.subspace!r}, but the adapter {self.start!r} to start from has a"
                " V of its own: expected 'random', which leaves it as it is"
            )

    @property
    def overruled(self) -> list[str]:
        """Settings that were changed and that the adapter to start from has itself."""
        names = ("r", "alpha", "targets", "dropout", "heads", "layers")
        default = AdapterConfig()
        changed = [name for name in names if getattr(self, name) != getattr(default, name)]
        return [] if self.start is None else changed

    def start_fingerprint(self) -> str:
        """A hash of the adapter to start from, which its name does not pin down; ``""`` without.

        :raises ValueError: if there is no such adapter.
        """
        with self._naming_start():
            return start_fingerprint(self.start)

    @contextmanager
    def _naming_start(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"lora.start is {self.start!r}: {error}") from error

    def lora(self) -> LoraConfig:
        """The same as PEFT's configuration, or that of the adapter to start from.

        :raises ValueError: if there is no such adapter.
        """
        if self.start is not None:
            with self._naming_start():
                return read_config(self.start)
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            lora_dropout=self.dropout,
            layers_to_transform=list(self.layers) or None,
            modules_to_save=list(self.heads) or None,
        )
