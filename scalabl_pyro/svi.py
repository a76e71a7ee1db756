"""Stochastic variational inference: one visible loop over minibatches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from tqdm import tqdm

from .data import Batch, Split
from .guides import AutoSubspace
from .kl import KLBudget, KLSchedule, kl_weight
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
    :raises ValueError: if an example has no label, validation is asked for without ``validate``, or
        the guide leaves a latent site uncovered or holds a parameter that no optimizer would move.
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
    trained = list(adapter.named_parameters().values())
    # A prior's own parameters are variational ones: they move with the guide's.
    known = {id(parameter) for parameter in trained}
    inferred = [p for p in model.parameters() if id(p) not in known]
    inferred += list(guide.parameters()) if isinstance(guide, nn.Module) else []
    groups = [
        {"params": trained, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": inferred, "lr": config.lr_guide, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, config.learning_rate)
    parameters = [*trained, *inferred]
    budget = None if config.kl.budget is None else KLBudget(config.kl.budget)
    good = _Snapshot(parameters)
    best, best_nll, best_step = _Snapshot(parameters), math.inf, config.steps
    history: list[dict[str, float]] = []
    batch: Batch | None = first
    per_example = 1 / (model.num_data * config.accumulation)

    adapter.train()
    with model.projections.one_site(), tqdm(total=config.steps, disable=not progress) as bar:
        for step in range(config.steps):
            beta = config.kl(step, config.steps) * (budget.factor if budget else 1.0)
            loss, nll = 0.0, 0.0
            first_step = _Sites(parameters) if step == 0 else nullcontext()
            # Checks are worth their time once: sites, shapes and supports do not change.
            with pyro.validation_enabled(step == 0), first_step, kl_weight(beta):
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
            if budget:
                budget.update(row["kl"])
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
        # In the data plate: a factor outside it is no likelihood.
        if msg["is_observed"] and msg["cond_indep_stack"]:
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


class _Sites(Messenger):
    """Refuses sites that training would pass over: uncovered latents, and unknown parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._known = {id(parameter) for parameter in parameters}
        self._seen: dict[str, int] = {}

    def _pyro_post_sample(self, msg: Message) -> None:
        auxiliary = msg["infer"].get("is_auxiliary")  # a guide's own, as in Pyro's joint guides
        if not (msg["is_observed"] or auxiliary or site_is_subsample(msg)):
            self._seen[msg["name"]] = self._seen.get(msg["name"], 0) + 1

    def _pyro_post_param(self, msg: Message) -> None:
        value: Any = msg["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if id(leaf) not in self._known:
            raise ValueError(
                f"the parameter {msg['name']!r} belongs to no module that fit trains, and would"
                " never move: write the guide as a PyroModule that holds it as a PyroParam"
            )

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # A covered site passes twice: in the guide, and again in the model.
        uncovered = sorted(name for name, count in self._seen.items() if count < 2)
        if uncovered and error[0] is None:
            raise ValueError(
                f"the latent sites {uncovered} are in the model or in the guide alone: every latent"
                " site of the model needs one of the same name in the guide"
            )


@torch.no_grad()
def _kl(model: LoRAModel, guide: Callable[..., Any], estimate: float) -> float:
    """KL(q‖p) in nats: in closed form where there is one, else the loss's own estimate."""
    if not isinstance(model, ScalaBLModel):
        return 0.0
    exact = None
    if isinstance(guide, AutoSubspace) and not model.prior.latents:
        exact = guide.kl(model.prior())
    return estimate if exact is None else exact
