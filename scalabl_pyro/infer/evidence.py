"""The precision of a normal prior by the evidence of a Laplace approximation (MacKay 1992)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

__all__ = ["log_det_by_eigenvalues", "precision_by_evidence"]

log = logging.getLogger(__name__)

#: where λ is looked for
_BOUNDS = (1e-6, 1e6)


def log_det_by_eigenvalues(H: Tensor) -> Callable[[float], float]:
    """log det(H + λI) as a function of λ, of a (D, D) H ≥ 0 but for rounding."""
    eigenvalues = torch.linalg.eigvalsh(H).clamp(min=0)
    return lambda precision: float((eigenvalues + precision).log().sum())


def precision_by_evidence(
    log_det: Callable[[float], float], numbers: int, distance: float
) -> float:
    r"""The λ from 1e-6 to 1e6 that maximises the evidence at a fixed mode θ* of P numbers.

    .. math:: \log p(D \mid λ) = \mathrm{const} - \tfrac{λ}{2} ‖θ^* - μ‖^2 + \tfrac{P}{2} \log λ
              - \tfrac{1}{2} \log\det(H + λI)

    It is concave in log λ. Where it still rises at a bound, that is told, and the bound returned.

    :param log_det: log det(H + λI) as a function of λ.
    :param numbers: P.
    :param distance: ‖θ* − μ‖², with the prior's mean μ.
    """

    def cost(t: float) -> float:
        return math.exp(t) * distance - numbers * t + log_det(math.exp(t))

    low, high = map(math.log, _BOUNDS)
    found = minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-5})
    precision = math.exp(found.x)
    for bound in _BOUNDS:
        if math.isclose(precision, bound, rel_tol=1e-3):
            log.warning(
                "the prior precision with the highest evidence lies beyond %g, where it is looked"
                " for: %g is taken; set it to what you believe in",
                bound,
                bound,
            )
            return bound
    return precision
