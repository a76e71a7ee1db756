"""Stochastic variational inference: one visible loop over minibatches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn
from tqdm import tqdm

from .data import Batch, Split
from .guides import AutoSubspace
from .kl import KLSchedule, kl_weight
from .model import LoRAModel, ScalaBLModel

__all__ = ["FitConfig", "FitResult", "NonFiniteLossError", "fit", "no_guide"]


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite; parameters are those of the last good step."""


@dataclass(frozen=True, slots=True)
class FitConfig:
    """Settings of :func:`fit`.

    :param steps: T, the optimizer's steps.
    :param batch_size: B of a minibatch.
    :param lr: learning rate of the projections and heads.
    :param lr_guide: learning rate of the guide.
    :param weight_decay: AdamW's decoupled decay of the projections and heads.
    :param warmup: share of the steps over which learning rates rise linearly from 0.
    :param decay: how they fall afterwards: to 0 (``linear``, ``cosine``) or not (``constant``).
    :param clip_norm: largest norm of the gradient of −ELBO/N.
    :param accumulation: minibatches in a step.
    :param kl: schedule of the KL weight.
    :param eval_every: steps between two validations, of which the last is at the end; 0 validates
        never.
    :param keep: which state to end with: the last, or the one with the best validation NLL.
    :raises ValueError: if a value is out of range.
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 1e-3
    lr_guide: float = 1e-2
    weight_decay: float = 0.0
    warmup: float = 0.06
    decay: str = "linear"
    clip_norm: float = 1.0
    accumulation: int = 1
    kl: KLSchedule = field(default_factory=KLSchedule)
    eval_every: int = 0
    keep: str = "last"

    def __post_init__(self) -> None:
        bounds = {
            "steps": (1, math.inf),
            "batch_size": (1, math.inf),
            "lr": (0, math.inf),
            "lr_guide": (0, math.inf),
            "weight_decay": (0, math.inf),
            "warmup": (0, 1),
            "accumulation": (1, math.inf),
            "eval_every": (0, math.inf),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}: expected {low} to {high}")
        if not self.clip_norm > 0:
            raise ValueError(
                f"clip_norm is {self.clip_norm}: expected a number above 0; inf is off"
            )
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"decay is {self.decay!r}: expected constant, linear or cosine")
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep is {self.keep!r}: expected last or best")
        if self.keep == "best" and not self.eval_every:
            raise ValueError("keep is 'best', but eval_every is 0: set how often to validate")

    def learning_rate(self, step: int) -> float:
        """The factor on both learning rates at 0-based ``step``."""
        warmup = self.warmup * self.steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.decay == "constant":
            return 1.0
        left = (self.steps - step) / (self.steps - warmup)
        return left if self.decay == "linear" else (1 - math.cos(math.pi * left)) / 2


class FitResult(NamedTuple):
    """What :func:`fit` returns.

    :param history: a row a step: ``step``, ``loss`` (−ELBO/N), ``nll``, ``kl`` (nats),
        ``kl_weight``, ``lr`` (factor), and ``validation_nll`` where it was computed.
    :param best_step: the step kept: the last, or the one with the lowest validation NLL.
    """

    history: list[dict[str, float]]
    best_step: int


def no_guide(*args: object, **kwargs: object) -> None:
    """The guide of a model without latent variables."""


def fit(
    model: LoRAModel,
    guide: Callable[..., Any],
    train: Split,
    config: FitConfig,
    *,
    seed: int = 0,
    elbo: Any = None,
    validate: Callable[[], float] | None = None,
    progress: bool = True,
) -> FitResult:
    r"""Minimise −ELBO/N with one AdamW over projections, heads and guide, changed in place.

    .. math:: -\frac{1}{N} \Big( \frac{N}{B} \sum_{n ∈ batch} E_q[\log p(y_n \mid x_n, s)]
              - β_t \, KL(q(s) \,\|\, p(s)) \Big)

    :param model: with its projections; ``model.num_data`` is N.
    :param guide: any Pyro guide for the model, or :func:`no_guide` for a point estimate.
    :param train: the N labelled examples.
    :param seed: fixes the order of the examples; the draws of s follow Pyro's own random state.
    :param elbo: ``Trace_ELBO`` if left out; any ELBO of Pyro.
    :param validate: returns the validation NLL, called every ``config.eval_every`` steps.
    :raises NonFiniteLossError: if the loss or the gradient is not finite.
    :raises ValueError: if an example has no label, or validation is asked for without ``validate``.
    """
    if train.labels is None:
        raise ValueError("training needs a label in every record")
    if config.eval_every and validate is None:
        raise ValueError("eval_every is set, but no validate function was given")
    elbo = Trace_ELBO(max_plate_nesting=1) if elbo is None else elbo
    adapter = model.adapter
    minibatches = train.minibatches(config.batch_size, seed=seed)
    first = next(minibatches)
    if isinstance(guide, nn.Module) and not list(guide.parameters()):
        with torch.no_grad(), pyro.poutine.block():
            guide(first)  # Pyro's automatic guides make their parameters at the first call
    # The model's own parameters: the adapter's, and any that a prior learns.
    trained = list(
        {id(p): p for p in (*adapter.named_parameters().values(), *model.parameters())}.values()
    )
    inferred = list(guide.parameters()) if isinstance(guide, nn.Module) else []
    groups = [{"params": trained, "lr": config.lr, "weight_decay": config.weight_decay}]
    if inferred:
        groups.append({"params": inferred, "lr": config.lr_guide, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, config.learning_rate)
    parameters = [*trained, *inferred]
    good = _Snapshot(parameters)
    best, best_nll, best_step = _Snapshot(parameters), math.inf, config.steps
    history: list[dict[str, float]] = []
    batch: Batch | None = first
    per_example = 1 / (model.num_data * config.accumulation)

    adapter.train()
    with model.projections.one_site(), tqdm(total=config.steps, disable=not progress) as bar:
        for step in range(config.steps):
            beta = config.kl(step, config.steps)
            loss, nll = 0.0, 0.0
            # Pyro's checks are worth their time once: shapes and supports do not change.
            with pyro.validation_enabled(step == 0), kl_weight(beta):
                for _ in range(config.accumulation):
                    batch = next(minibatches) if batch is None else batch
                    with _ObservedNLL() as observed:
                        loss += elbo.loss_and_grads(model, guide, batch) * per_example
                    nll += observed.mean() / config.accumulation
                    batch = None
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, per_example)
            norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                good.restore()
                adapter.eval()
                raise NonFiniteLossError(
                    f"at step {step + 1} of {config.steps} the loss is {loss} and the norm of its"
                    f" gradient {float(norm)}; the parameters are those of step {max(step - 1, 0)},"
                    " the last good one; lower lr or lr_guide, or clip_norm"
                )
            good.take()
            row: dict[str, float] = {
                "step": step + 1,
                "loss": loss,
                "nll": nll,
                "kl": _kl(model, guide, (loss - nll) * model.num_data / beta),
                "kl_weight": beta,
                "lr": config.learning_rate(step),
            }
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            last = step + 1 == config.steps
            if (
                validate is not None
                and config.eval_every
                and (last or not (step + 1) % config.eval_every)
            ):
                adapter.eval()
                row["validation_nll"] = validate()
                adapter.train()
                if row["validation_nll"] < best_nll or math.isinf(best_nll):
                    best_nll, best_step = row["validation_nll"], step + 1
                    best.take()
            history.append(row)
            bar.set_postfix(
                nll=f"{nll:.3f}", kl=f"{row['kl']:.1f}", kl_weight=f"{beta:.3g}", refresh=False
            )
            bar.update()
    adapter.eval()
    if config.keep == "best":
        best.restore()
        return FitResult(history, best_step)
    return FitResult(history, config.steps)


class _ObservedNLL(Messenger):
    """Records −log p(y | x, s) of the observed sites that pass, per example."""

    def __init__(self) -> None:
        super().__init__()
        self._terms: list[Tensor] = []

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["is_observed"]:
            distribution: Any = msg["fn"]
            self._terms.append(distribution.log_prob(msg["value"]).detach().mean())

    def mean(self) -> float:
        """Mean over examples and particles."""
        return -float(torch.stack(self._terms).mean())


class _Snapshot:
    """A copy of parameters that can be taken again and put back."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters: list[Tensor] = list(parameters)
        self._values = [copy.deepcopy(parameter.detach()) for parameter in parameters]

    @torch.no_grad()
    def take(self) -> None:
        torch._foreach_copy_(self._values, self._parameters)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self._parameters, self._values)


@torch.no_grad()
def _kl(model: LoRAModel, guide: Callable[..., Any], estimate: float) -> float:
    """KL(q‖p) in nats: in closed form where torch has it, else the loss's own estimate."""
    if not isinstance(model, ScalaBLModel):
        return 0.0
    if isinstance(guide, AutoSubspace):
        try:
            return float(torch.distributions.kl_divergence(guide.get_posterior(), model.prior))
        except NotImplementedError:
            return estimate
    return estimate
