"""Methods × seeds on the same work: trials chosen on validation, finished runs skipped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .config import ConfigError, DataConfig, RunConfig, build
from .console import quiet_worker
from .experiment import run
from .loading import AdapterConfig, ModelConfig
from .report import write_report
from .svi import FitConfig

__all__ = ["CompareConfig", "compare"]


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """Settings of ``scalabl compare``, described in configs/compare.yaml.

    :param methods: a row's name → its trials, each a mapping that overrides ``method`` and ``fit``.
        Where there are several, the one with the lowest validation NLL on ``tuning_seed`` is taken.
    :param seeds: the seeds of the table's rows.
    :param jobs: runs at a time, each in a process of its own; 0 takes one for each core.
    """

    model: ModelConfig
    lora: AdapterConfig
    data: DataConfig
    out: str
    methods: dict[str, list[dict[str, Any]]]
    fit: FitConfig = field(default_factory=FitConfig)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seed: int = 100
    jobs: int = 0
    eval_batch_size: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.methods or not all(self.methods.values()):
            raise ConfigError(f"methods is {self.methods}: expected one trial or more for each")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ConfigError(f"seeds is {list(self.seeds)}: expected different numbers")
        if self.tuning_seed in self.seeds:
            raise ConfigError(
                f"tuning_seed {self.tuning_seed} is among the seeds {list(self.seeds)}: trials must"
                " not be chosen on a seed that is reported"
            )
        for name, trials in self.methods.items():
            for trial in trials:
                self.run_config(name, trial, self.tuning_seed)

    def run_config(self, name: str, trial: dict[str, Any], seed: int) -> RunConfig:
        """The configuration of one run, whose folder is named by a hash of all that defines it."""
        unknown = sorted(trial.keys() - {"method", "fit"})
        if unknown:
            raise ConfigError(f"methods.{name} overrides {unknown}: expected method and fit")
        values = {
            "model": asdict(self.model),
            "lora": asdict(self.lora),
            "data": asdict(self.data),
            "fit": _merged(asdict(self.fit), trial.get("fit", {})),
            "method": trial["method"],
            "eval_batch_size": self.eval_batch_size,
            "seed": seed,
        }
        key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
        folder = Path(self.out) / "runs" / f"{name.replace(' ', '-')}-{key}-seed{seed}"
        return build(RunConfig, values | {"run_dir": str(folder), "progress": False})


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run what has not run yet, then write the table and pictures to ``config.out``.

    :returns: the table, as in ``table.json``.
    """
    tuned = {name: trials for name, trials in config.methods.items() if len(trials) > 1}
    _run_all(
        config,
        [
            config.run_config(n, t, config.tuning_seed)
            for n, trials in tuned.items()
            for t in trials
        ],
        "trials",
    )
    chosen = {
        name: min(
            trials, key=lambda t: _validation_nll(config.run_config(name, t, config.tuning_seed))
        )
        if name in tuned
        else trials[0]
        for name, trials in config.methods.items()
    }
    runs = {
        name: [config.run_config(name, trial, seed) for seed in config.seeds]
        for name, trial in chosen.items()
    }
    _run_all(config, [r for row in runs.values() for r in row], "runs")
    trials = {
        name: [
            {
                "trial": t,
                "validation_nll": _validation_nll(config.run_config(name, t, config.tuning_seed)),
            }
            for t in trials
        ]
        for name, trials in tuned.items()
    }
    folders = {name: [Path(r.run_dir) for r in row] for name, row in runs.items()}
    return write_report(Path(config.out), folders, chosen=chosen, trials=trials)


def _run_all(config: CompareConfig, runs: Iterable[RunConfig], what: str) -> None:
    todo = [r for r in {r.run_dir: r for r in runs}.values() if not Path(r.run_dir).exists()]
    if not todo:
        return
    jobs = min(config.jobs or os.cpu_count() or 1, len(todo))
    context = get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, context, initializer=quiet_worker) as pool,
        tqdm(total=len(todo), desc=what, disable=not config.progress) as bar,
    ):
        for done in as_completed([pool.submit(run, r) for r in todo]):
            done.result()
            bar.update()


def _validation_nll(config: RunConfig) -> float:
    metrics = json.loads((Path(config.run_dir) / "metrics.json").read_text())
    return metrics["validation"]["nll"]


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: _merged(base[key], value) if isinstance(value, dict) and key in base else value
        for key, value in changes.items()
    }
