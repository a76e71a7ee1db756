r"""Subspaces from data: which V a fresh adapter has.

The rows of V are the r directions of a module's input that its update ΔW(s) = (α/r)·B·diag(s)·V
looks at. They are leading eigenvectors v_j of a matrix C (d_in, d_in), with eigenvalues λ_j:

* ``activations``: of the second moment C = 1/R Σ_t x_t x_tᵀ of the module's inputs x at the R
  tokens of training prompts, with V_j = v_j · √(tr C / (d_in · λ_j)). Then (V_j·x)² is tr C / d_in
  in the mean, the same for each j ("whitened"), and the same as that of an orthonormal V whose
  directions are random. So s and B keep their scale, and s its start and its prior. Inputs with
  fewer than r directions leave the other rows of V at random ones, orthogonal to these.
* ``weights``: of C = WᵀW for the frozen weight W, the right singular vectors of W, with V_j = v_j.

The moment is not centred: ΔW(s) acts on x, not on x − mean, so a mean is a direction like others,
and these v_1 … v_r are the ones that keep most of Σ_t ‖x_t‖².
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..data import Batch, Split
from ..distributed import copy_from_main
from ..rng import forked_rng
from .adapter import SubspaceAdapter
from .padding import real_tokens

__all__ = ["SUBSPACES", "few_prompts", "second_moments", "set_perp", "set_subspace"]

log = logging.getLogger(__name__)

T = TypeVar("T")

#: most prompts whose activations are looked at
_PROMPTS = 256
#: most bytes of second moments at once, of which a layer with many inputs has gigabytes
_MOST_BYTES = 2**30
#: most inputs of which all eigenvectors are computed to get the first
_DENSE = 4096


@torch.no_grad()
def set_subspace(adapter: SubspaceAdapter, name: str, prompts: Split | None = None) -> None:
    """Give a fresh adapter another V, before a model or a guide is made of it.

    B is 0, so that the logits stay those of the base model. ``init_loc`` stays as it is. In plain
    LoRA (``svd=False``), A becomes diag(σ)·V with the singular values σ that it had.

    :param name: one of :data:`SUBSPACES`; ``random`` leaves V as it is. ``auto`` is ``activations``
        for the subspace form with V frozen, where nothing else moves V towards the data, and
        ``random`` for all others and for an adapter that starts from a trained one.
    :param prompts: for ``activations``, training examples, of which up to 256, evenly spread, run
        through the base model: once, and once more for each GiB of second moments. Labels are not
        looked at.
    :raises ValueError: if there is no such subspace; B is not 0; V would lose its scale
        (``projections="unit"``); or prompts are missing.
    """
    if name == "auto":
        name = "activations" if adapter.V_waits_for_data else "random"
    if name not in SUBSPACES:
        raise ValueError(f"subspace is {name!r}: expected one of {['auto', *sorted(SUBSPACES)]}")
    if name == "random":
        return
    if adapter.matrices.norms_of_B().any():
        raise ValueError(
            f"subspace is {name!r}, but B is not 0: what was trained has a V of its own; take"
            " 'random', which leaves it as it is, or a fresh adapter"
        )
    directions = SUBSPACES[name](adapter, prompts)
    copy_from_main(directions)  # rounding on another device may turn a direction round
    for A, V in zip(adapter.matrices.A.values(), directions, strict=True):
        sigma = torch.linalg.svdvals(A.weight.float())  # 1 in the subspace form
        A.weight.copy_(sigma[:, None] * V)


@torch.no_grad()
def set_perp(adapter: SubspaceAdapter, prompts: Split) -> None:
    r"""Give the coordinates s_perp directions that training data hardly excite.

    .. math:: ΔW^⊥_m(s^⊥) = (α/r) \, B^⊥_m \, \mathrm{diag}(s^⊥_m) \, V^⊥_m

    The k rows of V⊥ are orthonormal, orthogonal to the rows of V, and of all such the ones with the
    least Σ_j v_jᵀ C v_j, for the second moment C of the module's inputs. B⊥ has entries
    Normal(0, 1 / d_out), drawn from the current random state. Nothing trains either. V is meant as
    it is now: call :func:`set_subspace` first.

    :param adapter: with ``perp`` above 0.
    :param prompts: training examples, of which up to 256, evenly spread, run through the model:
        once, and once more for each GiB of second moments. Labels are not looked at.
    :raises ValueError: if a module has fewer than r + k inputs, or no token reaches it.
    """
    directions = []
    for name, C, A in _moments_in_turn(adapter, _sample(prompts)):
        if not C.any():
            raise ValueError(
                f"no token of {len(prompts)} prompts reaches {name}: give more, or leave it out of"
                " target_modules"
            )
        if len(C) < adapter.rank + adapter.perp:
            raise ValueError(
                f"{name} has {len(C)} inputs, fewer than r + perp = {adapter.rank} +"
                f" {adapter.perp}: expected a smaller perp"
            )
        V = A.weight.double()
        Q = torch.linalg.qr(V.mT, mode="complete").Q  # its first r columns span the rows of V
        outside = Q[:, adapter.rank :].mT.to(C)  # (d - r, d), orthonormal
        vectors = torch.linalg.eigh(outside @ C @ outside.mT).eigenvectors  # the least first
        directions.append(vectors[:, : adapter.perp].mT @ outside)
    copy_from_main(directions)
    for A, B, V in zip(adapter.perp_A, adapter.perp_B, directions, strict=True):
        A.weight.copy_(V)
        B.weight.copy_(torch.randn(B.weight.shape) / len(B.weight) ** 0.5)


def few_prompts(prompts: Sequence[T]) -> Sequence[T]:
    """Up to 256 of them, evenly spread."""
    return prompts[:: -(-len(prompts) // _PROMPTS)]


def _sample(prompts: Split) -> Split:
    return prompts.select(few_prompts(range(len(prompts))))


@torch.no_grad()
def second_moments(
    adapter: SubspaceAdapter, prompts: Split, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """C_m = 1/R Σ_t x_t x_tᵀ over the R tokens that reach adapted module m, (d_m, d_m) in float64;
    0 where no token does, as of an expert.

    One forward pass for each prompt. Padding and missing choices have no part in it.

    :param names: of the modules; all adapted ones if left out.
    :returns: by the names of modules.
    """
    adapter.eval()
    modules = dict(zip(adapter.module_names, adapter.matrices.A.values(), strict=True))
    inputs = {name: A for name, A in modules.items() if names is None or name in names}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(inputs, 0)

    def add(name: str, batch: Batch, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = real_tokens(args[0], batch).double()
        sums[name] = sums.get(name, 0) + x.mT @ x
        counts[name] += len(x)

    for example in prompts.examples:
        # One at a time: which of a batch's tokens are padding would not be known of an expert's.
        batch = prompts.collate([example])
        with ExitStack() as hooks:
            for name, A in inputs.items():
                hook = partial(add, name, batch)
                hooks.enter_context(A.register_forward_pre_hook(hook))
            adapter(batch)
    return {
        name: sums[name] / count
        if (count := counts[name])
        else A.weight.new_zeros(A.in_features, A.in_features, dtype=torch.float64)
        for name, A in inputs.items()
    }


def _leading(C: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The r largest eigenvalues (r,) and their eigenvectors as rows (r, d)."""
    if len(C) > _DENSE:
        with forked_rng(0):
            vectors, values, _ = torch.svd_lowrank(C, q=4 * r, niter=16)
        return values[:r], vectors[:, :r].mT
    values, vectors = torch.linalg.eigh(C)
    return values[-r:].flip(0), vectors[:, -r:].flip(1).mT


def _of_activations(adapter: SubspaceAdapter, prompts: Split | None) -> list[Tensor]:
    if adapter.unit:
        raise ValueError(
            "subspace is 'activations', which gives the rows of V the scale of their inputs, and"
            " projections 'unit' takes it away: expected frozen_v, free or fixed"
        )
    if prompts is None:
        raise ValueError(
            "V is to come from activations: give prompts, a split of training examples, or take"
            " subspace='random'"
        )
    sample = _sample(prompts)
    directions = []
    for name, C, A in _moments_in_turn(adapter, sample):
        values, V = _leading(C, adapter.rank)
        # Below it is what rounding of the inputs makes.
        known = values > len(C) * torch.finfo(torch.float32).eps * values[0]
        V = V[known] * (C.trace() / len(C) / values[known]).sqrt()[:, None]
        if len(V) < adapter.rank:
            log.info(
                "the inputs of %s at %d prompts have %d directions: the other %d of V stay random",
                *(name, len(sample), len(V), adapter.rank - len(V)),
            )
            V = _filled_up(V, A.weight)
        directions.append(V)
    return directions


def _moments_in_turn(
    adapter: SubspaceAdapter, prompts: Split
) -> Iterator[tuple[str, Tensor, nn.Linear]]:
    """Name, second moments and A of each adapted module, with few moments held at once."""
    modules = dict(zip(adapter.module_names, adapter.matrices.A.values(), strict=True))
    for names in _groups({name: A.in_features for name, A in modules.items()}):
        for name, C in second_moments(adapter, prompts, names).items():
            yield name, C, modules[name]


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names of modules whose second moments are held at once.

    :param sizes: how many inputs each has.
    """
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + 8 * size**2 > _MOST_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += 8 * size**2
    yield group


def _filled_up(V: Tensor, random: Tensor) -> Tensor:
    """(r, d), k orthogonal rows and r - k of norm 1 that are orthogonal to them.

    :param random: (r, d), what these are made of.
    """
    Q, R = torch.linalg.qr(torch.cat([V.double(), random.to(V.device).double()]).mT)
    rest = (Q * R.diagonal().sign()).mT[len(V) : len(random)]
    return torch.cat([V.to(rest), rest])


def _of_weights(adapter: SubspaceAdapter, prompts: Split | None) -> list[Tensor]:
    directions = []
    for layer in adapter.layers.values():
        base = layer.get_base_layer()
        W = dequantize_module_weight(base).double()  # (d_out, d_in)
        if isinstance(base, Conv1D):
            W = W.mT
        directions.append(_leading(W.mT @ W, adapter.rank)[1])
    return directions


def _as_it_is(adapter: SubspaceAdapter, prompts: Split | None) -> list[Tensor]:
    return [A.weight for A in adapter.matrices.A.values()]


#: functions of an adapter and of prompts, which return M matrices V (r, d_m), by name
SUBSPACES: dict[str, Callable[[SubspaceAdapter, Split | None], list[Tensor]]] = {
    "activations": _of_activations,
    "random": _as_it_is,
    "weights": _of_weights,
}
