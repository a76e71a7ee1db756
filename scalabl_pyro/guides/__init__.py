"""Guides: families of posterior approximations over the subspace vectors s."""

from __future__ import annotations

import inspect
from typing import Any

from ..models.model import ScalaBLModel
from .base import AutoSubspace
from .delta import AutoSubspaceDelta
from .low_rank_multivariate_normal import AutoSubspaceLowRankMultivariateNormal
from .multivariate_normal import AutoSubspaceMultivariateNormal
from .normal import AutoSubspaceNormal

__all__ = [
    "GUIDES",
    "AutoSubspace",
    "AutoSubspaceDelta",
    "AutoSubspaceLowRankMultivariateNormal",
    "AutoSubspaceMultivariateNormal",
    "AutoSubspaceNormal",
    "check_guide",
    "make_guide",
]

#: guides by the name that configurations and run folders use
GUIDES: dict[str, type[AutoSubspace]] = {
    "delta": AutoSubspaceDelta,
    "low_rank_multivariate_normal": AutoSubspaceLowRankMultivariateNormal,
    "multivariate_normal": AutoSubspaceMultivariateNormal,
    "normal": AutoSubspaceNormal,
}


def check_guide(name: str = "normal", **options: Any) -> None:
    """:raises ValueError: if there is no such guide, or it has no such option."""
    if name not in GUIDES:
        raise ValueError(f"guide.name is {name!r}: expected one of {sorted(GUIDES)}")
    known = [
        p for p in inspect.signature(GUIDES[name]).parameters if p not in ("model", "init_loc")
    ]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(f"the guide {name} has no option {unknown}: expected some of {known}")


def make_guide(model: ScalaBLModel, name: str = "normal", **options: Any) -> AutoSubspace:
    """The guide of that name.

    :raises ValueError: if there is no such guide or option, or a value is out of range.
    """
    check_guide(name, **options)
    return GUIDES[name](model, **options)
