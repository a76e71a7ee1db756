"""Guides: families of posterior approximations over the subspace vectors s."""

from .base import AutoSubspace
from .normal import AutoSubspaceNormal

__all__ = ["GUIDES", "AutoSubspace", "AutoSubspaceNormal"]

#: guides by the name that configurations and run folders use
GUIDES: dict[str, type[AutoSubspace]] = {"normal": AutoSubspaceNormal}
