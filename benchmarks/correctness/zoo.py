"""Which architectures are served, and which are refused and why, from small random configurations.

    python -m benchmarks.correctness.zoo --save

Each architecture of ``transformers`` is built with two or four small blocks and random weights, and
adapted at linear layers whose names are found in it. What is checked is what ``scalabl doctor``
checks of one model: see ``scalabl_pyro/runs/checks.py``.

``ok``, the reason of a refusal or of an absence, or what went wrong, after ``WRONG`` or ``CRASH``.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from benchmarks._report import report
from scalabl_pyro import Record, Split, SubspaceAdapter
from scalabl_pyro.data import Example
from scalabl_pyro.readouts.base import Readout
from scalabl_pyro.readouts.causal import last_logits, left_padded
from scalabl_pyro.runs import checks
from scalabl_pyro.runs.checks import Candidate, Needless

C, VOCABULARY, BLOCKS = 4, 64, 4

AUTO = {
    "causal": AutoModelForCausalLM,
    "classes": AutoModelForSequenceClassification,
    "choices": AutoModelForMultipleChoice,
}

# Model types of transformers, by what reads them
# fmt: off
CAUSAL = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2",
    "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "stablelm", "olmo", "olmo2",
    "cohere", "cohere2", "granite", "starcoder2", "codegen", "gpt_bigcode", "helium", "glm",
    "glm4", "nemotron", "smollm3", "exaone4", "ernie4_5", "mixtral", "qwen2_moe", "qwen3_moe",
    "olmoe", "granitemoe", "jetmoe", "phimoe", "deepseek_v3", "mamba", "mamba2",
    "falcon_mamba", "recurrent_gemma", "jamba", "bamba", "rwkv", "xglm", "biogpt",
    "persimmon", "bert", "roberta", "xlm-roberta", "camembert", "electra", "ctrl",
]
CLASSES = [
    "bert", "roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "mpnet",
    "xlm-roberta", "camembert", "xlnet", "funnel", "longformer", "big_bird",
    "mobilebert", "convbert", "roformer", "rembert", "fnet", "modernbert", 
    "layoutlm", "megatron-bert", "ernie", "flaubert", "xlm", "bart", "mbart", "t5",
    "umt5", "plbart", "led", "llama", "gpt2", "qwen2", "gemma2", "opt", "bloom",
]
CHOICES = [
    "bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "mpnet", "xlnet",
    "funnel",
]
# fmt: on

SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    n_embd=32,
    d_model=32,
    dim=32,
    emb_dim=32,
    embedding_size=32,
    word_embed_proj_dim=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    hidden_dim=64,
    d_inner=64,
    d_ff=64,
    d_kv=8,
    dff=64,
    n_inner=64,
    ffn_dim=64,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    num_hidden_layers=BLOCKS,
    num_layers=BLOCKS,
    n_layer=BLOCKS,
    n_layers=BLOCKS,
    encoder_layers=BLOCKS,
    decoder_layers=BLOCKS,
    num_decoder_layers=BLOCKS,
    num_attention_heads=4,
    num_heads=4,
    n_head=4,
    n_heads=4,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=128,
    n_positions=128,
    n_ctx=128,
    max_seq_len=128,
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
    rotary_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    num_labels=C,
)
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": dict(attention_types=[[["global", "local"], BLOCKS // 2]]),
    "longformer": dict(attention_window=4),
    "led": dict(attention_window=4),
    "big_bird": dict(attention_type="original_full"),
    "falcon": dict(head_dim=None),  # computed
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8, attn_layer_indices=[1, 3]),
    # Without attention, of which four blocks have none by default, its cache counts no tokens.
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "xlnet": dict(max_position_embeddings=None),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1, state_size=8),
    "recurrent_gemma": dict(lru_width=32, attention_window_size=8),
    "funnel": dict(block_sizes=[2, 2], num_hidden_layers=None, d_head=8),
    "mobilebert": dict(intra_bottleneck_size=32, true_hidden_size=32),
}


class Words(Readout):
    """Logits of C words after a prompt, or those of a head: readouts without a tokenizer."""

    padding_side = "right"
    auto_class = ""

    def __init__(self, kind: str) -> None:
        self.kind, self.num_classes, self.max_length = kind, C, 64
        self.row_per_choice = kind == "choices"
        self.tokenizer = words()
        if kind == "causal":
            self.label_ids = torch.arange(4, 4 + C)

    def _tokenize(self, record: Any) -> dict[str, list[list[int]]]:
        raise NotImplementedError("this readout is given tokens")

    _truncate = _tokenize

    def __call__(self, llm: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        if self.kind != "causal":
            return llm(**inputs).logits.float()
        return last_logits(llm, left_padded(inputs), 1)[:, 0, self.label_ids].float()


def build(kind: str, model_type: str) -> PreTrainedModel:
    """A small model with random weights, the same at each call."""
    config = AutoConfig.for_model(model_type)
    own = OWN.get(model_type, {})
    known = {n: v for n, v in SIZES.items() if hasattr(config, n)} | own
    known = {name: value for name, value in known.items() if value is not None}
    if kind == "causal" and hasattr(config, "is_decoder"):
        known["is_decoder"] = True
    config = AutoConfig.for_model(model_type, **known | {"num_labels": C})
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 1
    torch.manual_seed(1)
    return AUTO[kind].from_config(config, trust_remote_code=False).eval()


def targets(llm: PreTrainedModel, first: int = 0) -> list[str]:
    """Two linear layers of each block from ``first`` on, by their full names."""
    head = llm.get_output_embeddings() if hasattr(llm, "get_output_embeddings") else None
    blocks: dict[str, list[str]] = {}
    for name, module in llm.named_modules():
        numbers = [part for part in name.split(".") if part.isdigit()]
        wide = isinstance(module, (nn.Linear, Conv1D)) and min(module.weight.shape) >= 2
        # Not routers, which return more, nor experts, nor what PEFT leaves to Mamba's own kernels.
        wide &= not any(part in name for part in ("expert", "router"))
        if "mamba" in llm.config.model_type:
            wide &= not name.endswith(("out_proj", "dt_proj"))
        if numbers and int(numbers[0]) >= first and wide and module is not head:
            place = name.index(f".{numbers[0]}.") + len(numbers[0]) + 2
            blocks.setdefault(name[:place], []).append(name)
    return [name for layers in blocks.values() for name in (layers[0], layers[-1])]


def words() -> PreTrainedTokenizerFast:
    """A token for each of the words w5, w6, …"""
    names = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def split_of(readout: Words) -> Split:
    """Five examples of different lengths, which end with </s>."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n, length in enumerate((8, 6, 8, 3, 5)):
        ids = torch.randint(
            5, VOCABULARY, (C if readout.row_per_choice else 1, length - 1), generator=generator
        )
        rows = [[*row, 2] for row in ids.tolist()]
        mask = [[1] * length for _ in rows]
        examples.append(Example({"input_ids": rows, "attention_mask": mask}, C, n % C))
    records = [Record(str(n), "q", ("a", "b", "c", "d"), n % C) for n in range(5)]
    return Split(records, examples, readout.collate)


def candidate(kind: str, model_type: str) -> Candidate:
    readout = Words(kind)

    def adapt(llm: PreTrainedModel, *, upper: bool = False, **options: Any) -> SubspaceAdapter:
        names = targets(llm, BLOCKS // 2 if upper else 0)
        if not names:
            raise Needless("no block counts as the upper half")
        conv = isinstance(llm.get_submodule(names[0]), Conv1D)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=names, fan_in_fan_out=conv)
        torch.manual_seed(2)
        return SubspaceAdapter(llm, config, readout, **options)

    prompts = ("w7 w9 w11", "w20") if kind == "causal" else ()
    return Candidate(lambda: build(kind, model_type), adapt, split_of(readout), prompts)


WORDS = {"refused": "refused", "absent": "the model's own", "wrong": "WRONG", "broken": "CRASH"}


def examine(kind: str, model_type: str) -> dict[str, str]:
    """What became of each check."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = targets(build(kind, model_type))
    except Exception as error:  # of transformers: not a matter of this package
        return {"build": f"not built here: {type(error).__name__}: {str(error)[:120]}"}
    if not names:
        return {"build": "no linear layer in a block"}
    return {
        name: "ok" if state == "ok" else f"{WORDS[state]}: {text[:400]}"
        for name, (state, text) in checks.examine(candidate(kind, model_type))
        if kind == "causal" or name != "generation"  # which nobody expects of the others
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="model types")
    parser.add_argument("--save", action="store_true", help="write results/zoo.json")
    args = parser.parse_args()
    table = {}
    for kind, model_types in (("causal", CAUSAL), ("classes", CLASSES), ("choices", CHOICES)):
        for model_type in model_types:
            if not args.only or model_type in args.only:
                table[f"{model_type}, {kind}"] = outcomes = examine(kind, model_type)
                bad = {name: value for name, value in outcomes.items() if value != "ok"}
                print(f"{model_type}, {kind}: {bad or 'ok'}", flush=True)
    passed = sum(set(outcomes.values()) == {"ok"} for outcomes in table.values())
    built = sum(outcomes["build"] == "ok" for outcomes in table.values())
    kinds = {
        word: sum(any(v.startswith(word) for v in outcomes.values()) for outcomes in table.values())
        for word in ("refused", "the model's own", "WRONG", "CRASH")
    }
    figures = {"built": built, "all checks passed": passed, **kinds, "table": table}
    report("correctness.zoo", figures, save=args.save)


if __name__ == "__main__":
    main()
