"""What training moves, and at which rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from torch import nn

from ..data import Split
from ..models.model import LoRAModel

__all__ = [
    "check_moves",
    "make_parameters",
    "num_idle",
    "parameter_groups",
    "trained_parameters",
]

#: constraints of triangular factors → whether their diagonal is free
_DIAGONALS = {
    type(constraints.lower_cholesky): True,
    type(constraints.softplus_lower_cholesky): True,
    type(constraints.unit_lower_cholesky): False,
}


def make_parameters(guide: Callable[..., Any], train: Split) -> None:
    """Let a guide make its parameters, as Pyro's automatic guides do at their first call."""
    parts = list(guide.modules()) if isinstance(guide, nn.Module) else []
    waits = any(isinstance(part, AutoGuide) and part.prototype_trace is None for part in parts)
    if parts and (waits or not list(guide.parameters())):  # type: ignore[attr-defined]
        with torch.no_grad(), pyro.poutine.block():
            guide(train.collate(train.examples[:1]))


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
        numbers |= {f"guide.{name}": p for name, p in guide.named_parameters() if p.requires_grad}
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


def num_idle(guide: Callable[..., Any]) -> int:
    """How many numbers of a guide nothing depends on: a triangular factor is a square matrix, of
    which the part above the diagonal stays, and of a unit one the diagonal too."""
    idle = 0
    for module in guide.modules() if isinstance(guide, nn.Module) else ():
        for name, (constraint, _) in getattr(module, "_pyro_params", {}).items():
            if type(constraint) in _DIAGONALS:
                value = getattr(module, f"{name}_unconstrained")
                if not value.requires_grad:
                    continue
                D = value.shape[-1]
                above = D * (D - 1) // 2 + D * (not _DIAGONALS[type(constraint)])
                idle += value.numel() // D**2 * above
    return idle


def check_moves(optimizer: object, parameters: Sequence[nn.Parameter]) -> None:
    """:raises ValueError: unless it is one of torch over these parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}: expected one of torch over"
            " scalabl_pyro.infer.parameter_groups(model, guide, lr=…, lr_guide=…); those of"
            " Pyro are for pyro.infer.SVI"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "the optimizer is LBFGS, which evaluates the loss several times a step, and each would"
            " be of other draws of s: expected one that takes a gradient, such as AdamW or SGD"
        )
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if moved != {id(parameter) for parameter in parameters}:
        raise ValueError(
            f"the {type(optimizer).__name__} given is over {len(moved)} parameters: expected the"
            f" {len(parameters)} that are trained, those of"
            " scalabl_pyro.infer.parameter_groups(model, guide, lr=…, lr_guide=…)"
        )
