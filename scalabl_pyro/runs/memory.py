"""How much memory a run needs, found before any weight is loaded.

The model is built on the meta device from its config.json alone. One training step and one
prediction then run on fake tensors, which have shapes and no values, and what is alive is counted.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..data import Batch
from ..lora.adapter import CORES, Core, ProjectionMode, SubspaceAdapter
from ..lora.config import AdapterConfig, ModelConfig
from ..lora.loading import bytes_beside_weights, load_skeleton, positions, unquantized
from ..prediction.predictor import MAX_ROWS, Predictor
from ..prediction.texts import MOST_LOGITS
from ..readouts import READOUTS

__all__ = ["Memory", "MemoryConfig", "estimate", "explain_out_of_memory"]

#: what ``fit`` holds for each trained number beside itself and its gradient: two moments of AdamW,
#: the last good value and the best one
_COPIES = 4
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """What is to be trained, and how much of it at once.

    :param projections: what is trained beside s, as in :class:`SubspaceAdapter`.
    :param perp: k, coordinates of each module that nothing trains, as there.
    :param core: what s is in a module, as there.
    :param batch_size: B of a minibatch.
    :param eval_batch_size: B in prediction, before draws multiply it; of texts as many run at once
        as have few logits.
    :param tokens: T of the longest row, padding included; half of a text is its completion.
    :param classes: C.
    :param draws: S.
    :param particles: P of the ELBO.
    :raises ValueError: if ``perp`` is below 0, another number below 1, or the core unknown.
    """

    model: ModelConfig
    lora: AdapterConfig
    projections: ProjectionMode = "free"
    perp: int = 0
    core: Core = "diagonal"
    batch_size: int = 16
    eval_batch_size: int = 64
    tokens: int = 256
    classes: int = 4
    draws: int = 10
    particles: int = 1

    def __post_init__(self) -> None:
        counts = ("batch_size", "eval_batch_size", "tokens", "classes", "draws", "particles")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        if self.perp < 0:
            raise ValueError(f"perp is {self.perp}: expected 0 or more")
        if self.core not in CORES:
            raise ValueError(f"core is {self.core!r}: expected one of {list(CORES)}")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a run, apart from what the driver and the allocator keep for themselves.

    :param weights: the frozen model.
    :param loading: the most while it is read, on the host: the weights, and the file's pages where
        they are another number format; the system can take such pages back.
    :param adapters: the projections A (or V) and B, those of s_perp, and heads.
    :param optimizer: AdamW's two moments, and the two copies that ``fit`` can go back to.
    :param activations: the most that a forward and backward pass holds at once, gradients included.
    :param prediction: the most that a forward pass holds at once, with all rows of a batch × draws.
    """

    weights: int
    loading: int
    adapters: int
    optimizer: int
    activations: int
    prediction: int

    @property
    def training(self) -> int:
        """Bytes while training."""
        return self.weights + self.adapters + self.optimizer + self.activations

    @property
    def predicting(self) -> int:
        """Bytes while predicting with a trained model."""
        return self.weights + self.adapters + self.prediction

    def gib(self) -> dict[str, float]:
        """All of it in GiB (2³⁰ bytes)."""
        in_bytes = asdict(self) | {"training": self.training, "predicting": self.predicting}
        return {name: round(value / 2**30, 3) for name, value in in_bytes.items()}


def estimate(config: MemoryConfig) -> Memory:
    """Memory of a run whose model is known by its config.json, in seconds and without its weights.

    Attention by ``sdpa`` counts as a fused kernel, which keeps no T × T matrix; the driver, the
    allocator's gaps and 8-bit layers' outlier columns do not count.

    :param config: ``config.model.name`` may be a folder that holds a config.json and nothing else.
    :raises FileNotFoundError: if there is no such model.
    :raises ValueError: if the model has no positions for so many tokens.
    """
    model, lora = config.model, config.lora
    readout = READOUTS[model.readout].untokenized(config.classes)
    auto_class = getattr(transformers, readout.auto_class)
    llm = load_skeleton(model, auto_class, **readout.llm_options())
    limit = positions(llm.config)
    if limit is not None and config.tokens > limit:
        raise ValueError(
            f"tokens is {config.tokens}, and {model.name} has positions for {limit}: expected"
            f" {limit} or fewer"
        )
    weights = sum(t.nbytes for t in (*llm.parameters(), *llm.buffers()))
    read = bytes_beside_weights(model, llm)
    largest = 0
    if model.quantization is not None:
        layers = _quantised(llm, lora)
        weights += sum(_stored(layer, model.quantization) - layer.weight.nbytes for layer in layers)
        # One matrix at a time is brought back to full size.
        largest = max(layer.weight.nbytes for layer in layers)
        if model.quantization == "8bit":
            for layer in layers:
                layer.forward = partial(_int8, layer)
    with torch.device("meta"):
        adapter = SubspaceAdapter(
            llm,
            lora.lora(),
            readout,
            svd=False,
            projections=config.projections,
            core=config.core,
            perp=config.perp,
            base_dropout=lora.base_dropout,
            gradient_checkpointing=lora.gradient_checkpointing,
        )
    trained = sum(p.numel() for p in adapter.named_parameters().values())
    return Memory(
        weights=weights,
        loading=weights + read,
        adapters=sum(p.nbytes for p in adapter.state().values()),
        optimizer=_COPIES * _FLOAT32 * trained,
        **{name: peak + largest for name, peak in _peaks(adapter, config).items()},
    )


def explain_out_of_memory(config: MemoryConfig) -> str:
    """What a training run needs, and what it would need with each of the settings that help."""
    now = estimate(config).gib()
    parts = ", ".join(
        f"{name} {now[name]}" for name in ("weights", "adapters", "optimizer", "activations")
    )
    helps = {}
    if config.batch_size > 1:
        helps[f"fit.batch_size={config.batch_size // 2}, and fit.accumulation doubled"] = replace(
            config, batch_size=config.batch_size // 2
        )
    if not config.lora.gradient_checkpointing:
        helps["lora.gradient_checkpointing=true"] = replace(
            config, lora=replace(config.lora, gradient_checkpointing=True)
        )
    if config.model.quantization is None:
        helps["model.quantization=4bit"] = replace(
            config, model=replace(config.model, quantization="4bit")
        )
    lines = [f"  {name}: {estimate(c).gib()['training']} GiB" for name, c in helps.items()]
    return "\n".join(
        [
            f"the device is out of memory: training needs about {now['training']} GiB ({parts}), at"
            f" {config.tokens} tokens a row; what helps:",
            *lines,
        ]
    )


def _peaks(adapter: SubspaceAdapter, config: MemoryConfig) -> dict[str, int]:
    """Most bytes alive at once, weights apart, in a training step and in prediction."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        adapter.peft_model.to_empty(device="cpu")
        # Which draws agree on a module cannot be seen without values: that none does is assumed.
        adapter.trunk.depth_for = lambda s: adapter.trunk.depth  # type: ignore[method-assign]
        resident = [*adapter.peft_model.parameters(), *adapter.peft_model.buffers()]

        M, width = adapter.shape[0], adapter.shape[1] + config.perp
        adapter.train()
        with _Alive(resident) as training:
            s = torch.ones(config.particles, M, width, requires_grad=True)
            adapter(_batch(config, config.batch_size), s).log_softmax(-1)[..., 0].sum().backward()
        for parameter in resident:
            parameter.grad = None

        adapter.eval()
        with _Alive(resident) as predicting:
            draws = torch.ones(config.draws, M, width)
            # Where the model will run, and not on the CPU where the estimate is made.
            rows = None if config.model.device == "cpu" else MAX_ROWS
            predictor = Predictor(adapter, max_rows=rows)
            predictor.draws = draws  # without values, which Predictor would look at
            predictor.logits(_batch(config, _eval_batch_size(adapter, config)))
    return {"activations": training.peak, "prediction": predicting.peak}


def _eval_batch_size(adapter: SubspaceAdapter, config: MemoryConfig) -> int:
    if not adapter.readout.reads_texts:
        return config.eval_batch_size
    # As in score_split.
    each = config.draws * config.tokens * adapter.readout.num_classes
    return max(1, min(MAX_ROWS, MOST_LOGITS // each))


def _batch(config: MemoryConfig, size: int) -> Batch:
    kind = READOUTS[config.model.readout]
    inputs = kind.blank_inputs(size, config.classes, config.tokens, config.model)
    shape = (1, 1) if kind.reads_texts else (config.classes,)  # any token may follow
    return Batch(inputs, torch.ones(size, *shape, dtype=torch.bool))


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors made under it that are alive, and the most there ever were.

    :param resident: tensors that exist already and do not count, nor do views of them.
    """

    def __init__(self, resident: list[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = WeakIdKeyDictionary({t.untyped_storage(): None for t in resident})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage] = None
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _free(self, size: int) -> None:
        self.bytes -= size


# ---------------------------------------------------------------------- quantised layers


class _Int8(torch.autograd.Function):
    """What an 8-bit layer holds: its input until the backward pass, and in passing that input in
    float16 and int8, and its output in int32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        half, codes = x.half(), x.to(torch.int8)
        product = codes.new_empty(*half.shape[:-1], weight.shape[0], dtype=torch.int32)
        return product.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.saved_tensors[1], None


def _int8(layer: nn.Linear, x: Tensor) -> Tensor:
    product: Tensor = _Int8.apply(x, layer.weight)
    return product if layer.bias is None else product + layer.bias


def _quantised(llm: PreTrainedModel, lora: AdapterConfig) -> list[Any]:
    """The linear layers that bitsandbytes replaces."""
    skip = unquantized(llm, lora.heads)
    return [
        module
        for name, module in llm.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, skip)
    ]


def _stored(layer: Any, quantization: str) -> int:
    """Bytes of a quantised weight with its scales."""
    count = layer.weight.numel()
    if quantization == "8bit":
        return count + _FLOAT32 * layer.weight.shape[0]  # a scale for each output
    # Half a byte each; a byte for each block of 64, and a float for each 256 of those.
    return count // 2 + count // 64 + _FLOAT32 * count // (64 * 256)
