"""Which rows of a layer's input belong to which draw, for several draws in one forward pass.

The model is called on S·R rows, draw after draw. A layer inside may be called on another layout:
on time first, on the tokens that are sent to an expert, or on one row for all. There, no s belongs
to a row, and the layer is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .trunk import Trunk

__all__ = ["RowCheck"]


class RowCheck:
    """The check that the inputs of M adapted modules hold the rows of the draws in order.

    Shapes decide most cases. A shape that leaves a doubt is noted in :attr:`unclear`, and
    :meth:`verify` then looks at values, once for each module.

    :param llm: the model that is called with the rows.
    :param A: the M matrices A by the names of their modules.
    :param trunk: knows which modules are in a block of the model's stack.
    """

    def __init__(self, llm: nn.Module, A: Mapping[str, nn.Linear], trunk: Trunk) -> None:
        self._llm = llm
        self._names = list(A)
        self._A = list(A.values())
        self._in_block = [0 <= block < trunk.num_blocks for block in trunk.block_of]  # (M,)
        self._verified: set[int] = set()
        #: modules whose shapes left a doubt in this forward pass
        self.unclear: set[int] = set()

    def look(self, index: int, shape: torch.Size, S: int, rows: int, T: int) -> None:
        """Refuse a layer whose input does not hold the rows of the draws one after another.

        :param index: of the module.
        :param shape: of its input.
        :param S: the number of draws.
        :param rows: S·R, with which the model was called.
        :param T: tokens in a row.
        :raises ValueError: if the rows of a draw cannot be found in it.
        """
        in_block = self._in_block[index]
        if shape[0] == rows:
            doubt = shape[1] == rows if len(shape) > 2 else in_block
        elif len(shape) == 2 and (shape[0] == rows * T if in_block else shape[0] % S == 0):
            doubt = True  # tokens of all rows, of which each expert may see others
        else:
            raise self._no_rows(
                index, f"has the shape {tuple(shape)} for {rows} rows of {T} tokens"
            )
        if doubt and index not in self._verified:
            self.unclear.add(index)

    @torch.no_grad()
    def verify(self, inputs: dict[str, Tensor], run: Callable[[dict[str, Tensor]], Any]) -> None:
        """Compare what the unclear layers see of two examples with what they see of each alone.

        A row of one token looks the same in every order, so two of it are read instead.

        :param inputs: of one draw.
        :param run: runs the model on such inputs, without s.
        :raises ValueError: if a layer sees something else, or in another order.
        """
        if inputs["input_ids"].shape[-1] == 1:
            inputs = {name: value.repeat_interleave(2, -1) for name, value in inputs.items()}
        first = {name: value[:1] for name, value in inputs.items()}
        second = {name: value[1:2] for name, value in inputs.items()}
        if not len(second["input_ids"]):
            embeddings = cast(PreTrainedModel, self._llm).get_input_embeddings()
            vocabulary = cast(nn.Embedding, embeddings).num_embeddings
            second = first | {"input_ids": (first["input_ids"] + 1) % vocabulary}
        both = {name: torch.cat([first[name], second[name]]) for name in inputs}
        layers, self.unclear = self.unclear, set()
        modes = [(module, module.training) for module in self._llm.modules()]
        self._llm.eval()  # masks of dropout would differ
        try:
            together = self._seen(both, layers, run)
            alone = [self._seen(single, layers, run) for single in (first, second)]
        finally:
            for module, mode in modes:
                module.training = mode
        for index in layers:
            in_batch = together[index].float()
            expected = torch.cat([seen[index] for seen in alone]).float()
            if in_batch.shape != expected.shape or (
                (in_batch - expected).norm() > 0.05 * expected.norm()
            ):
                raise self._no_rows(index, "does not hold row after row")
        self._verified |= layers

    def _seen(
        self, inputs: dict[str, Tensor], layers: set[int], run: Callable[[dict[str, Tensor]], Any]
    ) -> dict[int, Tensor]:
        """What reaches the matrices A of some layers in a forward pass."""
        seen: dict[int, Tensor] = {}

        def keep(index: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[index] = args[0]

        with ExitStack() as hooks:
            for index in layers:
                hooks.enter_context(self._A[index].register_forward_pre_hook(partial(keep, index)))
            run(inputs)
        return seen

    def _no_rows(self, index: int, what: str) -> ValueError:
        return ValueError(
            f"{type(self._llm).__name__} calls {self._names[index]} on an input that {what},"
            " so several draws of s cannot run at once: leave it out of target_modules, or run one"
            " draw at a time, as by Predictor(max_rows=1)"
        )
