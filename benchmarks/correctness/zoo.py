"""Which architectures are served, and which are refused and why, from small random configurations.

    python -m benchmarks.correctness.zoo --save

Each architecture of ``transformers`` is built with two or four small blocks and random weights, and
adapted at linear layers whose names are found in it. What is checked:

* ``peft``: the logits of plain PEFT at the same weights;
* ``alone``: rows padded in a batch have the logits they have alone;
* ``draws``: S draws at once equal a loop over them;
* ``trunk``: with the upper half adapted, the shared trunk equals the full path;
* ``checkpointed``: gradients with checkpointing equal plain ones;
* ``trains``: three steps of ``fit`` move s;
* ``exported``: a draw, saved and loaded by plain PEFT, has its logits.

``ok``, the reason of a refusal, or what went wrong, after ``WRONG`` or ``CRASH``.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from benchmarks._report import report
from benchmarks.cost._steps import OneBatch
from scalabl_pyro import AutoSubspaceNormal, FitConfig, ScalaBLModel, SubspaceAdapter, fit
from scalabl_pyro.data import Batch
from scalabl_pyro.readouts.base import Readout
from scalabl_pyro.readouts.causal import last_logits, left_padded
from scalabl_pyro.runs.exports import save_adapter

C, VOCABULARY, BLOCKS = 4, 64, 4
TOLERANCE = 1e-4

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
    "xlnet": dict(max_position_embeddings=None),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1, state_size=8),
    "recurrent_gemma": dict(lru_width=32, attention_window_size=8),
    "funnel": dict(block_sizes=[2, 2], num_hidden_layers=None, d_head=8),
    "mobilebert": dict(intra_bottleneck_size=32, true_hidden_size=32),
}


class Wrong(Exception):
    """A check that ran, and whose numbers differ."""


class OwnPadding(Exception):
    """A model whose logits depend on padding, whoever runs it."""


class Words(Readout):
    """Logits of C words after a prompt, or those of a head: readouts without a tokenizer."""

    padding_side = "right"
    auto_class = ""

    def __init__(self, kind: str) -> None:
        self.kind, self.num_classes = kind, C
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
    return [name for found in blocks.values() for name in (found[0], found[-1])]


def batch_of(kind: str) -> Batch:
    """Five rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    shape = (5, C) if kind == "choices" else (5,)
    lengths = torch.tensor([8, 6, 8, 3, 5]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    mask = (torch.arange(8) < lengths[..., None]).long()
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=generator)
    ids = torch.where(torch.arange(8) == lengths[..., None] - 1, 2, ids) * mask  # ends with </s>
    choices = torch.ones(5, C, dtype=torch.bool)
    return Batch({"input_ids": ids, "attention_mask": mask}, choices, torch.arange(5) % C)


def make(kind: str, model_type: str, first: int = 0, **options: Any) -> SubspaceAdapter:
    llm = build(kind, model_type)
    names = targets(llm, first)
    if not names:
        raise ValueError(f"no trunk: no block counts {first} or more")
    conv = isinstance(llm.get_submodule(names[0]), Conv1D)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=names, fan_in_fan_out=conv)
    torch.manual_seed(2)
    adapter = SubspaceAdapter(llm, config, Words(kind), **options)
    fill(adapter.matrices.B.values())
    return adapter


@torch.no_grad()
def fill(layers: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for layer in layers:
        layer.weight.copy_(0.3 * torch.randn(layer.weight.shape, generator=generator))


def checks(kind: str, model_type: str) -> Iterator[tuple[str, Callable[[], None]]]:
    batch = batch_of(kind)

    def draws(adapter: SubspaceAdapter) -> Tensor:
        return torch.rand(3, *adapter.shape, generator=torch.Generator().manual_seed(4)) + 0.5

    def close(found: Tensor, expected: Tensor) -> None:
        error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-2)
        if not error < TOLERANCE:
            raise Wrong(f"off by {error:.1e}")

    @torch.no_grad()
    def peft() -> None:
        adapter = make(kind, model_type, svd=False)
        llm = build(kind, model_type)
        model = get_peft_model(llm, copy.deepcopy(adapter.peft_model.peft_config["default"]))
        plain = dict(model.eval().named_parameters())
        for name, value in adapter.state().items():
            plain[f"base_model.model.{name}"].copy_(value)
        close(adapter(batch), adapter.readout(llm, batch.inputs))

    @torch.no_grad()
    def alone() -> None:
        adapter = make(kind, model_type)
        rows = []
        for n in range(5):
            size = int(batch.inputs["attention_mask"][n].sum(-1).max())
            inputs = {name: value[n : n + 1, ..., :size] for name, value in batch.inputs.items()}
            rows.append(Batch(inputs, batch.choices[n : n + 1]))
        each = torch.cat([adapter(row, adapter.init_loc) for row in rows])
        try:
            close(adapter(batch, adapter.init_loc), each)
        except Wrong as error:
            llm = build(kind, model_type)
            plain = torch.cat([adapter.readout(llm, row.inputs) for row in rows])
            try:
                close(adapter.readout(llm, batch.inputs), plain)
            except Wrong:
                raise OwnPadding(f"padding changes its logits, {error}") from error
            raise

    @torch.no_grad()
    def at_once() -> None:
        adapter = make(kind, model_type)
        s = draws(adapter)
        loop = torch.stack([adapter(batch, each) for each in s])
        close(adapter(batch, s), loop)

    @torch.no_grad()
    def trunk() -> None:
        adapter = make(kind, model_type, first=BLOCKS // 2)
        s = draws(adapter)
        loop = torch.stack([adapter(batch, each) for each in s])
        if not adapter.trunk.depth:
            raise ValueError(f"no trunk: {adapter.trunk.why_not}")
        close(adapter(batch, s), loop)
        if not adapter.trunk.sharing:
            raise ValueError("no trunk: found in a forward pass")

    def checkpointed() -> None:
        gradients = []
        for checkpointing in (False, True):
            adapter = make(kind, model_type, gradient_checkpointing=checkpointing)
            adapter.train()
            s = adapter.init_loc.requires_grad_()
            adapter(batch, s).log_softmax(-1)[..., 0].sum().backward()
            gradients.append(s.grad)
        close(gradients[1], gradients[0])

    def trains() -> None:
        adapter = make(kind, model_type)
        model = ScalaBLModel(adapter, num_data=5)
        guide = AutoSubspaceNormal(model)
        config = FitConfig(steps=3, batch_size=5, lr_guide=0.01)
        fit(model, guide, OneBatch(batch), config, progress=False)
        if not (guide.median()["s"] - adapter.init_loc).abs().max() > 1e-4:
            raise Wrong("s did not move")

    @torch.no_grad()
    def exported() -> None:
        adapter = make(kind, model_type)
        s = draws(adapter)[0]
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(adapter, s, Path(folder) / "draw")
            model = PeftModel.from_pretrained(build(kind, model_type), f"{folder}/draw").eval()
        close(adapter.readout(model.get_base_model(), batch.inputs), adapter(batch, s))

    yield from {
        "peft": peft,
        "alone": alone,
        "draws": at_once,
        "trunk": trunk,
        "checkpointed": checkpointed,
        "trains": trains,
        "exported": exported,
    }.items()


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
    found = {"build": "ok"}
    for name, check in checks(kind, model_type):
        pyro.set_rng_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check()
            found[name] = "ok"
        except ValueError as error:
            found[name] = f"refused: {str(error).splitlines()[0][:400]}"
        except OwnPadding as error:
            found[name] = f"the model's own: {error}"
        except Wrong as error:
            found[name] = f"WRONG: {str(error)[:300]}"
        except Exception as error:
            found[name] = f"CRASH: {type(error).__name__}: {str(error)[:300]}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="model types")
    parser.add_argument("--save", action="store_true", help="write results/zoo.json")
    args = parser.parse_args()
    table = {}
    for kind, model_types in (("causal", CAUSAL), ("classes", CLASSES), ("choices", CHOICES)):
        for model_type in model_types:
            if not args.only or model_type in args.only:
                table[f"{model_type}, {kind}"] = found = examine(kind, model_type)
                bad = {name: value for name, value in found.items() if value != "ok"}
                print(f"{model_type}, {kind}: {bad or 'ok'}", flush=True)
    passed = sum(set(found.values()) == {"ok"} for found in table.values())
    built = sum(found["build"] == "ok" for found in table.values())
    kinds = {
        word: sum(any(v.startswith(word) for v in found.values()) for found in table.values())
        for word in ("refused", "the model's own", "WRONG", "CRASH")
    }
    figures = {"built": built, "all checks passed": passed, **kinds, "table": table}
    report("correctness.zoo", figures, save=args.save)


if __name__ == "__main__":
    main()
