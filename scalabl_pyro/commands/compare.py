"""Methods × seeds on the same work: trials chosen on validation, finished runs skipped."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data import check_split, fingerprint
from ..files import check_writable
from ..infer.fit_config import FitConfig
from ..infer.training import NonFiniteLossError
from ..lora.config import AdapterConfig, ModelConfig
from ..methods import ZeroShot
from ..readouts import READOUTS
from ..runs.config import RunConfig
from ..runs.data import DataConfig
from ..runs.settings import ConfigError, build, merged
from ..runs.training import train_run, unfinished_folder
from ._errors import message
from ._formats import format_table
from ._quiet import data_log_muted, quiet_worker
from ._report import write_report, written
from ._runs import ReportedRun

__all__ = ["CompareConfig", "compare", "compare_methods"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """Settings of ``scalabl compare``, described in configs/compare.yaml.

    :param methods: a row's name → its trials, each a mapping that overrides ``method`` and ``fit``.
        Where there are several, the one with the lowest validation NLL on ``tuning_seed`` is taken.
    :param seeds: the seeds of the table's rows.
    :param trunk_cache: of each run, see :class:`~scalabl_pyro.runs.RunConfig`.
    :param jobs: runs at a time, several in processes of their own; 0 takes one for each core, or
        one in all where there is a GPU.
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
    trunk_cache: str | None = None

    def __post_init__(self) -> None:
        if READOUTS[self.model.readout].reads_texts:
            raise ConfigError(
                f"model.readout is {self.model.readout!r}, and the table is of answers among"
                " choices: compare the metrics that scalabl train and evaluate give for each method"
            )
        if self.lora.heads:
            self._leave_out_zero_shot()
        if not self.methods or not all(self.methods.values()):
            raise ConfigError(f"methods is {self.methods}: expected one trial or more for each")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ConfigError(f"seeds is {list(self.seeds)}: expected different numbers")
        if self.tuning_seed in self.seeds:
            raise ConfigError(
                f"tuning_seed {self.tuning_seed} is among the seeds {list(self.seeds)}: trials must"
                " not be chosen on a seed that is reported"
            )
        if self.jobs < 0:
            raise ConfigError(f"jobs is {self.jobs}: expected 1 or more, or 0 for one a core")
        for name, trials in self.methods.items():
            for trial in trials:
                for seed in (self.tuning_seed, *self.seeds):
                    run = self.run_config(name, trial, seed)
                _check_fit(name, trial, run)

    def _leave_out_zero_shot(self) -> None:
        """Without training, there is no head for the base model to answer by."""
        remaining = {
            name: trials
            for name, trials in self.methods.items()
            if not any(trial.get("method", {}).get("name") == ZeroShot.name for trial in trials)
        }
        for name in self.methods.keys() - remaining.keys():
            log.warning(
                "the row %s is left out: the heads %s are untrained in the base model",
                name,
                list(self.lora.heads),
            )
        object.__setattr__(self, "methods", remaining)

    def run_config(
        self, name: str, trial: dict[str, Any], seed: int, *, data_hash: str = ""
    ) -> RunConfig:
        """The configuration of one run, whose folder is named by its seed and a hash of all else
        that defines it: one of ``runs``, or of ``trials`` with the seed of those.

        :param data_hash: of the records themselves, and of the adapter that training starts from,
            which a path does not pin down.
        """
        if "method" not in trial:
            raise ConfigError(f"methods.{name} has a trial without method: {trial}")
        unknown = sorted(trial.keys() - {"method", "fit"})
        if unknown:
            raise ConfigError(f"methods.{name} overrides {unknown}: expected method and fit")
        for key, value in trial.items():
            if not isinstance(value, dict):
                raise ConfigError(f"methods.{name} has {key} {value!r}: expected a mapping")
        values = {
            "model": asdict(self.model),
            "lora": asdict(self.lora),
            "data": asdict(self.data),
            "fit": merged(asdict(self.fit), trial.get("fit", {})),
            "method": trial["method"],
            "eval_batch_size": self.eval_batch_size,
        }
        config = build(RunConfig, values | {"seed": seed, "run_dir": "", "progress": False})
        defined = json.dumps([values, asdict(config.make_method()), data_hash], sort_keys=True)
        key = hashlib.sha256(defined.encode()).hexdigest()[:10]
        part = "trials" if seed == self.tuning_seed else "runs"
        folder = Path(self.out) / part / f"{name}-{key}-seed{seed}"
        # Neither is a part of what the run is.
        return replace(config, resume=True, run_dir=str(folder), trunk_cache=self.trunk_cache)


def _check_fit(name: str, trial: dict[str, Any], run: RunConfig) -> None:
    """Refuse to train a method with the ``fit`` of another, where it has one of its own."""
    foreign = run.foreign_fit(trial.get("fit", {}).keys())
    if foreign:
        own = {key: value for key, (_, value) in foreign.items()}
        raise ConfigError(
            f"methods.{name} has a trial without fit.{sorted(own)[0]}, and the one that all rows"
            f" share is not made for {run.method['name']}: give the trial its own; what scalabl"
            f" train takes is {own}"
        )


def compare_methods(config: CompareConfig) -> str:
    """``scalabl compare``: the table as text."""
    return f"{format_table(compare(config))}\n\n{written(Path(config.out))}"


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run what has not run yet, then write the report to ``config.out``.

    :returns: the table, as in ``table.json``.
    :raises DataError: if the data cannot be read or have no test split.
    :raises PermissionError: if ``out`` cannot be written.
    :raises RuntimeError: if a run fails; the message names its settings, and other runs are kept.
        If training diverges it is told at the end, when the other rows have their report.
    """
    check_writable(Path(config.out) / "runs")
    data_hash = _data_hash(config)

    def run_config(name: str, trial: dict[str, Any], seed: int) -> RunConfig:
        return config.run_config(name, trial, seed, data_hash=data_hash)

    def validation_nll(name: str, trial: dict[str, Any]) -> float | None:
        folder = run_config(name, trial, config.tuning_seed).run_dir
        if folder in diverged:
            return None
        return json.loads((Path(folder) / "metrics.json").read_text())["validation"]["nll"]

    tuned = {name: trials for name, trials in config.methods.items() if len(trials) > 1}
    attempts = [run_config(n, t, config.tuning_seed) for n, row in tuned.items() for t in row]
    # Rows that choose nothing need not wait for those that do; first, as they often run longer.
    settled = [
        run_config(name, row[0], seed)
        for name, row in config.methods.items()
        if name not in tuned
        for seed in config.seeds
    ]
    diverged = _run_all(config, [*settled, *attempts], "trials" if attempts else "runs")
    trials: dict[str, list[dict[str, Any]]] = {
        name: [{"trial": t, "validation_nll": validation_nll(name, t)} for t in row]
        for name, row in tuned.items()
    }
    finite = {
        name: [attempt for attempt in row if attempt["validation_nll"] is not None]
        for name, row in trials.items()
    }
    chosen = {
        name: min(finite[name], key=lambda attempt: attempt["validation_nll"])["trial"]
        if name in tuned
        else row[0]
        for name, row in config.methods.items()
        if name not in tuned or finite[name]
    }
    runs = {
        name: [run_config(name, trial, seed) for seed in config.seeds]
        for name, trial in chosen.items()
    }
    left = [r for row in runs.values() for r in row if r.run_dir not in diverged]
    diverged |= _run_all(config, left, "runs")
    folders = {
        name: [Path(r.run_dir) for r in row]
        for name, row in runs.items()
        if not diverged & {r.run_dir for r in row}
    }
    lost = sorted(config.methods.keys() - folders.keys())
    if not folders:
        raise RuntimeError(f"training diverged in every row, {lost}; lower lr or lr_guide")
    table = write_report(
        Path(config.out),
        {name: [ReportedRun.read(folder) for folder in row] for name, row in folders.items()},
        chosen={name: chosen[name] for name in folders},
        trials=trials,
        lost=lost,
    )
    if lost:
        raise RuntimeError(
            f"training diverged in the rows {lost}, which are left out of the report in"
            f" {config.out}; lower their lr or lr_guide, and the same command adds them"
        )
    return table


def _data_hash(config: CompareConfig) -> str:
    splits = config.data.splits(seed=0)
    check_split(splits, "test")
    return fingerprint(splits) + config.lora.start_fingerprint()


def _run_all(config: CompareConfig, runs: Sequence[RunConfig], what: str) -> set[str]:
    """Run what has no run folder yet; returns the folders that stay empty, as training diverged."""
    diverged: set[str] = set()
    todo = [r for r in {r.run_dir: r for r in runs}.values() if not Path(r.run_dir).exists()]
    for finished in {r.run_dir for r in runs if Path(r.run_dir).exists()}:
        # What a process left that was killed between saving its run and clearing up.
        shutil.rmtree(unfinished_folder(Path(finished)), ignore_errors=True)
    if not todo:
        return diverged
    # Runs would share a GPU's memory.
    jobs = config.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    with tqdm(total=len(todo), desc=what, disable=not config.progress) as bar:
        for run, error in _outcomes(todo, min(jobs, len(todo))):
            if isinstance(error, NonFiniteLossError):
                diverged.add(run.run_dir)
                shutil.rmtree(unfinished_folder(Path(run.run_dir)), ignore_errors=True)
            elif error is not None:
                raise RuntimeError(
                    f"the run {run.run_dir} (method {run.method}) failed: {message(error)};"
                    " finished runs are kept, and the same command goes on from there"
                ) from error
            bar.update()
    return diverged


def _outcomes(
    runs: Sequence[RunConfig], jobs: int
) -> Iterator[tuple[RunConfig, BaseException | None]]:
    """Each run and what it failed with, as they end: one after another here, or several at a time
    in processes of their own."""
    if jobs == 1:
        with data_log_muted():
            for run in runs:
                gc.collect()  # one language model in memory at a time
                try:
                    train_run(run)
                except Exception as error:
                    yield run, error
                else:
                    yield run, None
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=quiet_worker, initargs=(threads,))
    with pool:
        started = {pool.submit(train_run, run): run for run in runs}
        try:
            for done in as_completed(started):
                yield started[done], done.exception()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
