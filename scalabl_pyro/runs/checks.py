"""What works with a model and its adapter, tried out: each check against what must be the same.

The bound is a share of the largest logit. In float32 it is 1e-4; rounding in a model of thirty
blocks comes to 2e-6. In types of fewer digits it is eight steps of the type, 8·2⁻⁷ in bfloat16 and
8·2⁻¹⁰ in float16; rounding in such a model comes to up to four. B is so large that draws differ by
four bounds, so that a fault which mixes them up is seen. One that is smaller than the bound is not:
try float32.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import pyro
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..data import Batch, Split
from ..guides import AutoSubspaceNormal
from ..infer.fit_config import FitConfig
from ..infer.svi import fit
from ..lora.adapter import SubspaceAdapter
from ..lora.layers import ADAPTER
from ..lora.padding import real_tokens
from ..lora.saving import save_adapter
from ..lora.subspace import set_subspace
from ..models.model import ScalaBLModel
from ..prediction.generation import Decoding, encode_prompts, generate
from ..prediction.predictor import Predictor
from ..readouts.completion_tokens import NO_TOKEN

__all__ = ["CHECKS", "Candidate", "Finding", "Needless", "bound", "examine"]


class Finding(NamedTuple):
    """What became of a check.

    :param state: ``ok``; ``refused``, with the reason; ``absent`` where the model itself lacks it;
        ``wrong`` where numbers differ that must not; ``broken`` where something else went wrong.
    """

    state: str
    text: str


class Needless(Exception):
    """A check that says nothing of this model."""


class Wrong(Exception):
    """A check that ran, and whose numbers differ."""


class Adapts(Protocol):
    """Adapters of a candidate, the same each time."""

    def __call__(
        self,
        llm: PreTrainedModel,
        *,
        upper: bool = False,
        svd: bool = True,
        gradient_checkpointing: bool = False,
    ) -> SubspaceAdapter:
        """:param upper: adapt the upper half of the blocks alone."""
        ...


@dataclass
class Candidate:
    """A model as it is to be adapted, and examples to try it on.

    :param load: the base model, the same at each call.
    :param adapt: an adapter on it.
    :param split: labelled examples, some of them shorter than others.
    :param prompts: texts to continue, where the model can.
    """

    load: Callable[[], PreTrainedModel]
    adapt: Adapts
    split: Split
    prompts: tuple[str, ...] = ()
    spread: float = field(default=0.02, init=False)

    @property
    def batch(self) -> Batch:
        """All examples."""
        return self.split.collate(self.split.examples)

    def make(
        self, *, upper: bool = False, svd: bool = True, gradient_checkpointing: bool = False
    ) -> SubspaceAdapter:
        """An adapter with a random B, without which nothing depends on s."""
        adapter = self.adapt(
            self.load(), upper=upper, svd=svd, gradient_checkpointing=gradient_checkpointing
        )
        fill(adapter, self.spread)
        return adapter

    def settle(self) -> str:
        """Make B so large that draws are told apart from rounding.

        :raises Wrong: if no size of B does.
        """
        adapter = self.make()
        batch, s = self.batch, draws_of(adapter)
        for _ in range(12):
            with torch.no_grad():
                f = torch.stack([adapter(batch, each) for each in s])
            share = float((f[1:] - f[0]).abs().max() / _size(f))
            if share > 4 * bound(adapter):
                return f"draws of s differ by {share:.1g} of the largest, {_told(adapter)}"
            self.spread *= 2
            fill(adapter, self.spread)
        raise Wrong(f"draws of s change no logit by more than {share:.1e} of the largest")


def bound(adapter: SubspaceAdapter) -> float:
    """The share of the largest logit by which what must be the same may differ."""
    dtype = adapter.llm.dtype
    return 1e-4 if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps


@torch.no_grad()
def fill(adapter: SubspaceAdapter, spread: float) -> None:
    """Random B, the same for the same adapter.

    :param spread: the standard deviation.
    """
    generator = torch.Generator().manual_seed(3)
    for layer in adapter.matrices.B.values():
        layer.weight.copy_(spread * torch.randn(layer.weight.shape, generator=generator))


def draws_of(adapter: SubspaceAdapter) -> Tensor:
    """(3, M, r), around what the adapter starts with."""
    factors = torch.rand(3, *adapter.shape, generator=torch.Generator().manual_seed(4)) + 0.5
    return adapter.init_loc * factors.to(adapter.device)


def _size(f: Tensor) -> Tensor:
    return f.abs().max().clamp(min=1e-2)


def _same(adapter: SubspaceAdapter, actual: Tensor, expected: Tensor) -> str:
    """:raises Wrong: if they differ by more than the bound."""
    actual, expected = actual.detach(), expected.detach()
    return _judged(adapter, float((actual - expected).abs().max() / _size(expected)))


def _judged(adapter: SubspaceAdapter, share: float) -> str:
    if not share < bound(adapter):
        raise Wrong(f"off by {share:.1e} of the largest, {_told(adapter)}")
    return f"off by {share:.0e} of the largest" if share else "equal to the bit"


def _told(adapter: SubspaceAdapter) -> str:
    return f"the bound is {bound(adapter):.0e}"


def _loop(adapter: SubspaceAdapter, batch: Batch, s: Tensor) -> Tensor:
    return torch.stack([adapter(batch, each) for each in s])


def _counted(batch: Batch, logits: Tensor) -> Tensor:
    """Those of (B, C), or of (B, K, C) of texts, that a label goes with: K depends on the batch."""
    assert batch.labels is not None
    return logits[batch.labels != NO_TOKEN]


# ---------------------------------------------------------------------- the checks


@torch.no_grad()
def plain_peft(candidate: Candidate) -> str:
    """The logits of plain PEFT at the same weights."""
    adapter = candidate.make(svd=False)
    llm = candidate.load()
    adapter.readout.attach(llm)
    model = get_peft_model(llm, copy.deepcopy(adapter.peft_model.peft_config[ADAPTER]))
    plain = dict(model.eval().named_parameters())
    for name, value in adapter.state().items():
        plain[f"base_model.model.{name}"].copy_(value)
    batch = candidate.batch.to(adapter.device)
    return _same(adapter, adapter(batch), adapter.readout(llm, batch.inputs))


@torch.no_grad()
def padded(candidate: Candidate) -> str:
    """Rows that are padded have the logits that they have alone."""
    adapter = candidate.make()
    rows = [candidate.split.collate([e]).to(adapter.device) for e in candidate.split]
    batch = candidate.batch.to(adapter.device)
    each = torch.cat([_counted(row, adapter(row, adapter.init_loc)) for row in rows])
    try:
        return _same(adapter, _counted(batch, adapter(batch, adapter.init_loc)), each)
    except Wrong as error:
        llm = candidate.load()
        adapter.readout.attach(llm)
        plain = torch.cat([_counted(row, adapter.readout(llm, row.inputs)) for row in rows])
        try:
            _same(adapter, _counted(batch, adapter.readout(llm, batch.inputs)), plain)
        except Wrong:
            raise Needless(f"padding changes the model's own logits, {error}") from error
        raise


@torch.no_grad()
def from_activations(candidate: Candidate) -> str:
    """V from activations whitens the inputs that the modules have in the base model: the second
    moment of V·x is a multiple of the unit matrix, in the directions that there are."""
    adapter = candidate.adapt(candidate.load())
    set_subspace(adapter, "activations", candidate.split)
    llm = candidate.load()
    adapter.readout.attach(llm)
    inputs: dict[str, list[Tensor]] = {name: [] for name in adapter.module_names}
    for name, seen in inputs.items():

        def keep(_: Any, args: tuple[Any, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0])

        llm.get_submodule(name).register_forward_pre_hook(keep)
    batches = [candidate.split.collate([e]).to(adapter.device) for e in candidate.split]
    for batch in batches:
        adapter.readout(llm, batch.inputs)
    share = 0.0
    for seen, A in zip(inputs.values(), adapter.matrices.A.values(), strict=True):
        each = len(seen) // len(batches)  # calls of a module in a pass
        rows = (real_tokens(value, batches[i // each]) for i, value in enumerate(seen))
        x = torch.cat(list(rows)).double()
        projected = x @ A.weight.double().mT
        moment = projected.mT @ projected * (x.shape[1] / x.square().sum())
        there = moment.diag().round()  # 0 of a direction that no input has
        share = max(share, float((moment - there.diag()).abs().max()))
    return _judged(adapter, share)


@torch.no_grad()
def draws_at_once(candidate: Candidate) -> str:
    """Several draws of s at once equal a loop over them."""
    adapter = candidate.make()
    s = draws_of(adapter)
    return _same(adapter, adapter(candidate.batch, s), _loop(adapter, candidate.batch, s))


@torch.no_grad()
def shared_trunk(candidate: Candidate) -> str:
    """With the upper half adapted, blocks that run once for all draws give the same."""
    adapter = candidate.make(upper=True)
    s = draws_of(adapter)
    loop = _loop(adapter, candidate.batch, s)
    if not adapter.trunk.depth:
        raise Needless(f"every block runs for every draw: {adapter.trunk.why_not}")
    verdict = _same(adapter, adapter(candidate.batch, s), loop)
    if not adapter.trunk.sharing:
        raise Needless("every block runs for every draw, as a pass showed")
    return f"{verdict}; {adapter.trunk.depth} of {adapter.trunk.num_blocks} blocks run once"


def checkpointed(candidate: Candidate) -> str:
    """Gradients with gradient checkpointing equal plain ones."""
    gradients = []
    for checkpointing in (False, True):
        adapter = candidate.make(gradient_checkpointing=checkpointing)
        adapter.train()
        s = adapter.init_loc.requires_grad_()
        adapter(candidate.batch, s).log_softmax(-1)[..., 0].sum().backward()
        gradients.append(cast(Tensor, s.grad))
    return _same(adapter, gradients[1], gradients[0])


def trains(candidate: Candidate) -> str:
    """Three steps of ``fit`` move s."""
    adapter = candidate.make()
    model = ScalaBLModel(adapter, num_data=len(candidate.split))
    guide = AutoSubspaceNormal(model)
    config = FitConfig(steps=3, batch_size=len(candidate.split), lr_guide=0.01)
    fit(model, guide, candidate.split, config, progress=False)
    moved = float((guide.median()["s"] - adapter.init_loc).abs().max())
    if not moved > 1e-4:
        raise Wrong(f"s moved by {moved:.0e}: no gradient reaches it")
    return f"three steps move s by {moved:.2g}"


@torch.no_grad()
def reloads(candidate: Candidate) -> str:
    """What a run folder keeps gives the same again."""
    adapter = candidate.make()
    s = draws_of(adapter)[0]
    expected = adapter(candidate.batch, s)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "projections.safetensors"
        state = {n: p.detach().cpu().contiguous() for n, p in adapter.state().items()}
        save_file(state, path)
        fresh = candidate.adapt(candidate.load(), svd=False)
        for name, value in load_file(path).items():
            fresh.state()[name].copy_(value)
    return _same(adapter, fresh(candidate.batch, s), expected)


@torch.no_grad()
def exported(candidate: Candidate) -> str:
    """A draw, saved and loaded by plain PEFT, has its logits."""
    adapter = candidate.make()
    s = draws_of(adapter)[0]
    batch = candidate.batch.to(adapter.device)
    llm = candidate.load()
    adapter.readout.attach(llm)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, s, Path(folder) / "draw")
        model = PeftModel.from_pretrained(llm, f"{folder}/draw").eval()
    base = cast(PreTrainedModel, model.get_base_model())
    return _same(adapter, adapter.readout(base, batch.inputs), adapter(batch, s))


@torch.no_grad()
def generates(candidate: Candidate) -> str:
    """Probabilities of generated tokens equal those of a pass over the finished text."""
    adapter = candidate.make()
    llm = adapter.llm
    if not candidate.prompts or not llm.can_generate():
        raise Needless(f"{type(llm).__name__} does not continue texts")
    s, decoding = draws_of(adapter), Decoding(max_new_tokens=6)
    predictor = Predictor(adapter, s)
    generated, expected, size = [], [], 0.0
    texts = generate(predictor, candidate.prompts, decoding)
    prompts = encode_prompts(predictor, candidate.prompts, decoding)
    for begin, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([[*begin, *text.ids.tolist()]], device=adapter.device)
        generated.append(text.draw_log_probs.flatten())
        for each in s:
            with adapter.bound(each[None]):
                logits = llm(ids, use_cache=False).logits[0, len(begin) - 1 : -1].float()
            size = max(size, float(logits.abs().max()))
            own = logits.log_softmax(-1).gather(-1, ids[0, len(begin) :, None])
            expected.append(own.flatten().cpu())
    # As shares of the largest logit, of which these are differences.
    shares = (torch.cat(generated).cpu() - torch.cat(expected)).abs() / size
    return _judged(adapter, float(shares.max()))


#: by name, in the order in which they are tried
CHECKS: dict[str, Callable[[Candidate], str]] = {
    "plain PEFT": plain_peft,
    "padded rows": padded,
    "activations": from_activations,
    "draws at once": draws_at_once,
    "shared trunk": shared_trunk,
    "checkpointing": checkpointed,
    "training": trains,
    "run folder": reloads,
    "exported draw": exported,
    "generation": generates,
}


def examine(candidate: Candidate) -> Iterator[tuple[str, Finding]]:
    """What became of each check, ``build`` first; where nothing is built, of that alone."""

    def build(candidate: Candidate) -> str:
        return f"loads; {candidate.settle()}"

    finding = _outcome(build, candidate)
    yield "build", finding
    if finding.state == "ok":
        for name, check in CHECKS.items():
            yield name, _outcome(check, candidate)


def _outcome(check: Callable[[Candidate], str], candidate: Candidate) -> Finding:
    pyro.set_rng_seed(0)
    try:
        with _quiet():
            return Finding("ok", check(candidate))
    except Needless as error:
        return Finding("absent", str(error))
    except Wrong as error:
        return Finding("wrong", str(error))
    except (ValueError, FileNotFoundError) as error:
        return Finding("refused", " ".join(str(error).split()))
    except Exception as error:
        return Finding("broken", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
