"""Bayesian low-rank adaptation of language models as a probabilistic program on Pyro."""

import pyro

# Before any PyroModule is built: parameters belong to their modules, not to a global store.
pyro.settings.set(module_local_params=True)

from .adapter import SubspaceAdapter  # noqa: E402
from .checkpoint import load_run, save_run  # noqa: E402
from .data import Batch, DataError, Record, Split  # noqa: E402
from .diagnostics import to_inference_data  # noqa: E402
from .elbos import make_elbo  # noqa: E402
from .guides import (  # noqa: E402
    AutoSubspaceDelta,
    AutoSubspaceLowRankMultivariateNormal,
    AutoSubspaceMultivariateNormal,
    AutoSubspaceNormal,
    make_guide,
)
from .kl import KLBudget, KLSchedule, kl_weight  # noqa: E402
from .metrics import entropy, evaluate, mutual_information  # noqa: E402
from .model import LoRAModel, Projections, ScalaBLModel  # noqa: E402
from .predict import Predictions, Predictor, average, draw, predict  # noqa: E402
from .priors import make_prior  # noqa: E402
from .readout import LabelTokens, MultipleChoice, SequenceClassification  # noqa: E402
from .svi import FitConfig, FitResult, NonFiniteLossError, fit  # noqa: E402

__all__ = [
    "AutoSubspaceDelta",
    "AutoSubspaceLowRankMultivariateNormal",
    "AutoSubspaceMultivariateNormal",
    "AutoSubspaceNormal",
    "Batch",
    "DataError",
    "FitConfig",
    "FitResult",
    "KLBudget",
    "KLSchedule",
    "LabelTokens",
    "LoRAModel",
    "MultipleChoice",
    "NonFiniteLossError",
    "Predictions",
    "Predictor",
    "Projections",
    "Record",
    "ScalaBLModel",
    "SequenceClassification",
    "Split",
    "SubspaceAdapter",
    "average",
    "draw",
    "entropy",
    "evaluate",
    "fit",
    "kl_weight",
    "load_run",
    "make_elbo",
    "make_guide",
    "make_prior",
    "mutual_information",
    "predict",
    "save_run",
    "to_inference_data",
]
