"""The interface of every method: ``fit(train, validation, seed) → Fitted``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import pyro
import torch
from torch import Tensor

from ..data import Split
from ..guides import AutoSubspace
from ..infer.checkpoints import Checkpoints
from ..infer.fit_config import FitConfig
from ..infer.svi import fit
from ..infer.training import FitResult, no_guide
from ..lora.adapter import ProjectionMode, SubspaceAdapter
from ..models.model import LoRAModel, ScalaBLModel
from ..prediction.assessment import assess
from ..prediction.predictor import Predictor, Predicts, RunPredictor
from ..prediction.weight_draws import WeightAverage

__all__ = [
    "DrawsWeights",
    "Fitted",
    "LoRAMethod",
    "Method",
    "check_modules",
    "check_plain",
    "random_modules",
]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Fitted:
    """A trained method.

    :param predictor: predicts.
    :param result: the training history.
    :param guide: the posterior over s, or ``None`` without one.
    :param model: what was trained.
    """

    predictor: RunPredictor
    result: FitResult
    model: LoRAModel
    guide: AutoSubspace | None = None


@dataclass(frozen=True)
class Method(ABC):
    """A way to fine-tune, whose settings are its fields.

    :param config: settings of the training loop; a method that wants others than :class:`FitConfig`
        has gives them as its own default, ``METHODS[name].config``.
    :param eval_batch_size: B in validation and prediction.
    :param progress: show a bar.
    """

    name: ClassVar[str]
    #: whether the method works on the subspace form of the adapter
    svd: ClassVar[bool] = False
    #: whether it can learn texts too, and not answers among choices alone
    reads_texts: ClassVar[bool] = True
    #: settings of :class:`FitConfig` that never have an effect
    ignores: ClassVar[tuple[str, ...]] = ()

    config: FitConfig = FitConfig()  # noqa: RUF009  (frozen)
    eval_batch_size: int = 64
    progress: bool = True

    @property
    def projections(self) -> ProjectionMode:
        """What is trained beside s, as in :class:`~scalabl_pyro.lora.SubspaceAdapter`; a
        setting of the methods that leave a choice."""
        return "free"

    @property
    def particles(self) -> int:
        """P, the draws of a training step, each of which multiplies the rows of a minibatch."""
        return 1

    def without_effect(self) -> tuple[str, ...]:
        """Settings of :class:`FitConfig` that have no effect with these of the method."""
        return self.ignores

    def form(self) -> dict[str, Any]:
        """The options of :class:`~scalabl_pyro.lora.SubspaceAdapter` that the method decides."""
        return {"svd": self.svd, "projections": self.projections}

    def start(self, adapter: SubspaceAdapter, train: Split) -> None:
        """What a fresh adapter takes from the training data, before there is a model."""
        adapter.start_readout(train)

    def fit(
        self,
        make_adapter: Callable[..., SubspaceAdapter],
        train: Split,
        validation: Split | None,
        *,
        seed: int,
        checkpoints: Checkpoints | None = None,
    ) -> Fitted:
        """Train on ``train``; nothing but ``validation`` may choose anything.

        :param make_adapter: ``make_adapter(svd=…, projections=…)`` builds a fresh adapter from the
            current random state, which this method seeds.
        :param seed: fixes initialisation, order of the data, and draws.
        :param checkpoints: what :func:`~scalabl_pyro.infer.fit` writes, and goes on from.
        """
        pyro.set_rng_seed(seed)
        adapter = make_adapter(**self.form())
        self.start(adapter, train)
        model = self.make_model(adapter, num_data=len(train))
        guide = self.make_guide(model)
        return self._fit(model, guide, train, validation, seed=seed, checkpoints=checkpoints)

    def _fit(
        self,
        model: Any,
        guide: Any,
        train: Split,
        validation: Split | None,
        *,
        seed: int,
        checkpoints: Checkpoints | None,
    ) -> Fitted:
        """Train a model and a guide that are made, and what follows."""
        options: dict[str, Any] = {"seed": seed, "checkpoints": checkpoints}
        posterior = guide
        if (optimizer := self.make_optimizer(model)) is not None:
            posterior = options["optimizer"] = optimizer
        if validation is not None:
            options["validate"] = lambda: self.nll(
                self.make_predictor(model, posterior, seed=seed), validation
            )
        result = self._train(model, guide, train, **options)
        predictor = self.make_predictor(model, posterior, seed=seed)
        # A guide over something else than s has told all in the predictor's draws.
        over_s = guide if isinstance(model, ScalaBLModel) else None
        fitted = Fitted(predictor, result, model, over_s)
        return self.finish(fitted, train, validation, seed=seed)

    def finish(
        self, fitted: Fitted, train: Split, validation: Split | None, *, seed: int
    ) -> Fitted:
        """What follows training; nothing, unless a method says otherwise.

        :param seed: that of :meth:`fit`.
        """
        return fitted

    def nll(self, predictor: Predicts, split: Split) -> float:
        """Mean −log p̄(y_n) of the averaged predictions of a labelled split, in nats; of texts y_n
        is a whole completion."""
        return assess(predictor, split, batch_size=self.eval_batch_size).metrics["nll"]

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> Any:
        """The probabilistic model of these settings."""
        return LoRAModel(adapter, num_data=num_data)

    def make_guide(self, model: Any) -> Any:
        """The untrained guide, or ``None`` for a point estimate."""
        return None

    def make_optimizer(self, model: Any) -> torch.optim.Optimizer | None:
        """An optimizer whose state is the posterior, in the place of a guide; ``None`` for
        AdamW."""
        return None

    @abstractmethod
    def make_predictor(self, model: Any, posterior: Any, *, seed: int) -> RunPredictor:
        """Predicts by what the parameters are now.

        :param posterior: the guide, or what :meth:`make_optimizer` made.
        """

    def restore(
        self,
        adapter: SubspaceAdapter,
        state: Mapping[str, Tensor],
        *,
        temperature: float,
        seed: int,
    ) -> RunPredictor:
        """The predictor of a run folder.

        :param adapter: with the projections of the run.
        :param state: what the predictor's own ``state()`` was.
        :raises ValueError: if something is missing from it, or it holds what only a ``restore`` of
            the method's own could read.
        """
        if self.svd and "s" not in state:
            raise ValueError("there are no draws s")
        unknown = sorted(state.keys() - {"s"})
        if unknown:
            raise ValueError(f"{type(self).__name__} must override restore, to read {unknown}")
        return Predictor(adapter, state.get("s"), temperature)

    def _train(self, model: Any, guide: Any, train: Split, **options: Any) -> FitResult:
        """Train in place.

        :param options: ``seed``, ``validate``, ``checkpoints`` and, if the method makes one,
            ``optimizer`` of :func:`~scalabl_pyro.infer.fit`.
        """
        guide = no_guide if guide is None else guide
        return fit(model, guide, train, self.config, progress=self.progress, **options)


def check_plain(fitted: Fitted, name: str) -> None:
    """:raises ValueError: if what was trained is a posterior over s, which a method that works on
    A and B would leave out."""
    if isinstance(fitted.model, ScalaBLModel):
        raise ValueError(
            f"method {name} works on A and B of plain LoRA, and this model has vectors s: give what"
            " mle, map or blob trained"
        )


def check_modules(modules: str) -> None:
    """:raises ValueError: if :func:`random_modules` knows no such choice."""
    if modules not in ("all", "last"):
        raise ValueError(f"modules is {modules!r}: expected all or last")


def random_modules(each: list[_T], modules: str) -> list[_T]:
    """Of something for each adapted module what is random: ``all`` of it, or the ``last``."""
    return each if modules == "all" else each[-1:]


class DrawsWeights:
    """A method whose predictor is a :class:`~scalabl_pyro.prediction.WeightAverage`."""

    def restore(
        self, adapter: SubspaceAdapter, state: Mapping[str, Tensor], **_: Any
    ) -> WeightAverage:
        return WeightAverage.restored(adapter, state)


@dataclass(frozen=True)
class LoRAMethod(Method):
    """Plain LoRA, trained by ``fit``, and what follows it; what MLE, MAP and others share.

    :param projections: ``free`` trains A and B, and ``frozen_v`` B alone (LoRA-FA; Zhang et al.
        2023, arXiv 2308.03303).
    """

    ignores: ClassVar[tuple[str, ...]] = ("kl", "kl_budget")

    projections: Literal["free", "frozen_v"] = "free"

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> LoRAModel:
        """The likelihood.

        :raises ValueError: if the adapter's projections wait for a vector s to scale them.
        """
        if adapter.unit:
            raise ValueError(
                f"projections is 'unit', which fixes the scale of s, and method {self.name} has no"
                " s: expected free or frozen_v"
            )
        return super().make_model(adapter, num_data=num_data)

    def make_predictor(self, model: LoRAModel, posterior: Any, *, seed: int) -> RunPredictor:
        return Predictor(model.adapter)
