"""What `scalabl memory` says of Qwen2.5, from its published architecture.

    python -m benchmarks.cost.memory --save

GiB of training with LoRA r = 8 on q_proj, v_proj and lm_head, with and without gradient
checkpointing, and of predicting with S = 10 draws. Nothing is measured here: the tests compare
estimates to what is allocated.
"""

from __future__ import annotations

import argparse
import tempfile

from benchmarks._report import report
from benchmarks.cost._qwen import qwen_config
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.runs.memory import MemoryConfig, estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["7B", "32B", "72B"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--save", action="store_true", help="write results/memory.json")
    args = parser.parse_args()
    figures = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            qwen_config(size).save_pretrained(folder)
            for quantization in (None, "4bit"):
                for checkpointing in (False, True):
                    config = MemoryConfig(
                        ModelConfig(folder, dtype="bfloat16", quantization=quantization),
                        AdapterConfig(gradient_checkpointing=checkpointing),
                        batch_size=args.batch,
                        eval_batch_size=args.batch,
                        tokens=args.tokens,
                    )
                    name = f"{size} {quantization or 'bfloat16'}"
                    if checkpointing:
                        name += " checkpointed"
                    figures[name] = estimate(config).gib()
    report(
        "cost.memory", {"batch": args.batch, "tokens": args.tokens, "gib": figures}, save=args.save
    )


if __name__ == "__main__":
    main()
