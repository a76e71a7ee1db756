"""Probabilistic models: priors over s, and likelihoods around a language model."""

from . import priors
from .model import LoRAModel, Projections, ScalaBLModel
from .priors import make_prior

__all__ = ["LoRAModel", "Projections", "ScalaBLModel", "make_prior", "priors"]
