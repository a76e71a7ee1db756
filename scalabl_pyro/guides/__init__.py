"""Guides: families of posterior approximations over the subspace vectors s."""

from __future__ import annotations

from typing import Any

from ..models.model import ScalaBLModel
from ..registry import check_named, check_types, named
from .base import AutoSubspace
from .delta import AutoSubspaceDelta
from .low_rank_multivariate_normal import AutoSubspaceLowRankMultivariateNormal
from .multivariate_normal import AutoSubspaceMultivariateNormal
from .normal import AutoSubspaceNormal
from .relaxed_bernoulli import AutoSubspaceRelaxedBernoulli
from .top_normal import AutoSubspaceTopNormal

__all__ = [
    "GUIDES",
    "AutoSubspace",
    "AutoSubspaceDelta",
    "AutoSubspaceLowRankMultivariateNormal",
    "AutoSubspaceMultivariateNormal",
    "AutoSubspaceNormal",
    "AutoSubspaceRelaxedBernoulli",
    "AutoSubspaceTopNormal",
    "check_guide",
    "make_guide",
]

#: guides by the name that configurations and run folders use
GUIDES: dict[str, type[AutoSubspace]] = {
    "delta": AutoSubspaceDelta,
    "low_rank_multivariate_normal": AutoSubspaceLowRankMultivariateNormal,
    "multivariate_normal": AutoSubspaceMultivariateNormal,
    "normal": AutoSubspaceNormal,
    "relaxed_bernoulli": AutoSubspaceRelaxedBernoulli,
    "top_normal": AutoSubspaceTopNormal,
}


def check_guide(name: str = "normal", **options: Any) -> None:
    """Before there is a model to make it for.

    :raises ValueError: if there is no such guide or option, or a value is of another type.
    """
    check_named(GUIDES, "guide", name, None, **options)
    check_types(GUIDES[name], "guide", options)


def make_guide(model: ScalaBLModel, name: str = "normal", **options: Any) -> AutoSubspace:
    """The guide of that name.

    :raises ValueError: if there is no such guide or option, or a value is out of range.
    """
    return named(GUIDES, "guide", name, model, **options)
