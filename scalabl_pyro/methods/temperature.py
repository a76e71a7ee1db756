"""Temperature scaling (Guo et al. 2017, arXiv 1706.04599) of maximum likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ..data import Split
from ..lora.adapter import SubspaceAdapter
from ..prediction.predictor import Predictor, predict
from ..readouts.kappa import fit_kappa
from .base import Fitted, LoRAMethod

__all__ = ["TemperatureScaling", "best_temperature"]


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 that minimises the NLL of softmax(logits / T), within the bounds of
    :func:`~scalabl_pyro.readouts.kappa.fit_kappa` for 1/T.

    :param logits: (N, C) of one point estimate, −inf where a choice does not exist.
    :param labels: (N,).
    """
    return 1 / fit_kappa(logits, labels)


@dataclass(frozen=True)
class TemperatureScaling(LoRAMethod):
    """MLE, whose logits are divided by the temperature with the lowest validation NLL."""

    name: ClassVar[str] = "temperature"
    reads_texts: ClassVar[bool] = False

    def fit(
        self,
        make_adapter: Callable[..., SubspaceAdapter],
        train: Split,
        validation: Split | None,
        **options: Any,
    ) -> Fitted:
        """As :meth:`Method.fit`.

        :raises ValueError: if there is no validation split with labels.
        """
        if validation is None or validation.labels is None:
            raise ValueError("method temperature needs a validation split with labels")
        return super().fit(make_adapter, train, validation, **options)

    def finish(
        self, fitted: Fitted, train: Split, validation: Split | None, *, seed: int
    ) -> Fitted:
        assert validation is not None
        return self.temper(fitted, validation)

    def temper(self, fitted: Fitted, validation: Split) -> Fitted:
        """The same trained model at its best temperature.

        :raises ValueError: if it predicts by an average of draws, which no one temperature of the
            logits makes calibrated.
        """
        if not isinstance(fitted.predictor, Predictor) or fitted.predictor.num_draws > 1:
            raise ValueError(
                "a temperature divides the logits of one model, and this is an average over"
                f" {fitted.predictor.num_draws} draws: expected what mle or map trained, or the"
                " posterior mean, Predictor(adapter, guide.median()['s'][None])"
            )
        predictions = predict(fitted.predictor, validation, batch_size=self.eval_batch_size)
        assert predictions.labels is not None
        further = best_temperature(predictions.logits[0], predictions.labels)
        temperature = fitted.predictor.temperature * further  # by which they are divided already
        return replace(fitted, predictor=replace(fitted.predictor, temperature=temperature))
