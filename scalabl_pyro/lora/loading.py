"""Load a language model and its tokenizer, and build adapters on them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import is_bitsandbytes_available

from ..data import Split
from ..distributed import world_size
from ..embedded import model_folder
from ..readouts import READOUTS, Classes, Readout
from .adapter import Core, ProjectionMode, SubspaceAdapter
from .config import AdapterConfig, ModelConfig
from .dtypes import slow_on_cpu
from .gguf import find_gguf
from .subspace import set_subspace

__all__ = [
    "Classes",
    "UntrainedHeadError",
    "bytes_beside_weights",
    "load_llm",
    "load_readout",
    "load_skeleton",
    "make_adapter",
    "make_readout",
    "positions",
    "prepare",
    "unquantized",
]

log = logging.getLogger(__name__)


class UntrainedHeadError(ValueError):
    """A model without weights for a head that nothing would train.

    :param lack: what it lacks.
    :param fix: where heads can be trained.
    """

    def __init__(self, lack: str, fix: str) -> None:
        super().__init__(lack, fix)  # both, so that other processes can send it
        self.lack = lack
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.lack}: {self.fix}"


def load_readout(config: ModelConfig, classes: Classes) -> Readout:
    """The tokenizer and the readout.

    :raises FileNotFoundError: if the model or its tokenizer cannot be found.
    :raises ValueError: if this readout cannot read the model, or its weights are quantised already.
    """
    known = _load_config(config, READOUTS[config.readout].auto_class)
    return make_readout(config, classes, _load(config, AutoTokenizer), known)


def make_readout(
    config: ModelConfig, classes: Classes, tokenizer: PreTrainedTokenizerBase, llm_config: Any
) -> Readout:
    """The readout with the tokenizer of a model whose config.json is known.

    :raises ValueError: if it reads the next token, and the model reads both ways.
    """
    _check_direction(config, llm_config)
    return READOUTS[config.readout].build(
        tokenizer, classes, config, max_length=_context(tokenizer, llm_config)
    )


def load_llm(
    config: ModelConfig, readout: Readout, *, heads: Sequence[str] = ()
) -> PreTrainedModel:
    """The pretrained model that the readout reads, in evaluation mode, on its device.

    :param heads: modules to be trained whole; where the checkpoint lacks them, they start from the
        current random state.

    :raises FileNotFoundError: if the model cannot be found.
    :raises UntrainedHeadError: if it lacks weights that nothing would train.
    :raises ValueError: if it has a trained head for another number of classes; if its weights are
        pickles, or it needs code of its own; or if quantisation is asked for without bitsandbytes.
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
    known = _load_config(config, readout.auto_class)
    head = readout.auto_class.removeprefix("AutoModel")
    if any(head in name for name in known.architectures or ()):
        readout.check_head(config.name, known)
    options |= readout.llm_options()
    if find_gguf(config.name)[1] is not None:
        if config.quantization is not None:
            raise ValueError(
                f"quantization is {config.quantization!r}, but {config.name!r} is a GGUF file,"
                " which is unpacked to plain weights: set quantization=null"
            )
        options["quantization_config"] = GgufConfig(dequantize=True)
    if options["device_map"] == {"": "cpu"} and slow_on_cpu(options["dtype"]):
        log.warning(
            "model.dtype is %s on a CPU that has no instructions for it, which takes up to a"
            " hundred times as long as float32: train with model.dtype=float32, or auto, for twice"
            " the memory of the weights",
            config.dtype,
        )
    llm, loading_info = _load(
        config, auto_class, output_loading_info=True, use_safetensors=True, **options
    )
    untrained = [
        key for key in loading_info["missing_keys"] if not set(key.split(".")) & set(heads)
    ]
    if untrained:
        prefix = f"{llm.base_model_prefix}."
        modules = {key.removeprefix(prefix).split(".")[0] for key in untrained}
        raise UntrainedHeadError(
            f"{config.name!r} has no weights for {sorted(untrained)}, which would stay random",
            f"train them whole, as by lora.heads=[{','.join(sorted({*heads, *modules}))}]",
        )
    return prepare(llm, readout)


def prepare(llm: PreTrainedModel, readout: Readout) -> PreTrainedModel:
    """The same model, told the padding token, and with quantised layers that keep their weights."""
    llm.config.pad_token_id = readout.tokenizer.pad_token_id
    modules: Any = llm.modules()
    for module in modules:
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
            _load_config(config, auto_class.__name__, **options),
            trust_remote_code=False,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
        )


def bytes_beside_weights(config: ModelConfig, llm: PreTrainedModel) -> int:
    """Bytes of the checkpoint that are in memory beside the weights while these are read: none on
    a CPU where the file's number format is kept, as the weights are then the file's own pages.

    :param llm: of which parameters are counted, with or without values.
    """
    stored = getattr(_load(config, AutoConfig), "dtype", None) or torch.float32
    gguf = find_gguf(config.name)[1] is not None  # unpacked whole before it is copied
    if not gguf and config.quantization is None and stored == getattr(torch, config.dtype):
        return 0
    return sum(p.numel() for p in llm.parameters()) * (torch.float32 if gguf else stored).itemsize


def unquantized(llm: PreTrainedModel, heads: Sequence[str]) -> list[str]:
    """The modules that quantisation leaves alone: the output layer, what is tied to it, heads."""
    return [*get_keys_to_not_convert(llm), *heads]


def make_adapter(
    config: ModelConfig,
    adapter: AdapterConfig,
    readout: Readout,
    *,
    svd: bool,
    projections: ProjectionMode | None = None,
    core: Core = "diagonal",
    perp: int = 0,
    prompts: Split | None = None,
) -> SubspaceAdapter:
    """A fresh adapter on a freshly loaded model.

    :param svd: as in :class:`SubspaceAdapter`, and so ``projections``, ``core`` and ``perp``.
    :param prompts: of :func:`set_subspace`: training examples, which ``adapter.subspace`` may need.
    :raises ValueError: if the model is to be sharded and this is the only process; or see
        :func:`set_subspace`.
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
        core=core,
        perp=perp,
        base_dropout=adapter.base_dropout,
        gradient_checkpointing=adapter.gradient_checkpointing,
    )
    set_subspace(made, adapter.subspace, prompts)
    if config.shard:
        made.shard()
    return made


def _check_direction(config: ModelConfig, llm_config: Any) -> None:
    """transformers loads BERT and its kin as causal models, whatever they were trained for, and
    then every position sees its own token."""
    masked = type(llm_config) in MODEL_FOR_MASKED_LM_MAPPING and not llm_config.is_encoder_decoder
    causal = READOUTS[config.readout].auto_class == "AutoModelForCausalLM"
    if causal and masked and not llm_config.is_decoder:
        raise ValueError(
            f"{config.name!r} is a masked language model of type {llm_config.model_type}, which"
            " reads both ways, so that no position of it tells the next token: set"
            " readout=multiple_choice or readout=sequence_classification, or is_decoder=true in the"
            " config.json of a model that was trained as a decoder"
        )


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
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke"),
    *("markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
    "xmod",
}


def positions(llm_config: Any) -> int | None:
    """The most tokens that a model has positions for; ``None`` where its configuration has no
    limit."""
    text = llm_config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    # RoBERTa and its kin count positions from the one after the padding token's number.
    first = text.pad_token_id + 1 if text.model_type in _POSITIONS_AFTER_PADDING else 0
    return min((limit - first for limit in limits if limit), default=None)


def _context(tokenizer: PreTrainedTokenizerBase, llm_config: Any) -> int:
    limit = positions(llm_config)
    longest: int = tokenizer.model_max_length
    return longest if limit is None else min(longest, limit)


def _load_config(config: ModelConfig, auto_class: str, **options: Any) -> Any:
    """What config.json holds of a model that can be loaded by a class.

    :raises ValueError: if the class does not load it, or its weights are quantised already.
    """
    known = _load(config, AutoConfig, **options)
    quantized = getattr(known, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method", "bitsandbytes")
        raise ValueError(
            f"model {config.name!r} is quantised already ({method}): its layers are of another kind"
            " than those that can be adapted and exported; take the checkpoint it was made from,"
            " and model.quantization=4bit where memory is short"
        )
    if type(known) not in getattr(transformers, auto_class)._model_mapping:
        fit = [
            f"readout={name}"
            for name, kind in READOUTS.items()
            if type(known) in getattr(transformers, kind.auto_class)._model_mapping
            # A choice of each question's own is no class.
            and (config.readout, name) != ("multiple_choice", "sequence_classification")
        ]
        advice = f"set {' or '.join(fit)}" if fit else "no readout reads such a model"
        raise ValueError(
            f"model {config.name!r} is of type {known.model_type}, which {auto_class}, and so"
            f" readout={config.readout}, does not load: {advice}"
        )
    return known


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def _load(config: ModelConfig, auto_class: Any, **options: Any) -> Any:
    """``auto_class.from_pretrained``, which runs no code of the folder's; a name that is not found
    says where it was looked for."""
    name, gguf_file = find_gguf(model_folder(config.name))
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    elif auto_class is AutoTokenizer and _lacks_tokenizer(Path(name)):
        raise FileNotFoundError(
            f"model {name!r} has no tokenizer files, such as {_TOKENIZER_FILES[0]}: copy those of"
            " the model that it was trained from into the folder"
        )
    try:
        return auto_class.from_pretrained(
            name, revision=config.revision, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        told = str(error).strip()
        if "trust_remote_code" in told:
            raise ValueError(
                f"model {config.name!r} brings code of its own, which is never run: use a model"
                " whose architecture is part of transformers, or a newer version of transformers"
            ) from error
        place = Path(config.name)
        if options.get("use_safetensors") and "safetensors" in told:
            raise ValueError(
                f"model {config.name!r} has no weights in safetensors, and a pickle, such as"
                " pytorch_model.bin, can run code: where you trust it, load it with transformers"
                " and save it again by save_pretrained"
            ) from error
        if not isinstance(error, OSError):
            # What follows are the names of all that transformers knows.
            short = re.split(r"(?<=\.)\s+(?:Model type s|S)hould |\n", told)[0]
            raise ValueError(f"model {config.name!r} cannot be loaded: {short}") from error
        expected = "Name a folder that holds config.json and the weights"
        said = f" (transformers says: {told.splitlines()[0]})"
        if place.exists():
            looked = f"the folder {place.resolve()} is no complete model"
        else:
            looked = f"there is no folder {place.resolve()}"
            if _may_be_on_hub(config.name):
                looked += f", and neither the Hub nor its cache at {HF_HUB_CACHE} gave it"
                expected += f", or fetch it where there is a network: hf download {config.name}"
            else:
                said = ""
        raise FileNotFoundError(
            f"model {config.name!r} not found: {looked}. {expected}.{said}"
        ) from error


def _may_be_on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _lacks_tokenizer(folder: Path) -> bool:
    return (folder / "config.json").exists() and not any(
        (folder / file).exists() for file in _TOKENIZER_FILES
    )
