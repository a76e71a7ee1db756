"""Last-layer Laplace (Kristiadi et al. 2020, arXiv 2002.10118) around a trained head."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data import Batch, Split
from ..infer.evidence import log_det_by_eigenvalues, precision_by_evidence
from ..lora.adapter import SubspaceAdapter
from .base import Fitted, LoRAMethod, check_plain
from .laplace_lora import logit_draws

__all__ = ["LastLayerAverage", "LastLayerLaplace", "head_jacobian", "last_layer"]

log = logging.getLogger(__name__)

#: most numbers in a layer whose full covariance is kept: 800 MB in float64
_MOST = 10_000


def last_layer(adapter: SubspaceAdapter) -> nn.Linear:
    """The last linear layer of the adapter's trained head.

    :raises ValueError: if it has no such head, or one too large for a full covariance.
    """
    heads = [name for name in adapter.state() if ".modules_to_save." in name]
    module = None
    with adapter.bound(None) as llm:
        for name in heads:
            layer = llm.get_submodule(name.rpartition(".")[0])
            module = layer if isinstance(layer, nn.Linear) else module
    if module is None:
        raise ValueError(
            "method last_layer_laplace needs a head that is trained, a linear layer in lora.heads:"
            " for other readouts take method=laplace_lora method.modules=last"
        )
    size = sum(parameter.numel() for parameter in module.parameters())
    if size > _MOST:
        raise ValueError(
            f"the last layer has {size} numbers: a full covariance has at most {_MOST}; take"
            " method=laplace_lora method.modules=last"
        )
    return module


def head_jacobian(adapter: SubspaceAdapter, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits f (B, C), and their derivatives J (B, C, D) with respect to the D = d_out·(d_in + 1)
    numbers of the last layer, weight and then bias; d_out·d_in without a bias. J is in float64."""
    batch = batch.to(adapter.device)
    layer = last_layer(adapter)
    seen: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()  # what is below has no part in J
        seen.extend((args[0].detach(), output))
        return output

    with torch.enable_grad(), layer.register_forward_hook(cut):
        f = adapter(batch)
    x, output = seen
    x = x.reshape(len(batch), -1, x.shape[-1]).double()  # all rows and tokens of an example
    rows = []
    for f_c in f.masked_fill(~batch.choices, 0.0).unbind(-1):  # −inf has no slope
        (slope,) = torch.autograd.grad(f_c.sum(), output, retain_graph=True)
        slope = slope.reshape(len(batch), -1, slope.shape[-1]).double()
        weight = torch.einsum("bto,btd->bod", slope, x).flatten(1)
        rows.append(weight if layer.bias is None else torch.cat([weight, slope.sum(1)], 1))
    return f.detach(), torch.stack(rows, 1).to(f.device)  # the layer may be elsewhere


@dataclass(frozen=True, slots=True, eq=False)
class LastLayerAverage:
    r"""In the place of a :class:`~scalabl_pyro.prediction.Predictor`: draws of logits.

    .. math:: f_k(x) \sim \mathrm{Normal}\big(f(x), \; J(x) \, Σ \, J(x)^⊤\big)

    which is exact where the logits are linear in the last layer. The same standard normals serve
    all x.

    :param covariance: Σ (D, D).
    :param num_draws: S.
    """

    adapter: SubspaceAdapter
    covariance: Tensor
    num_draws: int
    seed: int = 0

    def state(self) -> dict[str, Tensor]:
        """Σ, by the name of a run folder."""
        return {"covariance": self.covariance}

    def logits(self, batch: Batch) -> Tensor:
        """(S, B, C) in float32, −inf where a choice does not exist."""
        f, J = head_jacobian(self.adapter, batch)
        return logit_draws(f, J @ self.covariance @ J.mT, self.num_draws, seed=self.seed)


@dataclass(frozen=True)
class LastLayerLaplace(LoRAMethod):
    r"""MLE or, with ``weight_decay``, MAP, then a normal over the last layer of the head around it.

    .. math:: q(w) = \mathrm{Normal}\big(w^*, (H + λI)^{-1}\big), \quad
              H = \sum_n J_n^⊤ \big(\mathrm{diag}(p_n) - p_n p_n^⊤\big) J_n

    H is the exact Hessian of −Σ_n log p(y_n | x_n) there, that of logistic regression on the
    layer's inputs, and full. LLLA of the paper on Laplace-LoRA is another thing, a normal over the
    LoRA matrices of the output layer: method ``laplace_lora`` with ``modules`` last.

    :param prior_precision: λ; the one that maximises the evidence if ``None``.
    :param draws: S, of the logits; they cost next to nothing.
    """

    name: ClassVar[str] = "last_layer_laplace"
    reads_texts: ClassVar[bool] = False

    prior_precision: float | None = None
    draws: int = 100

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}: expected 1 or more")
        if self.prior_precision is not None and not self.prior_precision > 0:
            raise ValueError(
                f"prior_precision is {self.prior_precision}: expected a number above 0, or null"
            )

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> Any:
        """The likelihood.

        :raises ValueError: if there is no head, or one too large.
        """
        last_layer(adapter)
        return super().make_model(adapter, num_data=num_data)

    def finish(
        self, fitted: Fitted, train: Split, validation: Split | None, *, seed: int
    ) -> Fitted:
        """The same trained model with a normal over the last layer.

        :param seed: of the draws.
        :raises ValueError: if it is over s.
        """
        check_plain(fitted, self.name)
        adapter = fitted.model.adapter
        adapter.eval()
        H = torch.zeros((), dtype=torch.float64, device=adapter.device)
        for chunk in train.batches(self.config.batch_size):
            f, J = head_jacobian(adapter, chunk.collate(chunk.examples))
            p = f.double().softmax(-1)
            curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
            H = H + torch.einsum("bcd,bce,bef->df", J, curvature, J)
        precision = self.prior_precision
        if precision is None:
            parameters = last_layer(adapter).parameters()
            norm = sum(float(p.detach().double().square().sum()) for p in parameters)
            precision = precision_by_evidence(log_det_by_eigenvalues(H), len(H), norm)
            log.info("the prior precision is %g", precision)
        eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(H + precision * eye))
        return replace(fitted, predictor=LastLayerAverage(adapter, covariance, self.draws, seed))

    def restore(
        self, adapter: SubspaceAdapter, state: Mapping[str, Tensor], *, seed: int, **_: Any
    ) -> LastLayerAverage:
        if state.keys() != {"covariance"}:
            raise ValueError(f"expected a covariance of the last layer, found {sorted(state)}")
        return LastLayerAverage(adapter, state["covariance"], self.draws, seed)
