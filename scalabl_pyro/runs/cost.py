"""What a run costs: numbers trained and stored, passes through the language model, seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..lora.passes import Passes
from .reading import RunFolderError, read_json
from .settings import ConfigError, build

__all__ = ["Cost", "read_cost"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What ``cost.json`` of a run folder holds.

    :param trained: numbers that the optimizer moves: matrices, heads, and parameters of the guide
        and the prior; of an ensemble those of all members.
    :param stored: numbers in ``projections.safetensors`` and ``posterior.safetensors``.
    :param training: of the run's own settings, from the first step to what follows the last, such
        as the choice of a temperature; not of other trials. ``None`` if a part of it was another
        process's: the run was resumed, or several trained it. What filled a ``trunk_cache`` is not
        counted.
    :param prediction: of an example of the splits that are evaluated, on average.
    """

    trained: int
    stored: int
    training: Passes | None
    prediction: Passes


def read_cost(folder: Path) -> Cost | None:
    """The cost of a run; ``None`` if its folder was written before costs were.

    :raises RunFolderError: if ``cost.json`` is damaged.
    """
    path = folder / "cost.json"
    if not path.exists():
        return None
    try:
        return build(Cost, read_json(path))
    except ConfigError as error:
        raise RunFolderError.damaged(path, error) from error
