"""What a Bayesian step costs over a plain PEFT LoRA step.

    python -m benchmarks.cost.train_step --save

``step_ratio``: a step of ``fit`` against a hand-written step on plain PEFT LoRA: the same Llama,
batch, readout, loss, clipping and optimizer; the two alternate in one process.
``pyro_ms``: what Pyro and the loop add to a step with M modules: a step of ``fit`` on a model that
costs nothing (its logits are a constant plus the sum of s), less the optimizer (``fit``), and less
forward, backward and clipping by hand on the same model too (``fit_less_bare_step``).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pyro
import torch
from peft import LoraConfig, get_peft_model
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._report import report
from benchmarks.cost._steps import Clock, LastToken, OneBatch, plain_step, ratio, seconds
from scalabl_pyro import AutoSubspaceNormal, FitConfig, ScalaBLModel, SubspaceAdapter, fit
from scalabl_pyro.data import Batch

TARGETS = ["q_proj", "v_proj"]


def llama(hidden: int, blocks: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=int(hidden * 2.75) // 8 * 8,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def measure_step(pairs: int, hidden: int, blocks: int, batch_size: int, tokens: int) -> dict:
    """Seconds a step on both sides, as a ratio with a bootstrap interval."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    readout = LastToken()
    ids = torch.randint(0, 2048, (batch_size, tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = Batch(inputs, torch.ones(batch_size, 4, dtype=torch.bool), torch.arange(batch_size) % 4)

    plain = get_peft_model(llama(hidden, blocks), lora)
    base = plain.get_base_model()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def other() -> float:
        return seconds(lambda: plain_step(readout, base, batch, parameters, optimizer))

    adapter = SubspaceAdapter(llama(hidden, blocks), lora, readout, projections="free")
    model = ScalaBLModel(adapter, num_data=1000)
    warmup = 5
    clock = Clock(other)
    config = FitConfig(steps=pairs + warmup, lr=1e-4, eval_every=1)
    fit(
        model,
        AutoSubspaceNormal(model),
        OneBatch(batch),
        config,
        validate=clock.validate,
        progress=False,
    )
    ours, theirs = np.array(clock.ours[warmup:]), np.array(clock.theirs[warmup:])
    step_ratio, interval = ratio(ours, theirs)
    return {
        "step_ratio": step_ratio,
        "step_ratio_95": interval,
        "pair_ratio_median": float(np.median(ours / theirs)),
        "ours_ms": 1e3 * float(np.median(ours)),
        "plain_ms": 1e3 * float(np.median(theirs)),
        "pairs": pairs,
    }


class Touch(torch.autograd.Function):
    """Zero, with a gradient for each tensor, so that the loop has them all to handle."""

    @staticmethod
    def forward(ctx, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return torch.zeros(())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


class FreeAdapter:
    """An adapter with M modules whose language model costs nothing."""

    def __init__(self, modules: int) -> None:
        self.shape = (modules, 8)
        self.init_loc = torch.ones(self.shape)
        self.device = torch.device("cpu")
        sizes = [(8, 64), (64, 8)] * modules
        self.parameters = {f"m{i}": nn.Parameter(torch.zeros(s)) for i, s in enumerate(sizes)}
        self.readout_parameters: dict[str, nn.Parameter] = {}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return self.parameters

    def train(self, mode: bool = True) -> None: ...

    def eval(self) -> None: ...

    def __call__(self, batch: Batch, s: torch.Tensor) -> torch.Tensor:
        return batch.choices.float() + s.sum() + Touch.apply(*self.parameters.values())


def bare_step(modules: int, batch: Batch, steps: int) -> float:
    """Seconds of what a hand-written step on the same free model does too, less its optimizer."""
    adapter, s = FreeAdapter(modules), nn.Parameter(torch.ones(modules, 8))
    tensors = [*adapter.parameters.values(), s]
    optimizer = torch.optim.AdamW(tensors)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(adapter(batch, s), batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(tensors, 1.0).item()
        used = time.perf_counter() - start
        optimizer.step()  # outside the clock, as on the other side, whose caches it fills as well
        start = time.perf_counter()
        optimizer.zero_grad()
        times.append(used + time.perf_counter() - start)
    return float(np.median(times[1:]))


def measure_pyro(modules: int, steps: int) -> dict[str, float]:
    """Milliseconds a step without a language model, under ``fit`` and under plain SVI."""
    batch = Batch({}, torch.ones(4, 4, dtype=torch.bool), torch.arange(4))
    figures = {}
    adapter = FreeAdapter(modules)
    model = ScalaBLModel(adapter, num_data=1000)
    clock = Clock(None)
    optimizer_times: list[float] = []
    step = torch.optim.AdamW.step

    def timed_step(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        result = step(self, *args, **kwargs)
        optimizer_times.append(time.perf_counter() - start)
        return result

    torch.optim.AdamW.step = timed_step
    try:
        config = FitConfig(steps=steps, eval_every=1)
        fit(
            model,
            AutoSubspaceNormal(model),
            OneBatch(batch),
            config,
            validate=clock.validate,
            progress=False,
        )
    finally:
        torch.optim.AdamW.step = step
    rest = np.array(clock.ours) - np.array(optimizer_times)
    figures["fit"] = 1e3 * float(np.median(rest[1:]))
    figures["fit_less_bare_step"] = figures["fit"] - 1e3 * bare_step(modules, batch, steps)

    model = ScalaBLModel(FreeAdapter(modules), num_data=1000)
    svi = SVI(
        model,
        AutoSubspaceNormal(model),
        pyro.optim.AdamW({"lr": 1e-3}),
        Trace_ELBO(max_plate_nesting=1),
    )
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        svi.step(batch)
        times.append(time.perf_counter() - start)
    figures["plain_svi_with_its_optimizers"] = 1e3 * float(np.median(times[1:]))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--save", action="store_true", help="write results/train_step.json")
    args = parser.parse_args()
    figures = measure_step(args.pairs, args.hidden, args.blocks, args.batch, args.tokens)
    figures["pyro_ms"] = {str(M): measure_pyro(M, max(20, args.pairs)) for M in (57, 129)}
    report("cost.train_step", figures, save=args.save)


if __name__ == "__main__":
    main()
