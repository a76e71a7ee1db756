"""Does the uncertainty of tokens tell a text of another kind from more of what was trained on?

    python -m benchmarks.cost.generation --model FOLDER --data FOLDER --save

Fine-tunes a small causal language model (made for stories260k) by the likelihood of the words of
1,000 questions of OpenBookQA, then scores 500 further ones and 102 of college physics (MMLU). A
question's score is the mean over its tokens of mutual information, entropy or −log p̄. Reported is
the AUROC of each, over 5 seeds, with a bootstrap interval over questions of the mean over seeds.

Two controls, for questions of physics are longer: the AUROC of the length alone, and that of the
scores over the first 16 tokens alone. The KL weight has the lowest NLL on 200 questions of the
validation split, among three, on a seed of its own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks._report import report
from scalabl_pyro import AutoSubspaceNormal, FitConfig, KLSchedule, Record, ScalaBLModel, draw, fit
from scalabl_pyro.commands._quiet import quiet_libraries
from scalabl_pyro.data import Completion, disjoint, read_folder
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import Classes, load_readout, make_adapter
from scalabl_pyro.prediction import ScoredText, score
from scalabl_pyro.prediction.predictor import Predictor
from scalabl_pyro.readouts.completion_tokens import CompletionTokens

TRAIN, VALIDATION, FIRST, DRAWS, RESAMPLES = 1000, 200, 16, 10, 2000
WEIGHTS = (1.0, 10.0, 100.0)
TUNING_SEED, SEEDS = 100, range(5)
PROMPT = "Question:"


class Bench:
    """A language model and the words of questions.

    :param steps: of training.
    :param limit: the most questions of each split.
    """

    def __init__(self, model: str, data: str, *, steps: int, limit: int | None) -> None:
        quiet_libraries()
        self.config, self.steps = ModelConfig(model), steps
        letters = load_readout(self.config, Classes(4, tuple("ABCD")))
        self.tokenizer, self.context = letters.tokenizer, letters.max_length
        splits = disjoint(read_folder(Path(data) / "openbookqa"))
        physics = read_folder(Path(data) / "mmlu" / "college_physics")["test"]
        self.texts = {
            "train": words(splits["train"][:TRAIN][:limit]),
            "validation": words(splits["validation"][:VALIDATION][:limit]),
            "known": words(splits["test"][:limit]),
            "other": words(physics[:limit]),
        }

    def fit(self, weight: float, seed: int) -> tuple[Predictor, dict[str, float]]:
        """Train, and describe the posterior."""
        pyro.set_rng_seed(seed)
        readout = CompletionTokens(
            self.tokenizer, num_classes=len(self.tokenizer), max_length=self.context
        )
        lora = AdapterConfig(targets=("q_proj", "v_proj"))
        adapter = make_adapter(self.config, lora, readout, svd=True, projections="free")
        train = readout.encode(self.texts["train"])
        model = ScalaBLModel(adapter, num_data=len(train))
        guide = AutoSubspaceNormal(model)
        config = FitConfig(steps=self.steps, kl=KLSchedule(weight))
        result = fit(model, guide, train, config, seed=seed, progress=False)
        with torch.no_grad():
            q = guide.get_posterior()
        about = {
            "kl": result.history[-1]["kl"],
            "noise_to_signal": float((q.stddev / q.mean.abs()).median()),
        }
        return Predictor(adapter, draw(guide, DRAWS, seed=seed)), about

    def score(self, predictor: Predictor, split: str) -> list[ScoredText]:
        texts = self.texts[split]
        return score(predictor, [PROMPT] * len(texts), [str(t.completion) for t in texts])


def words(records: Sequence[Record]) -> list[Completion]:
    return [Completion(r.id, PROMPT, f" {r.question}") for r in records]


def nll(texts: Sequence[ScoredText]) -> float:
    """Nats a token under the model average."""
    return -float(torch.cat([text.log_probs for text in texts]).mean())


def scores(texts: Sequence[ScoredText], tokens: int | None = None) -> dict[str, Tensor]:
    """(N,) means over the first ``tokens`` tokens of each text."""
    return {
        "mutual_information": torch.stack([t.mutual_information[:tokens].mean() for t in texts]),
        "entropy": torch.stack([t.entropy[:tokens].mean() for t in texts]),
        "surprise": torch.stack([-t.log_probs[:tokens].mean() for t in texts]),
    }


def wins(known: Tensor, other: Tensor) -> Tensor:
    """(N, N') pairs in which the score of ``other`` is higher, ties ½; their mean is the AUROC."""
    return (other > known[:, None]).double() + 0.5 * (other == known[:, None])


def with_interval(seeds: list[Tensor]) -> dict[str, object]:
    """AUROCs of each seed, their mean, and its 95 % interval over questions, drawn anew."""
    pairs = torch.stack(seeds).mean(0)  # (N, N')
    generator = torch.Generator().manual_seed(0)

    def counts(size: int) -> Tensor:
        drawn = torch.randint(size, (RESAMPLES, size), generator=generator)
        return torch.zeros(RESAMPLES, size).scatter_add_(1, drawn, torch.ones(drawn.shape)).double()

    known, other = counts(pairs.shape[0]), counts(pairs.shape[1])
    means = ((known @ pairs) * other).sum(-1) / pairs.numel()
    return {
        "auroc": float(pairs.mean()),
        "interval_95": means.quantile(torch.tensor([0.025, 0.975]).double()).tolist(),
        "seeds": [float(seed.mean()) for seed in seeds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of stories260k")
    parser.add_argument("--data", required=True, help="folder with openbookqa/ and mmlu/")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--limit", type=int, help="the most questions of each split")
    parser.add_argument("--save", action="store_true", help="write results/generation.json")
    args = parser.parse_args()
    bench = Bench(args.model, args.data, steps=args.steps, limit=args.limit)

    trials = {}
    for weight in tqdm(WEIGHTS, desc="KL weights"):
        predictor, about = bench.fit(weight, TUNING_SEED)
        trials[weight] = about | {"nll": nll(bench.score(predictor, "validation"))}
    chosen = min(trials, key=lambda weight: trials[weight]["nll"])

    pairs: dict[str, list[Tensor]] = {}
    runs = []
    for seed in tqdm(SEEDS, desc="seeds"):
        predictor, about = bench.fit(chosen, seed)
        known, other = (bench.score(predictor, split) for split in ("known", "other"))
        runs.append(about | {"nll_known": nll(known), "nll_other": nll(other)})
        for tokens, suffix in ((None, ""), (FIRST, f"_first_{FIRST}")):
            mine, theirs = scores(known, tokens), scores(other, tokens)
            for name in mine:
                pairs.setdefault(name + suffix, []).append(wins(mine[name], theirs[name]))
    lengths = [torch.tensor([len(t.tokens) for t in texts]) for texts in (known, other)]
    figures = {
        "kl_weight": chosen,
        "trials": {f"kl_weight={weight:g}": trial for weight, trial in trials.items()},
        "runs": runs,
        "auroc": {name: with_interval(per_seed) for name, per_seed in pairs.items()},
        "auroc_of_length": with_interval([wins(*lengths)]),
        "questions": {name: len(texts) for name, texts in bench.texts.items()},
    }
    report("cost.generation", figures, save=args.save)


if __name__ == "__main__":
    main()
