"""Kronecker-factored curvature of the matrices A and B (KFAC), and what it says of the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import grad

from ..data import Batch, Split
from ..lora.adapter import SubspaceAdapter
from ..lora.padding import real_tokens
from ..rng import forked_rng

__all__ = ["Kronecker", "kfac", "logit_moments", "weight_jacobian"]


class Kronecker(NamedTuple):
    r"""H ≈ X ⊗ G for a matrix W (d_out, d_in), X = xᵀx and G = gᵀg.

    :param x: (k, d_in), orthogonal rows.
    :param g: (k', d_out), orthogonal rows.
    """

    x: Tensor
    g: Tensor

    def eigenvalues(self) -> Tensor:
        """(k', k) in float64, those of H that may differ from 0."""
        x, g = (root.double().square().sum(-1) for root in self)
        return g[:, None] * x

    def covariance(self, J: Tensor, precision: float) -> Tensor:
        """J (H + λI)⁻¹ Jᵀ, (B, C, C), without a matrix of the size of H.

        :param J: (B, C, d_out, d_in), derivatives of C logits with respect to W.
        :param precision: λ.
        """
        # In float64: what H does not know is a difference that may be small, over a small λ.
        J, g, x = J.double(), self.g.double(), self.x.double()
        normal = nn.functional.normalize
        rotated = torch.einsum("ko,bcod,jd->bckj", normal(g), J, normal(x))
        shrunk = self.eigenvalues() / (self.eigenvalues() + precision)
        inside = torch.einsum("bckj,kj,bekj->bce", rotated, shrunk, rotated)
        return (torch.einsum("bcod,beod->bce", J, J) - inside) / precision

    def log_det(self, precision: float) -> float:
        """log det(H + λI)."""
        known = self.eigenvalues()
        rest = self.x.shape[1] * self.g.shape[1] - known.numel()
        return float((known + precision).log().sum()) + rest * math.log(precision)


def kfac(
    adapter: SubspaceAdapter, split: Split, *, rank: int, batch_size: int = 16
) -> dict[str, Kronecker]:
    r"""The generalised Gauss-Newton matrix of −Σ_n log p(y_n | x_n), a block for each A and B.

    .. math:: X ⊗ G, \quad X = \tfrac{1}{R} \sum_{n, t} x_{nt} x_{nt}^⊤, \quad
              G = \sum_{n, t, c} g_{ntc} \, g_{ntc}^⊤, \quad
              g_{ntc} = ∂ \big(\sqrt{p_{nc}} (e_c - p_n)^⊤ f(x_n)\big) / ∂ (W x_{nt})

    over R tokens that are no padding (Martens & Grosse 2015, arXiv 1503.05671; weights shared by
    tokens: "expand" of Eschenhagen et al. 2023, arXiv 2311.00636). C backward passes; one where
    each choice is a row of its own.

    :param rank: most eigenvectors kept of X and of G, by incremental singular value decompositions;
        randomised ones (Halko et al. 2011, arXiv 0909.4061) where that is less than all.
    :param batch_size: B of a pass.
    :returns: by the names of ``adapter.state()``.
    """
    adapter.eval()
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for chunk in split.batches(batch_size):
        batch = chunk.collate(chunk.examples).to(adapter.device)
        f, seen = _run(adapter, batch)
        p = f.detach().softmax(-1)
        columns = p.sqrt()[:, :, None] * (torch.eye(p.shape[1], device=p.device) - p[:, None])
        for name, (x, _) in seen.items():
            rows = real_tokens(x, batch)
            counts[name] = counts.get(name, 0) + len(rows)
            inputs[name] = _extended(inputs.get(name), rows, rank)
        for slopes in _slopes(f, batch, columns.unbind(1), seen):
            for name, slope in zip(seen, slopes, strict=True):
                outputs[name] = _extended(outputs.get(name), real_tokens(slope, batch), rank)
    return {name: Kronecker(inputs[name] / counts[name] ** 0.5, outputs[name]) for name in counts}


def logit_moments(
    adapter: SubspaceAdapter,
    batch: Batch,
    factors: Mapping[str, Kronecker],
    precision: Mapping[str, float],
) -> tuple[Tensor, Tensor]:
    """Mean (B, C) and covariance (B, C, C) of logits that are linear in the matrices A and B, of
    which each is normal with covariance (H + λI)⁻¹; the latter in float64. The passes of
    :func:`kfac`.

    :param factors: H of a matrix by its name; matrices that are left out are points.
    :param precision: λ by the same names.
    """
    f, rows = weight_jacobian(adapter, batch)
    covariance = f.new_zeros(*f.shape, f.shape[1], dtype=torch.float64)
    for name, factor in factors.items():
        J = rows[name].to(factor.g.device)  # layers may be on other devices than the logits
        covariance += factor.covariance(J, precision[name]).to(covariance.device)
    return f, covariance


def weight_jacobian(adapter: SubspaceAdapter, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, C), and their derivatives with respect to every matrix A and B, whether it is
    trained or not, (B, C, d_out, d_in) by the names of ``adapter.state()``.

    A missing choice has derivatives of 0. The passes of :func:`kfac`.
    """
    batch = batch.to(adapter.device)
    f, seen = _run(adapter, batch)
    units = torch.eye(f.shape[1], device=f.device).expand(len(batch), -1, -1)
    rows: dict[str, list[Tensor]] = {name: [] for name in seen}
    for slopes in _slopes(f, batch, units.unbind(1), seen):
        for (name, (x, _)), slope in zip(seen.items(), slopes, strict=True):
            # All tokens of all rows of an example.
            by_example = (value.reshape(len(batch), -1, value.shape[-1]) for value in (slope, x))
            rows[name].append(torch.einsum("bto,btd->bod", *by_example))
    return f.detach(), {name: torch.stack(each, dim=1) for name, each in rows.items()}


Seen = dict[str, tuple[Tensor, Tensor]]


def _run(adapter: SubspaceAdapter, batch: Batch) -> tuple[Tensor, Seen]:
    """Logits, and the input and output of every matrix."""
    with torch.enable_grad(), _recorded(adapter) as seen:
        f = adapter(batch)
    return f, seen


@contextmanager
def _recorded(adapter: SubspaceAdapter) -> Iterator[Seen]:
    seen: Seen = {}

    def record(name: str, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()  # of a frozen A in the first block
        seen[name] = args[0].detach(), output

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: record(name, args, output))
        for name, module in adapter.matrices.linears.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _slopes(
    f: Tensor, batch: Batch, directions: Sequence[Tensor], seen: Seen
) -> Iterator[tuple[Tensor, ...]]:
    """For each direction (B, C), the derivatives of f's component along it for every output."""
    f = f.masked_fill(~batch.choices, 0.0)  # −inf has no slope
    outputs = [output for _, output in seen.values()]
    if batch.row_per_choice:  # f_c depends on row c alone
        each = grad(f.sum(), outputs)
        for direction in directions:
            weights = direction.reshape(-1, 1)  # (B·C, 1)
            yield tuple(
                (weights.to(g.device) * g.reshape(len(weights), -1)).view_as(g) for g in each
            )
        return
    for direction in directions:  # one at a time: each holds as much as a forward pass
        yield grad((direction * f).sum(), outputs, retain_graph=True)


def _extended(root: Tensor | None, rows: Tensor, rank: int) -> Tensor:
    """(k, d), orthogonal, with about the rowsᵀ·rows of both together, k ≤ rank."""
    if root is not None:
        rows = torch.cat([root, rows])
    if rank >= min(rows.shape):
        rows = torch.linalg.qr(rows, mode="r").R
        _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
        return sizes[:, None] * directions
    with forked_rng(0):
        _, sizes, directions = torch.svd_lowrank(rows, q=min(2 * rank, *rows.shape), niter=3)
    return sizes[:rank, None] * directions.mT[:rank]
