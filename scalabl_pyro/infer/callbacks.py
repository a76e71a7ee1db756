"""What is called while :func:`~scalabl_pyro.infer.fit` trains: progress bars and loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

__all__ = ["Callback", "ProgressBar", "TensorBoard"]


class Callback:
    """Base class whose methods do nothing; override those that are needed.

    A row is what the history holds of a step: ``step`` from 1 on, ``loss``, ``nll``, ``kl``,
    ``kl_weight``, ``lr_factor``, and ``validation_nll`` where it was computed. Of several processes
    the main one alone calls. What a method raises ends the training.
    """

    def on_step(self, row: Mapping[str, float]) -> None:
        """After each step. A run that goes on from a checkpoint repeats what followed it."""

    def on_validate(self, row: Mapping[str, float]) -> None:
        """After :meth:`on_step` where the step was validated."""

    def on_end(self, history: Sequence[Mapping[str, float]]) -> None:
        """Once, however training ends: by an error or an interruption too.

        :param history: all rows, those before an interruption included.
        """


class ProgressBar(Callback):
    """A bar with the NLL and, where there is one, the KL and its weight.

    :param steps: T.
    :param initial: the steps that are done already.
    """

    def __init__(self, steps: int, *, initial: int = 0) -> None:
        self._bar = tqdm(total=steps, initial=initial)

    def on_step(self, row: Mapping[str, float]) -> None:
        shown = {"nll": f"{row['nll']:.4g}"}
        if row["kl"]:  # 0 where nothing is random
            shown |= {"kl": f"{row['kl']:.1f}", "kl_weight": f"{row['kl_weight']:.3g}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def on_end(self, history: Sequence[Mapping[str, float]]) -> None:
        self._bar.close()


class TensorBoard(Callback):
    """Writes every figure of a row as a scalar for TensorBoard.

    :param folder: of the event files.
    :raises ImportError: if the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "the package tensorboard is not installed: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def on_step(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def on_end(self, history: Sequence[Mapping[str, float]]) -> None:
        self._writer.close()
