"""The label rows of the output layer, in float32 on a body of fewer digits.

Logits near 18 have steps of 1/8 in bfloat16, which is more than draws of s differ by. Where a
readout looks at C words of the vocabulary, C rows of the output layer are all that is needed: they
cost nothing in float32, and the product with the other rows is saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..readouts.base import Readout
from .layers import ADAPTER

__all__ = ["OutputRows", "prepare_output_layer"]

log = logging.getLogger(__name__)

_CHUNK = 4096  # rows of the vocabulary that are held in float32 at once


class OutputRows:
    r"""An output layer that computes some rows only: :math:`z_v = W_v x + b_v + (ΔW(s) x)_v`.

    Whatever a model does with each logit by itself, such as a softcap or a scale, follows as usual.

    :param head: the output layer, adapted or not.
    :param ids: (C,), the tokens v.
    """

    def __init__(self, head: nn.Module, ids: Tensor) -> None:
        self._head = head
        self._ids: Tensor | None = ids

    @classmethod
    def of(cls, llm: PreTrainedModel, ids: Tensor, run: Callable[[], Tensor]) -> OutputRows | None:
        """Those of a model, or ``None`` where its output layer gives all there is already.

        :param ids: (C,).
        :param run: gives the model's logits of these tokens for a short text, with which it is
            checked that they are the model's own.
        """
        head = llm.get_output_embeddings()
        base = head.get_base_layer() if isinstance(head, LoraLayer) else head
        if type(base) is not nn.Linear:  # of quantised weights there are no rows
            return None
        if base.weight.dtype == torch.float32 or base.weight.is_meta:
            return None
        rows = cls(cast(nn.Module, head), ids)
        if rows._agrees(run):
            return rows
        log.warning(
            "%s does more with its logits than its output layer: they stay in %s",
            type(llm).__name__,
            base.weight.dtype,
        )
        return None

    @torch.no_grad()
    def _agrees(self, run: Callable[[], Tensor]) -> bool:
        """Whether these rows give what all rows in float32 do, and, but for rounding, the model."""
        ids = self._ids
        B = None
        if isinstance(self._head, LoraLayer):
            B = cast(nn.Linear, self._head.lora_B[ADAPTER]).weight
        original_B = None if B is None else B.clone()
        try:
            if B is not None:  # 0 at first; not random, for that would move the random state
                B.copy_(torch.linspace(-0.1, 0.1, B.numel()).view_as(B))
            own = run()
            with self.in_place():
                selected = run()
            self._ids = None
            with self.in_place():
                every = run()
        finally:
            self._ids = ids
            if B is not None and original_B is not None:
                B.copy_(original_B)
        size = every.abs().max()
        same = selected.shape == every.shape == own.shape and selected.isfinite().all()
        return bool(
            same
            and (selected - every).abs().max() <= 1e-4 * size
            and (own - every).abs().max() <= 2**-5 * size
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with these rows alone, others being 0, until the context ends."""
        own_forward = vars(self._head).get("forward")
        self._head.forward = self._forward  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del self._head.forward
            if own_forward is not None:
                self._head.forward = own_forward  # type: ignore[method-assign, assignment]

    def _forward(self, x: Tensor) -> Tensor:
        """(..., vocabulary), in float32."""
        head = self._head
        base = cast(nn.Linear, head.get_base_layer() if isinstance(head, LoraLayer) else head)
        x = x.to(base.weight.device)
        ids = None if self._ids is None else self._ids.to(x.device)
        parts = base.weight.split(_CHUNK) if ids is None else (base.weight[ids],)
        wide = x.float()
        logits = torch.cat([nn.functional.linear(wide, part.float()) for part in parts], -1)
        if base.bias is not None:
            logits = logits + (base.bias if ids is None else base.bias[ids]).float()
        if isinstance(head, LoraLayer) and not head.disable_adapters:
            for name in head.active_adapters:
                A, B = cast(nn.Linear, head.lora_A[name]), cast(nn.Linear, head.lora_B[name])
                update = B(A(head.lora_dropout[name](x.to(A.weight.dtype)))) * head.scaling[name]
                logits = logits + (update if ids is None else update[..., ids]).float()
        if ids is None:
            return logits
        return logits.new_zeros(*x.shape[:-1], base.out_features).index_copy(-1, ids, logits)


def prepare_output_layer(
    llm: PreTrainedModel, readout: Readout, device: torch.device
) -> OutputRows | None:
    """The rows of the output layer that a readout looks at, or ``None`` where all stay.

    The layer itself gets inputs without gaps.

    :param device: where the model takes its inputs.
    """
    try:
        head = llm.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if not isinstance(head, (nn.Linear, LoraLayer)):
        return None
    cast(nn.Module, head).register_forward_pre_hook(_contiguous_input)
    ids: Tensor | None = getattr(readout, "label_ids", None)
    if ids is None:
        return None
    row = ids[None].to(device)  # any tokens will do

    def run() -> Tensor:
        return readout(llm, {"input_ids": row, "attention_mask": torch.ones_like(row)})

    return OutputRows.of(llm, ids, run)


def _contiguous_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook: on CPUs, a product in bfloat16 with a slice of the positions is slow."""
    return (args[0].contiguous(), *args[1:])
