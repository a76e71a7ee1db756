"""What training carries from step to step, and the parts of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer.util import torch_item
from torch import Tensor, nn

from ..data import Batch
from ..distributed import average_gradients, is_main, wait, world_size
from ..models.model import LoRAModel
from .callbacks import Callback
from .checkpoints import (
    Checkpoints,
    Interrupted,
    Snapshot,
    TrainingState,
    random_state,
    set_random_state,
)
from .checks import first_step
from .fit_config import FitConfig
from .kl import KLBudget, kl_weight
from .messengers import LatentKL, ObservedNLL, ScaledToAll
from .parameters import check_moves, num_idle, parameter_groups, trained_parameters

__all__ = ["FitResult", "NonFiniteLossError", "Training", "no_guide"]


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite; parameters are those of the last good step."""


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


class Training:
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
        self.parameters = list(self._named.values())
        # Made from the data or at random, and made again otherwise where numbers round otherwise.
        # Any function of s may stand in the adapter's place.
        state: dict[str, nn.Parameter] = getattr(model.adapter, "state", dict)()
        frozen = {name: p for name, p in state.items() if not p.requires_grad}
        self._kept = self._named | {f"frozen.{name}": p for name, p in frozen.items()}
        if optimizer is None:
            groups = parameter_groups(model, guide, **config.rates)
            optimizer = torch.optim.AdamW(groups, eps=config.eps)
        check_moves(optimizer, self.parameters)
        self._optimizer = optimizer
        self._optimizer.zero_grad()  # what a step left that did not come to its end
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, config.lr_factor)
        self._budget = None if config.kl_budget is None else KLBudget(config.kl_budget)
        self._per_example = 1 / (model.num_data * config.accumulation)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._good = Snapshot(self.parameters)
        self.best = Snapshot(self.parameters)
        self.best_nll, self.best_step = math.inf, config.steps

    @property
    def over(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        config = self._config
        waited = (self.step - self.best_step) / config.eval_every if config.patience else 0
        return self.step >= config.steps or waited >= max(config.patience, 1)

    @property
    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def beta(self) -> float:
        """The KL weight of the next step."""
        factor = 1.0 if self._budget is None else self._budget.factor
        return factor * self._config.kl(self.step, self._config.steps)

    def gradients(
        self, elbo: Any, minibatches: Iterator[Batch], beta: float
    ) -> tuple[float, float, float]:
        """Leave the gradients of −ELBO in the parameters; the loss −ELBO/N, the NLL and the KL."""
        loss, nll, given_more = 0.0, 0.0, False
        latents = LatentKL(beta)
        first = self.step == 0
        checks = first_step(self.parameters) if first else pyro.validation_enabled(False)
        with checks, kl_weight(beta):
            for _ in range(self._config.accumulation):
                # Once: adapter and likelihood each need it there.
                batch = next(minibatches).to(self._device)
                observed = ObservedNLL()
                with ScaledToAll(self._model.num_data, len(batch)), observed, latents:
                    negative_elbo = elbo.loss_and_grads(self._model, self._guide, batch)
                loss += torch_item(negative_elbo) * self._per_example
                nll += observed.total() * self._per_example
                given_more |= observed.given_more
        if given_more:  # the likelihood is what the ELBO has beside its own KL, of the draws
            nll = loss - beta * latents.sampled() / self._model.num_data
        kl = _closed_form_kl(self._model, self._guide)
        return loss, nll, latents.total() if kl is None else kl

    def over_ranks(
        self, loss: float, nll: float, kl: float, checkpoints: Checkpoints | None
    ) -> tuple[float, float, float, bool]:
        """Average the gradients and these; and whether a process was asked to stop."""
        stop = checkpoints is not None and checkpoints.asked
        if world_size() == 1:
            return loss, nll, kl, stop
        terms = torch.tensor([loss, nll, kl, float(stop)], device=self._device)
        average_gradients(self.parameters, terms)
        loss, nll, kl, share = terms.tolist()
        return loss, nll, kl, share > 0  # all stop if one is asked to

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

    def record(self, loss: float, nll: float, kl: float, beta: float) -> None:
        """Add a row to the history, of the parameters before the step."""
        row: dict[str, float] = {
            "step": self.step + 1,
            "loss": loss,
            "nll": nll,
            "kl": kl,
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

    def validate(self, nll: Callable[[], float] | None) -> None:
        """Where a validation is due, remember the current parameters if they are the best so far.

        :param nll: of the validation examples; ``None`` where there is nothing to validate.
        :raises NonFiniteLossError: if the NLL is no number.
        """
        every = self._config.eval_every
        if nll is None or not every or not (self.over or self.step % every == 0):
            return
        self._model.eval()
        try:
            validation_nll = self.history[-1]["validation_nll"] = nll()
            if math.isnan(validation_nll):
                raise NonFiniteLossError(f"the validation NLL is {validation_nll}")
        except NonFiniteLossError as error:
            self._good.restore()
            raise NonFiniteLossError(
                f"{error}; this was after step {self.step}, and the parameters are those of step"
                f" {self.step - 1}; lower lr or lr_guide"
            ) from error
        self._model.train()
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
        trained = sum(p.numel() for p in self.parameters) - num_idle(self._guide)
        return FitResult(self.history, step, trained)

    def state(self) -> TrainingState:
        """All of it, and torch's random state."""
        optimizer = self._optimizer.state_dict()
        tensors: dict[str, Tensor] = {f"parameter.{n}": p for n, p in self._kept.items()}
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
        wrong = {n for n, p in self._kept.items() if n not in saved or saved[n].shape != p.shape}
        wrong |= saved.keys() - self._kept.keys()
        if wrong:
            raise ValueError(
                f"the checkpoint of step {state.step} in {checkpoints.folder} is of other"
                f" parameters; these are missing, unknown or of another shape: {sorted(wrong)};"
                " remove the folder to start anew"
            )
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
        with torch.no_grad():
            for name, parameter in self._kept.items():
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
@pyro.validation_enabled(False)  # the step sees these very distributions
def _closed_form_kl(model: LoRAModel, guide: Callable[..., Any]) -> float | None:
    """KL(q‖p) in nats, where there is a closed form."""
    if guide is no_guide:
        return 0.0
    prior = getattr(model, "prior", None)
    if not hasattr(guide, "kl") or prior is None or getattr(prior, "latents", None):
        return None
    kl: float | None = guide.kl(prior())
    return kl
