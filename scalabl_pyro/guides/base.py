"""What every guide over s has in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import cast

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import biject_to

from ..lora.adapter import SubspaceAdapter
from ..models.local_parameters import require_local_parameters
from ..models.model import LoRAModel, ScalaBLModel, check_model
from ..models.priors import Prior

__all__ = ["AutoSubspace", "JointNormal", "PosteriorPrior", "check_is_guide"]


def check_is_guide(guide: object) -> None:
    """:raises TypeError: if it cannot be a guide, ours or Pyro's."""
    no_guides = (type, LoRAModel, Prior, SubspaceAdapter)
    if not callable(guide) or isinstance(guide, no_guides):
        kind = guide.__name__ if isinstance(guide, type) else type(guide).__name__
        fixes = {
            "Laplace": "its .guide",
            "Chains": "its .thin(num_draws), which are draws already",
            "NoneType": "a guide, or scalabl_pyro.infer.no_guide for a point estimate",
        }
        fix = f"a guide, {kind}(model)" if isinstance(guide, type) else fixes.get(kind, "a guide")
        what = "the class " if isinstance(guide, type) else "a "
        raise TypeError(f"guide is {what}{kind}: expected {fix}")


class Onto(dist.transforms.ComposeTransform):
    """From the real line onto a support, which is what it says its values lie in.

    Torch's own transform says of some supports, such as the numbers above 0, that its values are
    any numbers, and with it every distribution that is transformed by it.

    :param support: of one coordinate.
    """

    def __init__(self, support: constraints.Constraint) -> None:
        super().__init__([biject_to(support)])
        self._support = support

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]  # of torch a property too
        return self._support


class AutoSubspace(PyroModule):
    r"""A guide that samples the site ``"s"`` (M, r) directly from :meth:`get_posterior`.

    .. math:: z \sim q(z) \text{ on } R^{M × r}, \qquad s = t(z)

    where t maps the real line to the prior's support (the identity for a prior on the real line).
    Further latent sites of the prior, such as a scale, get an independent normal each in the same
    way. A site ``"s_perp"`` of the model is drawn from its prior. The parameters exist from the
    start, without a trace of the model; the guide keeps no reference to the language model, so it
    pickles and saves alone. A subclass defines its parameters in ``__init__``, q(z) in
    :meth:`base` and its marginals in :meth:`marginals`; one whose marginals have no ``icdf``
    overrides :meth:`quantiles`, which the median comes from. Where q is no single distribution,
    because s depends on another latent site, it overrides :meth:`forward`, and
    :func:`~scalabl_pyro.prediction.draw` draws from there.

    :param model: gives the shape, the support and the start of s.
    :param init_loc: (M, r), the initial median of s; ``model.init_loc`` if left out.
    :param init_scale: initial standard deviation of each coordinate of z, above 0.
    :raises ValueError: if a value is out of range or of another shape.
    """

    def __init__(
        self,
        model: ScalaBLModel,
        *,
        init_loc: Tensor | None = None,
        init_scale: float = 0.05,
    ) -> None:
        require_local_parameters()
        check_model(model)
        super().__init__()
        if not (init_loc is None or isinstance(init_loc, Tensor)):
            raise TypeError(f"init_loc is {init_loc!r}: expected a tensor (M, r)")
        loc = model.init_loc if init_loc is None else init_loc.to(model.init_loc.device)
        if init_loc is not None and not init_loc.isfinite().all():
            raise ValueError("init_loc holds NaN or infinity: expected finite numbers")
        if loc.shape != model.init_loc.shape:
            raise ValueError(
                f"init_loc has shape {tuple(loc.shape)}: expected (M, r) ="
                f" {tuple(model.init_loc.shape)}"
            )
        if not (isinstance(init_scale, (int, float)) and 0 < init_scale < math.inf):
            raise ValueError(f"init_scale is {init_scale!r}: expected a finite number above 0")
        #: of each coordinate of s
        self.support = support = model.prior.support
        self._to_support = None if support is constraints.real else Onto(support)
        if self._to_support is not None and not support.check(loc).all():
            raise ValueError(f"init_loc leaves the support of the prior, {support}")
        # A buffer, so that it moves with the parameters; the state does not need it.
        self.register_buffer("_init_loc", self._unconstrained(loc.detach()), persistent=False)
        self._init_scale = float(init_scale)
        self._prior_perp = model.prior_perp
        self._latents = model.prior.latents
        for name, latent in self._latents.items():
            zeros = self._init_loc.new_zeros(latent.shape)
            setattr(self, f"{name}_loc", PyroParam(zeros, constraints.real, 2))
            scale = torch.full_like(zeros, init_scale)
            setattr(self, f"{name}_scale", PyroParam(scale, constraints.softplus_positive, 2))

    def base(self) -> TorchDistribution:
        """q(z), with event shape (M, r)."""
        raise NotImplementedError(f"{type(self).__name__} must define base()")

    def marginals(self) -> TorchDistribution:
        """The marginal of each coordinate of z, with batch shape (M, r)."""
        raise NotImplementedError(
            f"{type(self).__name__} must define marginals(), or override quantiles() and kl()"
        )

    def get_posterior(self) -> TorchDistribution:
        """q(s), with event shape (M, r)."""
        if self._to_support is None:
            return self.base()
        return dist.TransformedDistribution(self.base(), [self._to_support])

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Sample every latent site; the arguments are the model's and are ignored."""
        sites = {"s": pyro.sample("s", self.get_posterior())}
        if self._prior_perp is not None:
            sites["s_perp"] = pyro.sample("s_perp", self._prior_perp)
        for name in self._latents:
            sites[name] = pyro.sample(name, self._of_latent(name).to_event(2))
        return sites

    def _of_latent(self, name: str) -> TorchDistribution:
        """q of a further latent site's coordinates."""
        q = dist.Normal(getattr(self, f"{name}_loc"), getattr(self, f"{name}_scale"))
        return dist.TransformedDistribution(q, [Onto(self._latents[name].support)])

    @torch.no_grad()
    def sample(self, num_draws: int) -> Tensor:
        """(S, M, r) independent draws of s from :meth:`get_posterior`, by torch's random state.

        :func:`~scalabl_pyro.prediction.draw` is what predictors take: it has a seed, and draws
        s_perp beside s.

        :raises ValueError: if S < 1.
        """
        if num_draws < 1:
            raise ValueError(f"the number of draws is {num_draws}: expected 1 or more")
        # A copy: a point's draws are its parameter itself, which training would move.
        return self.get_posterior().sample(torch.Size([num_draws])).detach().clone()

    def with_perp(self, draws: Tensor) -> Tensor:
        """(S, M, r + k): draws of s, each beside one of s_perp, if the model has it.

        :param draws: (S, M, r).
        """
        if self._prior_perp is None:
            return draws
        return torch.cat([draws, self._prior_perp.sample(draws.shape[:1])], -1)

    def as_prior(self) -> PosteriorPrior:
        """q(s) as it is now, for the model of a further task with the same V and B.

        This is variational continual learning (Nguyen et al. 2018, arXiv 1710.10628): with exact
        posteriors, the last one is that of all tasks' data together.

        :raises ValueError: if s is not drawn from :meth:`get_posterior`.
        """
        if not self.draws_from_posterior:
            raise ValueError(
                f"{type(self).__name__} overrides forward, and a prior is get_posterior() alone:"
                " expected a guide that defines base()"
            )
        return PosteriorPrior(self)

    def of_s_alone(self) -> AutoSubspace:
        """A copy without the further latent sites of the prior."""
        copy = deepcopy(self)
        for name in self._latents:
            delattr(copy, f"{name}_loc")
            delattr(copy, f"{name}_scale")
        copy._latents = {}
        return copy

    @property
    def draws_from_posterior(self) -> bool:
        """Whether s is drawn from :meth:`get_posterior`, as it is unless forward is overridden."""
        return type(self).forward is AutoSubspace.forward

    @torch.no_grad()
    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """The median of each coordinate of each latent site, {"s": (M, r), …}; the arguments are
        the model's, as Pyro's guides take them, and are ignored."""
        return {name: value[0] for name, value in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float], *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Marginal quantiles of each coordinate of each latent site, {"s": (len(quantiles), M, r),
        …}; further arguments are ignored.

        :raises NotImplementedError: if the marginals have no ``icdf``.
        """
        levels = torch.as_tensor(quantiles).to(self._init_loc)[:, None, None]
        sites = {"s": self._quantiles(levels)}
        if self._prior_perp is not None:
            sites["s_perp"] = self._prior_perp.base_dist.icdf(levels)
        return sites | {name: self._of_latent(name).icdf(levels) for name in self._latents}

    def _quantiles(self, levels: Tensor) -> Tensor:
        """(K, M, r), those of s at levels (K, 1, 1)."""
        marginals = self.marginals()
        try:
            z = marginals.icdf(levels)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{type(self).__name__}: a {type(marginals).__name__} has no icdf, which quantiles"
                " and the median come from: override quantiles(), for instance by the empirical"
                " ones of many draws"
            ) from error
        return self._constrained(z)

    def entropy(self) -> Tensor:
        """H(q) of z in nats."""
        return self.base().entropy()

    @torch.no_grad()
    def kl(self, prior: TorchDistribution) -> float | None:
        r"""KL(q‖p) in nats where it has a closed form, a normal q and a normal prior p.

        .. math:: KL(q \,\|\, p) = -H(q) - \sum_{mj} E_q[\log p(s_{mj})]
        """
        p = getattr(prior, "base_dist", None)
        if self._latents or self._to_support is not None or not isinstance(p, dist.Normal):
            return None
        try:
            q = self.marginals()
        except NotImplementedError:  # a guide of base() alone
            return None
        if not (isinstance(q, dist.Normal) and self.draws_from_posterior):
            return None
        cross = 0.5 * ((q.loc - p.loc) ** 2 + q.scale**2) / p.scale**2 - p.log_prob(p.loc)
        return float(cross.sum() - self.entropy())

    def _constrained(self, z: Tensor) -> Tensor:
        return z if self._to_support is None else self._to_support(z)

    def _unconstrained(self, s: Tensor) -> Tensor:
        return s.clone() if self._to_support is None else self._to_support.inv(s)


class PosteriorPrior(Prior):
    """The posterior q(s) of an earlier task.

    Further latent sites of that task's prior, such as a scale, are no part of it.

    :param guide: as it is now; whatever becomes of it later is of no effect.
    """

    def __init__(self, guide: AutoSubspace) -> None:
        shape = guide._init_loc.shape
        super().__init__((shape[0], shape[1]))
        if guide._to_support is not None:  # a copy of the real line would be another constraint
            self.support = guide.support
        # A module, so that run folders keep its parameters.
        self.posterior = guide.of_s_alone().requires_grad_(False)

    def __call__(self) -> TorchDistribution:
        # As of a plain module: Pyro lets none with parts that it has called go into a model.
        return cast(TorchDistribution, nn.Module.__call__(self))

    def forward(self) -> TorchDistribution:
        with pyro.poutine.block():  # its parameters are no sites: nothing trains them
            return self.posterior.get_posterior()


class JointNormal(AutoSubspace):
    """A multivariate normal with correlations; a subclass gives :meth:`joint`.

    :param per_module: a normal of its own for each module's r coordinates (event shape (r,), batch
        shape (M,)) instead of one over all D = M·r coordinates (event shape (D,)).
    """

    def __init__(
        self,
        model: ScalaBLModel,
        *,
        init_loc: Tensor | None = None,
        init_scale: float = 0.05,
        per_module: bool = False,
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale)
        if not isinstance(per_module, bool):
            raise ValueError(f"per_module is {per_module!r}: expected true or false")
        self.per_module = per_module

    def joint(self) -> dist.MultivariateNormal | dist.LowRankMultivariateNormal:
        """q(z), with event shape (D,), or (r,) per module."""
        raise NotImplementedError(f"{type(self).__name__} must define joint()")

    def base(self) -> TorchDistribution:
        if self.per_module:
            return self.joint().to_event(1)
        shape = self._init_loc.shape
        to_matrix = dist.transforms.ReshapeTransform(torch.Size([shape.numel()]), shape)
        return dist.TransformedDistribution(self.joint(), [to_matrix])

    def entropy(self) -> Tensor:
        return self.joint().entropy().sum()  # a reshape keeps volumes

    @torch.no_grad()
    def marginals(self) -> dist.Normal:
        joint = self.joint()
        shape = self._init_loc.shape
        return dist.Normal(joint.mean.reshape(shape), joint.stddev.reshape(shape))

    def _start(self) -> tuple[Tensor, Tensor]:
        """Mean and scale at the start, (D,), or (M, r) per module."""
        loc = self._init_loc.clone()
        loc = loc if self.per_module else loc.flatten()
        return loc, torch.full_like(loc, self._init_scale)
