"""The hooks by which A_m·x becomes diag(s_m)·A_m·x, or R_m·A_m·x, with the s of each row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock, get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .flipout import Shift
from .rows import RowCheck

__all__ = ["Bound", "Hooks", "OnePass"]


class Bound(NamedTuple):
    """What the hooks read in a forward pass, and in the backward pass that repeats it.

    :param s: M of (S, D), or (S, D + k) with s_perp; ``None`` for all matrices as they are stored.
    :param shift: what is added to each of the M matrices A.
    :param tokens: the shape (S·R, T) of the model's input; ``None`` where it has not been seen.
    """

    s: tuple[Tensor, ...] | None = None
    shift: tuple[Shift, ...] | None = None
    tokens: tuple[int, int] | None = None


class OnePass:
    """One thread at a time, within which passes may hold others. A copy is a lock of its own."""

    def __init__(self) -> None:
        # Unlike RLock it may be released elsewhere: a generator may end in another thread.
        self._lock, self._depth = Lock(), 0
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner != get_ident():
            self._lock.acquire()
            self._owner = get_ident()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()

    def __reduce__(self) -> tuple[type[OnePass], tuple[()]]:
        return OnePass, ()


class Hooks:
    """One forward hook on each of M matrices A, which scales what A returns by :attr:`bound`.

    :param llm: the model that holds them, whose input tells the number of rows.
    :param A: the M matrices A by the names of their modules.
    :param rows: refuses inputs in which the rows of a draw cannot be found.
    :param unit: let A act with rows of unit norm.
    :param full: s_m is a matrix R_m (r, r), row by row, D = r² numbers; else a diagonal, D = r.
    :param perp: the M matrices (k, d_m) that s_perp scales; none if it has no coordinates.
    """

    def __init__(
        self,
        llm: nn.Module,
        A: Mapping[str, nn.Linear],
        rows: RowCheck,
        *,
        unit: bool,
        full: bool,
        perp: Sequence[nn.Linear] = (),
    ) -> None:
        self.bound = Bound()
        self._A = dict(A)
        self._perp = list(perp)
        self._rows = rows
        self._unit = unit
        self._full = full
        #: calls of each A in this forward pass; ``None`` once they were found to be one each
        self._calls: list[int] | None = [0] * len(A)
        for index, matrix in enumerate(A.values()):
            # Of a method, not a closure: a copy of the adapter gets hooks that read its own s.
            matrix.register_forward_hook(partial(self._scale, index))
        for index, matrix in enumerate(perp):
            matrix.register_forward_hook(partial(self._scale_perp, index))
        llm.register_forward_pre_hook(self._see_tokens, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        # What the last pass left bound may be part of a graph, which has no copy.
        return self.__dict__ | {"bound": Bound()}

    def bind(self, s: Tensor | None) -> torch.Size:
        """Let the hooks read s from now on, and nothing else; returns the shape of the draws.

        :param s: (\\*draws, M, D), or (\\*draws, M, D + k) with s_perp, which is 0 if left out.
            ``None`` is plain LoRA: s = 1, or R the identity.
        :raises ValueError: if s has another shape.
        """
        self.bound = Bound()
        if s is None and not (self._unit or self._perp):
            return torch.Size()
        if not (s is None or isinstance(s, Tensor)):
            raise TypeError(f"s is a {type(s).__name__}: expected a tensor (*draws, M, r)")
        if s is None:
            s = self.identity()
        each = self.effective(s)
        self.bound = Bound(each.reshape(-1, *each.shape[-2:]).unbind(1))
        # Of a tensor that Pyro tracks through a model, as ``pyro.infer.inspect`` does, the shape is
        # a tuple.
        return torch.Size(s.shape[:-2])

    @property
    def rank(self) -> int:
        """r."""
        return next(iter(self._A.values())).weight.shape[0]

    @property
    def width(self) -> int:
        """D, the numbers of s in a module: r, or r² of a matrix."""
        return self.rank**2 if self._full else self.rank

    def identity(self) -> Tensor:
        """The s (M, D) that changes nothing, where the first module is."""
        device = next(iter(self._A.values())).weight.device
        return self.diagonal(torch.ones(len(self._A), self.rank, device=device))

    def diagonal(self, values: Tensor) -> Tensor:
        """The s (M, D) that is a diagonal of these numbers (M, r)."""
        return values.diag_embed().flatten(-2) if self._full else values

    def with_perp(self, s: Tensor) -> Tensor:
        """(\\*draws, M, D + k), with s_perp = 0 where it was left out.

        :raises ValueError: if s has another shape.
        """
        M, D, k = len(self._A), self.width, self._perp[0].weight.shape[0] if self._perp else 0
        if s.shape[-2:] not in ((M, D), (M, D + k)) or 0 in s.shape:
            raise ValueError(
                f"s has shape {tuple(s.shape)}: expected (*draws, M, {'r²' if self._full else 'r'})"
                f" = (*draws, {M}, {D})" + (f", or with s_perp (*draws, {M}, {D + k})" if k else "")
            )
        missing = D + k - s.shape[-1]
        return nn.functional.pad(s, (0, missing)) if missing else s

    def effective(self, s: Tensor) -> Tensor:
        """What multiplies the rows of A and those of s_perp as they are stored: :meth:`with_perp`,
        over the norms of A's rows if these act with unit norm.

        :raises ValueError: if s has another shape.
        """
        s = self.with_perp(s)
        if not self._unit:
            return s
        norms = torch.stack(
            [torch.linalg.vector_norm(A.weight, dim=1).to(s.device) for A in self._A.values()]
        )
        if self._full:
            norms = norms.repeat(1, self.rank)  # of the column of each number of R
        scaled = s[..., : self.width] / norms
        return torch.cat([scaled, s[..., self.width :]], -1)

    def add(self, **fields: Any) -> None:
        """Change some fields of what is bound."""
        self.bound = self.bound._replace(**fields)

    @contextmanager
    def rebound(self, bound: Bound) -> Iterator[None]:
        """Let the hooks read something else, until the context ends."""
        before, self.bound = self.bound, bound
        try:
            yield
        finally:
            self.bound = before

    def start_pass(self, rows: int, T: int) -> None:
        """Count the calls of each A from here on, unless :meth:`check_calls` has passed.

        :param rows: S·R of the model's input.
        :param T: its tokens in a row.
        """
        self.add(tokens=(rows, T))
        self._rows.unclear = set()
        if self._calls is not None:
            self._calls = [0] * len(self._A)

    def check_calls(self) -> None:
        """Refuse a model that does not call each adapted module once in a forward pass.

        :raises ValueError: if it does not, for s would then not act as ΔW(s) says.
        """
        if self._calls is None:
            return
        wrong = {n: c for n, c in zip(self._A, self._calls, strict=True) if c != 1}
        if wrong:
            raise ValueError(
                "these adapted modules were not called once in a forward pass, but so often, and s"
                f" would not act as ΔW(s) says: {wrong}; leave them out of target_modules"
            )
        self._calls = None  # checked once: the hooks need not count any more

    def _scale(
        self, index: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        each, shift, tokens = self.bound
        if shift is not None:
            output = output + shift[index](args[0]).to(output)
        if each is None:
            return output
        if self._calls is not None:
            self._calls[index] += 1
        s = each[index]
        if len(s) > 1 and tokens is not None:
            self._rows.look(index, args[0].shape, len(s), *tokens)
        s = s[:, : self.width]
        return _mixed(output, s) if self._full else _times(output, s)

    def _scale_perp(
        self, index: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        # Of the same input as A's, whose rows have been looked at.
        each = self.bound.s
        return output if each is None else _times(output, each[index][:, -output.shape[-1] :])

    def _see_tokens(self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            self.add(tokens=None)
        else:
            self.start_pass(math.prod(ids.shape[:-1]), ids.shape[-1])


def _times(output: Tensor, s: Tensor) -> Tensor:
    """Each row times the s of its draw.

    :param output: (S·R, ..., r).
    :param s: (S, r).
    """
    s = s.to(output)
    if s.shape[0] == 1:
        return output * s[0]
    parts = output.unflatten(0, (s.shape[0], -1))  # (S, R, ..., r)
    return (parts * s.view(s.shape[0], *[1] * (parts.dim() - 2), -1)).flatten(0, 1)


def _mixed(output: Tensor, s: Tensor) -> Tensor:
    """R times each row, with the R of its draw.

    :param output: (S·R, ..., r).
    :param s: (S, r²).
    """
    r = output.shape[-1]
    cores = s.to(output).unflatten(-1, (r, r)).mT  # (S, r, r), for products from the right
    return (output.reshape(len(cores), -1, r) @ cores).reshape(output.shape)
