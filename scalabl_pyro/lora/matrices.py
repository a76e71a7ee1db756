"""The matrices A and B of LoRA layers: by name, as one flat vector, and decomposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .layers import ADAPTER

__all__ = ["LoRAMatrices"]


class LoRAMatrices:
    """A_m (r, d_m) and B_m (d_out, r) of M adapted modules, PEFT's own, by the names of weights.

    :param layers: the M layers by name.
    """

    def __init__(self, layers: Mapping[str, LoraLayer]) -> None:
        self.A = {
            f"{name}.lora_A.{ADAPTER}.weight": cast(nn.Linear, layer.lora_A[ADAPTER])
            for name, layer in layers.items()
        }
        self.B = {
            f"{name}.lora_B.{ADAPTER}.weight": cast(nn.Linear, layer.lora_B[ADAPTER])
            for name, layer in layers.items()
        }

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """All 2·M linear maps."""
        return self.A | self.B

    def flat_A(self) -> Tensor:
        """The M matrices A one after another, (r · Σ_m d_m,), where the first layer is."""
        device = next(iter(self.A.values())).weight.device
        return torch.cat([A.weight.flatten().to(device) for A in self.A.values()])

    def named_A(self, flat: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`flat_A`.

        :param flat: (\\*draws, r · Σ_m d_m).
        :returns: (\\*draws, r, d_m) each, where ``flat`` is.
        """
        parts = flat.split([A.weight.numel() for A in self.A.values()], dim=-1)
        return {
            name: part.unflatten(-1, A.weight.shape)
            for (name, A), part in zip(self.A.items(), parts, strict=True)
        }

    @torch.no_grad()
    def decompose_A(self) -> Tensor:
        """A = U·diag(σ)·V; V takes the place of A, B·U that of B; returns σ (M, r)."""
        values = []
        for A, B in zip(self.A.values(), self.B.values(), strict=True):
            U, sigma, V = torch.linalg.svd(A.weight.float(), full_matrices=False)
            A.weight.copy_(V)
            B.weight.copy_(B.weight.float() @ U)
            values.append(sigma)
        return self._stacked(values)

    @torch.no_grad()
    def decompose_product(self) -> Tensor:
        """B·A = U·diag(σ)·V; V takes the place of A, U·diag(σ) that of B; returns σ (M, r)."""
        values = []
        for A, B in zip(self.A.values(), self.B.values(), strict=True):
            Q_B, R_B = torch.linalg.qr(B.weight.double())  # (d_out, r), (r, r)
            Q_A, R_A = torch.linalg.qr(A.weight.double().mT)  # (d_in, r), (r, r)
            U, sigma, V = torch.linalg.svd(R_B @ R_A.mT)
            A.weight.copy_(V @ Q_A.mT)
            short = B.weight.shape[1] - len(sigma)  # a layer may have fewer outputs than r
            B.weight.copy_(nn.functional.pad(Q_B @ U * sigma, (0, short)))
            values.append(nn.functional.pad(sigma, (0, short)))
        return self._stacked(values)

    @torch.no_grad()
    def norms_of_B(self) -> Tensor:
        """‖B_m‖, (M,)."""
        return self._stacked([B.weight.norm() for B in self.B.values()])

    @torch.no_grad()
    def scale_columns_of_B(self, factors: Tensor) -> None:
        """Multiply column j of B_m by a factor.

        :param factors: (M, r).
        """
        for B, factor in zip(self.B.values(), factors, strict=True):
            B.weight.mul_(factor.to(B.weight))

    def _stacked(self, values: list[Tensor]) -> Tensor:
        """(M, ...) in float32 where the first layer is; layers may be spread over devices."""
        device = next(iter(self.A.values())).weight.device
        return torch.stack([value.to(device, torch.float32) for value in values])
