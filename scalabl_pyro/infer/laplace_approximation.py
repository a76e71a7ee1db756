"""Laplace approximation of p(s | D) for fixed projections: a normal from curvature at a mode."""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data import Batch, Split
from ..guides import AutoSubspaceMultivariateNormal
from ..lora.jacobian import derivatives, jacobian
from ..models.model import ScalaBLModel, check_latents_of_data, check_model, check_observes
from .batches import whole_split
from .evidence import log_det_by_eigenvalues, precision_by_evidence
from .messengers import ScaledToAll

__all__ = [
    "CURVATURES",
    "Laplace",
    "ggn",
    "hessian",
    "laplace",
    "normal_prior",
]


class Laplace(NamedTuple):
    """What :func:`laplace` returns.

    :param guide: the normal, which samples, predicts and saves like any other guide.
    :param log_evidence: log p(D) of the approximation, in nats.
    :param prior_precision: λ, if it was chosen by evidence.
    """

    guide: AutoSubspaceMultivariateNormal
    log_evidence: float
    prior_precision: float | None


def laplace(
    model: ScalaBLModel,
    split: Split,
    *,
    loc: Tensor | None = None,
    curvature: str = "ggn",
    by_evidence: bool = False,
    batch_size: int = 16,
) -> Laplace:
    r"""A normal at a mode s*, across all modules (MacKay 1992; Daxberger et al. 2021, 2106.14806).

    .. math:: q(\mathrm{vec}\, s) = \mathrm{Normal}\big(s^*, (H + Λ)^{-1} \big), \quad
              H = -\sum_n ∇^2_s \log p(y_n \mid x_n, s)\big|_{s^*}

    with the precision Λ of the prior, which must be normal. By evidence, Λ = λ·I with the λ that
    maximises, at the given s*,

    .. math:: \log p(D) ≈ \log p(D \mid s^*) + \log p(s^* \mid λ) + \tfrac{D}{2} \log 2π
              - \tfrac{1}{2} \log\det(H + Λ), \qquad D = M r

    :param split: the N labelled examples of ``model.num_data``.
    :param loc: (M, r), s*: the ``loc`` of an ``AutoSubspaceDelta`` fitted to the split;
        ``model.init_loc`` if left out, for a trained LoRA.
    :param curvature: ``ggn`` or ``hessian``.
    :param by_evidence: choose the prior's precision, in place of that of the model's prior. There
        is none to choose where s* is the prior's mean.
    :param batch_size: B of a pass.
    :raises ValueError: if the prior is not normal, labels are missing, the split does not hold
        ``model.num_data`` examples, the curvature at ``loc`` is not that of a mode, a choice is to
        be made by evidence that has no maximum, or ``ggn`` is asked of a readout of texts.
    """
    check_model(model)
    check_observes(model, "laplace")
    if curvature not in CURVATURES:
        raise ValueError(f"curvature is {curvature!r}: expected one of {sorted(CURVATURES)}")
    loc = model.init_loc if loc is None else loc.to(model.init_loc.device)
    if loc.shape != model.init_loc.shape:
        raise ValueError(
            f"loc has shape {tuple(loc.shape)}: expected (M, r) {tuple(model.init_loc.shape)}"
        )
    prior = normal_prior(model)
    batches = whole_split(model, split, batch_size)
    model.adapter.eval()
    H = torch.zeros(loc.numel(), loc.numel(), dtype=torch.float64, device=loc.device)
    log_likelihood = 0.0
    for batch in batches:
        H += CURVATURES[curvature](model, batch, loc)
        with torch.no_grad():
            log_likelihood += float(_log_likelihood(model, batch, model.adapter(batch, loc)))

    prior_loc, scale = prior.loc.detach().double(), prior.scale.detach().double()
    precision = None
    if by_evidence:
        distance = float((loc - prior_loc).square().sum())
        if not distance:
            raise ValueError(
                "by_evidence is true, and loc is the prior's mean: the narrower the prior, the"
                " higher the evidence; take a prior with another mean, such as Normal(0, 1), or"
                " leave by_evidence out"
            )
        precision = precision_by_evidence(log_det_by_eigenvalues(H), loc.numel(), distance)
        scale = torch.full_like(scale, precision**-0.5)
    tril, info = torch.linalg.cholesky_ex(H + scale.flatten().pow(-2).diag())
    if info:
        raise ValueError(
            "the curvature at loc is not positive definite, so loc is no mode: fit an"
            " AutoSubspaceDelta to it first, or use curvature='ggn'"
        )
    log_prior = float(dist.Normal(prior_loc, scale).log_prob(loc).sum())
    half_log_det = float(tril.diagonal().log().sum())
    guide = AutoSubspaceMultivariateNormal(model, init_loc=loc)
    L = torch.linalg.cholesky(torch.cholesky_inverse(tril)).to(guide.loc)
    guide.scale = L.diagonal().clone()
    guide.scale_tril = L / L.diagonal()[:, None]
    return Laplace(
        guide,
        log_likelihood + log_prior + 0.5 * loc.numel() * math.log(2 * math.pi) - half_log_det,
        precision,
    )


def normal_prior(
    model: ScalaBLModel, why: str = "a Laplace approximation needs a normal one"
) -> dist.Normal:
    """The prior on s, of a batch (M, r).

    :param why: for the message.
    :raises ValueError: if it is not normal, or depends on other sites.
    """
    prior = getattr(model.prior(), "base_dist", None)
    if model.prior.latents or not isinstance(prior, dist.Normal):
        raise ValueError(f"the prior is {model.prior}: {why}")
    return prior


def ggn(model: ScalaBLModel, batch: Batch, loc: Tensor) -> Tensor:
    r"""(D, D) generalised Gauss-Newton matrix of −log p(y | x, s), summed over a batch, in float64.

    .. math:: \sum_n J_n^⊤ Λ_n J_n, \quad J_n = ∂ f(x_n; s) / ∂ \mathrm{vec}\, s, \quad
              Λ_n = -∇^2_f \log p(y_n \mid f)

    where Λ_n = diag(p_n) − p_n p_nᵀ for classes. Never negative; the Hessian without the curvature
    of f (Schraudolph 2002). The passes of :func:`~scalabl_pyro.lora.jacobian`.

    :raises ValueError: if the readout reads texts, which have a logit for each token and word, or
        what stands in the adapter's place takes no s for each example.
    """
    # Any function of s may stand in the adapter's place.
    if "per_example" not in inspect.signature(model.adapter.__call__).parameters:
        raise ValueError(
            f"{type(model.adapter).__name__} takes no per_example=True, by which ggn gives an s to"
            " each example for the Jacobian: use curvature='hessian'"
        )
    readout = getattr(model.adapter, "readout", None)
    if readout is not None and readout.reads_texts:
        raise ValueError(
            f"the readout {type(readout).__name__} reads texts, for which ggn would take a backward"
            " pass for each word of the vocabulary at each token: use curvature='hessian'"
        )
    f, J = jacobian(model.adapter, batch, loc)
    f.requires_grad_()
    (slope,) = grad(-_log_likelihood(model, batch, f), f, create_graph=True)
    curvature = derivatives(slope, f).double()  # (B, C, C)
    J = J.flatten(2).double()  # (B, C, D)
    return torch.einsum("bcd,bce,bef->df", J, curvature, J)


def hessian(model: ScalaBLModel, batch: Batch, loc: Tensor) -> Tensor:
    """(D, D) exact Hessian of −log p(y | x, s), summed over a batch, in float64; D backward passes
    through a gradient."""
    s = loc.detach()[None].clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
        nll = -_log_likelihood(model, batch, model.adapter(batch, s[0]))
        (slope,) = grad(nll, s, create_graph=True)
        return derivatives(slope.flatten(1), s)[0].flatten(1).double()


CURVATURES = {"ggn": ggn, "hessian": hessian}


def _log_likelihood(model: ScalaBLModel, batch: Batch, logits: Tensor) -> Tensor:
    """Σ log p(y_n | f_n) over a batch, of whatever likelihood the model observes."""
    scaled = ScaledToAll(model.num_data, len(batch))
    with pyro.poutine.block(), pyro.poutine.trace() as seen, scaled:
        model.observe(batch, logits)
    nodes = seen.trace.nodes.values()
    check_latents_of_data(model, nodes, "a Laplace approximation is of s alone")
    log_likelihood = cast(Tensor, seen.trace.log_prob_sum())
    return log_likelihood * len(batch) / model.num_data
