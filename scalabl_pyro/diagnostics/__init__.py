"""Posteriors in arviz, cross-validation, whether a guide fits, and pictures."""

from .inference_data import to_inference_data
from .plots import (
    plot_correlation,
    plot_forest,
    plot_history,
    plot_prior_posterior,
    plot_signal_to_noise,
)
from .psis import loo, pareto_k

__all__ = [
    "loo",
    "pareto_k",
    "plot_correlation",
    "plot_forest",
    "plot_history",
    "plot_prior_posterior",
    "plot_signal_to_noise",
    "to_inference_data",
]
