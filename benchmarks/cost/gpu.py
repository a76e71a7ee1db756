"""A training step and a prediction of Qwen2.5 on one GPU, with random weights.

    python -m benchmarks.cost.gpu --sizes 0.5B 7B --save

Needs torch, transformers, peft and pyro-ppl, and bitsandbytes for 72B in 4 bits, and fetches
nothing. Sizes can be run apart: ``--save`` adds them to what is saved from the same hardware.

``train``: a step of ``fit`` against a hand-written step of plain PEFT LoRA on the same weights and
the same batch; the two alternate. ``predict``: S draws in one batch, one after the other, and in
one batch with a shared trunk of three quarters of the blocks, each against one pass, in turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, Qwen2Config
from transformers.quantizers.base import get_keys_to_not_convert

from benchmarks._report import RESULTS, report
from benchmarks.cost._qwen import SIZES, qwen_config
from benchmarks.cost._steps import (
    Clock,
    LastToken,
    OneBatch,
    plain_step,
    ratio,
    seconds,
    synchronize,
)
from scalabl_pyro.data import Batch
from scalabl_pyro.guides import AutoSubspaceNormal
from scalabl_pyro.infer import FitConfig, fit
from scalabl_pyro.lora.adapter import SubspaceAdapter
from scalabl_pyro.models.model import ScalaBLModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: in 4 bits, for their weights in bfloat16 leave no room for training
QUANTISED = ("72B",)
TARGETS = ["q_proj", "v_proj", "lm_head"]
CLASSES = 4


def tiny_config() -> Qwen2Config:
    """For ``--dry-run``."""
    return Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def build(config: Qwen2Config, *, quantised: bool) -> PreTrainedModel:
    """A model in bfloat16 with random weights, made on the device a tensor at a time."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if quantised:
        from transformers.integrations import replace_with_bnb_linear

        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        replace_with_bnb_linear(llm, get_keys_to_not_convert(llm), settings)
        llm.is_loaded_in_4bit = True
    torch.manual_seed(0)
    for module in llm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, _random(module, name, parameter))
        # As in scalabl_pyro.loading: 4-bit weights are not to be repacked on a CPU.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    llm.tie_weights()
    llm.model.rotary_emb = type(llm.model.rotary_emb)(config).to(DEVICE)
    return llm.eval()


def _random(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    value = torch.zeros(parameter.shape, dtype=torch.bfloat16, device=DEVICE)
    if parameter.dim() > 1:
        value.normal_(0, 0.02)
    elif name == "weight":
        value.fill_(1.0)  # of a norm
    if type(parameter) is nn.Parameter:
        return nn.Parameter(value, requires_grad=False)
    # bitsandbytes quantises a weight as it is moved.
    return type(parameter)(
        value, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
    ).to(DEVICE)


def random_batch(size: int, tokens: int, vocabulary: int) -> Batch:
    ids = torch.randint(0, vocabulary, (size, tokens), device=DEVICE)
    choices = torch.ones(size, CLASSES, dtype=torch.bool, device=DEVICE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, choices, torch.arange(size, device=DEVICE) % CLASSES)


def peak_gib(run: Callable[[], object]) -> float | None:
    """The most memory that was taken at once, weights included."""
    if DEVICE == "cpu":
        run()
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def measure_training(adapter: SubspaceAdapter, batch: Batch, pairs: int) -> dict[str, Any]:
    """Seconds a step of both sides, and the most memory of each."""
    # On the same frozen weights, a second LoRA adapter that no hook of ours touches.
    peft_model, readout = adapter.peft_model, adapter.readout
    peft_model.add_adapter("plain", LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    peft_model.set_adapter("plain")
    plain = [p for name, p in peft_model.named_parameters() if ".plain." in name]
    optimizer = torch.optim.AdamW(plain, lr=1e-4, weight_decay=0.0)
    llm = peft_model.get_base_model()

    def step() -> None:
        plain_step(readout, llm, batch, plain, optimizer)

    def other() -> float:
        peft_model.set_adapter("plain")
        taken = seconds(step)
        peft_model.set_adapter("default")
        return taken

    plain_peak = peak_gib(step)
    peft_model.set_adapter("default")
    model = ScalaBLModel(adapter, num_data=1000)
    guide = AutoSubspaceNormal(model)

    def ours(steps: int, clock: Clock) -> None:
        config = FitConfig(steps=steps, lr=1e-4, eval_every=1)
        fit(model, guide, OneBatch(batch), config, validate=clock.validate, progress=False)

    our_peak = peak_gib(lambda: ours(2, Clock(None)))
    warmup = 3
    clock = Clock(other)
    ours(pairs + warmup, clock)
    peft_model.delete_adapter("plain")
    ratio_of_steps, interval = ratio(clock.ours[warmup:], clock.theirs[warmup:])
    return {
        "step_ratio": ratio_of_steps,
        "step_ratio_95": interval,
        "ours_ms": 1e3 * float(np.median(clock.ours[warmup:])),
        "plain_ms": 1e3 * float(np.median(clock.theirs[warmup:])),
        "pairs": pairs,
        "ours_peak_gib": our_peak,
        "plain_peak_gib": plain_peak,
    }


@torch.no_grad()
def measure_prediction(
    adapter: SubspaceAdapter, batch: Batch, draws: int, rounds: int
) -> dict[str, Any]:
    """Seconds of S draws in each form, in turns, as ratios to one pass."""
    adapter.eval()
    bank = adapter.init_loc * (1 + 0.3 * torch.randn(draws, *adapter.shape, device=DEVICE))
    held = bank.clone()
    depth = adapter.trunk.num_blocks * 3 // 4
    below = torch.tensor([block < depth for block in adapter.trunk.block_of], device=DEVICE)
    held[:, below] = adapter.init_loc[below]
    forms: dict[str, Callable[[], object]] = {
        "one_pass": lambda: adapter(batch, bank[0]),
        "batched": lambda: adapter(batch, bank),
        "loop": lambda: [adapter(batch, s) for s in bank],
        "trunk": lambda: adapter(batch, held),
    }
    peaks = {name: peak_gib(form) for name, form in forms.items()}
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            taken[name].append(seconds(form))
    figures: dict[str, Any] = {
        "one_pass_ms": 1e3 * float(np.median(taken["one_pass"])),
        "draws": draws,
        "rounds": rounds,
        "batched_to_best_loop": float(np.median(taken["batched"]) / min(taken["loop"])),
        "peak_gib": peaks,
    }
    for name in ("batched", "loop", "trunk"):
        figures[name], figures[f"{name}_95"] = ratio(taken[name], taken["one_pass"])
    return figures


def measure(config: Qwen2Config, args: argparse.Namespace, *, quantised: bool) -> dict[str, Any]:
    start = time.perf_counter()
    llm = build(config, quantised=quantised)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    adapter = SubspaceAdapter(llm, lora, LastToken(CLASSES), projections="free")
    figures: dict[str, Any] = {
        "weights": "4bit" if quantised else "bfloat16",
        "modules": len(adapter.layers),
        "batch": args.batch,
        "train_tokens": args.train_tokens,
    }
    batch = random_batch(args.batch, args.train_tokens, config.vocab_size)
    figures["train"] = measure_training(adapter, batch, args.pairs)
    figures["predict"] = {
        f"{tokens}_tokens": measure_prediction(
            adapter,
            random_batch(args.batch, tokens, config.vocab_size),
            args.draws,
            args.rounds,
        )
        for tokens in args.tokens
    }
    figures["seconds"] = time.perf_counter() - start
    return figures


def earlier(sizes: list[str]) -> dict[str, Any]:
    """The saved figures of other sizes on the same hardware."""
    path = RESULTS / "gpu.json"
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if saved["hardware"]["gpu"] != gpus:
        return {}
    return {size: value for size, value in saved["figures"].items() if size not in sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--train-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256], help="in prediction")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=30, help="training steps of each side")
    parser.add_argument("--rounds", type=int, default=20, help="predictions in each form")
    parser.add_argument("--dry-run", action="store_true", help="tiny models instead, on any device")
    parser.add_argument("--save", action="store_true", help="write results/gpu.json")
    args = parser.parse_args()
    if DEVICE == "cpu" and not args.dry_run:
        parser.error("there is no GPU; --dry-run runs tiny models without one")
    if args.dry_run:
        jobs = {"tiny": (tiny_config(), False), "tiny_4bit": (tiny_config(), True)}
    else:
        jobs = {size: (qwen_config(size), size in QUANTISED) for size in args.sizes}
    figures = earlier(list(jobs)) if args.save else {}
    for name, (config, quantised) in jobs.items():
        figures[name] = measure(config, args, quantised=quantised)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        print(name, json.dumps(figures[name]), file=sys.stderr, flush=True)
    report("cost.gpu", figures, save=args.save)


if __name__ == "__main__":
    main()
