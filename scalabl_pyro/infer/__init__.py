"""Inference: SVI with any ELBO, MCMC and Laplace approximations."""

from .callbacks import Callback, ProgressBar, TensorBoard
from .chains import Chains, mcmc
from .checkpoints import CheckpointConfig, Checkpoints, Interrupted
from .elbos import ELBOS, make_elbo
from .fit_config import FitConfig
from .kl import KLBudget, KLSchedule, kl_weight
from .laplace_approximation import Laplace, laplace
from .parameters import parameter_groups
from .svi import fit
from .training import FitResult, NonFiniteLossError, no_guide

__all__ = [
    "ELBOS",
    "Callback",
    "Chains",
    "CheckpointConfig",
    "Checkpoints",
    "FitConfig",
    "FitResult",
    "Interrupted",
    "KLBudget",
    "KLSchedule",
    "Laplace",
    "NonFiniteLossError",
    "ProgressBar",
    "TensorBoard",
    "fit",
    "kl_weight",
    "laplace",
    "make_elbo",
    "mcmc",
    "no_guide",
    "parameter_groups",
]
