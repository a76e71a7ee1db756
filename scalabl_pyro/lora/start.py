"""A trained PEFT adapter to start from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["ADAPTER", "load_start", "read_config", "start_fingerprint"]

#: PEFT's name of the adapter, trained or fresh
ADAPTER = "default"


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
    """A hash of a trained PEFT adapter, its weights and their scaling, which its name does not pin
    down; ``""`` without one.

    :raises ValueError: if there is no such adapter, or its weights are a pickle.
    """
    if start is None:
        return ""
    config = read_config(start)
    _check_safe(start)
    weights = _weights(start).read_bytes()
    scaling = f"{config.r} {config.lora_alpha} {config.use_rslora}"
    return hashlib.sha256(scaling.encode() + weights).hexdigest()


def _weights(start: str | Path) -> Path:
    name = "adapter_model.safetensors"
    try:
        path = Path(start, name)
        if not path.parent.is_dir():
            path = Path(hf_hub_download(str(start), name))
        path.stat()
    except OSError as error:
        raise ValueError(
            f"the adapter {start} has no {name}: copy it again from where it was made ({error})"
        ) from error
    return path


def load_start(llm: PreTrainedModel, lora: LoraConfig, start: str | Path) -> PeftModel:
    read_config(start)
    _check_safe(start)
    lora.inference_mode = False
    if Path(lora.base_model_name_or_path or "").name == Path(llm.name_or_path or "").name:
        lora.base_model_name_or_path = None  # PEFT warns of one model in two places as of two
    try:
        _check_embeddings(llm, lora, start)
        model = cast(PeftModel, get_peft_model(llm, lora))
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


def _check_embeddings(llm: PreTrainedModel, lora: LoraConfig, start: str | Path) -> None:
    """:raises ValueError: if the adapter holds other embeddings than the base model, as PEFT writes
    where there are new tokens: they would be no part of what is trained and saved here."""
    layers = (llm.get_input_embeddings(), llm.get_output_embeddings())
    with safe_open(_weights(start), "pt") as file:
        written = set(file.keys())
        for name, layer in llm.named_modules():
            whole = name.rpartition(".")[2] in (lora.modules_to_save or ())
            if whole or layer not in layers or not isinstance(layer.weight, Tensor):
                continue
            for key in (f"base_model.model.{name}{part}.weight" for part in ("", ".base_layer")):
                if key not in written:
                    continue
                weight = file.get_tensor(key).to(layer.weight)
                if weight.shape == layer.weight.shape and not torch.equal(weight, layer.weight):
                    raise ValueError(
                        f"the adapter {start} holds other weights of {name} than the base model:"
                        " merge it into the base model, and train on that; or train an adapter with"
                        f" modules_to_save=[{name.rpartition('.')[2]!r}], which are part of it"
                    )


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
