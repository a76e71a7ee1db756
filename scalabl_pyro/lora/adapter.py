"""A language model with LoRA layers whose rank coordinates are scaled by a vector s.

ΔW(s) = (α/r) · B · diag(s) · V for each adapted module, with V: (r, d_in), B: (d_out, r), s: (r,).
The layers are PEFT's own; one forward hook on each ``lora_A`` multiplies its output by s.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import Batch, Split
from ..distributed import shard
from ..readouts.base import Readout
from .flipout import Shift, flipped
from .layers import ADAPTER, add_lora
from .matrices import LoRAMatrices
from .trunk import Leaving, Trunk

__all__ = ["PROJECTIONS", "ProjectionMode", "SubspaceAdapter"]

ProjectionMode = Literal["free", "unit", "frozen_v", "fixed"]
PROJECTIONS: tuple[str, ...] = get_args(ProjectionMode)


class SubspaceAdapter:
    """A function ``adapter(batch, s) → logits`` around a Hugging Face model with LoRA layers.

    In the subspace form (``svd=True``) each fresh A is replaced by its singular value decomposition
    A = U·diag(σ)·V: ``lora_A`` holds V with orthonormal rows, ``lora_B`` holds B·U, and
    :attr:`init_loc` holds σ, so that s = σ computes what the LoRA layer did. With ``svd=False`` the
    layers stay plain LoRA, and s = 1 (or ``None``) leaves them alone.

    What is trained beside s is the choice of ``projections``:

    * ``free``: V, B and heads;
    * ``unit``: the same, but V acts with rows of unit norm, which takes the scale of s out of V (B
      keeps it, unless the model has a prior on B);
    * ``frozen_v``: B and heads, while V stays where it starts;
    * ``fixed``: nothing, for inference on s alone.

    :param llm: any Hugging Face model; it is changed in place, as ``peft.get_peft_model`` does.
    :param lora: rank, scaling α and target modules; layers must call ``lora_B(lora_A(x))``.
    :param readout: turns the model's output into C logits.
    :param start: a trained PEFT adapter, a folder or a name on the Hub, to start from. In the
        subspace form its update B·A = U·diag(σ)·V becomes B = U·diag(σ), V and s = 1, which
        computes the same.
    :param svd: whether to bring the layers to the subspace form.
    :param projections: what is trained, as above; if left out, ``frozen_v``, as method ScalaBL has
        it, and ``free`` for a plain LoRA adapter (``svd=False``), as MLE has it.
    :param base_dropout: train with the base model's own dropout, which makes p(y | x, s) random.
    :param gradient_checkpointing: recompute activations in the backward pass, with the same s.
    :param share_trunk: run the blocks below the first random vector once for all draws, which
        computes the same (see :class:`~scalabl_pyro.lora.Trunk`).
    :raises ValueError: if a target matches no module, what PEFT builds would bypass the hook, or
        ``start`` does not fit the model.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        lora: LoraConfig,
        readout: Readout,
        *,
        start: str | Path | None = None,
        svd: bool = True,
        projections: ProjectionMode | None = None,
        base_dropout: bool = False,
        gradient_checkpointing: bool = False,
        share_trunk: bool = True,
    ) -> None:
        if projections is None:
            projections = "frozen_v" if svd else "free"
        if projections not in PROJECTIONS:
            raise ValueError(f"projections is {projections!r}: expected one of {PROJECTIONS}")
        self.readout = readout
        self.trained = start is not None
        self.peft_model, self.layers = add_lora(llm, lora, start)
        self.matrices = LoRAMatrices(self.layers)
        self._A = list(self.matrices.A.values())
        self.rank: int = lora.r
        self.scaling: float = next(iter(self.layers.values())).scaling[ADAPTER]
        self._s: tuple[Tensor, ...] | None = None
        self._shift: tuple[Shift, ...] | None = None
        self._fired: list[int] | None = [0] * len(self.layers)
        for index, A in enumerate(self._A):
            A.register_forward_hook(self._scale_by(index))
        self._hold_float32_heads()
        self._llm = cast(PreTrainedModel, self.peft_model.get_base_model())
        self.trunk = Trunk(self._llm, self.module_names)
        self._share_trunk = share_trunk
        self._fingerprint: str | None = None
        self._base_dropout = base_dropout
        self._blocks = [m for m in self._llm.modules() if hasattr(m, "gradient_checkpointing")]
        self._checkpointed = gradient_checkpointing
        if gradient_checkpointing:
            self._enable_checkpointing()
        self.peft_model.eval()
        self._stored = {
            name: parameter
            for name, parameter in self.peft_model.named_parameters()
            if parameter.requires_grad
        }
        self.unit = projections == "unit"
        frozen = {"frozen_v": self._A, "fixed": self.peft_model.modules()}.get(projections, ())
        for module in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self._init_loc = torch.ones(self.shape, device=self.device)
        if svd and start is None:
            self._init_loc = self.matrices.decompose_A()
        elif svd:
            self.matrices.decompose_product()
        self._B_at_start = self.matrices.norms_of_B()

    # ------------------------------------------------------------------ shape and parameters

    @property
    def module_names(self) -> tuple[str, ...]:
        """The M adapted modules, in the order of the first dimension of s."""
        return tuple(self.layers)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, r)."""
        return len(self.layers), self.rank

    @property
    def init_loc(self) -> Tensor:
        """(M, r), the s at which the adapter computes what plain LoRA would; a copy."""
        return self._init_loc.clone()

    @property
    def device(self) -> torch.device:
        return self._A[0].weight.device

    def set_dropout(self, rate: float) -> None:
        """Drop inputs of every A in training with this probability, in place of LoRA's own rate."""
        for layer in self.layers.values():
            layer.lora_dropout[ADAPTER] = nn.Dropout(rate).train(False)

    @property
    def has_dropout(self) -> bool:
        """Whether training draws dropout masks."""
        dropouts = [layer.lora_dropout[ADAPTER] for layer in self.layers.values()]
        return self._base_dropout or any(getattr(dropout, "p", 0.0) > 0 for dropout in dropouts)

    def state(self) -> dict[str, nn.Parameter]:
        """The projections A (or V) and B, and any head, by name, trained or not."""
        return {
            name.removeprefix("base_model.model."): parameter
            for name, parameter in self._stored.items()
        }

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Those of :meth:`state` that are trained."""
        return {name: p for name, p in self.state().items() if p.requires_grad}

    def num_parameters(self) -> dict[str, int]:
        """How many numbers are trained, in the LoRA projections and in heads apart."""
        counts = {"lora": 0, "heads": 0}
        for name, parameter in self.named_parameters().items():
            counts["lora" if ".lora_" in name else "heads"] += parameter.numel()
        return counts

    def train(self, mode: bool = True) -> None:
        """Switch training mode on (or off): LoRA's dropout, and the base model's if asked for.

        Otherwise the base model stays in evaluation mode, so that p(y | x, s) is a function of s
        alone. Checkpointed blocks look at their own flag before they recompute.
        """
        if self._base_dropout:
            self.peft_model.train(mode)
        for layer in self.layers.values():
            layer.lora_dropout.train(mode)
        for block in self._blocks if self._checkpointed else ():
            block.training = mode

    def eval(self) -> None:
        """Switch training mode off."""
        self.train(False)

    @contextmanager
    @torch.no_grad()
    def folded(self, s: Tensor) -> Iterator[PeftModel]:
        """The PEFT model as ordinary LoRA at one s: A = diag(s)·V, until the context ends.

        :param s: (M, r).
        """
        kept = [A.weight.clone() for A in self._A]
        for A, scale in zip(self._A, self._effective(s), strict=True):
            A.weight.mul_(scale[:, None].to(A.weight))
        bound, self._s = self._s, None
        try:
            yield self.peft_model
        finally:
            self._s = bound
            for A, weight in zip(self._A, kept, strict=True):
                A.weight.copy_(weight)

    @contextmanager
    @torch.no_grad()
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other projections, until the context ends.

        :param weights: by the names of :meth:`state`.
        """
        stored = self.state()
        kept = {name: stored[name].clone() for name in weights}
        for name, value in weights.items():
            stored[name].copy_(value)
        try:
            yield
        finally:
            for name, value in kept.items():
                stored[name].copy_(value)

    def shard(self) -> None:
        """Spread the base model over the processes that train together (see ``distributed``)."""
        self._fingerprint = self.base_fingerprint()  # while the weights are all here
        shard(self._llm, self._stored.values())

    def base_fingerprint(self) -> str:
        """A hash of the frozen base model: names, shapes and the first values of its parameters."""
        if self._fingerprint is not None:
            return self._fingerprint
        found = hashlib.sha256()
        for name, parameter in self.peft_model.named_parameters():
            # A head's untrained original is random, and of no effect.
            if not (name in self._stored or ".original_module." in name):
                values = parameter.detach().flatten()[:64].float().cpu().tolist()
                found.update(f"{name} {tuple(parameter.shape)} {values}".encode())
        return found.hexdigest()

    # ------------------------------------------------------------------ forward

    def __call__(
        self,
        batch: Batch,
        s: Tensor | None = None,
        *,
        per_example: bool = False,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Logits of a batch, for each draw of s.

        :param batch: B examples, moved to the adapter's device if need be.
        :param s: (\\*draws, M, r); all leading dimensions are draws. ``None`` is s = 1, plain LoRA.
        :param per_example: s is (B, M, r), one for each example, and the logits are (B, C).
        :param shift: numbers as in ``matrices.flat_A()``, added to the matrices A at signs that are
            drawn anew for each example (see :func:`~scalabl_pyro.lora.flipout.flipped`).
        :returns: (\\*draws, B, C) in float32; −inf where a choice does not exist. A readout may put
            further dimensions before C.
        :raises ValueError: if s has another shape.

        s and the shift stay bound until the next call, for a checkpointed backward pass runs the
        model again.
        """
        return self._run(batch, s, per_example=per_example, shift=shift)

    def above_trunk(self, batch: Batch, s: Tensor) -> Callable[[Tensor], Tensor]:
        """The logits of a batch as a function of some of these draws, a (S', M, r), that goes on
        from what leaves the blocks which no draw changes, run once.

        :param s: (S, M, r), all draws that the function is for.
        """
        depth = self._depth_shared_by(s)
        batch = batch.to(self.device)
        inputs, cached = self.trunk.take(batch.inputs)
        leaving = None
        if depth and not cached:
            with self.bound(s[:1]) as llm:
                leaving = self.trunk.leaving(lambda: self.readout(llm, inputs), depth)
        return partial(self._run, batch, leaving=leaving)

    def _run(
        self,
        batch: Batch,
        s: Tensor | None,
        *,
        per_example: bool = False,
        shift: Tensor | None = None,
        leaving: Leaving | None = None,
    ) -> Tensor:
        draws = self._bind(s)
        if per_example:
            if tuple(draws) != (len(batch),):
                raise ValueError(f"there are {tuple(draws)} draws of s for {len(batch)} examples")
            draws = torch.Size()  # the batch's own rows, which are not repeated
        batch = batch.to(self.device)
        inputs, cached = self.trunk.take(batch.inputs)
        if shift is not None:
            rows_each = math.prod(inputs["input_ids"].shape[1:-1])
            self._shift = tuple(
                flipped(delta, len(batch), rows_each)
                for delta in self.matrices.named_A(shift).values()
            )
        S = draws.numel()
        if S > 1:
            # (S·B, ...), draw-major
            inputs = {k: v.repeat(S, *[1] * (v.dim() - 1)) for k, v in inputs.items()}
        if torch.is_grad_enabled():
            self._check_checkpointing()
        if self._fired is not None:
            self._fired = [0] * len(self.layers)
        skipped = leaving or cached
        with (
            self.trunk.replaced(skipped, draws=S)
            if skipped
            else self._shared_trunk(s, S, math.prod(inputs["input_ids"].shape[:-1]))
        ):
            logits = self.readout(self._llm, inputs)  # (S·B, C)
        if self._fired is not None and s is not None and not leaving:
            self._check_fired()
        expected = (S * len(batch), self.readout.num_classes)
        if (logits.shape[0], logits.shape[-1]) != expected:
            raise ValueError(f"the readout returned {tuple(logits.shape)}: expected {expected}")
        logits = logits.unflatten(0, (*draws, len(batch)))
        return logits.masked_fill(~batch.choices, float("-inf"))

    @contextmanager
    def bound(self, s: Tensor | None) -> Iterator[PreTrainedModel]:
        """The language model with s bound, for as many forward passes as the context holds.

        :param s: (S, M, r), for batches of S·B rows, draw-major. ``None`` is s = 1, plain LoRA.
        :raises ValueError: if s has another shape.
        """
        with self._rebound(self._s, self._shift):
            self._bind(s)
            yield self._llm

    def cache_trunk(self, split: Split, *, batch_size: int = 64) -> Split:
        """The same split, with the trunk computed once: whatever is then run on it, a fit, a chain
        or a prediction, runs the blocks from the first adapted one on, with the same result.

        Hidden states stay in memory on the CPU: a vector for each token of each row.

        :param batch_size: B of a forward pass.
        :raises ValueError: if the adapter has no trunk, the trunk holds something that is trained,
            or ``base_dropout`` is on.
        """
        if self._base_dropout:
            raise ValueError(
                "base_dropout is on, and draws new masks in every pass: the trunk's output cannot"
                " be kept; set base_dropout=False"
            )

        def run(batch: Batch) -> Tensor:
            with self.bound(None) as llm:
                return self.readout(llm, batch.to(self.device).inputs)

        return self.trunk.cache(split, run, batch_size=batch_size)

    def _depth_shared_by(self, s: Tensor) -> int:
        """The number of blocks that may run once for these draws."""
        dropout = self._base_dropout and self.peft_model.training  # a mask for each draw
        if dropout or not self._share_trunk:
            return 0
        return self.trunk.depth_for(s.reshape(-1, *self.shape))

    def _shared_trunk(
        self, s: Tensor | None, draws: int, rows: int
    ) -> AbstractContextManager[None]:
        """How the blocks below the first random vector run in one forward pass."""
        depth = 0 if s is None or draws == 1 else self._depth_shared_by(s)
        if not depth:
            return nullcontext()
        # In the trunk there are the rows of one draw only.
        self._s = tuple(
            values[:1] if block < depth else values
            for values, block in zip(self._s or (), self.trunk.block_of, strict=True)
        )
        return self.trunk.shared(depth, rows=rows, draws=draws)

    def _bind(self, s: Tensor | None) -> torch.Size:
        self._shift = None
        if s is None and not self.unit:
            self._s = None
            return torch.Size()
        if s is None:
            s = torch.ones(self.shape, device=self.device)
        if s.shape[-2:] != self.shape:
            raise ValueError(
                f"s has shape {tuple(s.shape)}: expected (*draws, M, r) ="
                f" (*draws, {self.shape[0]}, {self.shape[1]})"
            )
        self._s = self._effective(s).reshape(-1, *self.shape).unbind(1)  # M of (S, r)
        return s.shape[:-2]

    def _effective(self, s: Tensor) -> Tensor:
        """The s that multiplies V's rows as they are stored."""
        if not self.unit:
            return s
        norms = [torch.linalg.vector_norm(A.weight, dim=1).to(s.device) for A in self._A]
        return s / torch.stack(norms)

    def _scale_by(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._shift is not None:
                output = output + self._shift[index](args[0]).to(output)
            if self._s is None:
                return output
            if self._fired is not None:
                self._fired[index] += 1
            s = self._s[index].to(output)  # (S, r)
            if s.shape[0] == 1:
                return output * s[0]
            rows = output.unflatten(0, (s.shape[0], -1))  # (S, R, ..., r)
            return (rows * s.view(s.shape[0], *[1] * (rows.dim() - 2), -1)).flatten(0, 1)

        return hook

    def _check_fired(self) -> None:
        wrong = {n: c for n, c in zip(self.layers, self._fired or (), strict=True) if c != 1}
        if wrong:
            raise ValueError(
                "these adapted modules were not called once in a forward pass, but so often, and s"
                f" would not act as ΔW(s) says: {wrong}; leave them out of target_modules"
            )
        self._fired = None  # checked once: the hooks need not count any more

    # ------------------------------------------------------------------ construction

    def _hold_float32_heads(self) -> None:
        """Train heads in float32, as PEFT does with A and B, whatever the base model's type."""
        for module in self.peft_model.modules():
            heads = getattr(module, "modules_to_save", None)
            if isinstance(heads, nn.ModuleDict):
                head = heads[ADAPTER].float()
                head.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))

    def move_start(self, loc: Tensor) -> None:
        """Make ``loc`` the :attr:`init_loc`, with B rescaled so that the same is computed there.

        :param loc: (M, r).
        :raises ValueError: if it is 0 somewhere: nothing depends on V or B there; or if B is not
            what it was at first, for draws of s made with it would then compute something else.
        """
        if not (loc != 0).all():
            raise ValueError("s = 0 cannot be the start: no gradient reaches V and B there")
        if not torch.equal(self.matrices.norms_of_B(), self._B_at_start):
            raise ValueError(
                "the start of s would have to move, and with it B, which has been trained or moved"
                " since this adapter was made: build a new adapter for a prior of another support"
            )
        self.matrices.scale_columns_of_B(self._init_loc / loc)
        self._init_loc = loc.to(self._init_loc)

    # ------------------------------------------------------------------ gradient checkpointing

    def _enable_checkpointing(self) -> None:
        # Recomputation must read what its own forward pass had, not what was bound last.
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._rebound(self._s, self._shift)

        self._llm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        if not self._base_dropout:
            # Blocks are in training mode while they are checkpointed, and some read it themselves.
            for block in self._blocks:
                for name, value in vars(block).items():
                    if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                        setattr(block, name, 0.0)

    @contextmanager
    def _rebound(
        self, s: tuple[Tensor, ...] | None, shift: tuple[Shift, ...] | None
    ) -> Iterator[None]:
        bound = self._s, self._shift
        self._s, self._shift = s, shift
        try:
            yield
        finally:
            self._s, self._shift = bound

    def _check_checkpointing(self) -> None:
        if not self._checkpointed and any(block.gradient_checkpointing for block in self._blocks):
            raise ValueError(
                "gradient checkpointing was switched on from outside and would recompute with"
                " another s, silently; pass gradient_checkpointing=True to SubspaceAdapter instead"
            )
