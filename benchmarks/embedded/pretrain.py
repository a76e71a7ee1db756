"""Pretrain the embedded language model: ``python -m scalabl_pyro.tiny.pretrain --out DIR``.

A Llama of 1.2 million parameters and its tokenizer learn the corpus of the embedded world in
11 minutes on two busy cores. The same seed, machine and thread count are meant to give the same
weights; elsewhere rounding may differ.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..data.world import COLOURS, world

__all__ = ["pretrain", "train_tokenizer"]

CONTEXT = 256
EPOCHS = 10
BATCH_TOKENS = 2560
PEAK_LR = 2e-3
# A colour is one token of about ten, and the only one that the facts decide.
COLOUR_WEIGHT = 8.0
THREADS = 2


def train_tokenizer(corpus: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding over bytes: any text can be encoded, words of the corpus are short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # Twice as fast as sdpa on a CPU in bfloat16.
    model.set_attn_implementation("eager")
    return model


def batches(texts: list[list[int]], pad: int, rng: random.Random) -> Iterator[torch.Tensor]:
    """One epoch of right-padded batches of texts of like length, in random order."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), rng.random()))
    groups: list[list[int]] = [[]]
    for i in order:
        if (len(groups[-1]) + 1) * len(texts[i]) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(i)
    rng.shuffle(groups)
    for group in groups:
        width = len(texts[group[-1]])
        yield torch.tensor([texts[i] + [pad] * (width - len(texts[i])) for i in group])


def pretrain(out: Path, seed: int = 0) -> None:
    """Train tokenizer and model on the embedded world, and write them to a new folder.

    :param out: the folder; it must not exist.
    :param seed: seed of the world, of the first weights and of the order of the texts.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: give the name of a new folder")
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    corpus = world(seed).corpus
    tokenizer = train_tokenizer(corpus)
    model = new_model(tokenizer)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    colours = torch.tensor(tokenizer.encode("".join(f" {colour}" for colour in COLOURS)))
    colon = tokenizer.encode("Answer:")[-1]
    texts = [[*ids, eos] for ids in tokenizer(corpus)["input_ids"]]
    schedule = [list(batches(texts, pad, rng)) for _ in range(EPOCHS)]
    steps = sum(map(len, schedule))
    print(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary; "
        f"{sum(map(len, texts)):,} tokens an epoch, {steps} steps",
        flush=True,
    )

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05
    )
    warmup = steps // 20
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    start = time.monotonic()
    model.train()
    for epoch, groups in enumerate(schedule, 1):
        total, count = 0.0, torch.zeros(4)
        for ids in groups:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            target = ids[:, 1:]
            loss = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            coloured = torch.isin(target, colours)
            weight = torch.where(coloured, COLOUR_WEIGHT, 1.0) * (target != pad)
            loss = (weight * loss.view_as(target)).sum() / weight.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += loss.item()
            hits = logits.argmax(-1) == target
            answers = coloured & (ids[:, :-1] == colon)
            stated = coloured & ~answers
            count += torch.stack(
                [m.sum() for m in (hits & answers, answers, hits & stated, stated)]
            )
        print(
            f"epoch {epoch}/{EPOCHS}  loss {total / len(groups):.3f}  "
            f"colours right in answers {count[0] / count[1]:.3f}, "
            f"in statements {count[2] / count[3]:.3f}  {time.monotonic() - start:.0f} s",
            flush=True,
        )
    _save(model, tokenizer, out)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the Hugging Face folder under a temporary name and rename it: whole, or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.bfloat16().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # The temporary folder and the weights are private at first; the package is for everyone.
        partial.chmod(0o755)
        for path in partial.iterdir():
            path.chmod(0o644)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
