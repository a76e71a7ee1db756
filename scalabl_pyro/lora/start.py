"""A trained PEFT adapter to start from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors import SafetensorError
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
    name = "adapter_model.safetensors"
    try:
        path = Path(start, name) if Path(start).is_dir() else hf_hub_download(start, name)
        weights = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"the adapter {start} has no {name}: copy it again from where it was made ({error})"
        ) from error
    scaling = f"{config.r} {config.lora_alpha} {config.use_rslora}"
    return hashlib.sha256(scaling.encode() + weights).hexdigest()


def load_start(llm: PreTrainedModel, lora: LoraConfig, start: str | Path) -> PeftModel:
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
