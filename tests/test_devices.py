"""What runs on a GPU, where there is none: tensors that say they are elsewhere, and hold numbers.

Their device is called meta, which every build of torch has. An operation that mixes them with
tensors of the CPU is refused, as CUDA refuses it. So a model with its upper blocks on the CPU is as
one that ``device_map`` spreads over two GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_records
from pyro.distributions import Uniform
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

import scalabl_pyro as sp
from scalabl_pyro.guides import GUIDES
from scalabl_pyro.infer.checkpoints import Checkpoints
from scalabl_pyro.methods import METHODS
from scalabl_pyro.prediction import (
    Decoding,
    Linearised,
    average,
    mahalanobis,
    pooled_features,
    score,
    weight_novelty,
)
from scalabl_pyro.prediction.distillation import fold_into
from scalabl_pyro.prediction.draws import KINDS

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten._index_put_impl_.default)
INDEXED += (aten.index_put_.default,)
CONFIG = sp.FitConfig(steps=2, batch_size=4, kl=sp.KLSchedule(0.1))
OPTIONS = {
    "laplace_lora": {"prior_precision": 1.0},
    "swag": {"members": 2, "share": 1.0},
    "tfb": {"bisections": 1},
    "blob_tfb": {"tfb": {"bisections": 1}},
}
#: what they do is in others
ALIKE = {"checkpoint_ensemble", "ensemble", "map", "mle", "reference", "temperature", "zero_shot"}


class There(Tensor):
    """A tensor elsewhere, whose numbers are in ``held``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        options = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device="meta", **options
        )
        made.held = held
        return made

    def tolist(self) -> list:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with Devices():
            return func(*args, **(kwargs or {}))


def held(value: object) -> object:
    return value.held if isinstance(value, There) else value


class Devices(TorchDispatchMode):
    """Lets every operation compute where the numbers are, or refuses it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func._schema.name.startswith("aten::_foreach_"):
            return self.each(func, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, There) for x in tensors)
        # An index may be on the CPU, and so may a single number.
        apart = [args[0], *args[2:]] if func in INDEXED and isinstance(args[0], There) else tensors
        here = [x for x in apart if isinstance(x, Tensor) and x.dim() and not isinstance(x, There)]
        if there and here and func not in COPIES:
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == "meta"
            kwargs["device"] = "cpu"
        if there and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError(f"Expected a generator of the same device: {func}")
        if func is aten._fused_sdp_choice.default:
            return 0  # the plain computation, which every device has
        found = func(*tree_map(held, args), **tree_map(held, kwargs))
        same = {id(held(x)): x for x in tensors}  # of operations in place

        def placed(x: object) -> object:
            return same.get(id(x), There(x) if there else x) if isinstance(x, Tensor) else x

        return tree_map(placed, found)

    def each(self, func, args, kwargs) -> object:
        """Of lists, whose tensors may be apart, where those at one place are together."""
        lists = [list(x) for x in args if isinstance(x, (list, tuple))]
        found = []
        for number, group in enumerate(zip(*lists, strict=True)):
            given = [[x[number]] if isinstance(x, (list, tuple)) else x for x in args]
            tensors = [x for x in (*group, *given, *kwargs.values()) if isinstance(x, Tensor)]
            there = {isinstance(x, There) for x in tensors if x.dim() or isinstance(x, There)}
            if len(there) > 1 and "copy" not in func._schema.name:
                raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
            result = func(*tree_map(held, given), **tree_map(held, kwargs))
            if result is not None:
                found.append(There(result[0]) if True in there else result[0])
        return found if found else None


def spread(llm: PreTrainedModel) -> None:
    """Move the first block and what is below it, and have what comes in and goes out follow the
    weights, as accelerate does."""

    def to(device: str, value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    def bring(module, args, kwargs) -> object:
        return tree_map(partial(to, "cpu"), args), tree_map(partial(to, "cpu"), kwargs)

    def bring_back(module, args, output) -> None:
        for name, value in output.items():
            output[name] = to("meta", value)

    blocks = next(m for m in llm.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)
    last = {"norm", "pooler", "lm_head", "classifier", "score"}
    above = [*blocks[1:], *(m for n, m in llm.named_modules() if n.split(".")[-1] in last)]
    llm.to("meta")
    for module in above:
        module.to("cpu").register_forward_pre_hook(bring, with_kwargs=True)
    llm.register_forward_hook(bring_back)


@pytest.fixture(params=["whole", "spread"], autouse=True)
def _elsewhere(request, monkeypatch) -> Iterator[None]:
    """Models are moved before adapters are made, and keep their numbers."""
    make, tensor = sp.SubspaceAdapter.__init__, torch.tensor
    move = spread if request.param == "spread" else partial(torch.nn.Module.to, device="meta")

    def make_there(self, llm, *args, **options) -> None:
        move(llm)
        make(self, llm, *args, **options)

    # torch makes no numbers for meta.
    monkeypatch.setattr(torch, "tensor", lambda x, device=None, **o: tensor(x, **o).to(device))
    monkeypatch.setattr(sp.SubspaceAdapter, "__init__", make_there)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter becomes There
    try:
        with Devices():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def fitted(adapter, guide="normal", **options):
    """A model, its guide after two steps, and the examples."""
    split = adapter.encode(make_records(9))
    model = sp.ScalaBLModel(adapter, num_data=len(split), **options)
    guide = sp.make_guide(model, guide)
    sp.fit(model, guide, split, CONFIG, progress=False)
    return model, guide, split


def test_a_mixture_is_refused():
    x = torch.ones(2, 2, device="meta")
    assert (x.device.type, float((x + torch.tensor(1.0)).sum())) == ("meta", 8.0)
    for mixed in (
        lambda: x + torch.ones(2),
        lambda: torch.ones(2).add_(x[0]),
        lambda: torch.ones(2)[x[0].long() - 1],
        lambda: torch.cat([x, torch.ones(2, 2)]),
        lambda: torch.rand(2, device="meta", generator=torch.Generator()),
        x.numpy,
    ):
        with pytest.raises(RuntimeError):
            mixed()


@pytest.mark.parametrize("name", GUIDES)
def test_guides_fit_draw_and_predict(make_causal, name):
    adapter = make_causal(projections="unit")
    prior = name if name == "relaxed_bernoulli" else "horseshoe"
    _, guide, split = fitted(adapter, name, prior=sp.make_prior(adapter.shape, prior))
    for kind in KINDS if name == "normal" else ["independent"]:
        draws = sp.draw(guide, 4, seed=0, kind=kind)
        assert draws.device == guide.median()["s"].device == adapter.device
        found = sp.predict(sp.Predictor(adapter, draws, max_rows=16), split, batch_size=4)
        assert found.logits.device.type == "cpu"
    torch.__future__.set_swap_module_params_on_conversion(False)  # Pyro refers to the parameters
    guide.to("cpu")
    assert guide.median()["s"].device == guide.sample(2).device == torch.device("cpu")


@pytest.mark.parametrize(
    "prior", [sp.make_prior((5, 4), "learned_normal"), Uniform(torch.zeros(5, 1), torch.ones(5, 1))]
)
def test_priors_follow_the_adapter(make_causal, prior):
    model, guide, split = fitted(make_causal(projections="frozen_v"), prior=prior)
    nxt = sp.ScalaBLModel(model.adapter, num_data=len(split), prior=guide.as_prior())
    sp.fit(nxt, sp.make_guide(nxt), split, CONFIG, progress=False)


@pytest.mark.parametrize("make", ["make_choice", "make_classifier", "make_likelihood"])
def test_readouts(request, make):
    adapter = request.getfixturevalue(make)(gradient_checkpointing=True)
    _, guide, split = fitted(adapter)
    sp.predict(sp.Predictor(adapter, sp.draw(guide, 4, seed=0)), split, tolerance=0.1)


def test_curvature_and_features(make_causal):
    adapter = make_causal(projections="frozen_v")
    model, guide, split = fitted(adapter)
    loc = guide.median()["s"]
    loaded = loc.cpu()
    found = sp.laplace(model, split, loc=loaded, by_evidence=True).guide
    sp.predict(Linearised(adapter, loc, sp.draw(found, 3, seed=0)), split)
    sp.novelty(model, split, split, loc=loaded)
    weight_novelty(adapter, split, split, precision=1.0, s=loc)
    known = pooled_features(adapter, split, s=loc)
    assert mahalanobis(known, known).device.type == "cpu"


@pytest.mark.parametrize("name", sorted(METHODS.keys() - ALIKE))
def test_methods_fit_and_go_on(make_choice, tmp_path, name):
    options = {"config": replace(CONFIG, clip_norm=METHODS[name].config.clip_norm)}
    method = METHODS[name](**options | OPTIONS.get(name, {}), progress=False)
    split = make_choice().encode(make_records(9))
    for _ in range(2):
        found = method.fit(make_choice, split, split, seed=0, checkpoints=Checkpoints(tmp_path))
    sp.predict(found.predictor, split)


def test_texts(make_causal):
    adapter = make_causal()
    draws = adapter.init_loc * torch.rand(3, *adapter.shape, device="meta")
    predictor = sp.Predictor(adapter, draws)
    sampled = Decoding(3, do_sample=True, top_k=9, stop=("cat",))
    for decoding in (Decoding(3, weights="posterior"), sampled):
        (text,) = sp.generate(predictor, ["the cat"], decoding)
        assert text.log_probs.device.type == "cpu"
    score(predictor, ["the cat"], ["runs"])


def test_a_distilled_student(make_causal):
    teacher, student = make_causal(), make_causal(svd=False)
    _, guide, split = fitted(teacher)
    log_probs = average(sp.predict(sp.Predictor(teacher, sp.draw(guide, 3, seed=0)), split).logits)
    fold_into(teacher, guide.median()["s"], student)
    sp.distill(student, split, log_probs, CONFIG, progress=False)


@pytest.mark.parametrize("_elsewhere", ["whole"], indirect=True)
def test_a_model_may_move_later(make_causal, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", lambda self, *args, **options: self)
        adapter = make_causal()
    assert adapter.device.type == "cpu"
    adapter.peft_model.to("meta")
    fitted(adapter, prior=sp.make_prior(adapter.shape, "log_normal"))
