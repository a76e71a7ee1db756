"""Load a language model and its tokenizer, and build adapters on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import is_bitsandbytes_available

from ..data import PROMPTS, Record
from ..distributed import world_size
from ..embedded import model_path
from ..readouts import READOUTS, Readout
from ..readouts.choice_likelihood import ChoiceLikelihood
from ..readouts.label_tokens import LabelTokens
from .adapter import ProjectionMode, SubspaceAdapter
from .config import AdapterConfig, ModelConfig

__all__ = ["Classes", "load_llm", "load_readout", "make_adapter"]


@dataclass(frozen=True, slots=True)
class Classes:
    """The C classes of a run: what its data fixes about the readout.

    :param count: C.
    :param words: the word of each class for label tokens, its name for sequence classification;
        for choice likelihood the choices, if all records share them.
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
        elif config.readout == "choice_likelihood":
            shared = {record.choices for record in records}
            words = shared.pop() if len(shared) == 1 else ()
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
    if config.readout == "choice_likelihood":
        return ChoiceLikelihood(
            tokenizer,
            PROMPTS[config.prompt],
            num_classes=classes.count,
            chat=config.chat,
            normalise=config.normalise,
            temperature=config.temperature,
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
        that nothing would train; or if quantisation is asked for without bitsandbytes.
    """
    auto_class = getattr(transformers, readout.auto_class)
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "device_map": config.device_map or {"": _device(config)},
    }
    if config.quantization is not None:
        skeleton = load_skeleton(config, auto_class)
        options["quantization_config"] = _quantization(config, unquantized(skeleton, heads))
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
    llm, found = _load(config, auto_class, output_loading_info=True, **options)
    untrained = [key for key in found["missing_keys"] if not set(key.split(".")) & set(heads)]
    if untrained:
        prefix = f"{llm.base_model_prefix}."
        modules = sorted({key.removeprefix(prefix).split(".")[0] for key in untrained})
        raise ValueError(
            f"{config.name!r} has no weights for {sorted(untrained)}, which would stay random:"
            f" train them whole, as by lora.heads=[{','.join(modules)}]"
        )
    llm.config.pad_token_id = readout.tokenizer.pad_token_id
    for module in llm.modules():
        # On CPUs with bfloat16 instructions, bitsandbytes would repack 4-bit weights at the first
        # prediction: rounded anew, and no gradient would pass them any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return llm


def load_skeleton(config: ModelConfig, auto_class: Any, **options: Any) -> PreTrainedModel:
    """The model without its weights, on the meta device: nothing but its config.json is read.

    :param options: replace entries of config.json.
    """
    with torch.device("meta"):
        return auto_class.from_config(
            _load(config, AutoConfig, **options),
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
        )


def unquantized(llm: PreTrainedModel, heads: Sequence[str]) -> list[str]:
    """The modules that quantisation leaves alone: the output layer, what is tied to it, heads."""
    return [*get_keys_to_not_convert(llm), *heads]


def make_adapter(
    config: ModelConfig,
    adapter: AdapterConfig,
    readout: Readout,
    *,
    svd: bool,
    projections: ProjectionMode = "free",
) -> SubspaceAdapter:
    """A fresh adapter on a freshly loaded model.

    :param svd: and ``projections``: those of :class:`SubspaceAdapter`.
    :raises ValueError: if the model is to be sharded and this is the only process.
    """
    if config.shard and world_size() == 1:
        raise ValueError("model.shard is on, but one process runs: start it by accelerate launch")
    lora = adapter.lora()
    made = SubspaceAdapter(
        load_llm(config, readout, heads=lora.modules_to_save or ()),
        lora,
        readout,
        start=adapter.start,
        svd=svd,
        projections=projections,
        base_dropout=adapter.base_dropout,
        gradient_checkpointing=adapter.gradient_checkpointing,
    )
    if config.shard:
        made.shard()
    return made


def _device(config: ModelConfig) -> str:
    if config.device.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(config.device.partition(":")[2] or 0) >= count:
            raise ValueError(
                f"device is {config.device!r}, but torch {torch.__version__} sees {count} GPUs: set"
                " device=auto, or install a build of torch for this machine's GPUs"
            )
    if config.device != "auto":
        return config.device
    if torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"  # each process its own
    return "cpu"


def _quantization(config: ModelConfig, skip: list[str]) -> BitsAndBytesConfig:
    if not is_bitsandbytes_available():
        raise ValueError(
            f"quantization is {config.quantization!r}, which needs bitsandbytes: run pip install"
            " bitsandbytes, or set quantization=null"
        )
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=skip,
    )


_POSITIONS_AFTER_PADDING = {
    "camembert",
    "data2vec-text",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}


def _context(tokenizer: PreTrainedTokenizerBase, llm_config: Any) -> int:
    text = llm_config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    # RoBERTa and its kin count positions from the one after the padding token's number.
    first = text.pad_token_id + 1 if text.model_type in _POSITIONS_AFTER_PADDING else 0
    return min([tokenizer.model_max_length, *(limit - first for limit in limits if limit)])


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
            f" the weights, or fetch it where there is a network: hf download {config.name}."
            f" (transformers says: {str(error).strip().splitlines()[0]})"
        ) from error
