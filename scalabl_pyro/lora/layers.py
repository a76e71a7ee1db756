"""PEFT's LoRA layers on a language model: which are served, and why others are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, _ConvNd
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["ADAPTER", "add_lora"]

#: PEFT's name of the one adapter
ADAPTER = "default"


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
    _check_config(llm, lora)
    model = get_peft_model(llm, lora) if start is None else _load_trained(llm, lora, start)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    _check_layers(layers)
    return cast(PeftModel, model), layers


def _check_layers(layers: dict[str, LoraLayer]) -> None:
    for name, layer in layers.items():
        if isinstance(layer, (Embedding, MultiheadAttention, _ConvNd)):
            raise ValueError(
                f"{name} is adapted by {type(layer).__name__}, which does not call"
                " lora_B(lora_A(x)); target linear layers only"
            )
        if layer.lora_variant:
            raise ValueError(
                f"{name} uses the LoRA variant {layer.lora_variant}; only plain LoRA is served"
            )
        if layer.merged:
            raise ValueError(f"{name} is merged into its base layer; unmerge it first")
        if layer.in_features < layer.r[ADAPTER]:
            raise ValueError(
                f"{name} has {layer.in_features} inputs, fewer than the rank {layer.r[ADAPTER]}"
            )


def _load_trained(llm: PreTrainedModel, lora: LoraConfig, start: str | Path) -> PeftModel:
    lora.inference_mode = False
    model = cast(PeftModel, get_peft_model(llm, lora))
    try:
        found = model.load_adapter(str(start), ADAPTER, is_trainable=True)
        wrong = [*found.missing_keys, *found.unexpected_keys]
        if wrong:
            raise RuntimeError(f"only one of them has {wrong}")
    except RuntimeError as error:
        raise ValueError(
            f"the adapter {start} does not fit {type(llm).__name__}: {error}; load the base model"
            " that it was trained on"
        ) from error
    return model


def _check_config(llm: PreTrainedModel, lora: LoraConfig) -> None:
    if getattr(lora, "target_parameters", None):
        raise ValueError("target_parameters bypasses the lora_A module: use target_modules")
    ranks = set((lora.rank_pattern or {}).values()) | {lora.r}
    if len(ranks) > 1:
        raise ValueError(
            f"rank_pattern gives ranks {sorted(ranks)}: one rank r for all modules is needed"
        )
    if lora.alpha_pattern:
        raise ValueError("alpha_pattern is not supported: one scaling α for all modules is needed")
    if isinstance(llm, PeftModel) or any(isinstance(m, LoraLayer) for m in llm.modules()):
        raise ValueError(
            "the model already carries a PEFT adapter: pass the base model, loaded anew"
        )
    layers = lora.layers_to_transform or []
    blocks = getattr(llm.config.get_text_config(), "num_hidden_layers", None)
    layers = [layers] if isinstance(layers, int) else layers
    outside = [] if blocks is None else [layer for layer in layers if not 0 <= layer < blocks]
    if outside:
        raise ValueError(
            f"layers_to_transform holds {outside}, but {type(llm).__name__} has {blocks} blocks,"
            " counted from 0"
        )
    names = [name for name, _ in llm.named_modules()]
    heads = [h for h in lora.modules_to_save or () if not any(_ends(name, h) for name in names)]
    if heads:
        raise ValueError(
            f"modules_to_save {sorted(heads)} match no module of {type(llm).__name__}; its"
            f" outermost are {[name for name, _ in llm.named_children()]}"
        )
    targets = lora.target_modules
    if targets is None or targets == "all-linear":
        return
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [t for t in targets if not any(_ends(name, t) for name in names)]
    if missing:
        linear = {
            n.rpartition(".")[2]
            for n, m in llm.named_modules()
            if isinstance(m, (nn.Linear, Conv1D))
        }
        raise ValueError(
            f"target_modules {sorted(missing)} match no module of {type(llm).__name__}; its linear"
            f" layers are {sorted(linear)}"
        )


def _ends(name: str, part: str) -> bool:
    """Whether a module is meant by the end of its name, as PEFT reads it."""
    return name == part or name.endswith(f".{part}")
