"""A language model with LoRA layers whose rank coordinates are scaled by a vector s.

ΔW(s) = (α/r) · B · diag(s) · V for each adapted module, with V: (r, d_in), B: (d_out, r), s: (r,).
The layers are PEFT's own; one forward hook on each ``lora_A`` multiplies its output by s.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from ..data import Batch, Completion, Record, Split
from ..distributed import shard
from ..readouts.base import Readout
from .flipout import Shift, flipped
from .layers import ADAPTER, add_lora
from .matrices import LoRAMatrices
from .output_layer import OutputRows, contiguous_input
from .trunk import Leaving, Trunk, TrunkError, map_tensors

__all__ = ["PROJECTIONS", "ProjectionMode", "SubspaceAdapter"]

ProjectionMode = Literal["free", "unit", "frozen_v", "fixed"]
PROJECTIONS: tuple[str, ...] = get_args(ProjectionMode)

log = logging.getLogger(__name__)


class _Bound(NamedTuple):
    """What the hooks read in a forward pass, and in the backward pass that repeats it.

    :param s: M of (S, r), or ``None`` for plain LoRA.
    :param shift: what is added to each of the M matrices A.
    :param tokens: the shape (S·R, T) of the model's input; ``None`` where it has not been seen.
    """

    s: tuple[Tensor, ...] | None = None
    shift: tuple[Shift, ...] | None = None
    tokens: tuple[int, int] | None = None


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
    :param base_dropout: train with the base model's own dropout, which makes p(y | x, s) random.
    :param gradient_checkpointing: recompute activations in the backward pass, with the same s.
    :param share_trunk: run the blocks below the first random vector once for all draws, which
        computes the same (see :class:`~scalabl_pyro.lora.Trunk`). Where a forward pass shows that a
        model does not allow it, all blocks run for all draws, with a line in the log.
    :raises ValueError: if a target matches no module, what PEFT builds would bypass the hook, or
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
        self._bound = _Bound()
        self._fired: list[int] | None = [0] * len(self.layers)
        for index, A in enumerate(self._A):
            # Of a method, not a closure: a copy of the adapter gets hooks that read its own s.
            A.register_forward_hook(partial(self._scale, index))
        self._hold_float32_heads()
        self._llm = cast(PreTrainedModel, self.peft_model.get_base_model())
        self._llm.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
        #: what the readout trains of its own, by name; part of :meth:`state`
        self.readout_parameters = readout.attach(self._llm)
        self.trunk = Trunk(self._llm, self.module_names)
        self._unclear: set[int] = set()
        self._rows_verified: set[int] = set()
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
        self._output_rows = self._prepare_output_layer()
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
        """The projections A (or V) and B, any head, and what the readout trains of its own, by
        name, trained or not."""
        return {
            name.removeprefix("base_model.model."): parameter
            for name, parameter in self._stored.items()
        }

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Those of :meth:`state` that are trained."""
        return {name: p for name, p in self.state().items() if p.requires_grad}

    def num_parameters(self) -> dict[str, int]:
        """How many numbers are trained, in the LoRA projections and in heads and readout apart."""
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

    @torch.no_grad()
    def start_readout(self, train: Split) -> None:
        """Let the readout choose where its own parameters start, if it has some.

        :param train: labelled examples.
        """
        starts = self.readout.start(self._llm, partial(self, s=self.init_loc), train)
        for name, value in starts.items():
            self.readout_parameters[name].fill_(value)

    @contextmanager
    @torch.no_grad()
    def folded(self, s: Tensor) -> Iterator[PeftModel]:
        """The PEFT model as ordinary LoRA at one s: A = diag(s)·V, until the context ends.

        :param s: (M, r).
        """
        kept = [A.weight.clone() for A in self._A]
        for A, scale in zip(self._A, self._effective(s), strict=True):
            A.weight.mul_(scale[:, None].to(A.weight))
        bound, self._bound = self._bound, _Bound()
        try:
            yield self.peft_model
        finally:
            self._bound = bound
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
        self._output_rows = None
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
            try:
                with self.bound(s[:1]) as llm:
                    leaving = self.trunk.leaving(lambda: self.readout(llm, inputs), depth)
            except TrunkError as error:
                self._leave_unshared(error)
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
        try:
            return self._pass(batch, s, per_example=per_example, shift=shift, leaving=leaving)
        except TrunkError as error:
            self._leave_unshared(error)
            return self._pass(batch, s, per_example=per_example, shift=shift, leaving=leaving)

    def _leave_unshared(self, error: TrunkError) -> None:
        """Run every block for every draw from now on, which computes the same."""
        self._share_trunk = False
        log.warning("%s: every block runs for every draw, which takes longer", error)

    def _pass(
        self,
        batch: Batch,
        s: Tensor | None,
        *,
        per_example: bool,
        shift: Tensor | None,
        leaving: Leaving | None,
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
            shifts = tuple(
                flipped(delta, len(batch), rows_each)
                for delta in self.matrices.named_A(shift).values()
            )
            self._bound = self._bound._replace(shift=shifts)
        S = draws.numel()
        one = inputs
        if S > 1:
            # (S·B, ...), draw-major
            inputs = {k: v.repeat(S, *[1] * (v.dim() - 1)) for k, v in inputs.items()}
        if torch.is_grad_enabled():
            self._check_checkpointing()
        if self._fired is not None:
            self._fired = [0] * len(self.layers)
        skipped = leaving or cached
        *shape, T = inputs["input_ids"].shape
        rows = math.prod(shape)
        self._bound = self._bound._replace(tokens=(rows, T))
        self._unclear = set()
        with (
            self.trunk.replaced(skipped, draws=S) if skipped else self._shared_trunk(s, S, rows),
            self._output_rows.in_place() if self._output_rows else nullcontext(),
        ):
            logits = self.readout(self._llm, inputs)  # (S·B, C)
        # Tensors without values, of an estimate of memory, cannot be compared.
        if self._unclear and not isinstance(logits, FakeTensor):
            self._verify_rows(one, self._unclear)
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
        with self._rebound(self._bound):
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
        parted = tuple(
            values[:1] if block < depth else values
            for values, block in zip(self._bound.s or (), self.trunk.block_of, strict=True)
        )
        self._bound = self._bound._replace(s=parted)
        return self.trunk.shared(depth, rows=rows, draws=draws)

    def _bind(self, s: Tensor | None) -> torch.Size:
        self._bound = _Bound()
        if s is None and not self.unit:
            return torch.Size()
        if s is None:
            s = torch.ones(self.shape, device=self.device)
        if s.shape[-2:] != self.shape:
            raise ValueError(
                f"s has shape {tuple(s.shape)}: expected (*draws, M, r) ="
                f" (*draws, {self.shape[0]}, {self.shape[1]})"
            )
        each = self._effective(s).reshape(-1, *self.shape).unbind(1)  # M of (S, r)
        self._bound = _Bound(each)
        return s.shape[:-2]

    def _effective(self, s: Tensor) -> Tensor:
        """The s that multiplies V's rows as they are stored."""
        if not self.unit:
            return s
        norms = [torch.linalg.vector_norm(A.weight, dim=1).to(s.device) for A in self._A]
        return s / torch.stack(norms)

    def _scale(
        self, index: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """The forward hook of A_m: A·x becomes diag(s_m)·A·x, with the s of each row."""
        each, shift, tokens = self._bound
        if shift is not None:
            output = output + shift[index](args[0]).to(output)
        if each is None:
            return output
        if self._fired is not None:
            self._fired[index] += 1
        s = each[index].to(output)  # (S, r)
        if s.shape[0] == 1:
            return output * s[0]
        if tokens is not None:
            self._check_rows(index, args[0].shape, len(s), *tokens)
        parts = output.unflatten(0, (s.shape[0], -1))  # (S, R, ..., r)
        return (parts * s.view(s.shape[0], *[1] * (parts.dim() - 2), -1)).flatten(0, 1)

    # ------------------------------------------------------------------ rows of draws

    def _see_tokens(self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = None if ids is None else (math.prod(ids.shape[:-1]), ids.shape[-1])
        self._bound = self._bound._replace(tokens=tokens)

    def _check_rows(self, index: int, shape: torch.Size, S: int, rows: int, T: int) -> None:
        """Refuse a layer whose input does not hold the rows of the draws one after another.

        :param shape: of the input of A_m.
        :raises ValueError: if the rows of a draw cannot be found in it. Shapes that leave a doubt
            are noted for :meth:`_verify_rows`.
        """
        inside = 0 <= self.trunk.block_of[index] < self.trunk.num_blocks
        if shape[0] == rows:
            doubt = shape[1] == rows if len(shape) > 2 else inside
        elif len(shape) == 2 and (shape[0] == rows * T if inside else shape[0] % S == 0):
            doubt = True  # tokens of all rows, of which each expert may see others
        else:
            raise self._no_rows(
                index, f"has the shape {tuple(shape)} for {rows} rows of {T} tokens"
            )
        if doubt and index not in self._rows_verified:
            self._unclear.add(index)

    @torch.no_grad()
    def _verify_rows(self, inputs: dict[str, Tensor], layers: set[int]) -> None:
        """Compare what layers see of two examples with what they see of each alone, once.

        :param inputs: of one draw.
        :raises ValueError: if a layer sees something else, or in another order.
        """
        first = {name: value[:1] for name, value in inputs.items()}
        second = {name: value[1:2] for name, value in inputs.items()}
        if not len(second["input_ids"]):
            second = first | {"input_ids": first["input_ids"].roll(1, -1)}
        both = {name: torch.cat([first[name], second[name]]) for name in inputs}
        modes = [(module, module.training) for module in self.peft_model.modules()]
        self.peft_model.eval()  # masks of dropout would differ
        try:
            with self._rebound(_Bound()):
                together = self._seen(both, layers)
                alone = [self._seen(some, layers) for some in (first, second)]
        finally:
            for module, mode in modes:
                module.training = mode
        for index in layers:
            found = together[index].float()
            expected = torch.cat([seen[index] for seen in alone]).float()
            if found.shape != expected.shape or (
                (found - expected).norm() > 0.05 * expected.norm()
            ):
                raise self._no_rows(index, "does not hold row after row")
        self._rows_verified |= layers

    def _seen(self, inputs: dict[str, Tensor], layers: set[int]) -> dict[int, Tensor]:
        """What reaches the matrices A of some layers in a forward pass."""
        seen: dict[int, Tensor] = {}

        def keep(index: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[index] = args[0]

        with ExitStack() as hooks:
            for index in layers:
                hooks.enter_context(self._A[index].register_forward_pre_hook(partial(keep, index)))
            self.readout(self._llm, inputs)
        return seen

    def _no_rows(self, index: int, what: str) -> ValueError:
        return ValueError(
            f"{type(self._llm).__name__} calls {self.module_names[index]} on an input that {what},"
            " so several draws of s cannot run at once: leave it out of target_modules, or run one"
            " draw at a time, as by Predictor(max_rows=1)"
        )

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
        """Train heads in float32, as PEFT does with A and B, whatever the base model's type.

        What a head returns has the base model's type again where frozen weights follow.
        """
        wrappers = [m for m in self.peft_model.modules() if isinstance(m, ModulesToSaveWrapper)]
        inside = {id(m) for wrapper in wrappers for m in wrapper.modules()}
        last = self.peft_model.get_base_model()
        for module in self.peft_model.modules():  # in the order of their definition
            if id(module) not in inside and [*module.parameters(recurse=False)]:
                last = module
        places = {id(module): place for place, module in enumerate(self.peft_model.modules())}
        for wrapper in wrappers:
            head = wrapper.modules_to_save[ADAPTER]
            dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), None)
            head.float().register_forward_pre_hook(_to_float32, with_kwargs=True)
            if places[id(wrapper)] < places[id(last)] and dtype not in (None, torch.float32):
                head.register_forward_hook(partial(_to_dtype, dtype))

    def _prepare_output_layer(self) -> OutputRows | None:
        try:
            head = self._llm.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            head = None
        if not isinstance(head, (nn.Linear, LoraLayer)):
            return None
        cast(nn.Module, head).register_forward_pre_hook(contiguous_input)
        ids: Tensor | None = getattr(self.readout, "label_ids", None)
        if ids is None:
            return None
        row = ids[None].to(self.device)  # any tokens will do

        def run() -> Tensor:
            return self.readout(
                self._llm, {"input_ids": row, "attention_mask": torch.ones_like(row)}
            )

        return OutputRows.of(self._llm, ids, run)

    def __getstate__(self) -> dict[str, Any]:
        # What the last pass left bound may be part of a graph, which has no copy.
        return self.__dict__ | {"_bound": _Bound()}

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
        self._llm.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": self._checkpoint_contexts}
        )
        if not self._base_dropout:
            # Blocks are in training mode while they are checkpointed, and some read it themselves.
            for block in self._blocks:
                for name, value in vars(block).items():
                    if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                        setattr(block, name, 0.0)

    def _checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # Recomputation must read what its own forward pass had, not what was bound last.
        return nullcontext(), self._rebound(self._bound)

    @contextmanager
    def _rebound(self, bound: _Bound) -> Iterator[None]:
        kept, self._bound = self._bound, bound
        try:
            yield
        finally:
            self._bound = kept

    def _check_checkpointing(self) -> None:
        if not self._checkpointed and any(block.gradient_checkpointing for block in self._blocks):
            raise ValueError(
                "gradient checkpointing was switched on from outside and would recompute with"
                " another s, silently; pass gradient_checkpointing=True to SubspaceAdapter instead"
            )


def _to_float32(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    return tuple(_floats(args, torch.float32)), _floats(kwargs, torch.float32)


def _to_dtype(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _floats(output, dtype)


def _floats(value: Any, dtype: torch.dtype) -> Any:
    """The same nested values, with numbers but no indices and masks in another type."""
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, value)
