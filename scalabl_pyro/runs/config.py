"""Everything that defines a training run."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..data import (
    Record,
    draw_shots,
)
from ..files import check_writable, json_text
from ..infer.checkpoints import CheckpointConfig
from ..infer.fit_config import FitConfig
from ..lora.config import AdapterConfig, ModelConfig
from ..methods import METHODS, Method, ScalaBL
from ..readouts import READOUTS, Classes
from .data import DataConfig
from .places import resolved
from .settings import ConfigError, build, flat, merged, no_setting

__all__ = ["MAY_CHANGE_ON_RESUME", "NOT_PART_OF_FUNCTION", "SHARED", "RunConfig"]

#: settings that may change between an interruption and its resumption
MAY_CHANGE_ON_RESUME = (
    *("run_dir", "resume", "checkpoint", "progress"),
    *("eval_batch_size", "trunk_cache"),  # which round otherwise, and change nothing else
)

#: settings of a finished run that leave the function as it is that was trained: where its model is
#: and where it runs, what only training heeds, and how many draws are made of a posterior
NOT_PART_OF_FUNCTION = (
    *(f"model.{name}" for name in ("name", "revision", "device", "device_map", "attention")),
    *("model.shard", "model.truncate", "method.draws"),
    *(f"lora.{name}" for name in ("dropout", "base_dropout", "gradient_checkpointing")),
)

#: fields of every method → the setting of a run that fills them
SHARED = {"config": "fit", "eval_batch_size": "eval_batch_size", "progress": "progress"}


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that defines a training run.

    :param method: ``name``, a key of ``METHODS``, and that method's own fields; fields left out are
        filled in with their defaults, which another version may change.
    :param run_dir: the folder to write, which must not exist.
    :param fit: the method's own, ``METHODS[name].config``, if left out.
    :param checkpoint: how often an unfinished run is saved.
    :param eval_batch_size: B of a forward pass in validation and prediction, before draws multiply
        it.
    :param seed: of the starting weights, the order of the data, noise and draws.
    :param progress: show a bar.
    :param prior_run: a run folder, or ``owner/name`` on the Hub, with the same settings of model,
        lora and method. Its posterior is the prior of s, and where q starts; its V, B, heads and
        classes stay as they are, and s alone moves. ``method.prior`` is that of the first run.
    :param trunk_cache: a folder, to keep what leaves the blocks below the first adapted one: they
        run once for each example of training and validation, for all runs on the same model and
        records. It is held in memory while a run trains.
    :param resume: go on with an unfinished run of the same settings, if there is one, and leave a
        finished one as it is.
    :param trials: mappings that override ``method`` and ``fit``; where there are any, each is
        trained, and the one with the lowest validation NLL is kept.
    """

    model: ModelConfig
    lora: AdapterConfig
    data: DataConfig
    run_dir: str
    method: dict[str, Any] = field(default_factory=lambda: {"name": "scalabl"})
    fit: FitConfig = None  # type: ignore[assignment]  # the method's, once that is known
    trials: tuple[dict[str, Any], ...] = ()
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: bool = False
    eval_batch_size: int = 64
    seed: int = 0
    progress: bool = True
    prior_run: str | None = None
    trunk_cache: str | None = None

    def __post_init__(self) -> None:
        if self.eval_batch_size < 1:
            raise ConfigError(f"eval_batch_size is {self.eval_batch_size}: expected 1 or more")
        if self.trunk_cache == "":
            raise ConfigError("trunk_cache is '': expected a folder, or null")
        if not 0 <= self.seed < 2**32:  # numpy's generators, which Pyro seeds too, take no more
            raise ConfigError(f"seed is {self.seed}: expected 0 to 2^32 − 1")
        method = self.make_method()
        if method.projections == "fixed" and self.lora.start is None:
            raise ConfigError(
                "method.projections is 'fixed', which trains s alone, and B starts at 0, where"
                " nothing depends on s: give lora.start, a trained adapter"
            )
        if self.prior_run is not None and not isinstance(method, ScalaBL):
            able = [name for name, other in METHODS.items() if issubclass(other, ScalaBL)]
            raise ConfigError(
                f"prior_run is {self.prior_run!r}, and method {method.name} has no posterior that"
                f" could be a prior: expected one of {able}, as that run has"
            )
        if method.config.kl_budget is not None and "kl_budget" in method.ignores:
            raise ConfigError(
                f"fit.kl_budget is {method.config.kl_budget}, and method {method.name} has no KL:"
                " leave it out"
            )
        if READOUTS[self.model.readout].reads_texts and not method.reads_texts:
            able = [name for name, other in METHODS.items() if other.reads_texts]
            raise ConfigError(
                f"method {method.name} learns answers among choices, and model.readout is"
                f" {self.model.readout!r}, which reads texts: expected one of {able}"
            )
        object.__setattr__(self, "fit", method.config)
        own = [field.name for field in fields(method) if field.name not in SHARED]
        settings = {"name": method.name} | {name: getattr(method, name) for name in own}
        object.__setattr__(self, "method", settings)
        self.attempts()

    def make_method(self) -> Method:
        """The method with its settings.

        :raises ConfigError: if there is no such method, or it has no such setting.
        """
        settings = dict(self.method)
        name = settings.pop("name", None)
        if name not in METHODS:
            raise ConfigError(f"method.name is {name!r}: expected one of {sorted(METHODS)}")
        taken = sorted(settings.keys() & SHARED.keys())
        if taken:
            raise ConfigError(
                f"method.{taken[0]} is no setting: fit, eval_batch_size and progress are"
            )
        known = [f.name for f in fields(METHODS[name]) if f.name not in SHARED]
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise ConfigError(
                f"{no_setting(unknown[0], known, 'method.')}; another method than {name} is"
                " method=NAME, which brings that method's settings"
            )
        shared = {field: getattr(self, key) for field, key in SHARED.items()}
        if self.fit is None:
            del shared["config"]
        return build(METHODS[name], settings | shared, "method.")

    def classes(self, splits: Mapping[str, Sequence[Record]]) -> Classes:
        """What the records fix about the readout: all of them its classes, some of train its shots.

        :raises DataError: if the prompt cannot put them, or there are fewer than shots.
        """
        shots = draw_shots(splits["train"], self.model.shots, seed=self.seed)
        records = [record for split in splits.values() for record in split]
        return self.model.classes(records, shots=shots)

    def attempts(self) -> list[RunConfig]:
        """The configurations to train, of which one is kept: those of the trials, or this one.

        :raises ConfigError: if a trial overrides something else, or is wrong.
        """
        if not self.trials:
            return [self]
        return [replace(self.changed(trial), trials=()) for trial in self.trials]

    def changed(self, trial: Mapping[str, Any]) -> RunConfig:
        """This configuration with another ``method`` or another ``fit``, or parts of them.

        :raises ConfigError: if the trial overrides something else, or is wrong.
        """
        unknown = sorted(trial.keys() - {"method", "fit"})
        if unknown:
            raise ConfigError(f"a trial overrides {unknown}: expected method and fit")
        for key, value in trial.items():
            if not isinstance(value, Mapping):
                raise ConfigError(f"a trial's {key} is {value!r}: expected a mapping")
        method = dict(trial.get("method", {}))
        if method.get("name", self.method["name"]) == self.method["name"]:
            method = merged(self.method, method)  # another method has settings of its own
        fit = build(FitConfig, merged(asdict(self.fit), trial.get("fit", {})), "fit.")
        return replace(self, method=method, fit=fit, trials=())

    def without_effect(self) -> list[str]:
        """A line for each setting that was changed and that acts on nothing: one of ``fit`` that
        the method does not use, or one of ``lora`` that the adapter to start from has itself."""
        method = self.make_method()
        own = METHODS[method.name].config
        unused = [
            f"fit.{name} has no effect with method {method.name}"
            for name in method.without_effect()
            if getattr(self.fit, name) != getattr(own, name)
        ]
        overruled = [
            f"lora.{name} has no effect with lora.start, whose adapter has its own"
            for name in self.lora.overruled
        ]
        return unused + overruled

    def foreign_fit(self, given: Collection[str]) -> dict[str, tuple[Any, Any]]:
        """The settings of ``fit`` of which the method has values of its own, where these are
        others: what they are, and the method's.

        :param given: the names of those that were chosen for this method, and are as meant.
        """
        method = METHODS[self.method["name"]]
        own, shared, mine = (asdict(fit) for fit in (method.config, FitConfig(), self.fit))
        return {
            name: (mine[name], value)
            for name, value in own.items()
            if value not in (shared[name], mine[name]) and name not in given
        }

    def flat(self) -> dict[str, Any]:
        """All settings by their full names."""
        return flat(asdict(self))

    def function_settings(self) -> dict[str, Any]:
        """The settings on which the trained function depends, by their full names, as JSON has
        them."""
        values = asdict(self)
        parts = {name: values[name] for name in ("model", "lora", "method")}
        settings = flat(parts | {"data": {"classes": self.data.classes}})
        of_function = {
            key: value for key, value in settings.items() if key not in NOT_PART_OF_FUNCTION
        }
        return dict(json.loads(json_text(of_function)))

    def completed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as :meth:`function_settings` has them, of a run that older code may have
        written: what it did not know yet is at its default."""
        method: Any = METHODS[self.method["name"]]
        unknown = self.function_settings().keys() - settings.keys()
        defaults = {
            key: one.default
            for part, kind in (("model", ModelConfig), ("lora", AdapterConfig), ("method", method))
            for one in fields(kind)
            if (key := f"{part}.{one.name}") in unknown and one.default is not MISSING
        }
        return dict(json.loads(json_text(defaults))) | dict(settings)

    def differences(self, other: RunConfig) -> list[str]:
        """The settings that differ from another run's, of those that change what is trained."""
        mine, others = resolved(self.flat()), resolved(other.flat())
        keys = mine.keys() | others.keys()
        labels = "data.columns.labels"
        if "auto" in (mine[labels], others[labels]):  # one before and one after the data decided
            keys -= {labels}
        if not (mine["data.classes"] and others["data.classes"]):  # so too
            keys -= {"data.classes"}
        return [
            f"{key}: {mine.get(key)!r}, was {others.get(key)!r}"
            for key in sorted(keys)
            if mine.get(key) != others.get(key) and key.split(".")[0] not in MAY_CHANGE_ON_RESUME
        ]

    def check_run_dir(self) -> Path:
        """The run folder, in a place that can be written.

        :raises FileExistsError: if it exists.
        :raises PermissionError: if the folder that is to hold it cannot be made.
        """
        folder = Path(self.run_dir)
        if folder.exists():
            raise FileExistsError(
                f"the run folder {folder} exists; choose another run_dir, or remove it"
            )
        check_writable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder
