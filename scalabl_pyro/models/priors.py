"""Priors over the subspace vectors s: fixed, learned, or with latent scales of their own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from ..registry import named
from ..rng import forked_rng
from .local_parameters import make_parameters_local

make_parameters_local()  # before a first model or guide of this package can be made

__all__ = [
    "PRIORS",
    "FixedPrior",
    "HierarchicalNormal",
    "Horseshoe",
    "Latent",
    "LearnedNormal",
    "Prior",
    "latent_dims",
    "make_prior",
]


class Latent(NamedTuple):
    """A latent site that a prior has beside ``"s"``, whose two dimensions are event dimensions."""

    shape: tuple[int, int]
    support: constraints.Constraint


def latent_dims(shape: Sequence[int], of_s: Sequence[int]) -> list[str | None]:
    """The names of a further latent site's two dimensions; none where its size is 1 and that of s
    is not.

    :param of_s: the shape of s.
    """
    sizes = zip(("module", "rank"), shape, of_s, strict=True)
    return [name if size == size_of_s else None for name, size, size_of_s in sizes]


class Prior(PyroModule):
    """p(s). Called in a model, it samples its own latent sites and returns the prior of ``"s"``.

    A subclass says in :attr:`latents` which sites those are, so that every guide covers them.

    :param shape: (M, r).
    """

    #: where s may lie
    support: constraints.Constraint = cast(constraints.Constraint, constraints.real)

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = (shape[0], shape[1])
        self.latents: dict[str, Latent] = {}

    def forward(self) -> TorchDistribution:
        """The distribution of s, with event shape (M, r)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")


class FixedPrior(Prior):
    """Any distribution of one number, for each coordinate.

    :param coordinate: with a batch shape that expands to (M, r), on an interval of the real line.
    :raises ValueError: if it is a distribution of more than one number, of another shape, or
        discrete; if a parameter of it is no finite number; or if it says that its support is the
        real line, and it is not.
    """

    def __init__(self, shape: tuple[int, int], coordinate: TorchDistribution) -> None:
        super().__init__(shape)
        _check_finite(coordinate)
        self.support = cast(constraints.Constraint, coordinate.support)
        reals = torch.tensor([-1e6, 0.0, 1e6], device=_device(coordinate))
        if not coordinate.event_shape and self.support.check(reals).all():
            self.support = Prior.support  # by whatever name, as a mixture's
            _check_on_the_line(coordinate)
        if coordinate.event_shape or self.support.is_discrete:
            raise ValueError(
                f"the prior is {coordinate} with event shape {tuple(coordinate.event_shape)} and"
                f" support {coordinate.support}: expected a distribution of one continuous number"
            )
        try:
            self._coordinate = coordinate.expand(torch.Size(shape))
        except RuntimeError as error:
            raise ValueError(
                f"the prior has batch shape {tuple(coordinate.batch_shape)}, which does not expand"
                f" to (M, r) = {tuple(shape)}"
            ) from error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedPrior:
        """As of any module; the distribution's parameters, which belong to none, move too."""
        super()._apply(fn, recurse)
        here = _device(self._coordinate)
        device = fn(torch.empty(0, device=here)).device
        if device != here:
            self._coordinate = _on(device, self._coordinate)
            if self.support is not Prior.support:  # its bounds may be tensors too
                self.support = cast(constraints.Constraint, self._coordinate.support)
        return self

    def forward(self) -> TorchDistribution:
        return self._coordinate.to_event(2)


class LearnedNormal(Prior):
    r"""Normal(0, τ²) whose scale is learned by empirical Bayes, as a parameter of the model.

    :param scale: τ at the start.
    :param per_module: a scale τ_m for each module instead of one in all.
    """

    scale: Tensor  # (M, 1) or (1, 1)

    def __init__(
        self, shape: tuple[int, int], *, scale: float = 1.0, per_module: bool = True
    ) -> None:
        super().__init__(shape)
        if not isinstance(per_module, bool):
            raise ValueError(f"per_module is {per_module!r}: expected true or false")
        start = torch.full((shape[0] if per_module else 1, 1), _positive("scale", scale))
        self.scale = PyroParam(start, constraints.softplus_positive, 2)  # type: ignore[assignment]

    def forward(self) -> TorchDistribution:
        return dist.Normal(0.0, self.scale).expand(self.shape).to_event(2)


class HierarchicalNormal(Prior):
    r"""A latent scale for each module.

    .. math:: τ_m \sim \mathrm{HalfNormal}(τ), \qquad s_{mj} \sim \mathrm{Normal}(0, τ_m^2)

    :param scale: τ, of the half-normal.
    """

    scale: Tensor

    def __init__(self, shape: tuple[int, int], *, scale: float = 1.0) -> None:
        super().__init__(shape)
        self.latents = {"module_scale": Latent((shape[0], 1), constraints.positive)}
        self.register_buffer("scale", torch.full((shape[0], 1), _positive("scale", scale)))

    def forward(self) -> TorchDistribution:
        tau = pyro.sample("module_scale", dist.HalfNormal(self.scale).to_event(2))
        return _normals(tau, self.shape)


class Horseshoe(Prior):
    r"""Sparse: most coordinates near 0, few far from it (Carvalho, Polson & Scott 2010).

    .. math:: τ \sim C^+(0, τ_0), \quad λ_{mj} \sim C^+(0, 1), \quad
              s_{mj} \sim \mathrm{Normal}(0, τ^2 λ_{mj}^2)

    :param scale: τ₀, of the global half-Cauchy.
    """

    scale: Tensor
    ones: Tensor

    def __init__(self, shape: tuple[int, int], *, scale: float = 1.0) -> None:
        super().__init__(shape)
        self.latents = {
            "global_scale": Latent((1, 1), constraints.positive),
            "local_scale": Latent((shape[0], shape[1]), constraints.positive),
        }
        self.register_buffer("scale", torch.full((1, 1), _positive("scale", scale)))
        self.register_buffer("ones", torch.ones(shape))

    def forward(self) -> TorchDistribution:
        tau = pyro.sample("global_scale", dist.HalfCauchy(self.scale).to_event(2))
        lam = pyro.sample("local_scale", dist.HalfCauchy(self.ones).to_event(2))
        return _normals(tau * lam, self.shape)


def make_prior(shape: tuple[int, int], name: str = "normal", **options: Any) -> Prior:
    """The prior of that name.

    :param options: of its entry in ``PRIORS``.
    :raises ValueError: if there is no such prior or option, or a value is out of range.
    """
    return named(PRIORS, "prior", name, shape, **options)


def _fixed(make: Callable[..., TorchDistribution]) -> Callable[..., Prior]:
    """A prior from a function of options that gives the distribution of one coordinate."""

    def prior(shape: tuple[int, int], **options: Any) -> Prior:
        return FixedPrior(shape, make(**options))

    # Its options are those of ``make``, for whoever asks what they are.
    first = next(iter(inspect.signature(prior).parameters.values()))
    own = inspect.signature(make).parameters.values()
    prior.__signature__ = inspect.Signature([first, *own])  # type: ignore[attr-defined]
    return prior


#: priors by the name that configurations use, as functions of (M, r) and options
PRIORS: dict[str, Callable[..., Prior]] = {
    "hierarchical_normal": HierarchicalNormal,
    "horseshoe": Horseshoe,
    "laplace": _fixed(lambda scale=1.0: dist.Laplace(0.0, _positive("scale", scale))),
    "learned_normal": LearnedNormal,
    "log_normal": _fixed(lambda scale=1.0: dist.LogNormal(0.0, _positive("scale", scale))),
    "normal": _fixed(lambda loc=0.0, scale=1.0: dist.Normal(loc, _positive("scale", scale))),
    "relaxed_bernoulli": _fixed(
        lambda probs=0.5, temperature=0.5: dist.RelaxedBernoulli(
            torch.tensor(_positive("temperature", temperature)),
            probs=torch.tensor(_positive("probs", probs, below=1.0)),
        )
    ),
}


def _positive(name: str, value: float, *, below: float = math.inf) -> float:
    if not (isinstance(value, (int, float)) and 0 < value < below):
        raise ValueError(f"{name} is {value!r}: expected a number above 0 and below {below:g}")
    return float(value)


def _check_on_the_line(coordinate: TorchDistribution) -> None:
    """:raises ValueError: if it has no density somewhere on the real line. The support of a
    transformed distribution is the range of its last transform, wherever the base may be."""
    sizes = [10.0**exponent for exponent in range(-6, 7)]
    # Torch's by itself, too: torch.compile, which other libraries call, turns it off for good.
    validated = pyro.settings.context(
        validate_distributions_pyro=True, validate_distributions_torch=True
    )
    with validated, torch.no_grad():
        for value in (sign * size for size in sizes for sign in (1, -1)):
            try:
                density = coordinate.log_prob(torch.tensor(value, device=_device(coordinate)))
                bad = bool(density.isnan().any())
            except ValueError:  # of the base, which knows its own support
                bad = True
            if bad:
                raise ValueError(
                    f"the prior is {coordinate}, whose support is said to be the real line, and it"
                    f" has no density at {value:g}: expected a distribution with the right"
                    " support, such as a subclass that overrides it"
                )


def _check_finite(distribution: TorchDistribution) -> None:
    # torch's own check of parameters is off under Pyro.
    for name in distribution.arg_constraints:
        value = getattr(distribution, name, None)
        if isinstance(value, Tensor) and not value.isfinite().all():
            bad = float(value[~value.isfinite()].flatten()[0])
            raise ValueError(f"the prior's {name} is {bad}: expected finite numbers")


def _normals(scale: Tensor, shape: tuple[int, int]) -> TorchDistribution:
    """Normal(0, scale²) with event shape (M, r), whatever draws lead the scale's shape."""
    batch = torch.Size((*scale.shape[:-2], *shape))
    return dist.Normal(0.0, scale).expand(batch).to_event(2)


def _device(distribution: TorchDistribution) -> torch.device:
    """Where the distribution's draws are."""
    with forked_rng():
        return distribution.sample().device


def _on(device: torch.device, value: Any) -> Any:
    """The same distribution with every tensor that it or a part of it holds on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_on(device, part) for part in value]
    if not isinstance(value, (torch.distributions.Distribution, torch.distributions.Transform)):
        return value
    moved = copy(value)
    moved.__dict__.update({name: _on(device, part) for name, part in vars(value).items()})
    return moved
