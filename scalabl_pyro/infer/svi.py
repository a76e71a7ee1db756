"""Stochastic variational inference: one visible loop over minibatches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from ..data import Batch, Split
from ..distributed import average_over_ranks, check_same, is_main, rank, wait, world_size
from ..guides import AutoSubspaceDelta
from ..models.model import LoRAModel, ScalaBLModel
from .callbacks import Callback, ProgressBar
from .checkpoints import (
    Checkpoints,
    Interrupted,
    Snapshot,
    TrainingState,
    random_state,
    set_random_state,
)
from .kl import KLBudget, KLSchedule, kl_weight
from .messengers import AllSites, ObservedNLL

__all__ = [
    "FitConfig",
    "FitResult",
    "NonFiniteLossError",
    "fit",
    "no_guide",
    "parameter_groups",
    "trained_parameters",
]


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite; parameters are those of the last good step."""


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FitConfig:
    """Settings of :func:`fit`, with the defaults of configs/base.yaml.

    :param steps: T, the optimizer's steps.
    :param batch_size: B of a minibatch.
    :param lr: learning rate of the projections and heads.
    :param lr_guide: learning rate of the guide, and of what a readout trains of its own.
    :param weight_decay: AdamW's decoupled decay of the projections and heads. It is no Gaussian
        prior: the share it takes depends neither on N nor on the gradient's scaling.
    :param eps: AdamW's ε, beside the root of the second moment.
    :param warmup: share of the steps over which learning rates rise linearly from 0.
    :param decay: how they fall afterwards: to 0 (``linear``, ``cosine``) or not (``constant``).
    :param clip_norm: largest norm of the gradient of −ELBO/N.
    :param accumulation: minibatches in a step.
    :param kl: schedule of the KL weight.
    :param kl_budget: C > 0 in nats: :class:`~scalabl_pyro.infer.KLBudget` adapts the weight on top
        of its schedule, so that KL(q‖p) goes to C, and ends the nearer the more steps there are.
        No budget if left out.
    :param eval_every: steps between two validations, of which the last is at the end; 0 validates
        never.
    :param keep: which state to end with: the last, or the one with the best validation NLL.
    :param patience: end after so many validations in a row without a lower NLL; 0 never does. The
        schedules are those of all steps.
    :raises ValueError: if a value is out of range.
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 1e-3
    lr_guide: float = 1e-2
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup: float = 0.06
    decay: str = "linear"
    clip_norm: float = 1.0
    accumulation: int = 1
    kl: KLSchedule = field(default_factory=KLSchedule)
    kl_budget: float | None = None
    eval_every: int = 0
    keep: str = "last"
    patience: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "steps": (1, math.inf),
            "batch_size": (1, math.inf),
            "lr": (0, torch.finfo(torch.float32).max),
            "lr_guide": (0, torch.finfo(torch.float32).max),
            "weight_decay": (0, torch.finfo(torch.float32).max),
            "eps": (0, math.inf),
            "warmup": (0, 1),
            "accumulation": (1, math.inf),
            "eval_every": (0, math.inf),
            "patience": (0, math.inf),
        }
        if not isinstance(self.kl, KLSchedule):
            raise ValueError(f"kl is {self.kl!r}: expected a KLSchedule, such as KLSchedule(10.0)")
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                expected = f"{low} to {high}" if high == 1 else f"a finite number from {low} on"
                raise ValueError(f"{name} is {getattr(self, name)}: expected {expected}")
        if not self.clip_norm > 0:
            raise ValueError(
                f"clip_norm is {self.clip_norm}: expected a number above 0; inf is off"
            )
        if self.kl_budget is not None and not self.kl_budget > 0:
            raise ValueError(f"kl_budget is {self.kl_budget!r}: expected a number of nats above 0")
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"decay is {self.decay!r}: expected constant, linear or cosine")
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep is {self.keep!r}: expected last or best")
        if self.keep == "best" and not self.eval_every:
            raise ValueError("keep is 'best', but eval_every is 0: set how often to validate")
        if self.patience and not self.eval_every:
            raise ValueError(
                f"patience is {self.patience}, but eval_every is 0: set how often to validate"
            )

    def lr_factor(self, step: int) -> float:
        """The factor on both learning rates at 0-based ``step``."""
        warmup = self.warmup * self.steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.decay == "constant":
            return 1.0
        left = (self.steps - step) / max(self.steps - warmup, 1.0)
        return left if self.decay == "linear" else (1 - math.cos(math.pi * left)) / 2

    @property
    def rates(self) -> dict[str, float]:
        """Those of AdamW's two groups of parameters."""
        return {"lr": self.lr, "lr_guide": self.lr_guide, "weight_decay": self.weight_decay}

    @property
    def reach(self) -> float:
        r"""About the furthest that a parameter of the guide can get, lr_guide · Σ_t factor_t.

        A step of Adam moves a parameter by about its learning rate at most. With σ = softplus(u),
        \|Δ log σ\| ≤ \|Δu\|: below 1, σ cannot change by a factor e.
        """
        return self.lr_guide * sum(map(self.lr_factor, range(self.steps)))


class FitResult(NamedTuple):
    """What :func:`fit` returns.

    :param history: a row a step: ``step``, ``loss`` (−ELBO/N), ``nll``, ``kl`` (nats),
        ``kl_weight``, ``lr_factor`` (of both learning rates), and ``validation_nll`` where it was
        computed.
    :param best_step: the step kept: the last, or the one with the lowest validation NLL.
    :param num_trained: how many numbers the optimizer moved.
    """

    history: list[dict[str, float]]
    best_step: int
    num_trained: int = 0


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
    optimizer: torch.optim.Optimizer | None = None,
    validate: Callable[[], float] | None = None,
    checkpoints: Checkpoints | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> FitResult:
    r"""Minimise −ELBO/N with one AdamW over projections, heads and guide, changed in place.

    .. math:: -\frac{1}{N} \Big( \frac{N}{B} \sum_{n ∈ batch} E_q[\log p(y_n \mid x_n, s)]
              - β_t \, KL(q(s) \,\|\, p(s)) \Big)

    In a process group of ``torch.distributed`` every process has its share of each minibatch, and
    all must start from the same random state, so that they draw the same s.

    :param model: with its projections; ``model.num_data`` is N.
    :param guide: any Pyro guide for the model, or :func:`no_guide` for a point estimate.
    :param train: the N labelled examples.
    :param seed: fixes the order of the examples; the draws of s follow Pyro's own random state.
    :param elbo: ``Trace_ELBO`` if left out; any ELBO of Pyro.
    :param optimizer: another one of torch over the same parameters, whose learning rates follow
        ``config.warmup`` and ``config.decay``; ``config.lr``, ``lr_guide``, ``weight_decay`` and
        ``eps`` are AdamW's alone.
    :param validate: returns the validation NLL, called every ``config.eval_every`` steps.
    :param checkpoints: written on the way; where there is one already, training goes on from it,
        and ends as it would have ended without the interruption, to the bit.
    :param callbacks: called with the figures of each step, by the main process alone.
    :param progress: show a bar.
    :raises NonFiniteLossError: if the loss or the gradient is not finite.
    :raises Interrupted: if a signal asked to stop, after a checkpoint.
    :raises ValueError: if an example has no label, validation is asked for without ``validate``,
        something else is given for a callback, the guide leaves a latent site uncovered or holds a
        parameter that no optimizer would move, or ``optimizer`` is over other parameters.

    Usage::

        model = ScalaBLModel(adapter, num_data=len(train))
        guide = AutoSubspaceNormal(model)
        config = FitConfig(steps=20, batch_size=4, kl=KLSchedule(weight=10.0))
        history = fit(model, guide, train, config).history  # a dictionary of figures for each step
    """
    _check(model, guide, train, config, validate, callbacks)
    elbo = Trace_ELBO(max_plate_nesting=1) if elbo is None else elbo
    if isinstance(guide, nn.Module) and not list(guide.parameters()):
        with torch.no_grad(), pyro.poutine.block():
            # Pyro's automatic guides make their parameters at the first call.
            guide(next(train.minibatches(config.batch_size, seed=seed)))
    _tell_reach(guide, config)
    model.start_readout(train)
    run = _Training(model, guide, config, optimizer)
    if checkpoints is not None:
        run.resume(checkpoints)
        check_same(run.step, f"processes would go on from different steps of {checkpoints.folder}")
    minibatches = train.minibatches(
        config.batch_size,
        seed=seed,
        skip=run.step * config.accumulation,
        rank=rank(),
        world_size=world_size(),
    )
    bars = [ProgressBar(config.steps, initial=run.step)] if progress and is_main() else []
    callbacks = [*bars, *callbacks] if is_main() else []
    model.adapter.train()
    with (
        model.projections.one_site(),
        checkpoints.interruptible() if checkpoints else nullcontext(),
        ExitStack() as ends,
    ):
        ends.callback(model.adapter.eval)  # however training ends
        for callback in callbacks:
            ends.callback(callback.on_end, run.history)
        while not run.over:
            beta = run.kl_weight()
            loss, nll = run.gradients(elbo, minibatches, beta)
            loss, nll, stop = run.over_ranks(loss, nll, checkpoints)
            run.clip(loss)
            run.record(loss, nll, beta)
            run.take_step()
            run.validate(validate)
            run.tell(callbacks)
            if checkpoints is not None:
                run.save(checkpoints, stop)
    return run.result()


def _check(
    model: LoRAModel,
    guide: Callable[..., Any],
    train: Split,
    config: FitConfig,
    validate: Callable[[], float] | None,
    callbacks: Sequence[Callback],
) -> None:
    """Refuse what cannot be trained, before anything is."""
    for name, value, kind, made in (
        ("train", train, Split, "adapter.encode(records)"),
        ("config", config, FitConfig, "FitConfig(steps=…)"),
        ("callbacks", callbacks, Sequence, "a list of Callback objects"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}: expected {made}")
    if train.labels is None:
        raise ValueError("training needs a label in every record")
    if len(train) != model.num_data:
        log.warning(
            "there are %d training examples, but the model's num_data is %d: it is N, which weighs"
            " the likelihood against the prior",
            len(train),
            model.num_data,
        )
    if config.eval_every and validate is None:
        raise ValueError("eval_every is set, but no validate function was given")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ValueError(f"callbacks holds {callback!r}: expected objects of Callback classes")
    if config.kl_budget is not None and (guide is no_guide or isinstance(guide, AutoSubspaceDelta)):
        raise ValueError("kl_budget needs a density q(s), and the guide is a point: set kl.weight")
    if world_size() > 1 and model.adapter.has_dropout:
        raise ValueError(
            "dropout leaves another random state in every process, so that s would not be shared:"
            " set lora.dropout=0 and lora.base_dropout=false, and train mc_dropout in one process"
        )


def _tell_reach(guide: Callable[..., Any], config: FitConfig) -> None:
    """Warn of a run that is too short for σ to leave its start: what it ends with is a guess."""
    logarithmic = (constraints.softplus_positive, constraints.positive)
    modules = guide.modules() if isinstance(guide, nn.Module) else ()
    kinds = [
        kind
        for module in modules
        if isinstance(module, PyroModule)
        for kind, _ in module._pyro_params.values()
    ]
    if config.reach < 1 and any(kind in logarithmic for kind in kinds):
        log.warning(
            "%d steps at lr_guide %g change the guide's standard deviations by a factor of about"
            " %.2f at most: they will tell where they started, not what the data say; raise"
            " fit.steps or fit.lr_guide",
            config.steps,
            config.lr_guide,
            math.exp(config.reach),
        )


def trained_parameters(
    model: LoRAModel, guide: Callable[..., Any]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """All that a loss of both moves, by name: projections and heads, and what moves at the guide's
    rate and does not decay.

    :raises ValueError: if there is nothing.
    """
    trained = model.adapter.named_parameters()
    known = {id(parameter) for parameter in trained.values()}
    own = {id(p) for p in model.adapter.readout_parameters.values()}
    matrices = {name: p for name, p in trained.items() if id(p) not in own}
    # A readout's few numbers, such as κ, have as far to go as the guide's.
    numbers = {name: p for name, p in trained.items() if id(p) in own}
    # A prior's own parameters are variational ones.
    numbers |= {
        f"model.{name}": p
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in known
    }
    if isinstance(guide, nn.Module):
        numbers |= {f"guide.{name}": p for name, p in guide.named_parameters()}
    if not (matrices or numbers):
        raise ValueError("nothing is trained: projections is 'fixed', and there is no guide")
    return matrices, numbers


def parameter_groups(
    model: LoRAModel,
    guide: Callable[..., Any],
    *,
    lr: float,
    lr_guide: float,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Those of :func:`trained_parameters` for an optimizer of torch, with their rates and decay."""
    matrices, numbers = trained_parameters(model, guide)
    return [
        {"params": list(matrices.values()), "lr": lr, "weight_decay": weight_decay},
        {"params": list(numbers.values()), "lr": lr_guide, "weight_decay": 0.0},
    ]


class _Training:
    """What training carries from step to step, and a checkpoint holds; and the parts of a step.

    :raises ValueError: if nothing is trained, or the optimizer is over something else.
    """

    def __init__(
        self,
        model: LoRAModel,
        guide: Callable[..., Any],
        config: FitConfig,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._model, self._guide, self._config = model, guide, config
        self._device = model.adapter.device
        matrices, numbers = trained_parameters(model, guide)
        self._named = matrices | numbers
        self._parameters = list(self._named.values())
        if optimizer is None:
            groups = parameter_groups(model, guide, **config.rates)
            optimizer = torch.optim.AdamW(groups, eps=config.eps)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}: expected one of torch over"
                " scalabl_pyro.infer.parameter_groups(model, guide, lr=…, lr_guide=…); those of"
                " Pyro are for pyro.infer.SVI"
            )
        self._optimizer = optimizer
        moved = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if moved != {id(parameter) for parameter in self._parameters}:
            raise ValueError(
                f"the {type(self._optimizer).__name__} given is over {len(moved)} parameters:"
                f" expected the {len(self._parameters)} that are trained, {list(self._named)}"
            )
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, config.lr_factor)
        self._budget = None if config.kl_budget is None else KLBudget(config.kl_budget)
        self._per_example = 1 / (model.num_data * config.accumulation)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._good = Snapshot(self._parameters)
        self.best = Snapshot(self._parameters)
        self.best_nll, self.best_step = math.inf, config.steps

    @property
    def over(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        config = self._config
        waited = (self.step - self.best_step) / config.eval_every if config.patience else 0
        return self.step >= config.steps or waited >= max(config.patience, 1)

    @property
    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def kl_weight(self) -> float:
        """β of the next step."""
        factor = 1.0 if self._budget is None else self._budget.factor
        return factor * self._config.kl(self.step, self._config.steps)

    def gradients(
        self, elbo: Any, minibatches: Iterator[Batch], beta: float
    ) -> tuple[float, float]:
        """Leave the gradients of −ELBO in the parameters; the loss −ELBO/N and the NLL."""
        loss, nll = 0.0, 0.0
        # Checks are worth their time once: sites, shapes and supports do not change.
        check = self.step == 0
        sites = AllSites(self._parameters) if check else nullcontext()
        with pyro.validation_enabled(check), sites, kl_weight(beta):
            for _ in range(self._config.accumulation):
                # Once: adapter and likelihood each need it there.
                batch = next(minibatches).to(self._device)
                with ObservedNLL() as observed:
                    negative_elbo = elbo.loss_and_grads(self._model, self._guide, batch)
                loss += negative_elbo * self._per_example
                nll += observed.total() * self._per_example
        return loss, nll

    def over_ranks(
        self, loss: float, nll: float, checkpoints: Checkpoints | None
    ) -> tuple[float, float, bool]:
        """Average the gradients, the loss and the NLL; and whether a process was asked to stop."""
        stop = checkpoints is not None and checkpoints.asked
        if world_size() == 1:
            return loss, nll, stop
        terms = torch.tensor([loss, nll, float(stop)], device=self._device)
        average_over_ranks([*self._gradients, terms])
        loss, nll, share = terms.tolist()
        return loss, nll, share > 0  # all stop if one is asked to

    def clip(self, loss: float) -> None:
        """Scale the gradients to those of −ELBO/N, of a norm that is not too large.

        :raises NonFiniteLossError: if they or the loss are not finite; the last good parameters are
            put back.
        """
        gradients = self._gradients
        norm = float(nn.utils.get_total_norm(gradients)) * self._per_example
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._good.restore()
            advice = (
                "lower lr or lr_guide, or clip_norm"
                if self.step
                else ("nothing was trained yet: look at the guide's init_scale and at the prior")
            )
            raise NonFiniteLossError(
                f"at step {self.step + 1} of {self._config.steps} the loss is {loss} and the norm"
                f" of its gradient {norm}; the parameters are those of step"
                f" {max(self.step - 1, 0)}, the last good one; {advice}"
            )
        self._good.take()
        factor = min(1.0, self._config.clip_norm / (norm + 1e-6))
        torch._foreach_mul_(gradients, self._per_example * factor)

    def record(self, loss: float, nll: float, beta: float) -> None:
        """Add a row to the history, of the parameters before the step."""
        rest = (loss - nll) * self._model.num_data
        row: dict[str, float] = {
            "step": self.step + 1,
            "loss": loss,
            "nll": nll,
            "kl": _kl(self._model, self._guide, rest, beta),
            "kl_weight": beta,
            "lr_factor": self._config.lr_factor(self.step),
        }
        self.history.append(row)

    def take_step(self) -> None:
        """Move the parameters by their gradients, and the schedules by the last row of history."""
        if self._budget is not None:
            self._budget.update(self.history[-1]["kl"])
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        self.step += 1

    def validate(self, validate: Callable[[], float] | None) -> None:
        """Where a validation is due, remember the current parameters if they are the best so far.

        :raises NonFiniteLossError: if the NLL is no number.
        """
        every = self._config.eval_every
        if validate is None or not every or not (self.over or self.step % every == 0):
            return
        self._model.adapter.eval()
        validation_nll = self.history[-1]["validation_nll"] = validate()
        self._model.adapter.train()
        if math.isnan(validation_nll):
            self._good.restore()
            raise NonFiniteLossError(
                f"the validation NLL is {validation_nll} after step {self.step}; the parameters are"
                f" those of step {self.step - 1}; lower lr or lr_guide"
            )
        if validation_nll < self.best_nll or math.isinf(self.best_nll):
            self.best_nll, self.best_step = validation_nll, self.step
            self.best.take()

    def tell(self, callbacks: Sequence[Callback]) -> None:
        """Call them with the last row of history."""
        row = self.history[-1]
        for callback in callbacks:
            callback.on_step(row)
            if "validation_nll" in row:
                callback.on_validate(row)

    def save(self, checkpoints: Checkpoints, stop: bool) -> None:
        """Write a checkpoint where one is due, or it is time to stop.

        :raises Interrupted: if it is time to stop.
        """
        if not (stop or self.over or self.step % checkpoints.config.every == 0):
            return
        if is_main():
            checkpoints.save(self.state())
        wait()  # before any process may go on from it
        if stop:
            raise Interrupted(f"stopped by a signal after step {self.step}; go on with resume=true")

    def result(self) -> FitResult:
        """What training ends with, in the parameters too."""
        if self._config.keep == "best":
            self.best.restore()
        step = self.best_step if self._config.keep == "best" else self.step
        return FitResult(self.history, step, sum(p.numel() for p in self._parameters))

    def state(self) -> TrainingState:
        """All of it, and torch's random state."""
        optimizer = self._optimizer.state_dict()
        tensors: dict[str, Tensor] = {f"parameter.{n}": p for n, p in self._named.items()}
        for index, moments in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        if self._config.keep == "best":
            best = zip(self._named, self.best.values, strict=True)
            tensors |= {f"best.{name}": value for name, value in best}
        values = {
            "groups": optimizer["param_groups"],
            "scheduler": self._scheduler.state_dict(),
            "budget": None if self._budget is None else vars(self._budget),
            "history": self.history,
            "best": [self.best_nll, self.best_step],
        }
        return TrainingState(self.step, tensors | random_state(self._device), values)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint, if there is one.

        :raises ValueError: if it is of other parameters.
        """
        state = checkpoints.latest()
        if state is None:
            return
        tensors, values = dict(state.tensors), state.values
        prefix = "parameter."
        saved = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        wrong = {n for n, p in self._named.items() if n not in saved or saved[n].shape != p.shape}
        wrong |= saved.keys() - self._named.keys()
        if wrong:
            raise ValueError(
                f"the checkpoint of step {state.step} in {checkpoints.folder} is of other"
                f" parameters; these are missing, unknown or of another shape: {sorted(wrong)}"
            )
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(saved[name])
            if self._config.keep == "best":
                for value, name in zip(self.best.values, self._named, strict=True):
                    value.copy_(tensors[f"best.{name}"])
        self._optimizer.load_state_dict({"state": moments, "param_groups": values["groups"]})
        self._scheduler.load_state_dict(values["scheduler"])
        if self._budget is not None:
            vars(self._budget).update(values["budget"])
        self.history.extend(values["history"])
        self.best_nll, self.best_step = values["best"]
        self.step = state.step
        set_random_state(tensors, self._device)


@torch.no_grad()
@pyro.validation_enabled(False)  # the step has seen these very distributions
def _kl(model: LoRAModel, guide: Callable[..., Any], rest: float, beta: float) -> float:
    """KL(q‖p) in nats: in closed form where there is one, else the loss's own estimate.

    :param rest: β·KL − log p(B), what the loss is made of beside the NLL.
    """
    if guide is no_guide:
        return 0.0
    prior = getattr(model, "prior", None)
    if hasattr(guide, "kl") and prior is not None and not getattr(prior, "latents", None):
        exact = guide.kl(prior())
        if exact is not None:
            return float(exact)
    log_prior_B = float(model.log_prior_B()) if isinstance(model, ScalaBLModel) else 0.0
    return (rest + log_prior_B) / beta
