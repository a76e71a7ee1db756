"""The trunk: the blocks below the first random vector, whose output is the same for every draw.

With adapted modules in the blocks k, k + 1, … of a stack, the hidden states that leave block k − 1
do not depend on s. They are computed once for the S draws of one pass (:meth:`Trunk.shared`), or
kept for further passes (:meth:`Trunk.leaving`, :meth:`Trunk.replaced`), which are the chunks that
many draws run in, or a whole training run (:mod:`~scalabl_pyro.lora.trunk_cache`).
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

__all__ = [
    "CACHED",
    "Trunk",
    "TrunkError",
    "TrunkOutput",
    "bytes_of",
    "map_tensors",
]

log = logging.getLogger(__name__)

#: with the number of the block, the name of cached hidden states among the inputs
CACHED = "hidden_states_leaving_block_"
# Arguments of blocks whose first dimension is no row: of DeBERTa; of Bloom and Falcon; of MPT.
_ROWLESS = {"rel_embeddings", "alibi", "position_bias"}


class TrunkError(ValueError):
    """A model whose blocks cannot be run on the rows of one draw, found in a forward pass."""


class TrunkOutput(NamedTuple):
    """What leaves a trunk, of one draw.

    :param hidden: (R, T, H), for R rows of tokens.
    :param depth: the number of blocks that it has passed.
    """

    hidden: Tensor
    depth: int


class Trunk:
    """The first ``depth`` blocks of a language model, those without a random vector.

    Any model serves whose adapted modules lie in one ``nn.ModuleList`` of blocks that run in order,
    each once, or before or after it; before it, there is nothing to share.

    :param llm: the model with its LoRA layers.
    :param module_names: the M adapted modules in it.
    """

    def __init__(self, llm: PreTrainedModel, module_names: Sequence[str]) -> None:
        self._llm = llm
        self._names = tuple(module_names)
        self._order_checked = False
        #: whether one pass runs the trunk once for all its draws
        self.sharing = True
        prefix, self._blocks, self.why_not = _find_blocks(llm, module_names)
        order = {name: place for place, (name, _) in enumerate(llm.named_modules())}
        #: (M,) the block that holds each module; −1 and the number of blocks are before and after
        self.block_of: list[int] = []
        for name in module_names:
            if prefix and name.startswith(f"{prefix}."):
                self.block_of.append(int(name.removeprefix(f"{prefix}.").split(".")[0]))
            else:
                after = prefix and order[name] > order[prefix]
                self.block_of.append(len(self._blocks) if after else -1)
        #: k, the number of blocks that no draw of s can change
        self.depth = max(0, min(self.block_of))
        if self.why_not is None and self.depth == 0:
            first = module_names[self.block_of.index(min(self.block_of))]
            self.why_not = f"{first} is adapted, below which there is no block"

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """In the order in which they run; none where they are not known, see ``why_not``."""
        return tuple(self._blocks)

    @property
    def model_name(self) -> str:
        """In messages."""
        return type(self._llm).__name__

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def fingerprint(self, trained: Iterable[nn.Parameter]) -> str:
        """A hash of all that the trunk computes with: the model's settings, and every number below
        and beside the blocks above the trunk.

        :param trained: what is left out: LoRA matrices and heads.
        """
        above = [*trained, *(p for block in self._blocks[self.depth :] for p in block.parameters())]
        left_out = set(map(id, above))
        settings = self._llm.config.to_diff_dict()
        for name in ("_name_or_path", "transformers_version"):
            settings.pop(name, None)
        digest = hashlib.sha256(f"{self.depth} {sorted(settings.items(), key=str)}".encode())
        for name, value in (*self._llm.named_parameters(), *self._llm.named_buffers()):
            # A head's untrained original is random, and of no effect.
            of_runs = id(value) in left_out or ".lora_" in name or ".original_module." in name
            if not of_runs:
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(bytes_of(value))
        return digest.hexdigest()

    def depth_for(self, s: Tensor) -> int:
        """The number of blocks that these draws do not change: at least :attr:`depth`, and more
        where the draws agree on the lowest modules.

        :param s: (S, M, r).
        """
        if s.requires_grad or not self._blocks:
            return self.depth  # each draw of a module needs its own gradient
        random = (s != s[:1]).any(-1).any(0).tolist()  # (M,)
        blocks = [block for block, differs in zip(self.block_of, random, strict=True) if differs]
        return max(0, min(blocks, default=self.num_blocks))

    def stop_sharing(self, error: TrunkError) -> None:
        """Run every block for every draw from now on, which computes the same."""
        self.sharing = False
        log.warning("%s: every block runs for every draw, which takes longer", error)

    def above(self, depth: int) -> Tensor:
        """(M,), true for the modules outside the first ``depth`` blocks."""
        return torch.tensor(self.block_of) >= depth

    # ------------------------------------------------------------------ one pass for all draws

    @contextmanager
    def shared(self, depth: int, *, rows: int, draws: int) -> Iterator[None]:
        """Run the first ``depth`` blocks on the rows of one draw, and repeat what leaves them.

        The model itself is called with all rows, draw-major, and sees nothing of this: what comes
        before and after the blocks, such as masks, positions and heads, has all rows.

        :param rows: S·R, of the model's input.
        :raises TrunkError: in the forward pass, if an argument of a block has neither a row for
            each input row nor one for all, or a random module runs before the trunk has ended.
        """
        one = rows // draws  # R

        def first_draw(value: Tensor) -> Tensor:
            if value.dim() < 2 or value.shape[0] in (1, one):
                return value
            if value.shape[0] != rows:
                raise TrunkError(
                    f"a block of {type(self._llm).__name__} takes an argument of shape"
                    f" {tuple(value.shape)} for {rows} rows"
                )
            return value[:one]

        def all_draws(value: Tensor) -> Tensor:
            if value.dim() < 2 or value.shape[0] != one:
                return value
            return value.repeat(draws, *[1] * (value.dim() - 1))  # (S·R, ...)

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return map_tensors(first_draw, args), map_tensors(first_draw, kwargs)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            return map_tensors(all_draws, output)

        with self._checked_order(depth), ExitStack() as hooks:
            for block in self._blocks[:depth]:
                hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(self._blocks[depth - 1].register_forward_hook(after))
            yield

    @contextmanager
    def _checked_order(self, depth: int) -> Iterator[None]:
        """Refuse a model that runs a random module before the trunk has ended."""
        if self._order_checked:  # once: what a model runs, and when, stays the same
            yield
            return
        ended = False

        def end(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal ended
            ended = True

        def random(module: nn.Module, args: Any) -> None:
            if not ended:
                raise TrunkError(
                    f"{type(self._llm).__name__} runs an adapted module before the blocks below it"
                )

        with ExitStack() as hooks:
            hooks.enter_context(self._blocks[depth - 1].register_forward_hook(end))
            for name, index in zip(self._names, self.block_of, strict=True):
                if index >= depth:
                    module = self._llm.get_submodule(name)
                    hooks.enter_context(module.register_forward_pre_hook(random))
            yield
        self._order_checked = True

    # ------------------------------------------------------------------ one pass for further ones

    def take(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], TrunkOutput | None]:
        """The model's inputs, and apart from them the cached hidden states, if any.

        :raises ValueError: if they were cached for another depth.
        """
        cached = {name: value for name, value in inputs.items() if name.startswith(CACHED)}
        for name in cached:
            if name != f"{CACHED}{self.depth - 1}":
                raise ValueError(
                    f"the batch holds {name}, but the adapter's trunk has {self.depth} blocks:"
                    " cache it again with this adapter"
                )
        rest = {name: value for name, value in inputs.items() if name not in cached}
        # (B, [C,] T, H) → (R, T, H)
        return rest, next(
            (TrunkOutput(h.flatten(0, -3), self.depth) for h in cached.values()), None
        )

    @contextmanager
    def replaced(self, leaving: TrunkOutput, *, draws: int) -> Iterator[None]:
        """Skip the trunk, and go on from what leaves it."""
        rows = leaving.hidden.repeat(draws, 1, 1)  # (S·R, T, H)
        with _instead(self._blocks[: leaving.depth], lambda *args, **kwargs: rows):
            yield

    def leaving(self, run: Callable[[], Any], depth: int) -> TrunkOutput | None:
        """What leaves the first ``depth`` blocks, with those above left out.

        :param run: runs the model on R rows.
        :returns: ``None`` where a block returns more than hidden states.
        """
        output: Any = None

        def keep(module: nn.Module, args: Any, returned: Any) -> None:
            nonlocal output
            output = returned

        # Run to its end, not stopped by an exception: other libraries' hooks need to close.
        with (
            self._checked_order(depth),
            self._blocks[depth - 1].register_forward_hook(keep),
            _instead(self._blocks[depth:], lambda *args, **kwargs: output),
        ):
            run()
        return TrunkOutput(output, depth) if isinstance(output, Tensor) else None

    def check_untrained(self, hidden: Sequence[Tensor]) -> None:
        """Refuse what a trained parameter has a part in.

        :param hidden: what leaves the trunk and has a gradient.
        :raises ValueError: if there is such a parameter.
        """
        trained = [p for p in self._llm.parameters() if p.requires_grad]
        if not (trained and hidden):
            return
        total = torch.stack([states.sum() for states in hidden]).sum()
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
        if any(gradient is not None for gradient in gradients):
            raise ValueError(
                "the trunk holds parameters that are trained, such as a head in modules_to_save"
                " below the first adapted block: what leaves it would not stay the same"
            )


@contextmanager
def _instead(blocks: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let blocks return something else than they compute."""
    # A forward of its own hides the class's: the blocks stay in place, with what a model may read
    # from them. Libraries that place layers on devices give them such a forward too.
    forwards = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for block, own in zip(blocks, forwards, strict=True):
            del block.forward
            if own is not None:
                block.forward = own  # type: ignore[method-assign]


def bytes_of(value: Tensor) -> bytes:
    """The numbers of a tensor, for a hash."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nested arguments, with the function applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        mapped = [map_tensors(function, each) for each in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    if isinstance(value, dict):
        named = {name: map_tensors(function, each) for name, each in value.items()}
        return type(value)(**named) if isinstance(value, ModelOutput) else named
    return value


def _find_blocks(
    llm: PreTrainedModel, names: Sequence[str]
) -> tuple[str, list[nn.Module], str | None]:
    """The list of blocks that holds adapted modules, by name, or why there is none to split."""
    kind = type(llm).__name__
    lists = {name: list(m) for name, m in llm.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [x for x in lists if not any(x.startswith(f"{other}.") for other in lists)]
    holding = [x for x in outer if any(name.startswith(f"{x}.") for name in names)]
    if len(holding) > 1:
        return "", [], f"{kind} has adapted modules in several lists of blocks: {holding}"
    # With all adapted modules outside, the longest stack is the trunk.
    longest = max(holding or outer, key=lambda x: len(lists[x]), default="")
    if not longest:
        return "", [], f"{kind} keeps its blocks in no nn.ModuleList"
    if len(set(map(id, lists[longest]))) < len(lists[longest]):
        return "", [], f"{kind} runs the same block more than once"
    rowless = _ROWLESS & set(inspect.signature(lists[longest][0].forward).parameters)
    if rowless:
        return (
            "",
            [],
            f"{kind} gives its blocks {sorted(rowless)}, which have no row for each input",
        )
    if llm.config._attn_implementation == "flex_attention":
        return "", [], "the block masks of flex attention cannot be cut to the rows of one draw"
    return longest, lists[longest], None
