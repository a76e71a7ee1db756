"""Guides: families of posterior approximations over the subspace vectors s."""

from .base import AutoSubspace
from .low_rank_multivariate_normal import AutoSubspaceLowRankMultivariateNormal
from .multivariate_normal import AutoSubspaceMultivariateNormal
from .normal import AutoSubspaceNormal

__all__ = [
    "GUIDES",
    "AutoSubspace",
    "AutoSubspaceLowRankMultivariateNormal",
    "AutoSubspaceMultivariateNormal",
    "AutoSubspaceNormal",
]

#: guides by the name that configurations and run folders use
GUIDES: dict[str, type[AutoSubspace]] = {
    "low_rank_multivariate_normal": AutoSubspaceLowRankMultivariateNormal,
    "multivariate_normal": AutoSubspaceMultivariateNormal,
    "normal": AutoSubspaceNormal,
}
