r"""Novelty: how much of the prior's uncertainty about an answer the training data left.

With logits that are linear in what is uncertain, θ, a prior of precision λ and the curvature H of
the training data (the generalised Gauss-Newton matrix of −Σ_n log p(y_n | x_n, θ), which needs no
labels), the contrasts P f between the choices of a question have the covariances

.. math:: P J λ^{-1} J^⊤ P \text{ before}, \qquad P J (H + λ I)^{-1} J^⊤ P \text{ after the data},

where J = ∂f/∂θ, and P takes the mean over the choices that exist away. The novelty

.. math:: \frac{\mathrm{tr}\, P J (H + λ I)^{-1} J^⊤ P}{\mathrm{tr}\, P J λ^{-1} J^⊤ P} \in [0, 1]

is a ratio of the two, so that how large the contrasts are does not matter, as it does for mutual
information. It is 1 without data, and falls with each example that moves the same directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data import Batch, Split
from ..infer.batches import whole_split
from ..infer.kfac import weight_jacobian
from ..infer.laplace_approximation import ggn, normal_prior
from ..lora.adapter import SubspaceAdapter
from ..lora.jacobian import jacobian
from ..models.model import ScalaBLModel

__all__ = ["novelty", "weight_novelty"]


def novelty(
    model: ScalaBLModel, train: Split, split: Split, *, loc: Tensor, batch_size: int = 16
) -> Tensor:
    """Novelty in s, (N,) in [0, 1]: θ = vec s, of M·r numbers, with the precision of its prior.

    A forward pass for each question, and C backward ones, or one where each choice is a row of its
    own; the same for the training data, once.

    :param train: all examples that the model was trained on.
    :param split: the N questions; their labels are not looked at.
    :param loc: (M, r), where the logits are linearised: ``guide.median()["s"]``.
    :param batch_size: B of a pass.
    :returns: nan where no contrast depends on s, as with B = 0.
    :raises ValueError: if the prior is not normal, or ``train`` has no labels or does not hold
        ``model.num_data`` examples.
    """
    loc = loc.to(model.init_loc.device)
    why = "novelty needs a normal one; by=entropy and unfamiliar=mahalanobis need none"
    precision = normal_prior(model, why).scale.detach().double().flatten().pow(-2)
    model.adapter.eval()
    H = torch.zeros(loc.numel(), loc.numel(), dtype=torch.float64, device=loc.device)
    for batch in whole_split(model, train, batch_size):
        H += ggn(model, batch.to(loc.device), loc)
    root = torch.linalg.cholesky(H + precision.diag())

    def variances(batch: Batch) -> tuple[Tensor, Tensor]:
        _, J = jacobian(model.adapter, batch, loc)
        J = _contrasts(J.flatten(2).double(), batch)  # (B, C, D)
        after = torch.linalg.solve_triangular(root, J.flatten(0, 1).mT, upper=False)
        before = J.square() / precision
        return after.square().sum(0).unflatten(0, J.shape[:2]).sum(-1), before.flatten(1).sum(-1)

    return _shares(model.adapter, split, batch_size, variances)


def weight_novelty(
    adapter: SubspaceAdapter,
    train: Split,
    split: Split,
    *,
    precision: float,
    s: Tensor | None = None,
    batch_size: int = 16,
) -> Tensor:
    r"""Novelty in all entries of A and B, (N,) in [0, 1]: exact, by matrices of N_train·C rows.

    H = ΦᵀΦ with C rows for each training example, √p_c (e_c − p)ᵀJ. By Woodbury's identity

    .. math:: J (H + λI)^{-1} J^⊤ = \tfrac{1}{λ} \big(J J^⊤ - J Φ^⊤ (λI + Φ Φ^⊤)^{-1} Φ J^⊤\big)

    Φ is kept, with Σ_m r·(d_in + d_out) numbers a row, in float32 on the CPU. Passes are those of
    :func:`novelty`. A sample of the training data costs less, and gives a larger novelty.

    :param train: examples that the model was trained on; their labels are not looked at.
    :param precision: λ, of a normal prior on every entry.
    :param s: (M, r): A is diag(s)·V, for an adapter in the subspace form; plain LoRA if left out.
    :raises ValueError: if the precision is not above 0, or ``projections`` is ``unit``.
    """
    if not precision > 0:
        raise ValueError(f"precision is {precision}: expected a number above 0")
    if adapter.unit:
        raise ValueError(
            "projections is 'unit', which takes the scale of A away: weight_novelty expects free or"
            " frozen_v"
        )
    adapter.eval()
    folded = adapter.identity() if s is None else s
    with adapter.folded(folded):
        parts: list[Tensor] = []
        for chunk in train.batches(batch_size):
            f, J = _flat(adapter, chunk.collate(chunk.examples))
            p = f.double().softmax(-1)
            roots = p.sqrt()[..., None] * (torch.eye(f.shape[1]) - p[:, None])  # (B, C, C)
            parts.append((roots.float() @ J).flatten(0, 1))
        rows = torch.cat(parts)  # (N_train·C, D)
        inner = precision * torch.eye(len(rows), dtype=torch.float64) + _products(rows, rows)
        root = torch.linalg.cholesky(inner)

        def variances(batch: Batch) -> tuple[Tensor, Tensor]:
            _, J = _flat(adapter, batch)
            J = _contrasts(J, batch)
            cross = _products(rows, J.flatten(0, 1))  # (N_train·C, B·C)
            known = torch.linalg.solve_triangular(root, cross, upper=False).square().sum(0)
            before = J.double().square().flatten(1).sum(-1)
            return before - known.unflatten(0, J.shape[:2]).sum(-1), before

        return _shares(adapter, split, batch_size, variances)


def _shares(
    adapter: SubspaceAdapter,
    split: Split,
    batch_size: int,
    variances: Callable[[Batch], tuple[Tensor, Tensor]],
) -> Tensor:
    """(N,), the first of two variances (B,) over the second, in the order of the split."""
    ordered, place = split.by_length()
    shares = []
    for chunk in ordered.batches(batch_size):
        after, before = variances(chunk.collate(chunk.examples).to(adapter.device))
        shares.append((after / before).clamp(0, 1).float().cpu())  # but for rounding it is there
    return torch.cat(shares)[place]


def _contrasts(J: Tensor, batch: Batch) -> Tensor:
    """P·J, (B, C, D), of derivatives that are 0 for a missing choice."""
    exists = batch.choices.to(J)[..., None]  # (B, C, 1)
    return (J - J.sum(1, keepdim=True) / exists.sum(1, keepdim=True)) * exists


def _flat(adapter: SubspaceAdapter, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (B, C), and derivatives (B, C, D) with respect to all entries, on the CPU."""
    f, rows = weight_jacobian(adapter, batch)
    return f.cpu(), torch.cat([J.flatten(2).cpu() for J in rows.values()], dim=-1)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """x·yᵀ in float64, of (n, D) and (k, D) in float32, some columns at a time."""
    parts = zip(x.split(4096, dim=1), y.split(4096, dim=1), strict=True)
    return sum((a.double() @ b.double().mT for a, b in parts), x.new_zeros(()).double())
