"""A language model with LoRA layers whose rank coordinates are scaled by a vector s.

ΔW(s) = (α/r) · B · diag(s) · V for each adapted module, with V: (r, d_in), B: (d_out, r), s: (r,);
or B · R · V with a matrix R (r, r) of r² coordinates in the place of the diagonal. The layers are
PEFT's own; one forward hook on each ``lora_A`` multiplies its output by s.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from ..data import Batch, Completion, Record, Split
from ..distributed import shard
from ..readouts.base import Readout
from .checkpointing import Checkpointing
from .flipout import flipped
from .heads import hold_float32_heads
from .hooks import Bound, Hooks, OnePass
from .layers import ADAPTER, PERP, add_lora, add_perp
from .matrices import LoRAMatrices
from .output_layer import prepare_output_layer
from .rows import RowCheck
from .saving import guard_saving
from .trunk import Trunk, TrunkError, TrunkOutput
from .trunk_cache import cached_split

__all__ = ["CORES", "PROJECTIONS", "Core", "ProjectionMode", "SubspaceAdapter"]

ProjectionMode = Literal["free", "unit", "frozen_v", "fixed"]
PROJECTIONS: tuple[str, ...] = get_args(ProjectionMode)
Core = Literal["diagonal", "full"]
CORES: tuple[str, ...] = get_args(Core)


class SubspaceAdapter:
    """A function ``adapter(batch, s) → logits`` around a Hugging Face model with LoRA layers.

    In the subspace form (``svd=True``) each fresh A is replaced by its singular value decomposition
    A = U·diag(σ)·V: ``lora_A`` holds V with orthonormal rows, ``lora_B`` holds B·U, and
    :attr:`init_loc` holds σ, so that s = σ computes what the LoRA layer did. With ``svd=False`` the
    layers stay plain LoRA, and s = 1 (or ``None``) leaves them alone.

    What is trained beside s is the choice of ``projections``:

    * ``free``: V, B, heads, and what the readout trains of its own;
    * ``unit``: the same, but V acts with rows of unit norm, which takes the scale of s out of V (B
      keeps it, unless the model has a prior on B);
    * ``frozen_v``: the same without V, which stays where it starts;
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
    :param core: what s is in a module: ``diagonal``, r numbers, or ``full``, a matrix R of r²
        numbers, row by row, which also mixes the r directions (the core of LoRA-XS; Marszałek et
        al. 2025, arXiv 2502.12122, infer one). It starts at the diagonal. Wherever (M, r) is said
        of s, it is then (M, r²).
    :param perp: k, how many coordinates s_perp of each module nothing trains, beside the r of s; 0
        until :func:`~scalabl_pyro.lora.set_perp` says what they scale.
    :param base_dropout: train with the base model's own dropout, which makes p(y | x, s) random.
    :param gradient_checkpointing: recompute activations in the backward pass, with the same s.
    :param share_trunk: run the blocks below the first random vector once for all draws, which
        computes the same (see :class:`~scalabl_pyro.lora.Trunk`). Where a forward pass shows that a
        model does not allow it, all blocks run for all draws, with a line in the log.
    :raises ValueError: if the model is on another device than a CPU or a CUDA device, a target
        matches no module, what PEFT builds would bypass the hook, or
        ``start`` does not fit the model.

    Usage::

        readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
        adapter = SubspaceAdapter(llm, LoraConfig(r=4, target_modules=["q_proj"]), readout)
        train = adapter.encode(records)
        batch = next(train.minibatches(4, seed=0))
        s = torch.randn(10, *adapter.shape)  # (S, M, r)
        logits = adapter(batch, s)  # (S, B, C)
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
        core: Core = "diagonal",
        perp: int = 0,
        base_dropout: bool = False,
        gradient_checkpointing: bool = False,
        share_trunk: bool = True,
    ) -> None:
        if projections is None:
            projections = "frozen_v" if svd else "free"
        if projections not in PROJECTIONS:
            raise ValueError(f"projections is {projections!r}: expected one of {PROJECTIONS}")
        if core not in CORES:
            raise ValueError(f"core is {core!r}: expected one of {CORES}")
        self.readout = readout
        #: whether it starts from a trained adapter, which s = 1 reproduces
        self.warm_start = start is not None
        self.unit = projections == "unit"
        #: whether V is fresh and never moves, so that it may come from the data before training
        self.V_waits_for_data = svd and start is None and projections == "frozen_v"
        self.peft_model, self.layers = add_lora(llm, lora, start)
        if llm.device.type not in ("cpu", "cuda", "meta"):
            # Seeds are set and put back, and random states saved, on these alone.
            raise ValueError(
                f"the model is on {llm.device}: expected a CPU or a CUDA device, as after"
                " llm.to('cpu')"
            )
        if perp < 0:
            raise ValueError(f"perp is {perp}: expected a number of coordinates, 0 or more")
        #: k
        self.perp = perp
        fixed = add_perp(self.layers, perp) if perp else {}
        self.matrices = LoRAMatrices(self.layers)
        self._A = list(self.matrices.A.values())
        self.rank: int = lora.r
        self.scaling: float = next(iter(self.layers.values())).scaling[ADAPTER]
        hold_float32_heads(self.peft_model)
        #: the language model, with the LoRA layers in it
        self.llm = cast(PreTrainedModel, self.peft_model.get_base_model())
        self.trunk = Trunk(self.llm, self.module_names)
        self.trunk.sharing = share_trunk
        A_of = dict(zip(self.module_names, self._A, strict=True))
        self._rows = RowCheck(self.llm, A_of, self.trunk)
        perp_layers = self.layers.values() if perp else ()
        #: M matrices V⊥ (k, d_m), and ``perp_B`` B⊥ (d_out, k); none if k is 0
        self.perp_A = [cast(nn.Linear, layer.lora_A[PERP]) for layer in perp_layers]
        self.perp_B = [cast(nn.Linear, layer.lora_B[PERP]) for layer in perp_layers]
        self._hooks = Hooks(
            self.llm, A_of, self._rows, unit=self.unit, full=core == "full", perp=self.perp_A
        )
        # What hooks and trunk read stands in the modules: threads take turns.
        self._one_pass = OnePass()
        self._checkpointing = Checkpointing(self.llm, self._hooks)
        self.peft_model.eval()
        #: what the readout trains of its own, by name; part of :meth:`state`
        self.readout_parameters = readout.attach(self.llm)
        known = set(map(id, self.llm.parameters()))
        for name, parameter in self.readout_parameters.items():
            if id(parameter) not in known:
                raise ValueError(
                    f"{type(readout).__name__}.attach gives a parameter {name!r} that is none of"
                    " the model's, which nothing would train or save: expected it to register it,"
                    f" llm.register_parameter({name!r}, parameter)"
                )
        self._readout_at_first = [p.detach().clone() for p in self.readout_parameters.values()]
        self._fingerprint: str | None = None
        self._base_dropout = base_dropout
        if gradient_checkpointing:
            self._checkpointing.enable(dropout=base_dropout)
        self._stored = {
            name: parameter
            for name, parameter in self.peft_model.named_parameters()
            if parameter.requires_grad or name.removeprefix("base_model.model.") in fixed
        }
        frozen = {"frozen_v": self._A, "fixed": self.peft_model.modules()}.get(projections, ())
        for module in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self._output_rows = prepare_output_layer(self.llm, readout, self.device)
        self._init_loc = self._hooks.identity()
        if svd and start is None:
            self._init_loc = self._hooks.diagonal(self.matrices.decompose_A())
        elif svd:
            self.matrices.decompose_product()
        self._B_at_start = self.matrices.norms_of_B()
        self._is_folded = False
        if svd:
            guard_saving(self.peft_model, self._holds_s)

    # ------------------------------------------------------------------ shape and parameters

    @property
    def module_names(self) -> tuple[str, ...]:
        """The M adapted modules, in the order of the first dimension of s."""
        return tuple(self.layers)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of s: (M, r), or (M, r²) of a full core."""
        return len(self.layers), self._hooks.width

    def identity(self) -> Tensor:
        """(M, r), the s at which A and B act as they are stored: 1, or of a full core the identity
        matrices; where the model is now."""
        return self._hooks.identity()

    def with_perp(self, s: Tensor) -> Tensor:
        """(\\*draws, M, r + k), with s_perp = 0 where it was left out.

        :param s: (\\*draws, M, r) or (\\*draws, M, r + k).
        :raises ValueError: if s has another shape.
        """
        return self._hooks.with_perp(s)

    @property
    def init_loc(self) -> Tensor:
        """(M, r), the s at which the adapter computes what plain LoRA would; a copy, where the
        model is now."""
        return self._init_loc.to(self.device, copy=True)

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
        """The projections A (or V) and B, any head, and what the readout trains of its own, by
        name, trained or not."""
        return {
            name.removeprefix("base_model.model."): parameter
            for name, parameter in self._stored.items()
        }

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Those of :meth:`state` that are trained."""
        return {name: p for name, p in self.state().items() if p.requires_grad}

    def freeze(self) -> None:
        """Train nothing of :meth:`state` any more, so that s alone is left to infer. Models that
        were made before still declare what they found."""
        for parameter in self.state().values():
            parameter.requires_grad_(False)

    def num_parameters(self) -> dict[str, int]:
        """How many numbers are trained, in the LoRA projections and in heads and readout apart."""
        counts = {"lora": 0, "heads": 0}
        for name, parameter in self.named_parameters().items():
            counts["lora" if ".lora_" in name else "heads"] += parameter.numel()
        return counts

    def train(self, mode: bool = True) -> None:
        """Switch training mode on (or off): LoRA's dropout, and the base model's if asked for.

        Otherwise the base model stays in evaluation mode, so that p(y | x, s) is a function of s
        alone.
        """
        if self._base_dropout:
            self.peft_model.train(mode)
        for layer in self.layers.values():
            layer.lora_dropout.train(mode)
        self._checkpointing.train(mode)

    def eval(self) -> None:
        """Switch training mode off."""
        self.train(False)

    def move_start(self, loc: Tensor) -> None:
        """Make ``loc`` the :attr:`init_loc`, with B rescaled so that the same is computed there.

        :param loc: (M, r).
        :raises ValueError: if it is 0 somewhere: nothing depends on V or B there; or if B is not
            what it was at first, for draws of s made with it would then compute something else.
        """
        if not (loc != 0).all():
            raise ValueError("s = 0 cannot be the start: no gradient reaches V and B there")
        if not (self._init_loc != 0).all():
            raise ValueError(
                "the prior's support is part of the line, and a full core starts at a diagonal,"
                " whose other numbers are 0: expected a prior on the whole line, or core='diagonal'"
            )
        if not torch.equal(self.matrices.norms_of_B(), self._B_at_start.to(self.device)):
            raise ValueError(
                "the start of s would have to move, and with it B, which has been trained or moved"
                " since this adapter was made: build a new adapter for a prior of another support"
            )
        init_loc = self.init_loc
        self.matrices.scale_columns_of_B(init_loc / loc)
        self._init_loc = loc.to(init_loc)

    @torch.no_grad()
    def start_readout(self, train: Split) -> None:
        """Let the readout choose where its own parameters start, if it has some and they have not
        moved yet. ``fit`` does so too.

        :param train: labelled examples.
        """
        now = self.readout_parameters.values()
        if any(
            (p != q.to(p.device)).any() for p, q in zip(now, self._readout_at_first, strict=True)
        ):
            return
        starts = self.readout.start(self.llm, partial(self, s=self.init_loc), train)
        for name, value in starts.items():
            self.readout_parameters[name].fill_(value)

    @contextmanager
    @torch.no_grad()
    def folded(self, s: Tensor) -> Iterator[PeftModel]:
        """The PEFT model as ordinary LoRA at one s: A = diag(s)·V, or R·V, until the context ends.

        :param s: (M, r), or (M, r + k) with s_perp, whose rows are a second adapter of PEFT's.
        """
        matrices = [*self._A, *self.perp_A]
        of_A, of_perp = self._hooks.effective(s).split([self._hooks.width, self.perp], dim=-1)
        scales = [*of_A, *of_perp][: len(matrices)]
        with self._one_pass:
            originals = [A.weight.clone() for A in matrices]
            try:
                for A, scale in zip(matrices, scales, strict=True):
                    A.weight.copy_(_scaled_rows(A.weight, scale.to(A.weight)))
                self._is_folded = True
                with self._hooks.rebound(Bound()):
                    yield self.peft_model
            finally:
                self._is_folded = False
                for A, weight in zip(matrices, originals, strict=True):
                    A.weight.copy_(weight)

    def _check_active(self) -> None:
        """:raises ValueError: if PEFT leaves a layer out, so that s would be of no effect."""
        for name, layer in self.layers.items():
            if layer.merged:
                why = "is merged into its base layer: undo it by unmerge_adapter()"
            elif layer.disable_adapters:
                why = "is switched off: leave disable_adapter(), or call enable_adapter_layers()"
            elif ADAPTER not in layer.active_adapters:
                others = ", ".join(layer.active_adapters)
                why = f"is not active, but {others} is: call set_adapter({ADAPTER!r})"
            else:
                continue
            raise ValueError(f"s would be of no effect: PEFT's adapter of {name} {why}")

    def _holds_s(self) -> bool:
        return self._is_folded

    @contextmanager
    @torch.no_grad()
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other projections, until the context ends.

        :param weights: by the names of :meth:`state`.
        """
        stored = self.state()
        with self._one_pass:
            originals = {name: stored[name].clone() for name in weights}
            try:
                for name, value in weights.items():
                    stored[name].copy_(value)
                yield
            finally:
                for name, value in originals.items():
                    stored[name].copy_(value)

    def shard(self) -> None:
        """Spread the base model over the processes that train together (see ``distributed``)."""
        self._fingerprint = self.base_fingerprint()  # while the weights are all here
        self._output_rows = None
        shard(self.llm, self._stored.values())

    def base_fingerprint(self) -> str:
        """A hash of the frozen base model: names, shapes and the first values of its parameters."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for name, parameter in self.peft_model.named_parameters():
            # A head's untrained original is random, and of no effect.
            if not (name in self._stored or ".original_module." in name):
                values = parameter.detach().flatten()[:64].float().cpu().tolist()
                digest.update(f"{name} {tuple(parameter.shape)} {values}".encode())
        return digest.hexdigest()

    # ------------------------------------------------------------------ forward

    def encode(self, records: Sequence[Record] | Sequence[Completion]) -> Split:
        """Tokenise records for the readout.

        :raises DataError: if a record does not fit it.
        """
        return self.readout.encode(cast(Sequence[Record], records))

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
        :param s: (\\*draws, M, r), or (\\*draws, M, r + k) with s_perp, which is 0 if left out; all
            leading dimensions are draws. ``None`` is s = 1, plain LoRA.
        :param per_example: s is (B, M, r), one for each example, or (B, C, M, r), one for each
            choice of a batch in which choices are rows of their own; the logits are (B, C).
        :param shift: numbers as in ``matrices.flat_A()``, added to the matrices A at signs that are
            drawn anew for each example (see :func:`~scalabl_pyro.lora.flipout.flipped`).
        :returns: (\\*draws, B, C) in float32; −inf where a choice does not exist. A readout may put
            further dimensions before C.
        :raises ValueError: if s has another shape.

        Outside of a pass no s is bound: the language model itself, called directly, is plain LoRA
        with A and B as they are stored. Threads take turns, a pass each; they cannot train one
        adapter at once.
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
            try:
                with self._reading(s[:1]):  # not whole: the blocks above are left out
                    leaving = self.trunk.leaving(lambda: self.readout(self.llm, inputs), depth)
            except TrunkError as error:
                self.trunk.stop_sharing(error)
        return partial(self._run, batch, leaving=leaving)

    def _run(
        self,
        batch: Batch,
        s: Tensor | None,
        *,
        per_example: bool = False,
        shift: Tensor | None = None,
        leaving: TrunkOutput | None = None,
    ) -> Tensor:
        with self._one_pass, self._hooks.rebound(self._hooks.bound):
            try:
                return self._pass(batch, s, per_example=per_example, shift=shift, leaving=leaving)
            except TrunkError as error:
                self.trunk.stop_sharing(error)
                return self._pass(batch, s, per_example=per_example, shift=shift, leaving=leaving)

    def _pass(
        self,
        batch: Batch,
        s: Tensor | None,
        *,
        per_example: bool,
        shift: Tensor | None,
        leaving: TrunkOutput | None,
    ) -> Tensor:
        if not isinstance(batch, Batch):
            raise TypeError(
                f"batch is a {type(batch).__name__}: expected a Batch, such as one of"
                " adapter.encode(records).batches(64)"
            )
        self._check_active()
        draws = self._hooks.bind(s)
        if per_example:
            whole = batch.choices.shape if batch.row_per_choice else ()
            if draws not in (batch.choices.shape[:1], whole):
                raise ValueError(f"there are {tuple(draws)} draws of s for {len(batch)} examples")
            draws = torch.Size()  # the batch's own rows, which are not repeated
        batch = batch.to(self.device)
        inputs, cached = self.trunk.take(batch.inputs)
        if shift is not None:
            rows_each = math.prod(inputs["input_ids"].shape[1:-1])
            deltas = zip(self._A, self.matrices.named_A(shift).values(), strict=True)
            shifts = tuple(
                flipped(delta.to(A.weight.device), len(batch), rows_each) for A, delta in deltas
            )
            self._hooks.add(shift=shifts)
        S = draws.numel()
        one = inputs
        if S > 1:
            # (S·B, ...), draw-major
            inputs = {k: v.repeat(S, *[1] * (v.dim() - 1)) for k, v in inputs.items()}
        if torch.is_grad_enabled():
            self._checkpointing.check()
        skipped = leaving or cached
        *shape, T = inputs["input_ids"].shape
        rows = math.prod(shape)
        self._hooks.start_pass(rows, T)  # here too, for a readout may call a part of the model
        with (
            self.trunk.replaced(skipped, draws=S) if skipped else self._shared_trunk(s, S, rows),
            self._output_rows.in_place() if self._output_rows else nullcontext(),
        ):
            logits = self.readout(self.llm, inputs)  # (S·B, C)
        if s is not None and not leaving:
            self._hooks.check_calls()
        # Tensors without values, of an estimate of memory, cannot be compared.
        if self._rows.unclear and not isinstance(logits, FakeTensor):
            with self._hooks.rebound(Bound()):
                self._rows.verify(one, partial(self.readout, self.llm))
        of_batch = batch.choices.shape[-1]  # more than C where a readout takes any number
        expected = (S * len(batch), max(self.readout.num_classes, of_batch))
        if (logits.shape[0], logits.shape[-1]) != expected:
            raise ValueError(f"the readout returned {tuple(logits.shape)}: expected {expected}")
        logits = logits.unflatten(0, (*draws, len(batch)))
        return logits.masked_fill(~batch.choices, float("-inf"))

    @contextmanager
    def bound(self, s: Tensor | None) -> Iterator[PreTrainedModel]:
        """The language model with s bound, for as many forward passes as the context holds. Other
        threads wait for its end.

        :param s: (S, M, r), for batches of S·B rows, draw-major. ``None`` is s = 1, plain LoRA.
        :raises ValueError: if s has another shape; in a forward pass, if the rows of a draw cannot
            be found in a layer's input, or a layer is not called once.
        """
        with self._reading(s):
            handle = self.llm.register_forward_hook(self._check_pass, with_kwargs=True)
            try:
                yield self.llm
            finally:
                handle.remove()

    @contextmanager
    def _reading(self, s: Tensor | None) -> Iterator[None]:
        """Other threads wait, and the hooks read s, until the context ends."""
        with self._one_pass, self._hooks.rebound(self._hooks.bound):
            self._check_active()
            self._hooks.bind(s)
            yield

    def _check_pass(
        self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """After a forward pass of the model, that s acted in it as ΔW(s) says."""
        bound = self._hooks.bound
        if bound.s is None:
            return
        self._hooks.check_calls()
        if self._rows.unclear:
            ids: Any = kwargs.get("input_ids", args[0] if args else None)
            inputs = {
                name: value[: len(ids) // len(bound.s[0])]
                for name, value in {**kwargs, "input_ids": ids}.items()
                if isinstance(value, Tensor) and value.shape == ids.shape
            }
            with self._hooks.rebound(Bound()):
                self._rows.verify(inputs, lambda inputs: llm(**inputs, use_cache=False))

    def cache_trunk(
        self, split: Split, *, batch_size: int = 64, folder: str | Path | None = None
    ) -> Split:
        """The same split, with the trunk computed once: whatever is then run on it, a fit, a chain
        or a prediction, runs the blocks from the first adapted one on, with the same result.

        Hidden states stay in memory on the CPU: a vector for each token of each row.

        :param batch_size: B of a forward pass.
        :param folder: keep them there too, for other runs on the same model, depth and questions.
        :raises ValueError: if the adapter has no trunk, the trunk holds something that is trained,
            ``base_dropout`` is on, or what the folder holds is damaged or of other weights.
        """
        if self._base_dropout:
            raise ValueError(
                "base_dropout is on, and draws new masks in every pass: the trunk's output cannot"
                " be kept; set base_dropout=False"
            )

        def run(batch: Batch) -> Tensor:
            with self._reading(None):  # not whole: the blocks above are left out
                return self.readout(self.llm, batch.to(self.device).inputs)

        return cached_split(
            self.trunk,
            split,
            run,
            batch_size=batch_size,
            folder=None if folder is None else Path(folder),
            trained=self._stored.values(),
        )

    def _depth_shared_by(self, s: Tensor) -> int:
        """The number of blocks that may run once for these draws."""
        dropout = self._base_dropout and self.peft_model.training  # a mask for each draw
        if dropout or not self.trunk.sharing:
            return 0
        return self.trunk.depth_for(s.reshape(-1, *s.shape[-2:]))

    def _shared_trunk(
        self, s: Tensor | None, draws: int, rows: int
    ) -> AbstractContextManager[None]:
        """How the blocks below the first random vector run in one forward pass."""
        depth = 0 if s is None or draws == 1 else self._depth_shared_by(s)
        if not depth:
            return nullcontext()
        # In the trunk there are the rows of one draw only.
        parted = tuple(
            values[:1] if block < depth else values
            for values, block in zip(self._hooks.bound.s or (), self.trunk.block_of, strict=True)
        )
        self._hooks.add(s=parted)
        return self.trunk.shared(depth, rows=rows, draws=draws)


def _scaled_rows(A: Tensor, s: Tensor) -> Tensor:
    """diag(s)·A or, of r² numbers, R·A.

    :param A: (r, d).
    :param s: (r,) or (r²,).
    """
    return s[:, None] * A if len(s) == len(A) else s.view(len(A), len(A)) @ A
