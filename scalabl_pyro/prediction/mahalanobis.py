r"""The Mahalanobis distance of features: a rival of novelty that knows neither answers nor s.

.. math:: d(x) = \sqrt{(φ(x) - μ)^⊤ Σ^{-1} (φ(x) - μ)}

with the mean μ and a covariance Σ of the training questions' features φ, one for all classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data import Split
from ..lora.adapter import SubspaceAdapter
from ..lora.padding import token_mask

__all__ = ["feature_distances", "ledoit_wolf", "mahalanobis", "pooled_features"]


def feature_distances(
    adapter: SubspaceAdapter,
    train: Split,
    splits: Sequence[Split],
    s: Tensor | None = None,
    *,
    batch_size: int = 64,
) -> list[Tensor]:
    """d, (N,) for each split, of its :func:`pooled_features` from those of the training questions.
    One forward pass for each question.

    :param s: (M, r), as for :func:`pooled_features`.
    :raises ValueError: as :func:`mahalanobis`.
    """
    known = pooled_features(adapter, train, s, batch_size=batch_size)
    return [
        mahalanobis(known, pooled_features(adapter, split, s, batch_size=batch_size))
        for split in splits
    ]


def mahalanobis(known: Tensor, features: Tensor) -> Tensor:
    """d, (N,) ≥ 0: high is unfamiliar. Σ is that of :func:`ledoit_wolf`.

    :param known: (N_train, H), features of training questions.
    :param features: (N, H).
    :raises ValueError: if the shapes do not fit, fewer than two questions are known, or their
        features do not vary.
    """
    if known.dim() != 2 or len(known) < 2 or features.shape[1:] != known.shape[1:]:
        raise ValueError(
            f"known has shape {tuple(known.shape)} and features {tuple(features.shape)}: expected"
            " (N_train, H), N_train of 2 or more, and (N, H)"
        )
    covariance = ledoit_wolf(known)
    if not covariance.trace() > 0:
        raise ValueError(f"the {len(known)} known features do not vary: expected different ones")
    root = torch.linalg.cholesky(covariance)
    apart = features.double() - known.double().mean(0)
    return torch.linalg.solve_triangular(root, apart.mT, upper=False).norm(dim=0).to(features)


def ledoit_wolf(x: Tensor) -> Tensor:
    r"""A covariance that can be inverted however few the rows are, (H, H) in float64.

    .. math:: (1 - ρ) S + ρ m I, \quad m = \frac{\mathrm{tr} S}{H}, \quad
              ρ = \min\Big(1, \frac{\sum_k ‖x_k x_k^⊤ - S‖^2 / N^2}{‖S - m I‖^2}\Big)

    with the centred rows x_k and S their covariance, divided by N (Ledoit and Wolf 2004); ρ is 1e-8
    or more.

    :param x: (N, H).
    """
    x = x.double() - x.double().mean(0)
    N, H = x.shape
    S = x.mT @ x / N
    target = (S.trace() / H) * torch.eye(H, dtype=S.dtype, device=S.device)
    # Σ_k ‖x_k x_kᵀ − S‖² = Σ_k ‖x_k‖⁴ − N ‖S‖²
    noise = (x.square().sum(-1).square().sum() - N * S.square().sum()) / N**2
    spread = (S - target).square().sum()
    share = min(1.0, float(noise / spread)) if spread > 0 else 1.0
    share = max(share, 1e-8)  # two rows say that nothing is noise, and S has rank 1
    return (1 - share) * S + share * target


@torch.no_grad()
def pooled_features(
    adapter: SubspaceAdapter, split: Split, s: Tensor | None = None, *, batch_size: int = 64
) -> Tensor:
    """φ, (N, H) on the CPU in float32: the mean of the model's last hidden states over a question's
    tokens, of all its choices where each is a row of its own. One forward pass.

    :param s: (M, r), such as ``guide.median()["s"]``; plain LoRA if left out.
    """
    adapter.eval()
    backbone = cast(nn.Module, adapter.llm.base_model)
    ordered, place = split.by_length()
    features = []
    for chunk in ordered.batches(batch_size):
        batch = chunk.collate(chunk.examples).to(adapter.device)
        mask = token_mask(batch).view(len(batch), -1)  # (B, [C·]T)
        hidden: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any, hidden: list[Tensor] = hidden) -> None:
            hidden.append(output[0].float())

        handle = backbone.register_forward_hook(keep)
        try:
            adapter(batch, s)
        finally:
            handle.remove()
        weight = mask[..., None].to(hidden[0])
        rows = hidden[0].reshape(len(batch), -1, hidden[0].shape[-1])
        features.append(((rows * weight).sum(1) / weight.sum(1)).cpu())
    return torch.cat(features)[place]
