"""Checkpoints of an unfinished training run: what it takes to go on to the bit."""

from __future__ import annotations

import copy
import errno
import json
import logging
import signal
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..distributed import world_size
from ..files import whole_file

__all__ = [
    "CheckpointConfig",
    "Checkpoints",
    "Interrupted",
    "Snapshot",
    "TrainingState",
    "random_state",
    "set_random_state",
]

log = logging.getLogger(__name__)


class Interrupted(RuntimeError):
    """Training was asked to stop by a signal, and left a checkpoint."""


class Snapshot:
    """A copy of parameters that can be taken again and put back."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters: list[Tensor] = list(parameters)
        self.values = [copy.deepcopy(parameter.detach()) for parameter in parameters]

    @torch.no_grad()
    def take(self) -> None:
        torch._foreach_copy_(self.values, self._parameters)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self._parameters, self.values)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything that the rest of a run depends on, after ``step`` steps.

    :param tensors: by name: parameters, the optimizer's state, random states.
    :param values: of JSON: the history, the schedules, and what else is no tensor.
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, and how many stay.

    :param every: steps between two of them; one more comes at the end, and one on a signal.
    :param keep: how many are kept, the newest.
    :raises ValueError: if a number is below 1.
    """

    every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")


@dataclass(slots=True)
class Checkpoints:
    """A folder of checkpoints, each one safetensors file, written whole or not at all.

    :param folder: made at the first checkpoint.
    """

    folder: Path
    config: CheckpointConfig = field(default_factory=CheckpointConfig)
    _asked: int | None = field(default=None, init=False)

    def part(self, name: str) -> Checkpoints:
        """Those of one part of a run, in a folder inside."""
        return Checkpoints(self.folder / name, self.config)

    @property
    def exist(self) -> bool:
        """Whether there are any, in this folder or in its parts."""
        return any(self.folder.rglob("*.safetensors"))

    @property
    def asked(self) -> bool:
        """Whether a signal asked to stop."""
        return self._asked is not None

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, then remove old ones.

        :raises OSError: if there is no space; the checkpoints before it are kept.
        """
        path = self.folder / f"step-{state.step:08d}.safetensors"
        tensors = {k: v.detach().cpu().contiguous() for k, v in state.tensors.items()}
        values = json.dumps(dict(state.values))
        header = {"step": str(state.step), "values": values, "crc32": _crc32(tensors, values)}
        try:
            with whole_file(path) as part:
                save_file(tensors, part, metadata=header)
        except (OSError, SafetensorError) as error:
            kept = f"; those before it are kept in {self.folder}" if self._paths() else ""
            then = "go on with resume=true" if kept else "start again"
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"the checkpoint of step {state.step} could not be written: {error}{kept}: make"
                f" room, then {then}",
            ) from error
        paths = self._paths()
        end = paths.index(path) + 1
        # What is newer than this one is torn, for training went back behind it.
        for old in [*paths[:end][: -self.config.keep], *paths[end:]]:
            old.unlink()

    def latest(self) -> TrainingState | None:
        """The newest checkpoint that is whole; ``None`` if there is none."""
        for path in reversed(self._paths()):
            state = _load(path)
            if state is not None:
                return state
            log.warning("%s is torn: going back to the checkpoint before it", path)
        return None

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Answer SIGTERM and SIGINT by a checkpoint after the step, instead of at once."""

        def ask(signum: int, frame: FrameType | None) -> None:
            self._asked = signum

        self._asked = None  # what stopped an earlier run
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return
        handlers = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in handlers.items():
                # A handler that Python did not set cannot be put back.
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        if self._asked is not None:
            signal.raise_signal(self._asked)  # it came after the last step


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's random number generators: the CPU's, and those of all GPUs if
    ``device`` is one, for a model may be spread over them. Of several processes each has a GPU of
    its own, and all the same state there, which is kept alone."""
    state = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda" and world_size() > 1:
        state["random.cuda"] = torch.cuda.get_rng_state(device)[None]
    elif device.type == "cuda":
        state["random.cuda"] = torch.stack(torch.cuda.get_rng_state_all())
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what :func:`random_state` gave.

    :raises ValueError: if that was on a CPU, and ``device`` is none, or on more or fewer GPUs.
    """
    torch.set_rng_state(state["random.cpu"])
    if device.type == "cuda" and "random.cuda" not in state:
        raise ValueError("the checkpoint was made on a CPU: go on there, or start again")
    if device.type == "cuda" and world_size() > 1:
        # On this process's own GPU: on others nothing was drawn by the process that saved.
        torch.cuda.set_rng_state(state["random.cuda"][0], device)
    elif device.type == "cuda":
        count = len(state["random.cuda"])
        if count == 1:  # of a single GPU, or of several processes with the same state
            torch.cuda.set_rng_state(state["random.cuda"][0], device)
            return
        if count != torch.cuda.device_count():
            raise ValueError(
                f"the checkpoint was made with {count} visible GPUs, and there are"
                f" {torch.cuda.device_count()}: set CUDA_VISIBLE_DEVICES to as many"
            )
        torch.cuda.set_rng_state_all(list(state["random.cuda"]))


def _load(path: Path) -> TrainingState | None:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    if not header or header.get("crc32") != _crc32(tensors, header.get("values", "")):
        return None
    return TrainingState(int(header["step"]), tensors, json.loads(header["values"]))


def _crc32(tensors: Mapping[str, Tensor], values: str) -> str:
    crc = zlib.crc32(values.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, crc)
    return str(crc)
