"""Heads that are trained whole, in float32 on a base model of fewer digits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .layers import ADAPTER
from .trunk import map_tensors

__all__ = ["hold_float32_heads"]


def hold_float32_heads(peft_model: PeftModel) -> None:
    """Train heads in float32, as PEFT does with A and B, whatever the base model's type.

    What a head returns has the base model's type again where frozen weights follow.

    :param peft_model: changed in place.
    """
    wrappers = [m for m in peft_model.modules() if isinstance(m, ModulesToSaveWrapper)]
    inside = {id(m) for wrapper in wrappers for m in wrapper.modules()}
    last = peft_model.get_base_model()
    for module in peft_model.modules():  # in the order of their definition
        if id(module) not in inside and [*module.parameters(recurse=False)]:
            last = module
    places = {id(module): place for place, module in enumerate(peft_model.modules())}
    for wrapper in wrappers:
        head = wrapper.modules_to_save[ADAPTER]
        dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), None)
        head.float().register_forward_pre_hook(_to_float32, with_kwargs=True)
        if places[id(wrapper)] < places[id(last)] and dtype not in (None, torch.float32):
            head.register_forward_hook(partial(_to_dtype, dtype))


def _to_float32(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    return tuple(_floats(args, torch.float32)), _floats(kwargs, torch.float32)


def _to_dtype(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _floats(output, dtype)


def _floats(value: Any, dtype: torch.dtype) -> Any:
    """The same nested values, with numbers but no indices and masks in another type."""
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, value)
