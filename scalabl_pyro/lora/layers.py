"""PEFT's LoRA layers on a language model: which are served, and why others are refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .config_checks import check_lora
from .start import ADAPTER, load_start

__all__ = [
    "ADAPTER",
    "PERP",
    "add_lora",
    "add_perp",
    "quiet_peft",
]

#: PEFT's name of the second adapter, whose rows s_perp scales
PERP = "perp"


def add_lora(
    llm: PreTrainedModel, lora: LoraConfig, start: str | Path | None = None
) -> tuple[PeftModel, dict[str, LoraLayer]]:
    """Plain LoRA layers, which all call ``lora_B(lora_A(x))``.

    :param llm: changed in place.
    :param start: a trained PEFT adapter that fills them, a folder or a name on the Hub.
    :returns: PEFT's model, and its M layers by their names in ``llm``.
    :raises ValueError: if a target matches no module, the layers would not be as said, or ``start``
        does not fit.
    """
    _check_model(llm)
    check_lora(llm, lora, trained=start is not None)
    with quiet_peft():
        model = get_peft_model(llm, lora) if start is None else load_start(llm, lora, start)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    _check_layers(layers)
    return cast(PeftModel, model), layers


@torch.no_grad()
def add_perp(layers: Mapping[str, LoraLayer], k: int) -> dict[str, nn.Parameter]:
    """Give each layer k more rows, which nothing trains, with the scaling of the first r.

    They are a second adapter of PEFT's, which adds its own product: A and B of the first one stay
    whole parameters. Both matrices are 0.

    :returns: the 2·M matrices by the names of their weights.
    """
    weights = {}
    for name, layer in layers.items():
        layer.update_layer(PERP, k, lora_alpha=k, config=LoraConfig(r=k))
        layer.scaling[PERP] = layer.scaling[ADAPTER]
        layer.set_adapter([ADAPTER, PERP])
        for part in ("lora_A", "lora_B"):
            matrices = getattr(layer, part)
            matrices[PERP].to(matrices[ADAPTER].weight).requires_grad_(False)
            weights[f"{name}.{part}.{PERP}.weight"] = matrices[PERP].weight.zero_()
    return weights


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Make a model of PEFT in here: PEFT asks transformers by a name that is on its way out, and
    warns of an output layer that shares its weight with the embeddings, which are brought apart
    where they are merged."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", ".*ensure_weight_tying", UserWarning)
        yield


def _check_model(llm: PreTrainedModel) -> None:
    """:raises ValueError: if the model, or a part of it, is wrapped or holds an adapter already."""
    for name, module in llm.named_modules():
        where = f"{name} of the model" if name else "the model"
        if isinstance(module, (OptimizedModule, nn.DataParallel, DistributedDataParallel)):
            inner = "_orig_mod" if isinstance(module, OptimizedModule) else "module"
            raise ValueError(
                f"{where} is wrapped in {type(module).__name__}, which renames its modules: pass"
                f" what it wraps, its attribute {inner}"
            )
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper, PeftModel)):
            raise ValueError(
                f"the model already carries a PEFT adapter: {where} is a {type(module).__name__};"
                " load the base model anew for each SubspaceAdapter"
            )
    if not isinstance(llm, PreTrainedModel):
        raise ValueError(
            f"llm is a {type(llm).__name__}: expected a model of transformers, a PreTrainedModel,"
            " without anything around it"
        )


def _check_layers(layers: dict[str, LoraLayer]) -> None:
    if not layers:
        raise ValueError(
            "no layer of the model is adapted: name linear layers outside modules_to_save in"
            " target_modules"
        )
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper):
            raise ValueError(
                f"{name}.{layer.parameter_name} is a weight without a layer of its own (experts in"
                " one tensor, or a router), which PEFT adapts without calling lora_B(lora_A(x)):"
                " name linear layers in target_modules, such as q_proj and v_proj"
            )
        if isinstance(layer, (Embedding, MultiheadAttention, _ConvNd)):
            raise ValueError(
                f"{name} is adapted by {type(layer).__name__}, which does not call"
                " lora_B(lora_A(x)); target linear layers only"
            )
        base = type(layer.get_base_layer()).__name__
        if "Router" in base:  # a linear layer that returns more than its product
            raise ValueError(
                f"{name} is a {base}, which chooses experts: name other layers in target_modules,"
                " such as q_proj and v_proj"
            )
        if layer.lora_variant:
            variant = ", ".join(type(each).__name__ for each in layer.lora_variant.values())
            raise ValueError(f"{name} uses the LoRA variant {variant}; only plain LoRA is served")
        if layer.merged:
            raise ValueError(f"{name} is merged into its base layer; unmerge it first")
        if layer.in_features < layer.r[ADAPTER]:
            raise ValueError(
                f"{name} has {layer.in_features} inputs, fewer than the rank {layer.r[ADAPTER]}"
            )
