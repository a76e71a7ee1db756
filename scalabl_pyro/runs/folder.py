"""Run folders: what a trained method leaves on disk, and how it is read again.

* ``adapter/`` an ordinary PEFT adapter with the posterior's median folded in; of an ensemble the
  last member
* ``projections.safetensors`` A (or V), B and heads, trained or not; ``posterior.safetensors`` the
  parameters of the guide and of the prior, such as the posterior of ``prior_run``, and draws
  ``s`` (S, M, r), or ``weights.*`` of projections
* ``posterior.json`` what these tensors mean, and the settings that they were trained with;
  ``config.yaml`` all settings of the run, of which those must not be changed any more;
  ``places.json`` where the files and folders are that these name by a relative path
* ``predictions.safetensors`` of every split but the training one: logits (S, N, C), labels (N,),
  numbers of tokens (N,) and, where there is another split than those of the task, Mahalanobis
  distances (N,); of texts what :class:`~scalabl_pyro.prediction.Assessment` says
* ``metrics.json``, ``cost.json``, ``trials.json`` if there were some, ``history.csv``,
  ``environment.json``; ``data.json``, hashes of the records of each split, and ``trained_on.json``,
  of each training question; ``README.md``, a model card
"""

from __future__ import annotations

import csv
import platform
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from ..data import Record, Split, asked, fingerprints
from ..files import json_text, whole_folder
from ..guides import AutoSubspace
from ..lora.loading import load_readout, make_adapter
from ..lora.passes import Passes
from ..lora.saving import save_peft
from ..methods import Fitted
from ..models.model import LoRAModel, ScalaBLModel
from ..prediction.assessment import Assessment
from ..prediction.predictor import Predictor, Predicts, RunPredictor, predict_proba
from ..readouts import Classes, Readout
from .card import run_card, with_intervals
from .config import RunConfig
from .cost import Cost
from .places import place, relative_places
from .reading import (
    RunFolderError,
    file_hash,
    find_run,
    read_json,
    read_places,
    read_settings_placed,
    read_tensors,
)
from .settings import ConfigError, build

__all__ = [
    "PosteriorInfo",
    "Run",
    "RunFolderError",
    "load_run",
    "point_of",
    "read_posterior_info",
    "restore",
    "save_run",
]

FORMAT = 4
PACKAGES = ("scalabl_pyro", "torch", "pyro-ppl", "transformers", "peft", "safetensors", "datasets")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The frozen model that a run was trained on; see ``SubspaceAdapter.base_fingerprint``."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class PosteriorInfo:
    """What ``posterior.json`` holds.

    :param settings: on which the trained function depends, see ``RunConfig.function_settings``.
    :param modules: M names.
    :param temperature: that divides the logits.
    :param sha256: of the files of tensors, by name; of runs from before it was kept, of none.
    """

    format: int
    settings: dict[str, Any]
    modules: tuple[str, ...]
    rank: int
    scaling: float
    kl_weight: float | None
    num_data: int
    seed: int
    temperature: float
    classes: Classes
    base_model: BaseModel
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder, loaded.

    :param folder: where it is, of one from the Hub in the local cache.
    :param predictor: gives the logits that it gave before saving.
    :param model: the probabilistic model, with what its prior learned.
    :param guide: the posterior q(s), or ``None`` without one.
    """

    folder: Path
    config: RunConfig
    classes: Classes
    predictor: RunPredictor
    model: LoRAModel
    guide: AutoSubspace | None

    @property
    def readout(self) -> Readout:
        return self.predictor.adapter.readout

    @property
    def class_names(self) -> tuple[str, ...]:
        """The choices that all records of the run share, where it knows them."""
        return self.config.data.classes or self.readout.class_names

    def subspace_predictor(self) -> Predictor:
        """The predictor, as one at draws of s or at a point.

        :raises ValueError: if the method has draws of something else.
        """
        if not isinstance(self.predictor, Predictor):
            raise ValueError(
                f"method {self.config.method['name']} predicts by more than one adapter and vector"
                " s: of such a run there are train, compare, report, evaluate, predict, select,"
                " distill and show-prompts alone"
            )
        return self.predictor

    def encode(self, records: Sequence[Record]) -> Split:
        """Tokenise records for the run's model.

        :raises DataError: if a record does not fit the readout.
        """
        return self.readout.encode(records)

    def predict_proba(self, inputs: Sequence[Record | str], *, batch_size: int = 64) -> Tensor:
        """Probabilities of the Bayesian model average, (N, C).

        :param inputs: records, or texts where all share the choices of the run.
        :raises ValueError: if one text is given for a list, or texts and the run knows no choices,
            or see :meth:`encode`.
        """
        if isinstance(inputs, str):
            raise ValueError(f"inputs is the text {inputs[:40]!r}: expected a list of texts")
        if any(isinstance(x, str) for x in inputs) and not self.class_names:
            raise ValueError(
                "the choices of this run differ from record to record: give records with choices"
            )
        records = [
            x if isinstance(x, Record) else Record(str(n), x, self.class_names)
            for n, x in enumerate(inputs)
        ]
        return predict_proba(self.predictor, self.encode(records), batch_size=batch_size)


def save_run(
    config: RunConfig,
    classes: Classes,
    fitted: Fitted,
    assessed: Mapping[str, Assessment],
    trials: Sequence[Mapping[str, Any]] = (),
    *,
    records: Mapping[str, Sequence[Record]],
    training: Passes | None,
    prediction: Passes,
    before: Collection[str] = (),
) -> None:
    """Write the run folder that the configuration names, whole or not at all.

    :param records: by split; their hashes are kept.
    :param before: hashes of what trained the run that this one goes on from.
    :param training: what it took; ``None`` if it is not known.
    :param prediction: what an example took.
    :raises FileExistsError: if the folder exists.
    """
    with whole_folder(config.check_run_dir()) as part:
        stored = _write_run(part, config, classes, fitted, assessed, trials)
        cost = Cost(fitted.result.num_trained, stored, training, prediction)
        _write_json(part / "cost.json", asdict(cost))
        _write_json(part / "data.json", fingerprints(records))
        _write_json(part / "trained_on.json", sorted({*before, *asked(records["train"])}))
        _write_cards(part, config, fitted, assessed)


def _write_run(
    part: Path,
    config: RunConfig,
    classes: Classes,
    fitted: Fitted,
    assessed: Mapping[str, Assessment],
    trials: Sequence[Mapping[str, Any]],
) -> int:
    """All but what is told of it; how many numbers are stored to predict with."""
    predictor, adapter = fitted.predictor, fitted.predictor.adapter
    history = fitted.result.history  # empty where nothing was trained
    guide_state = fitted.guide.state_dict() if fitted.guide is not None else {}
    median = point_of(predictor, fitted.guide)
    with adapter.folded(median) as peft_model:
        save_peft(peft_model, part / "adapter")
    projections = _tensors(adapter.state())
    save_file(projections, part / "projections.safetensors")
    posterior = {f"guide.{name}": value for name, value in guide_state.items()}
    if isinstance(fitted.model, ScalaBLModel):
        prior_state = fitted.model.prior.state_dict()
        posterior |= {f"prior.{name}": value for name, value in prior_state.items()}
    posterior |= predictor.state()
    if posterior:
        save_file(_tensors(posterior), part / "posterior.safetensors")
    info = PosteriorInfo(
        format=FORMAT,
        settings=config.function_settings(),
        modules=adapter.module_names,
        rank=adapter.rank,
        scaling=adapter.scaling,
        kl_weight=history[-1]["kl_weight"] if history else None,
        num_data=fitted.model.num_data,
        seed=config.seed,
        temperature=predictor.temperature if isinstance(predictor, Predictor) else 1.0,
        classes=replace(classes, form=adapter.readout.form),
        base_model=BaseModel(config.model.name, adapter.base_fingerprint()),
        sha256={path.name: file_hash(path) for path in sorted(part.glob("*.safetensors"))},
    )
    _write_json(part / "posterior.json", asdict(info))
    tensors = {
        f"{split}.{name}": value
        for split, assessment in assessed.items()
        for name, value in assessment.tensors.items()
    }
    save_file(_tensors(tensors), part / "predictions.safetensors")
    OmegaConf.save(OmegaConf.create(asdict(config)), part / "config.yaml")
    if places := relative_places(config.flat()):
        _write_json(part / "places.json", places)
    _write_json(
        part / "metrics.json", {name: assessment.metrics for name, assessment in assessed.items()}
    )
    if trials:
        _write_json(part / "trials.json", list(trials))
    _write_history(part / "history.csv", history)
    _write_json(part / "environment.json", _environment())
    return sum(value.numel() for value in (*projections.values(), *posterior.values()))


def _write_cards(
    part: Path, config: RunConfig, fitted: Fitted, assessed: Mapping[str, Assessment]
) -> None:
    figures = with_intervals(
        {split: assessment.metrics for split, assessment in assessed.items()},
        {split: assessment.tensors for split, assessment in assessed.items()},
    )
    sizes = {"train": fitted.model.num_data}
    for split, assessment in assessed.items():
        sizes[split] = len(
            assessment.tensors["labels" if "labels" in assessment.tensors else "lengths"]
        )
    rank = fitted.model.adapter.rank
    for folder in (part, part / "adapter"):
        text = run_card(config, sizes, figures, rank=rank, adapter=folder != part)
        (folder / "README.md").write_text(text, encoding="utf-8")


def load_run(folder: str | Path) -> Run:
    """Read a run folder and the base model it names.

    :param folder: or ``owner/name`` on the Hub, where ``hf upload owner/name FOLDER`` puts one;
        with ``@`` and a branch, tag or commit behind it, if not the latest is wanted.
    :raises RunFolderError: if it cannot be had, is incomplete, damaged, or of another format
        version, was made on other base weights, or its ``config.yaml`` has been changed since.
    """
    folder = find_run(folder)
    info = read_posterior_info(folder)
    config = read_settings_placed(folder)
    _check_settings(config, info, folder)
    # One process reads it.
    return restore(folder, replace(config, model=replace(config.model, shard=False)), info)


def restore(folder: Path, config: RunConfig, info: PosteriorInfo) -> Run:
    """The run in a folder, whose two kinds of settings agree.

    :raises RunFolderError: as :func:`load_run` does.
    """
    classes = info.classes
    method = config.make_method()
    # V comes with the projections, whatever it was before training; the adapter that training
    # started from may be gone, and what was saved has the same layers.
    start = str(folder / "adapter") if config.lora.start is not None else None
    adapter = make_adapter(
        config.model,
        replace(config.lora, start=start, subspace="random"),
        load_readout(config.model, classes),
        **method.form() | {"svd": False},
    )
    if adapter.module_names != info.modules:
        raise RunFolderError(
            f"{folder} adapts {list(info.modules)}, but on this model the same settings adapt"
            f" {list(adapter.module_names)}"
        )
    if adapter.base_fingerprint() != info.base_model.fingerprint:
        raise RunFolderError(
            f"{folder} was made on other weights than those of {config.model.name!r}; set"
            f" model.name to the model it was trained on, {info.base_model.name!r} or a copy of"
            " it: in its config.yaml, or on the command line where prior_run names this folder"
        )
    model = method.make_model(adapter, num_data=info.num_data)
    if config.prior_run is not None:
        # Of the same family as q; its parameters are read below, and that run may be gone.
        model.prior = method.make_guide(model).as_prior()
    # After the model, which may move the start of an adapter.
    projections = folder / "projections.safetensors"
    _load_into(adapter.state(), _finite_tensors(projections), projections)
    guide, posterior = None, folder / "posterior.safetensors"
    saved = _finite_tensors(posterior) if posterior.exists() or method.svd else {}
    if isinstance(model, ScalaBLModel):
        guide = method.make_guide(model)
        targets = {f"guide.{name}": value for name, value in guide.state_dict().items()}
        targets |= {f"prior.{name}": value for name, value in model.prior.state_dict().items()}
        _load_into(targets, {n: v for n, v in saved.items() if n != "s"}, posterior)
        saved = {name: value for name, value in saved.items() if name == "s"}
    try:
        predictor = method.restore(
            adapter,
            {name: value.to(adapter.device) for name, value in saved.items()},
            temperature=info.temperature,
            seed=info.seed,
        )
    except ValueError as error:
        raise RunFolderError.damaged(posterior, error) from error
    for name, known in info.sha256.items():
        if file_hash(folder / name) != known:
            raise RunFolderError.damaged(
                folder / name, "it is not the file that was saved with posterior.json"
            )
    return Run(folder, config, classes, predictor, model, guide)


def point_of(predictor: Predicts, guide: AutoSubspace | None) -> Tensor:
    """(M, r), the s of one pass: the guide's median, the mean of the draws, or 1 without either."""
    if guide is not None:
        return guide.median()["s"]
    if isinstance(predictor, Predictor) and predictor.draws is not None:
        return predictor.draws.mean(0)
    return predictor.adapter.identity()


def read_posterior_info(folder: Path) -> PosteriorInfo:
    """What ``posterior.json`` says, with its ``lora.start`` where it is.

    :raises RunFolderError: if it is missing, damaged, or of another format version.
    """
    path = folder / "posterior.json"
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise RunFolderError(
            f"{path} has format {values.get('format')}, but this version reads format {FORMAT}; use"
            " the version of scalabl_pyro named in its environment.json"
        )
    try:
        info = build(PosteriorInfo, values)
    except ConfigError as error:
        raise RunFolderError.damaged(path, error) from error
    start = place(info.settings.get("lora.start"), read_places(folder))
    return replace(info, settings=info.settings | {"lora.start": start})


def _check_settings(config: RunConfig, info: PosteriorInfo, folder: Path) -> None:
    """Refuse settings under which the trained numbers would be another function."""
    mine, trained = config.function_settings(), config.completed(info.settings)
    changed = [
        f"{key} is {mine.get(key)!r}, but was {trained.get(key)!r} in training"
        for key in sorted(mine.keys() | trained.keys())
        if mine.get(key) != trained.get(key)
    ]
    if changed:
        raise RunFolderError(
            f"{folder / 'config.yaml'} contradicts posterior.json: {'; '.join(changed)}; set it"
            " back, or train another run with it"
        )


@torch.no_grad()
def _load_into(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    shapes = {name: tuple(value.shape) for name, value in targets.items()}
    saved_shapes = {name: tuple(value.shape) for name, value in saved.items()}
    if shapes != saved_shapes:
        wrong = sorted(n for n in shapes | saved_shapes if shapes.get(n) != saved_shapes.get(n))
        raise RunFolderError.damaged(
            path, f"these tensors are missing, unknown or of another shape: {wrong}"
        )
    for name, target in targets.items():
        target.copy_(saved[name])


def _finite_tensors(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    bad = sorted(name for name, value in tensors.items() if not value.isfinite().all())
    if bad:
        raise RunFolderError(
            f"{path} holds NaN or infinity in {bad}: expected finite numbers; train again with a"
            " lower lr"
        )
    return tensors


def _tensors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in values.items()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value, indent=2) + "\n")


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    columns = list(dict.fromkeys(name for row in history for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "command": sys.argv,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
