"""What a LoRA configuration asks of a model, checked before PEFT builds it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["check_lora"]

# Task types for which PEFT adds names of heads to modules_to_save, of which a model has some.
_HEADS_OF_TASKS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}


#: beginnings of PEFT's names of such starts of A and B
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_lora(llm: PreTrainedModel, lora: LoraConfig, *, trained: bool) -> None:
    """Refuse what would bypass ``lora_A``, train nothing, or match nothing of the model.

    :param trained: whether an adapter of this configuration has been trained already.
    :raises ValueError: if it asks for such a thing.
    """
    _check_numbers(lora, trained=trained)
    _check_blocks(llm, lora)
    _check_heads(llm, lora)
    targets = lora.target_modules
    if targets is None or targets == "all-linear":
        return
    matches = _matches(llm, targets)
    _check_targets(llm, targets, matches)
    if not trained:  # else it was trained so, with the head alone
        _check_overlap(llm, lora, matches)


def _check_numbers(lora: LoraConfig, *, trained: bool) -> None:
    if getattr(lora, "target_parameters", None):
        raise ValueError("target_parameters bypasses the lora_A module: use target_modules")
    ranks = set((lora.rank_pattern or {}).values()) | {lora.r}
    if len(ranks) > 1:
        raise ValueError(
            f"rank_pattern gives ranks {sorted(ranks)}: expected one rank r for all modules, of"
            " which s has r coordinates in each; train an adapter without rank_pattern"
        )
    if lora.alpha_pattern:
        raise ValueError(
            f"alpha_pattern is {lora.alpha_pattern}: expected one scaling α for all modules; train"
            " an adapter without alpha_pattern"
        )
    init = str(lora.init_lora_weights).lower()
    if init.startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"init_lora_weights is {lora.init_lora_weights!r}, by which PEFT changes the base"
            " model's own weights wherever it loads the adapter: expected true, or one that leaves"
            " them alone; of a trained adapter, PEFT's save_pretrained(folder,"
            " path_initial_model_for_weight_conversion=...) makes plain LoRA"
        )
    if lora.inference_mode and not trained:
        raise ValueError("inference_mode is true, which trains nothing: set it to false")
    if not (math.isfinite(lora.lora_alpha) and lora.lora_alpha != 0):
        raise ValueError(
            f"lora_alpha is {lora.lora_alpha}, so that nothing depends on A, B and s: expected a"
            " number above 0"
        )
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"lora_dropout is {lora.lora_dropout}: expected a probability below 1")


def _check_blocks(llm: PreTrainedModel, lora: LoraConfig) -> None:
    """The blocks that are named are there."""
    layers = lora.layers_to_transform or []
    layers = [layers] if isinstance(layers, int) else layers
    blocks = getattr(llm.config.get_text_config(), "num_hidden_layers", None)
    outside = [] if blocks is None else [layer for layer in layers if not 0 <= layer < blocks]
    if outside:
        raise ValueError(
            f"layers_to_transform holds {outside}, but {type(llm).__name__} has {blocks} blocks,"
            " counted from 0"
        )


def _check_heads(llm: PreTrainedModel, lora: LoraConfig) -> None:
    """The heads that are named are there."""
    names = [name for name, _ in llm.named_modules()]
    asked = set(lora.modules_to_save or ())
    heads = {head for head in asked if not any(_ends(name, head) for name in names)}
    # PEFT itself lists the names that a classifier's head may have, all of them.
    by_task = _HEADS_OF_TASKS.get(str(getattr(lora.task_type, "value", lora.task_type)), set())
    if by_task & asked - heads:
        heads -= by_task
    if heads:
        raise ValueError(
            f"modules_to_save {sorted(heads)} match no module of {type(llm).__name__}; its"
            f" outermost are {[name for name, _ in llm.named_children()]}"
        )


def _matches(llm: PreTrainedModel, targets: str | Collection[str]) -> dict[str, list[str]]:
    """Target → the names of the modules that PEFT takes for it."""
    names = [name for name, _ in llm.named_modules()]
    if isinstance(targets, str):
        return {targets: [name for name in names if re.fullmatch(targets, name)]}
    return {target: [name for name in names if _ends(name, target)] for target in targets}


def _check_targets(
    llm: PreTrainedModel, targets: str | Collection[str], matches: Mapping[str, list[str]]
) -> None:
    """Each target matches a module."""
    missing = sorted(target for target, matching in matches.items() if not matching)
    if not missing:
        return
    linear = {
        name.rpartition(".")[2]
        for name, module in llm.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    pattern = (
        f"; one text is a pattern of whole names, a list such as [{targets}] has their ends"
        if isinstance(targets, str)
        else ""
    )
    raise ValueError(
        f"target_modules {missing} match no module of {type(llm).__name__}; its linear layers are"
        f" {sorted(linear)}{pattern}"
    )


def _check_overlap(
    llm: PreTrainedModel, lora: LoraConfig, matches: Mapping[str, list[str]]
) -> None:
    """No layer is both adapted and trained whole."""
    heads = lora.modules_to_save or ()
    names = [name for name, _ in llm.named_modules()]
    whole = {name for name in names if any(_ends(name, head) for head in heads)}
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
