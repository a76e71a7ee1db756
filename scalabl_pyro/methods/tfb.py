"""Training-free Bayesianization (Shi et al. 2024, arXiv 2412.05723) of maximum likelihood."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from ..data import Split
from ..lora.adapter import SubspaceAdapter
from ..models.model import LoRAModel
from ..prediction.predictor import Predictor, predict
from ..prediction.weight_draws import WeightAverage
from ..readouts import Readout
from .base import (
    DrawsWeights,
    Fitted,
    LoRAMethod,
    check_modules,
    check_plain,
    random_modules,
)

__all__ = ["TFB"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TFB(DrawsWeights, LoRAMethod):
    r"""MLE or, with ``weight_decay``, MAP, then as much isotropic noise as the training data allow.

    With B·A = U·diag(d)·V, brought to B = U·diag(d) and A = V, the entries of A get independent
    normals of standard deviation σ_q / d_j in row j: noise of the same size in every direction that
    ΔW spans. σ_q is the largest at which

    .. math:: |\mathrm{NLL}(σ_q) - \mathrm{NLL}(0)| \le ε \, \mathrm{NLL}(0)

    on training examples, found by bisection in [0, ``max_scale``]. The published settings are
    ε = 0.003, 0.015 and 5 bisections, for Llama-3.1-8B. Their NLL is of pseudo-labels, which are
    the model's own answers without noise; so it is here with ``pseudo_labels``, and of the labels
    without. σ_q is in the last row of the history. Where even ``max_scale`` is within the
    tolerance, σ_q is just below it, which a warning says.

    :param tolerance: ε.
    :param max_scale: the largest σ_q tried.
    :param bisections: of the interval.
    :param examples: how many training examples measure the NLL, chosen at random.
    :param draws: S, the draws that measure and predict.
    :param pseudo_labels: measure with the model's own answers in the place of labels.
    :param modules: whose A gets noise: ``all`` adapted modules, or the ``last`` one alone.
    :raises ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "tfb"

    tolerance: float = 0.003
    max_scale: float = 0.015
    bisections: int = 5
    examples: int = 500
    draws: int = 10
    pseudo_labels: bool = False
    modules: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        for name in ("tolerance", "max_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a number above 0")
        for name in ("bisections", "examples", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        check_modules(self.modules)

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> LoRAModel:
        """The likelihood.

        :raises ValueError: if there would have to be pseudo-labels of texts.
        """
        self.check_readout(adapter.readout)
        return super().make_model(adapter, num_data=num_data)

    def check_readout(self, readout: Readout) -> None:
        """:raises ValueError: if there would have to be pseudo-labels of texts."""
        if self.pseudo_labels and readout.reads_texts:
            raise ValueError(
                "pseudo_labels is true, and the readout reads texts, among which there is no most"
                " probable one to be had: set pseudo_labels=false"
            )

    def finish(
        self, fitted: Fitted, train: Split, validation: Split | None, *, seed: int
    ) -> Fitted:
        """The same trained model with noise on A; its matrices are changed in place.

        :param fitted: of plain LoRA; the noise is about the adapter's own matrices.
        :param seed: of the examples and of the draws.
        :raises ValueError: if it is over s, or there would have to be pseudo-labels of texts.
        """
        check_plain(fitted, self.name)
        self.check_readout(fitted.model.adapter.readout)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(train), generator=generator)[: self.examples].tolist()
        anchor = train.select(chosen)
        adapter = fitted.model.adapter
        if self.pseudo_labels:
            predictions = predict(Predictor(adapter), anchor, batch_size=self.eval_batch_size)
            anchor = anchor.relabelled(predictions.probabilities.argmax(-1).tolist())
        plain = self.nll(Predictor(adapter), anchor)
        matrices = adapter.matrices
        d = matrices.decompose_product()
        d = d.clamp(min=1e-6 * float(d.max()))  # a direction that is not used has no scale
        noise = torch.randn(self.draws, len(matrices.flat_A()), generator=generator)
        noise = noise.to(adapter.device)
        noises = matrices.named_A(noise)
        means = matrices.named_A(matrices.flat_A().detach())
        rows = zip(means, d, strict=True)
        spread = {name: noises[name] / scale[:, None].to(noise) for name, scale in rows}

        noisy = random_modules(list(means), self.modules)

        def at(sigma: float) -> WeightAverage:
            return WeightAverage(adapter, {n: means[n] + sigma * spread[n] for n in noisy})

        low, high = 0.0, self.max_scale
        for _ in range(self.bisections):
            sigma = (low + high) / 2
            change = abs(self.nll(at(sigma), anchor) - plain)
            low, high = (sigma, high) if change <= self.tolerance * plain else (low, sigma)
        if not low:
            log.warning(
                "no noise down to σ_q = %g leaves the training NLL within %g of %g: all draws are"
                " the same; lower max_scale or raise tolerance",
                high,
                self.tolerance * plain,
                plain,
            )
        if high == self.max_scale:
            log.warning(
                "σ_q is %g, at its cap: even more noise may leave the training NLL within %g of"
                " %g; raise max_scale",
                low,
                self.tolerance * plain,
                plain,
            )
        log.info("σ_q is %g", low)
        history = fitted.result.history
        last = history[-1] if history else {}  # nothing was trained
        result = fitted.result._replace(history=[*history[:-1], {**last, "sigma_q": low}])
        return replace(fitted, predictor=at(low), result=result)
