"""PEFT's LoRA layers on a language model: which are served, and why others are refused."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = [
    "ADAPTER",
    "PERP",
    "add_lora",
    "add_perp",
    "quiet_peft",
    "read_config",
    "start_fingerprint",
]

#: PEFT's name of the adapter
ADAPTER = "default"
#: and of the second one, whose rows s_perp scales
PERP = "perp"

# Task types for which PEFT adds names of heads to modules_to_save, of which a model has some.
_HEADS_OF_TASKS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}


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
    _check_config(llm, lora, trained=start is not None)
    with quiet_peft():
        model = get_peft_model(llm, lora) if start is None else _load_trained(llm, lora, start)
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


def read_config(start: str | Path) -> LoraConfig:
    """The configuration of a trained PEFT adapter.

    :param start: a folder or a name on the Hub.
    :raises ValueError: if there is none, or it is no plain LoRA.
    """
    try:
        config = PeftConfig.from_pretrained(str(start))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(start)!r} is no PEFT adapter: expected a folder with adapter_config.json, whole,"
            f" or a name on the Hub; copy it again from where it was made (PEFT says: {error})"
        ) from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != PeftType.LORA.value:
        raise ValueError(
            f"the adapter {str(start)!r} is of PEFT's type {kind}: expected LORA, whose layers call"
            " lora_B(lora_A(x)); train a LoRA adapter, or leave lora.start out"
        )
    return cast(LoraConfig, config)


def start_fingerprint(start: str | None) -> str:
    """A hash of the weights of a trained PEFT adapter, which its name does not pin down; ``""``
    without one.

    :raises ValueError: if there is no such adapter.
    """
    if start is None:
        return ""
    read_config(start)
    try:
        folder = Path(start) if Path(start).is_dir() else Path(snapshot_download(start))
        weights = (folder / "adapter_model.safetensors").read_bytes()
    except OSError as error:
        raise ValueError(
            f"the adapter {start} has no adapter_model.safetensors: copy it again from where it was"
            f" made ({error})"
        ) from error
    return hashlib.sha256(weights).hexdigest()


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
    read_config(start)
    _check_safe(start)
    lora.inference_mode = False
    if Path(lora.base_model_name_or_path or "").name == Path(llm.name_or_path or "").name:
        lora.base_model_name_or_path = None  # PEFT warns of one model in two places as of two
    model = cast(PeftModel, get_peft_model(llm, lora))
    try:
        loaded = model.load_adapter(str(start), ADAPTER, is_trainable=True)
        wrong = [*loaded.missing_keys, *loaded.unexpected_keys]
        if wrong:
            raise RuntimeError(f"only one of them has {wrong}")
    except SafetensorError as error:
        raise ValueError(
            f"adapter_model.safetensors of the adapter {start} is damaged ({error}): copy it again"
            " from where it was made"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"adapter_model.safetensors of the adapter {start} does not fit {type(llm).__name__}:"
            f" {' '.join(str(error).split())}; load the base model that it was trained on, or copy"
            " it again from where it was made"
        ) from error
    trained = (".lora_", ".modules_to_save.")
    for name, value in model.state_dict().items():
        if any(part in name for part in trained) and not value.isfinite().all():
            raise ValueError(
                f"the adapter {start} holds numbers that are not finite, in {name}: its training"
                " failed; take an earlier checkpoint of it"
            )
    return model


def _check_safe(start: str | Path) -> None:
    folder = Path(start)
    if (folder / "adapter_model.bin").exists() and not (
        folder / "adapter_model.safetensors"
    ).exists():
        raise ValueError(
            f"the adapter {start} has its weights in adapter_model.bin, a pickle, which can run"
            " code: expected adapter_model.safetensors; load it with PEFT where you trust it, and"
            " save it again"
        )


def _check_config(llm: PreTrainedModel, lora: LoraConfig, *, trained: bool) -> None:
    if getattr(lora, "target_parameters", None):
        raise ValueError("target_parameters bypasses the lora_A module: use target_modules")
    ranks = set((lora.rank_pattern or {}).values()) | {lora.r}
    if len(ranks) > 1:
        raise ValueError(
            f"rank_pattern gives ranks {sorted(ranks)}: one rank r for all modules is needed"
        )
    if lora.alpha_pattern:
        raise ValueError("alpha_pattern is not supported: one scaling α for all modules is needed")
    if lora.inference_mode and not trained:
        raise ValueError("inference_mode is true, which trains nothing: set it to false")
    if not (math.isfinite(lora.lora_alpha) and lora.lora_alpha != 0):
        raise ValueError(
            f"lora_alpha is {lora.lora_alpha}, so that nothing depends on A, B and s: expected a"
            " number above 0"
        )
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"lora_dropout is {lora.lora_dropout}: expected a probability below 1")
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
    asked = set(lora.modules_to_save or ())
    heads = {h for h in asked if not any(_ends(name, h) for name in names)}
    # PEFT itself lists the names that a classifier's head may have, all of them.
    by_task = _HEADS_OF_TASKS.get(str(getattr(lora.task_type, "value", lora.task_type)), set())
    if by_task & asked - heads:
        heads -= by_task
    if heads:
        raise ValueError(
            f"modules_to_save {sorted(heads)} match no module of {type(llm).__name__}; its"
            f" outermost are {[name for name, _ in llm.named_children()]}"
        )
    targets = lora.target_modules
    if targets is None or targets == "all-linear":
        return
    matches = {
        target: [
            name
            for name in names
            if (re.fullmatch(target, name) if isinstance(targets, str) else _ends(name, target))
        ]
        for target in ([targets] if isinstance(targets, str) else targets)
    }
    missing = [target for target, matching in matches.items() if not matching]
    if missing:
        linear = {
            n.rpartition(".")[2]
            for n, m in llm.named_modules()
            if isinstance(m, (nn.Linear, Conv1D))
        }
        pattern = (
            f"; one text is a pattern of whole names, a list such as [{targets}] has their ends"
            if isinstance(targets, str)
            else ""
        )
        raise ValueError(
            f"target_modules {sorted(missing)} match no module of {type(llm).__name__}; its linear"
            f" layers are {sorted(linear)}{pattern}"
        )
    if trained:
        return  # it was trained so, with the head alone
    whole = {name for name in names if any(_ends(name, head) for head in asked)}
    for target, matching in matches.items():
        within = [n for n in matching if any(n == w or n.startswith(f"{w}.") for w in whole)]
        if whole & set(matching) or len(within) == len(matching):
            raise ValueError(
                f"{sorted(whole & set(matching) or within)} are both in target_modules, as"
                f" {target!r}, and in modules_to_save: a layer is adapted or trained whole, so"
                " leave it out of one of them"
            )


def _ends(name: str, part: str) -> bool:
    """Whether a module is meant by the end of its name, as PEFT reads it."""
    return name == part or name.endswith(f".{part}")
