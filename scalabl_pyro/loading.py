"""Load a language model and its tokenizer, and build adapters on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .adapter import SubspaceAdapter
from .data import PROMPTS, Record
from .readout import READOUTS, LabelTokens, Readout
from .tiny import model_path

__all__ = ["AdapterConfig", "Classes", "ModelConfig", "load_llm", "load_readout", "make_adapter"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which language model, and how its answer is read.

    :param name: a folder, a name on the Hub, or ``embedded`` for the model in this package.
    :param readout: ``label_tokens``, ``sequence_classification`` or ``multiple_choice``.
    :param dtype: of the frozen weights: ``float32``, ``bfloat16`` or ``float16``.
    :param device: ``auto`` takes a GPU if there is one.
    :param attention: implementation in ``transformers``, such as ``sdpa`` or ``eager``.
    :param revision: branch, tag or commit on the Hub.
    :param prompt: for label tokens, a name in ``PROMPTS``.
    :param chat: for label tokens, put prompts through the chat template.
    :param truncate: cut prompts that are longer than the context instead of refusing them.
    :raises ValueError: if a value is not one of those listed.
    """

    name: str
    readout: str = "label_tokens"
    dtype: str = "float32"
    device: str = "auto"
    attention: str | None = None
    revision: str = "main"
    prompt: str = "letters"
    chat: bool = False
    truncate: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "readout": sorted(READOUTS),
            "dtype": ["float32", "bfloat16", "float16"],
            "prompt": sorted(PROMPTS),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {values}")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """LoRA: rank r, scaling α, target modules, dropout, and heads that are trained whole.

    :param base_dropout: also train with the base model's own dropout.
    :raises ValueError: if a value is out of range.
    """

    r: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj", "lm_head")
    dropout: float = 0.0
    heads: tuple[str, ...] = ()
    base_dropout: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "heads", tuple(self.heads))
        if self.r < 1:
            raise ValueError(f"r is {self.r}: expected a rank of 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}: expected a number above 0")

    def lora(self) -> LoraConfig:
        """The same as PEFT's configuration."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            lora_dropout=self.dropout,
            modules_to_save=list(self.heads) or None,
        )


@dataclass(frozen=True, slots=True)
class Classes:
    """The C classes of a run: what its data fixes about the readout.

    :param count: C.
    :param words: the word of each class for label tokens, its name for sequence classification.
    :param form: for label tokens, whether a space leads the words; found when the readout is built.
    """

    count: int
    words: tuple[str, ...] = ()
    form: str | None = None

    @classmethod
    def of(cls, config: ModelConfig, records: Sequence[Record]) -> Classes:
        """The classes that these records need: those of all splits that will be read."""
        words: tuple[str, ...] = ()
        if config.readout == "label_tokens":
            words = PROMPTS[config.prompt].label_words(records)
        elif config.readout == "sequence_classification":
            words = PROMPTS["classes"].label_words(records)
        return cls(max(len(record.choices) for record in records), words)


def load_readout(config: ModelConfig, classes: Classes) -> Readout:
    """The tokenizer and the readout.

    :raises FileNotFoundError: if the model cannot be found.
    """
    tokenizer: PreTrainedTokenizerBase = _load(config, AutoTokenizer)
    max_length = _context(tokenizer, _load(config, AutoConfig))
    if config.readout == "label_tokens":
        return LabelTokens(
            tokenizer,
            PROMPTS[config.prompt],
            classes.words,
            chat=config.chat,
            form=classes.form,
            max_length=max_length,
            truncate=config.truncate,
        )
    return READOUTS[config.readout](
        tokenizer, num_classes=classes.count, max_length=max_length, truncate=config.truncate
    )


def load_llm(
    config: ModelConfig, readout: Readout, *, heads: Sequence[str] = ()
) -> PreTrainedModel:
    """The pretrained model that the readout reads, in evaluation mode, on its device.

    :param heads: modules to be trained whole; where the checkpoint lacks them, they start from the
        current random state.

    :raises FileNotFoundError: if the model cannot be found.
    :raises ValueError: if it has a trained head for another number of classes, or lacks weights
        that nothing would train.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    if config.readout == "sequence_classification":
        known = _load(config, AutoConfig)
        trained = any(
            readout.auto_class.removeprefix("AutoModel") in name
            for name in known.architectures or ()
        )
        if trained and known.num_labels != readout.num_classes:
            raise ValueError(
                f"{config.name!r} has a head for {known.num_labels} classes, but the data has"
                f" {readout.num_classes}: use its base model without a head"
            )
        options["num_labels"] = readout.num_classes
    auto_class = getattr(transformers, readout.auto_class)
    llm, found = _load(config, auto_class, output_loading_info=True, **options)
    untrained = [key for key in found["missing_keys"] if not set(key.split(".")) & set(heads)]
    if untrained:
        raise ValueError(
            f"{config.name!r} has no weights for {sorted(untrained)}, which would stay random:"
            " train them whole, as in lora.heads=[classifier]"
        )
    llm.config.pad_token_id = readout.tokenizer.pad_token_id
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return llm.to(device)


def make_adapter(
    config: ModelConfig, adapter: AdapterConfig, readout: Readout, *, svd: bool
) -> SubspaceAdapter:
    """A fresh adapter on a freshly loaded model."""
    return SubspaceAdapter(
        load_llm(config, readout, heads=adapter.heads),
        adapter.lora(),
        readout,
        svd=svd,
        base_dropout=adapter.base_dropout,
        gradient_checkpointing=adapter.gradient_checkpointing,
    )


def _context(tokenizer: PreTrainedTokenizerBase, llm_config: Any) -> int:
    limits = [
        getattr(llm_config, name, None) for name in ("max_position_embeddings", "n_positions")
    ]
    return min([tokenizer.model_max_length, *(limit for limit in limits if limit)])


def _load(config: ModelConfig, auto_class: Any, **options: Any) -> Any:
    """``auto_class.from_pretrained``; a name that is not found says where it was looked for."""
    name = str(model_path()) if config.name == "embedded" else config.name
    try:
        return auto_class.from_pretrained(name, revision=config.revision, **options)
    except OSError as error:
        place = Path(config.name)
        looked = (
            f"the folder {place.resolve()} is no complete model"
            if place.exists()
            else f"there is no folder {place.resolve()}, and neither the Hub nor its cache at"
            f" {HF_HUB_CACHE} gave it"
        )
        raise FileNotFoundError(
            f"model {config.name!r} not found: {looked}. Name a folder that holds config.json and"
            f" the weights, or fetch it where there is a network: hf download {config.name}"
        ) from error
