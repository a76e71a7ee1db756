"""Bayesian low-rank adaptation of language models as a probabilistic program on Pyro.

Names are imported on first use (PEP 562), so that ``import scalabl_pyro`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _bitsandbytes  # noqa: F401  before anything imports peft

if TYPE_CHECKING:
    from . import (
        data,
        diagnostics,
        guides,
        infer,
        lora,
        methods,
        models,
        prediction,
        readouts,
        runs,
    )
    from .data import Record, Split
    from .diagnostics import loo, pareto_k, to_inference_data
    from .guides import (
        AutoSubspaceDelta,
        AutoSubspaceLowRankMultivariateNormal,
        AutoSubspaceMultivariateNormal,
        AutoSubspaceNormal,
        AutoSubspaceRelaxedBernoulli,
        AutoSubspaceTopNormal,
        make_guide,
    )
    from .infer import FitConfig, KLSchedule, fit, kl_weight, laplace, mcmc
    from .lora import SubspaceAdapter, from_pretrained, save_adapter
    from .models import LoRAModel, ScalaBLModel, make_prior, priors
    from .prediction import (
        Predictions,
        Predictor,
        distill,
        draw,
        entropy,
        evaluate,
        generate,
        load_predictor,
        mutual_information,
        noise_to_signal,
        novelty,
        predict,
        predict_proba,
        save_predictor,
        select,
    )
    from .pyro_svi import from_pyro_svi
    from .runs import load_run

__all__ = [
    "AutoSubspaceDelta",
    "AutoSubspaceLowRankMultivariateNormal",
    "AutoSubspaceMultivariateNormal",
    "AutoSubspaceNormal",
    "AutoSubspaceRelaxedBernoulli",
    "AutoSubspaceTopNormal",
    "FitConfig",
    "KLSchedule",
    "LoRAModel",
    "Predictions",
    "Predictor",
    "Record",
    "ScalaBLModel",
    "Split",
    "SubspaceAdapter",
    "data",
    "diagnostics",
    "distill",
    "draw",
    "entropy",
    "evaluate",
    "fit",
    "from_pretrained",
    "from_pyro_svi",
    "generate",
    "guides",
    "infer",
    "kl_weight",
    "laplace",
    "load_predictor",
    "load_run",
    "loo",
    "lora",
    "make_guide",
    "make_prior",
    "mcmc",
    "methods",
    "models",
    "mutual_information",
    "noise_to_signal",
    "novelty",
    "pareto_k",
    "predict",
    "predict_proba",
    "prediction",
    "priors",
    "readouts",
    "runs",
    "save_adapter",
    "save_predictor",
    "select",
    "to_inference_data",
]

_HOMES = {
    "data": ["Record", "Split"],
    "diagnostics": ["loo", "pareto_k", "to_inference_data"],
    "guides": [
        "AutoSubspaceDelta",
        "AutoSubspaceLowRankMultivariateNormal",
        "AutoSubspaceMultivariateNormal",
        "AutoSubspaceNormal",
        "AutoSubspaceRelaxedBernoulli",
        "AutoSubspaceTopNormal",
        "make_guide",
    ],
    "infer": ["FitConfig", "KLSchedule", "fit", "kl_weight", "laplace", "mcmc"],
    "lora": ["SubspaceAdapter", "from_pretrained", "save_adapter"],
    "methods": [],
    "models": ["LoRAModel", "ScalaBLModel", "make_prior", "priors"],
    "prediction": [
        "Predictions",
        "Predictor",
        "distill",
        "draw",
        "entropy",
        "evaluate",
        "generate",
        "load_predictor",
        "mutual_information",
        "noise_to_signal",
        "novelty",
        "predict",
        "predict_proba",
        "save_predictor",
        "select",
    ],
    "pyro_svi": ["from_pyro_svi"],
    "readouts": [],
    "runs": ["load_run"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return import_module(f".{name}", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
