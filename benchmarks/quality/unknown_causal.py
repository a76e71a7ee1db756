"""The scores of :mod:`benchmarks.quality.unknown` in a real causal language model, 5 seeds.

    python -m benchmarks.quality.unknown_causal --model FOLDER --encoder FOLDER --data FOLDER --save

SmolLM2-135M-Instruct on 1,000 questions of ARC-Easy, read by choice likelihood, as in
:mod:`benchmarks.quality.causal`, each row at what was chosen there. Positives are the wrong answers
among 500 test questions, or the questions of another subject beside these: chemistry and physics of
MMLU, all their splits, and OpenBookQA. The likeness of the choices is that to an encoder which saw
none of them. Finished runs are kept in ``--runs``, a folder, and not run again. A CPU without
instructions for bfloat16 needs ``--dtype float32``: what ran so is named in the figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks._report import RESULTS, report
from benchmarks._runs import cached
from benchmarks.quality import causal
from benchmarks.quality.calibration import tempered
from benchmarks.quality.causal import BATCH, SEEDS, scalabl, spread, watched
from benchmarks.quality.unknown import OTHERS, Row, contrast, print_table, subjects, table
from scalabl_pyro.data import Record, read_folder
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import Classes, load_readout, make_adapter
from scalabl_pyro.methods import Fitted, Method
from scalabl_pyro.prediction.mahalanobis import feature_distances

TASK = "arc_easy"
#: questions with four choices, evenly spread
TEST, OPENBOOKQA = 500, 200


class Bench(causal.Bench):
    """The task of the causal table, with questions of other subjects; ``all`` has the test
    questions and these, one after another.

    :param runs: folder of finished runs.
    """

    batch_size = BATCH

    def __init__(self, model: str, data: str, runs: Path, dtype: str = "bfloat16") -> None:
        super().__init__(model, data, TASK, runs / "runs.jsonl", dtype=dtype)
        records = {name: self._records[name] for name in ("train", "validation")}
        records["test"] = spread(of_four(self._records["test"]), TEST)
        for name, place in OTHERS.items():
            records[name] = [r for split in read_folder(Path(data) / place).values() for r in split]
        records["openbookqa"] = spread(read_folder(Path(data) / "openbookqa")["test"], OPENBOOKQA)
        self._splits = {name: self.readout.encode(each) for name, each in records.items()}
        parts = [records[name] for name in ("test", *subjects(self))]
        self._splits["all"] = self.readout.encode([record for part in parts for record in part])
        self._trunk_is_cached = False

    def fit(self, method: Method, seed: int, subspace: str = "random") -> Fitted:
        if not self._trunk_is_cached:  # minutes: not where all runs are finished
            adapter = make_adapter(self.config, self.adapter, self.readout, svd=False)
            for name in ("train", "validation", "all"):
                self._splits[name] = adapter.cache_trunk(self._splits[name], batch_size=BATCH)
            self._trunk_is_cached = True
        return super().fit(method, seed, subspace)

    def cached(self, name: str, run: Callable[[], dict]) -> dict:
        """The result of an earlier run, or run now."""
        return cached(self.runs, name, run)


def of_four(records: list[Record]) -> list[Record]:
    return [record for record in records if len(record.choices) == 4]


def distances(bench: Bench, fitted: Fitted) -> dict[str, Tensor]:
    """How far the features are from those of the training questions."""
    loc = None if fitted.guide is None else fitted.guide.median()["s"]
    train, new = bench.splits["train"], bench.splits["all"]
    found = feature_distances(fitted.model.adapter, train, [new], loc, batch_size=BATCH)
    return {"mahalanobis": found[0]}


ROWS: dict[str, Row] = {
    "MLE": Row(
        {"lr=0.001": watched(1e-3)},
        derive={"MLE tempered": tempered},
        of_features=distances,
    ),
    "V activations": Row(
        {"lr=0.005 kl_weight=1": scalabl(5e-3, 1)}, subspace="activations", of_features=distances
    ),
}


def controls(bench: Bench, encoder: str) -> dict[str, Tensor]:
    """Scores that know nothing of the model: tokens, and how alike the choices are to an encoder
    that was not trained on any of this."""
    config = ModelConfig(encoder, readout="multiple_choice", dtype="bfloat16", attention="eager")
    readout = load_readout(config, Classes(4))
    settings = AdapterConfig(targets=("query",), heads=("classifier",), subspace="random")
    adapter = make_adapter(config, settings, readout, svd=False)
    split = bench.splits["all"]
    alike = -contrast(adapter, readout.encode(split.records))
    return {"tokens": torch.tensor(split.lengths).float(), "alike": alike}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--encoder", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument(
        "--data", required=True, help="folder with arc_easy/, mmlu/ and openbookqa/"
    )
    parser.add_argument("--runs", type=Path, default=RESULTS / "unknown_causal")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the first so many")
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--save", action="store_true", help="write results/unknown_causal.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.runs.mkdir(parents=True, exist_ok=True)
    bench: Any = Bench(args.model, args.data, args.runs, dtype=args.dtype)
    rows = {name: ROWS[name] for name in args.rows}
    summary = table(bench, rows, partial(controls, bench, args.encoder), args.seeds, args.resamples)
    print_table(summary["rows"])
    report("quality.unknown_causal", summary, save=args.save)


if __name__ == "__main__":
    main()
