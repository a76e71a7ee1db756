"""Training-free Bayesianization of BLoB's mean (Shi et al. 2024, arXiv 2412.05723, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..data import Split
from ..lora.adapter import SubspaceAdapter
from .base import Fitted
from .blob import BLoB, BLoBModel
from .tfb import TFB

__all__ = ["BLoBTFB"]


@dataclass(frozen=True)
class BLoBTFB(BLoB):
    """BLoB, of whose q(A) the mean is kept, and then the noise of :class:`TFB` about it.

    :param tfb: options of :class:`TFB`.
    """

    name: ClassVar[str] = "blob_tfb"

    tfb: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._noise()

    def _noise(self) -> TFB:
        try:
            return TFB(eval_batch_size=self.eval_batch_size, **self.tfb)
        except TypeError as error:
            raise ValueError(f"tfb is {self.tfb}: {error}") from error

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> BLoBModel:
        """As BLoB's.

        :raises ValueError: if there would have to be pseudo-labels of texts.
        """
        self._noise().check_readout(adapter.readout)
        return super().make_model(adapter, num_data=num_data)

    def finish(
        self, fitted: Fitted, train: Split, validation: Split | None, *, seed: int
    ) -> Fitted:
        """The mean with noise on A; the adapter's matrices are changed in place."""
        return self._noise().finish(fitted, train, validation, seed=seed)
