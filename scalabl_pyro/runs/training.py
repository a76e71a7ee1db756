"""One training run, from its settings to a run folder."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from ..data import Record, Split, fingerprint, fingerprints
from ..distributed import is_main, world_size
from ..files import json_text, write_whole
from ..infer.checkpoints import Checkpoints
from ..infer.training import NonFiniteLossError
from ..lora.adapter import SubspaceAdapter
from ..lora.loading import load_readout, make_adapter
from ..lora.passes import PassCounter, Passes
from ..methods import Fitted, ScalaBL
from ..prediction.assessment import Assessment, assess
from ..prediction.mahalanobis import feature_distances
from ..prediction.predictor import Predictor
from ..readouts import Readout
from .config import RunConfig
from .folder import point_of, save_run
from .memory import MemoryConfig, explain_out_of_memory
from .places import relative_places
from .prior import load_prior_run, prior_fingerprint
from .reading import read_fingerprints, read_json, read_settings_placed
from .settings import ConfigError
from .training_data import read_data, trained_before, warn_of_trained_before

__all__ = ["train_run", "unfinished_folder"]

log = logging.getLogger(__name__)


def train_run(config: RunConfig) -> dict[str, Any]:
    """Train, predict every split but the training one, and write the run folder.

    Where the configuration has trials, each is trained with the same seed, and the run is the one
    with the lowest validation NLL. Until the run is finished, its checkpoints stand beside the run
    folder, in ``RUN_DIR.unfinished``; with ``resume`` training goes on from them, and a finished
    run is left as it is. Of several processes that train together (see
    :mod:`~scalabl_pyro.distributed`) one writes.

    :returns: metrics by split, and the validation NLL of each trial under ``trials``.
    :raises FileExistsError: if the run folder or an unfinished run exists, and not ``resume``.
    :raises ConfigError: if the run that exists has other settings.
    :raises RuntimeError: if another process works on the same run.
    :raises NonFiniteLossError: if training diverges, in every trial if there are some.
    """
    folder = Path(config.run_dir)
    if config.resume and (folder / "metrics.json").exists():
        metrics = _finished(config, folder)
        # What a process left that was killed between saving its run and clearing up.
        shutil.rmtree(unfinished_folder(folder), ignore_errors=True)
        return metrics
    config.check_run_dir()
    with _unfinished(config) as checkpoints:
        return _run(config, checkpoints)


def _finished(config: RunConfig, folder: Path) -> dict[str, Any]:
    before = read_settings_placed(folder)
    differences = _differences(config, before)
    had = read_fingerprints(folder)
    splits: dict[str, list[Record]] = {}
    if had and not differences:
        splits, _, decided = read_data(config)
        differences = _differences(decided, before)
    if differences:
        raise ConfigError(
            f"the finished run in {folder} has other settings ({'; '.join(differences)}): choose"
            " another run_dir, or remove it"
        )
    now = fingerprints(splits) if had else {}
    others = sorted(split for split in had.keys() | now.keys() if had.get(split) != now.get(split))
    if others:
        raise ConfigError(
            f"the finished run in {folder} had other records of {others} than its data settings"
            " name now: put them back, choose another run_dir, or remove it"
        )
    metrics = read_json(folder / "metrics.json")
    trials = folder / "trials.json"
    return {**metrics, "trials": read_json(trials, list)} if trials.exists() else metrics


def _differences(config: RunConfig, before: RunConfig) -> list[str]:
    """Settings that differ from those of a run, of the trial that has the fewest."""
    return min((attempt.differences(before) for attempt in config.attempts()), key=len)


def _run(config: RunConfig, checkpoints: Checkpoints) -> dict[str, Any]:
    splits, classes, config = read_data(config)
    _check_inputs(config, splits, checkpoints)
    if is_main():
        warn_of_trained_before(config, splits)
    readout = load_readout(config.model, classes)
    encoded = {name: readout.encode(records) for name, records in splits.items()}
    trainer = _Trainer(config, readout, encoded.pop("train"), encoded["validation"], checkpoints)
    if config.trunk_cache is not None:
        trainer.cache_trunk(config.trunk_cache)
    chosen, name, trials = config, "run", list[dict[str, Any]]()
    if config.trials:
        chosen, name, trials = _best(config, trainer)
    fitted = trainer.fit(chosen, name)
    counter = trainer.counter
    counter.reset()
    show = config.progress and is_main()
    assessed = {
        name: assess(fitted.predictor, split, batch_size=config.eval_batch_size, progress=show)
        for name, split in encoded.items()
    }
    prediction = counter.passes(sum(map(len, encoded.values())))
    _add_distances(assessed, fitted, trainer.train, encoded, config.eval_batch_size)
    if is_main():
        save_run(
            chosen,
            classes,
            fitted,
            assessed,
            trials,
            records=splits,
            before=trained_before(config),
            training=trainer.spent[name],
            prediction=prediction,
        )
    metrics: dict[str, Any] = {name: assessment.metrics for name, assessment in assessed.items()}
    return {**metrics, "trials": trials} if trials else metrics


def _add_distances(
    assessed: Mapping[str, Assessment],
    fitted: Fitted,
    train: Split,
    splits: Mapping[str, Split],
    batch_size: int,
) -> None:
    """Mahalanobis distances (N,) from the training examples, where there is another split than
    those of the task, to be told from ``test``, and one model has features."""
    predictor = fitted.predictor
    others = splits.keys() - {"validation", "test"}
    if not others or "test" not in splits:
        return
    if not isinstance(predictor, Predictor) or predictor.adapter.readout.reads_texts:
        return
    s = point_of(predictor, fitted.guide)
    try:
        names = ("test", *others)
        distances = feature_distances(
            predictor.adapter, train, [splits[name] for name in names], s, batch_size=batch_size
        )
    except (ValueError, RuntimeError) as error:  # of which running out of memory is one
        # What was trained is not lost for a column of a table.
        log.warning("the run keeps no Mahalanobis distances: %s", error)
        return
    for name, values in zip(names, distances, strict=True):
        assessed[name].tensors["mahalanobis"] = values


@dataclass
class _Trainer:
    """Fits the attempts of one run, and counts the passes of each.

    :param train: the training examples; ``cached_train`` the same as methods take them, with what
        leaves the trunk if that is kept, and so ``validation`` and ``cached_validation``.
    :param spent: by an attempt's name; ``None`` where a part of them was in another process.
    """

    config: RunConfig
    readout: Readout
    train: Split
    validation: Split
    checkpoints: Checkpoints
    counter: PassCounter = field(default_factory=PassCounter)
    spent: dict[str, Passes | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cached_train, self.cached_validation = self.train, self.validation
        self._whole = not self.checkpoints.exist and world_size() == 1

    def cache_trunk(self, folder: str) -> None:
        """Train and validate on what leaves the trunk, which is of the base model.

        :raises ConfigError: if there is no trunk, or what leaves it cannot be kept.
        """
        if world_size() > 1:
            raise ConfigError(
                f"trunk_cache is {folder!r}, and {world_size()} processes train together: leave it"
                " out, or train in one"
            )
        # No prompts are needed: where V points changes nothing below.
        lora = replace(self.config.lora, subspace="random")
        adapter = make_adapter(self.config.model, lora, self.readout, svd=False)
        try:
            self.cached_train, self.cached_validation = (
                adapter.cache_trunk(split, batch_size=self.config.eval_batch_size, folder=folder)
                for split in (self.train, self.validation)
            )
        except ValueError as error:
            raise ConfigError(f"trunk_cache is {folder!r}, but {error}") from error
        except OSError as error:
            raise ConfigError(
                f"trunk_cache is {folder!r}: expected a folder that can be written ({error})"
            ) from error
        except torch.OutOfMemoryError as error:
            raise RuntimeError(explain_out_of_memory(self._sizes(self.config))) from error
        del adapter
        gc.collect()  # one language model in memory at a time, and they refer to themselves

    def fit(self, attempt: RunConfig, name: str) -> Fitted:
        """:raises RuntimeError: if memory runs out; it says what the run needs and what helps."""
        self.counter.reset()
        try:
            fitted = self._fit(attempt, name)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(explain_out_of_memory(self._sizes(attempt))) from error
        # The best of several trials comes back from its last checkpoint, which is no training.
        self.spent.setdefault(name, self.counter.passes() if self._whole else None)
        return fitted

    def _fit(self, attempt: RunConfig, name: str) -> Fitted:
        method = attempt.make_method()
        part = self.checkpoints.part(name)
        splits = self.cached_train, self.cached_validation
        options: dict[str, Any] = {"seed": self.config.seed, "checkpoints": part}
        if isinstance(method, ScalaBL) and attempt.prior_run is not None:
            before = load_prior_run(attempt)
            assert before.guide is not None  # as every run of the method has one
            adapter = before.predictor.adapter
            self.counter.watch(adapter)
            return method.fit_next(adapter, before.guide, *splits, **options)
        return method.fit(self._make_adapter, *splits, **options)

    def _make_adapter(self, **options: Any) -> SubspaceAdapter:
        model, lora = self.config.model, self.config.lora
        adapter = make_adapter(model, lora, self.readout, prompts=self.train, **options)
        self.counter.watch(adapter)
        return adapter

    def _sizes(self, attempt: RunConfig) -> MemoryConfig:
        method = attempt.make_method()
        return MemoryConfig(
            self.config.model,
            self.config.lora,
            method.projections if attempt.prior_run is None else "fixed",
            method.form().get("perp", 0),
            method.form().get("core", "diagonal"),
            batch_size=attempt.fit.batch_size,
            eval_batch_size=self.config.eval_batch_size,
            tokens=max(self.train.lengths),
            classes=self.readout.num_classes,
            particles=method.particles,
        )


@contextmanager
def _unfinished(config: RunConfig) -> Iterator[Checkpoints]:
    """The checkpoints of this run, in a locked folder that is removed when the run is saved."""
    folder = unfinished_folder(Path(config.run_dir))
    checkpoints = Checkpoints(folder, config.checkpoint)
    if not is_main():
        yield checkpoints
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / "lock").acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(
            f"another process works on the run in {folder}: wait for it, or choose another run_dir"
        ) from error
    with held:
        try:
            config.check_run_dir()  # again: it may have been finished just before
            _check_settings(config, checkpoints)
            yield checkpoints
        except BaseException:
            if not checkpoints.exist:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _check_settings(config: RunConfig, checkpoints: Checkpoints) -> None:
    """Compare with the settings that an unfinished run began with, or keep them."""
    folder = checkpoints.folder
    if checkpoints.exist and not config.resume:
        raise FileExistsError(
            f"an unfinished run is in {folder}: go on with resume=true, or remove it"
        )
    settings = folder / "config.yaml"
    if checkpoints.exist and settings.exists():
        differences = config.differences(read_settings_placed(folder))
        if differences:
            raise ConfigError(
                f"the unfinished run in {folder} has other settings ({'; '.join(differences)}): set"
                " them as they were, or choose another run_dir"
            )
    if config.resume and settings.exists() and not checkpoints.exist:
        log.warning("the unfinished run in %s left no checkpoint: it starts anew", folder)
    write_whole(settings, OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    write_whole(folder / "places.json", json_text(relative_places(config.flat())))


def _check_inputs(
    config: RunConfig, splits: Mapping[str, Sequence[Record]], checkpoints: Checkpoints
) -> None:
    """The same for the records themselves, the adapter to start from and the prior, which a path
    does not pin down."""
    inputs = {
        "data.sha256": (fingerprint(splits), "records than those that its data settings name"),
        "start.sha256": (config.lora.start_fingerprint(), "tensors than those of lora.start"),
        "prior.sha256": (prior_fingerprint(config), "tensors than those of its prior_run"),
    }
    for name, (digest, others) in inputs.items():
        path = checkpoints.folder / name
        if checkpoints.exist and path.exists() and path.read_text() != digest:
            raise ConfigError(
                f"the unfinished run in {checkpoints.folder} began with other {others} now: put"
                " them back, or choose another run_dir"
            )
        if is_main():
            write_whole(path, digest)


def unfinished_folder(run_dir: Path) -> Path:
    """Where the checkpoints of a run stand until it is finished."""
    return run_dir.with_name(run_dir.name + ".unfinished")


def _best(config: RunConfig, trainer: _Trainer) -> tuple[RunConfig, str, list[dict[str, Any]]]:
    """The trial with the lowest validation NLL, by its name too; one that diverges is passed over.

    What it is to be fitted again from is its last checkpoint, to the bit.
    """
    best: tuple[RunConfig, str] | None = None
    lowest = float("inf")
    trials: list[dict[str, Any]] = []
    for i, (trial, attempt) in enumerate(zip(config.trials, config.attempts(), strict=True)):
        gc.collect()  # one language model in memory at a time, and they refer to themselves
        try:
            fitted = trainer.fit(attempt, f"trial-{i}")
            nll = attempt.make_method().nll(fitted.predictor, trainer.validation)
            del fitted
        except NonFiniteLossError as error:
            log.warning("the trial %s diverged: %s", trial, error)
            nll = None
        trials.append({"trial": trial, "validation_nll": nll})
        if nll is not None and nll < lowest:
            lowest, best = nll, (attempt, f"trial-{i}")
    if best is None:
        raise NonFiniteLossError("every trial diverged; lower lr or lr_guide")
    gc.collect()
    return *best, trials
