"""Probabilistic models: priors over s, and likelihoods around a language model."""

from . import priors
from .completion import CompletionModel
from .model import LoRAModel, Projections, ScalaBLModel
from .priors import make_prior

__all__ = ["CompletionModel", "LoRAModel", "Projections", "ScalaBLModel", "make_prior", "priors"]
