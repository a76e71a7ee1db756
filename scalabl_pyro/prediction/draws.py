"""Draws of s: independent, antithetic or quasi-random, and which modules stay random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import Tensor
from torch.nn.functional import pad
from torch.quasirandom import SobolEngine

from ..data import Batch
from ..guides import AutoSubspace
from ..guides.base import check_is_guide
from ..rng import forked_rng

__all__ = ["KINDS", "draw", "hold", "signal_to_noise"]


def draw(
    guide: Callable[..., Any],
    num_draws: int,
    *,
    seed: int,
    kind: str = "independent",
    batch: Batch | None = None,
) -> Tensor:
    r"""S draws of s, (S, M, r), independent of the global random state; of s and s_perp,
    (S, M, r + k), for a model that has both.

    Each draw has the distribution q(s) whatever the kind; together they may cover it better. With
    s = t(ε) for a standard normal ε,

    * ``independent``: ε_1, …, ε_S independent;
    * ``antithetic``: pairs ε, −ε (Hammersley & Morton 1956): averages are exact for whatever is
      linear in ε;
    * ``sobol``: ε = Φ⁻¹(u) at a scrambled Sobol sequence u in the unit cube (Owen 1998). Every
      prefix of the draws covers the cube evenly, best where S is a power of 2.

    Draws of s_perp are independent ones from its prior, whatever the kind.

    :param guide: any guide that samples ``"s"``, ours or Pyro's.
    :param seed: fixes the draws.
    :param kind: one of :data:`KINDS`; but for ``independent``, it needs a guide with a normal q.
    :param batch: what Pyro's own guides are called with; ours need none.
    :raises TypeError: if it is no guide.
    :raises ValueError: if S < 1, a guide of Pyro comes without a batch, the kind is unknown, it has
        more dimensions than Sobol's, or it needs a normal q and the guide has none.
    """
    if num_draws < 1:
        raise ValueError(f"the number of draws is {num_draws}: expected 1 or more")
    if kind not in KINDS:
        raise ValueError(f"the kind of draws is {kind!r}: expected one of {sorted(KINDS)}")
    check_is_guide(guide)
    with forked_rng(seed), torch.no_grad():
        draws = KINDS[kind](guide, num_draws, seed, batch)
        if isinstance(guide, AutoSubspace) and guide.draws_from_posterior:
            return guide.with_perp(draws)
        return draws


def _independent(
    guide: Callable[..., Any], num_draws: int, seed: int, batch: Batch | None
) -> Tensor:
    if isinstance(guide, AutoSubspace) and guide.draws_from_posterior:
        return guide.sample(num_draws)
    unmade = isinstance(guide, AutoGuide) and guide.prototype_trace is None
    if batch is None and (unmade or isinstance(guide, GuideMessenger)):
        raise ValueError(
            f"{type(guide).__name__} runs the model, which needs a batch: give batch=, one of the"
            " training split"
        )
    drawn = [_sites(guide, batch) for _ in range(num_draws)]
    return torch.cat([torch.stack([sites[name] for sites in drawn]) for name in drawn[0]], -1)


def _sites(guide: Callable[..., Any], batch: Batch | None) -> dict[str, Tensor]:
    """``s``, and ``s_perp`` if there is one, of one run of a guide.

    :raises ValueError: if it neither samples nor returns ``s``.
    """
    nodes: Any = poutine.trace(guide).get_trace(batch).nodes
    sites = {n: node["value"] for n, node in nodes.items() if node["type"] == "sample"}
    returned = nodes["_RETURN"]["value"]
    found = sites if "s" in sites or not isinstance(returned, dict) else returned
    if "s" not in found:
        raise ValueError(
            f"the guide samples {list(sites)}, and not 's': expected a guide of the model as it is;"
            " one of a model under poutine.reparam predicts by pyro.infer.Predictive"
        )
    return {name: found[name] for name in ("s", "s_perp") if name in found}


def _antithetic(
    guide: Callable[..., Any], num_draws: int, seed: int, batch: Batch | None
) -> Tensor:
    q, like = _known(guide, "antithetic")
    half = torch.randn(-(-num_draws // 2), like.numel(), dtype=torch.float64)
    noise = torch.stack([half, -half], 1).flatten(0, 1)[:num_draws]
    return _transform(q, noise.to(like))


def _quasi_random(
    guide: Callable[..., Any], num_draws: int, seed: int, batch: Batch | None
) -> Tensor:
    q, like = _known(guide, "sobol")
    return _transform(q, _sobol(num_draws, like.numel(), seed).to(like))


def _known(guide: Callable[..., Any], kind: str) -> tuple[TorchDistribution, Tensor]:
    """q(s), and a tensor of as many numbers as its noise has."""
    if not isinstance(guide, AutoSubspace):
        raise ValueError(
            f"{kind} draws need a guide of scalabl_pyro, whose q(s) is known, and this one is a"
            f" {type(guide).__name__}; use kind='independent'"
        )
    if not guide.draws_from_posterior:
        raise ValueError(
            f"{kind} draws are of get_posterior(), and {type(guide).__name__} overrides forward;"
            " use kind='independent'"
        )
    inner = posterior = guide.get_posterior()
    while hasattr(inner, "base_dist"):
        inner = inner.base_dist
    size = (inner.batch_shape + inner.event_shape).numel()
    return posterior, guide.median()["s"].new_empty(size)


#: kinds of draws by name: functions of the guide, S, a seed and a batch, which draw from torch's
#: random state, seeded already, and return (S, M, r)
KINDS: dict[str, Callable[[Callable[..., Any], int, int, Batch | None], Tensor]] = {
    "antithetic": _antithetic,
    "independent": _independent,
    "sobol": _quasi_random,
}


def signal_to_noise(draws: Tensor) -> Tensor:
    r"""How sure a posterior is of each module, (M,).

    .. math:: \mathrm{SNR}_m = \sqrt{\sum_j μ_{mj}^2 \Big/ \sum_j σ_{mj}^2}

    :param draws: (S, M, r), enough for a standard deviation; a thousand cost nothing.
    """
    noise = draws.var(0).sum(-1)
    return (draws.mean(0).square().sum(-1) / noise).sqrt()


def hold(draws: Tensor, loc: Tensor, random: Tensor) -> Tensor:
    """The draws with some modules at one value, (S, M, r).

    An adapter runs the blocks below the first random module once for all draws, so that::

        draws = hold(draws, guide.median()["s"], adapter.trunk.above(18))       # by depth
        draws = hold(draws, guide.median()["s"], signal_to_noise(draws) < 3)    # by their spread

    cost less. They are draws of another, narrower posterior.

    :param draws: (S, M, r), or (S, M, r + k) with those of s_perp, which is then 0 where a module
        stays.
    :param loc: (M, r), where the other modules stay.
    :param random: (M,), true for the modules that stay random.
    """
    perp = draws.shape[-1] - loc.shape[-1]
    return torch.where(random.to(draws.device)[:, None], draws, pad(loc, (0, perp)))


def _sobol(num_draws: int, dimensions: int, seed: int) -> Tensor:
    if dimensions > SobolEngine.MAXDIM:
        raise ValueError(
            f"s has {dimensions} numbers, but Sobol sequences have at most {SobolEngine.MAXDIM}"
            " dimensions; use kind='antithetic'"
        )
    points = SobolEngine(dimensions, scramble=True, seed=seed).draw(num_draws, dtype=torch.float64)
    # Points lie on a grid that includes 0: the middle of a cell has a finite quantile.
    return torch.special.ndtri(points + 0.5 ** (SobolEngine.MAXBIT + 1))


def _transform(q: TorchDistribution, noise: Tensor) -> Tensor:
    """Draws of q, made of a standard normal noise (S, D)."""
    if isinstance(q, torch.distributions.TransformedDistribution):
        value = _transform(q.base_dist, noise)
        for transform in q.transforms:
            value = transform(value)
        return value
    if isinstance(q, torch.distributions.Independent):
        return _transform(q.base_dist, noise)
    if isinstance(q, torch.distributions.Normal):
        return q.loc + q.scale * noise.view(-1, *q.batch_shape)
    if isinstance(q, (dist.MultivariateNormal, dist.LowRankMultivariateNormal)):
        rows = noise.view(-1, *q.batch_shape, *q.event_shape, 1)
        return q.mean + (q.scale_tril @ rows).squeeze(-1)
    raise ValueError(
        f"there is no map from normal noise to draws of a {type(q).__name__}; use"
        " kind='independent'"
    )
