"""Bayesian low-rank adaptation of language models as a probabilistic program on Pyro."""

import logging

import pyro

# It warns at import of optional kernels that this machine lacks.
logging.getLogger("bitsandbytes").setLevel("ERROR")
# Before any PyroModule is built: parameters belong to their modules, not to a global store.
pyro.settings.set(module_local_params=True)

from .adapter import SubspaceAdapter  # noqa: E402
from .completion import Completion, CompletionModel, CompletionTokens, read_completions  # noqa: E402
from .data import Batch, DataError, Record, Split  # noqa: E402
from .diagnostics import loo, pareto_k, to_inference_data  # noqa: E402
from .distill import distill, fold_into  # noqa: E402
from .draws import draw, hold, signal_to_noise  # noqa: E402
from .elbos import make_elbo  # noqa: E402
from .generate import Decoding, ScoredText, generate, score  # noqa: E402
from .guides import (  # noqa: E402
    AutoSubspaceDelta,
    AutoSubspaceLowRankMultivariateNormal,
    AutoSubspaceMultivariateNormal,
    AutoSubspaceNormal,
    make_guide,
)
from .kl import KLBudget, KLSchedule, kl_weight  # noqa: E402
from .laplace import Laplace, laplace  # noqa: E402
from .linearised import Linearised  # noqa: E402
from .mcmc import Chains, mcmc  # noqa: E402
from .memory import MemoryConfig, estimate  # noqa: E402
from .metrics import entropy, evaluate, mutual_information  # noqa: E402
from .model import LoRAModel, Projections, ScalaBLModel  # noqa: E402
from .peft_io import export, merge, push_to_hub  # noqa: E402
from .predict import Predictions, Predictor, average, predict, predict_proba  # noqa: E402
from .priors import make_prior  # noqa: E402
from .readout import LabelTokens, MultipleChoice, SequenceClassification  # noqa: E402
from .run_folder import load_run  # noqa: E402
from .svi import FitConfig, FitResult, NonFiniteLossError, fit  # noqa: E402

__all__ = [
    "AutoSubspaceDelta",
    "AutoSubspaceLowRankMultivariateNormal",
    "AutoSubspaceMultivariateNormal",
    "AutoSubspaceNormal",
    "Batch",
    "Chains",
    "Completion",
    "CompletionModel",
    "CompletionTokens",
    "DataError",
    "Decoding",
    "FitConfig",
    "FitResult",
    "KLBudget",
    "KLSchedule",
    "LabelTokens",
    "Laplace",
    "Linearised",
    "LoRAModel",
    "MemoryConfig",
    "MultipleChoice",
    "NonFiniteLossError",
    "Predictions",
    "Predictor",
    "Projections",
    "Record",
    "ScalaBLModel",
    "ScoredText",
    "SequenceClassification",
    "Split",
    "SubspaceAdapter",
    "average",
    "distill",
    "draw",
    "entropy",
    "estimate",
    "evaluate",
    "export",
    "fit",
    "fold_into",
    "generate",
    "hold",
    "kl_weight",
    "laplace",
    "load_run",
    "loo",
    "make_elbo",
    "make_guide",
    "make_prior",
    "mcmc",
    "merge",
    "mutual_information",
    "pareto_k",
    "predict",
    "predict_proba",
    "push_to_hub",
    "read_completions",
    "score",
    "signal_to_noise",
    "to_inference_data",
]
