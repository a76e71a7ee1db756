"""Stochastic variational inference: one visible loop over minibatches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.nn import PyroModule
from torch import nn

from ..data import Split
from ..distributed import check_same, copy_from_main, is_main, rank, world_size
from ..guides import AutoSubspaceDelta
from ..models.model import LoRAModel
from .callbacks import Callback, ProgressBar
from .checkpoints import Checkpoints
from .checks import check_elbo, check_program
from .fit_config import FitConfig
from .parameters import make_parameters
from .training import FitResult, Training, no_guide

__all__ = ["fit"]

log = logging.getLogger(__name__)


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

    In a process group of ``torch.distributed`` every process has its share of each minibatch and
    the first one's projections and guide to start from, and all must start from the same random
    state, so that they draw the same s.

    :param model: with its projections; ``model.num_data`` is N.
    :param guide: any Pyro guide for the model, or :func:`no_guide` for a point estimate.
    :param train: the N labelled examples.
    :param seed: fixes the order of the examples; the draws of s follow Pyro's own random state.
    :param elbo: ``Trace_ELBO`` if left out; any ELBO of Pyro whose loss is one number of traces
        that Python runs: not compiled, nor wake-sleep.
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
    check_program(model, guide, train)
    check_elbo(elbo)
    _check(model, guide, config, validate, callbacks)
    elbo = Trace_ELBO(max_plate_nesting=1) if elbo is None else elbo
    make_parameters(guide, train)
    _tell_reach(guide, config)
    model.start_readout(train)
    run = Training(model, guide, config, optimizer)
    if world_size() > 1:
        # Gradients are averaged: they have to be of the same V, which rounding on another device
        # may have turned round.
        copy_from_main([*model.adapter.state().values(), *run.parameters])
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
    model.train()
    with (
        model.projections.one_site(),
        checkpoints.interruptible() if checkpoints else nullcontext(),
        ExitStack() as ends,
    ):
        ends.callback(model.eval)  # however training ends
        for callback in callbacks:
            ends.callback(callback.on_end, run.history)
        while not run.over:
            beta = run.beta
            loss, nll, kl = run.gradients(elbo, minibatches, beta)
            loss, nll, kl, stop = run.over_ranks(loss, nll, kl, checkpoints)
            run.clip(loss)
            run.record(loss, nll, kl, beta)
            run.take_step()
            run.validate(validate)
            run.tell(callbacks)
            if checkpoints is not None:
                run.save(checkpoints, stop)
    return run.result()


def _check(
    model: LoRAModel,
    guide: Callable[..., Any],
    config: FitConfig,
    validate: Callable[[], float] | None,
    callbacks: Sequence[Callback],
) -> None:
    """Refuse settings of this loop that do not go together."""
    for name, value, kind, made in (
        ("config", config, FitConfig, "FitConfig(steps=…)"),
        ("callbacks", callbacks, Sequence, "a list of Callback objects"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}: expected {made}")
    if validate is not None and not callable(validate):
        raise TypeError(
            f"validate is a {type(validate).__name__}: expected a function that returns the NLL,"
            " such as lambda: sp.evaluate(answers.logits, answers.labels)['nll'] of answers ="
            " sp.predict(sp.Predictor(adapter, sp.draw(guide, 10, seed=0)), split)"
        )
    if config.eval_every and validate is None:
        raise ValueError("eval_every is set, but no validate function was given")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ValueError(f"callbacks holds {callback!r}: expected objects of Callback classes")
    points = (AutoSubspaceDelta, AutoDelta)
    if config.kl_budget is not None and (guide is no_guide or isinstance(guide, points)):
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
