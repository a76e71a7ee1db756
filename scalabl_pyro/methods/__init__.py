"""Methods behind one interface, by the name that the command line uses."""

from .base import Fitted, Method, PointMethod
from .ensemble import Ensemble
from .map import MAP
from .mc_dropout import MCDropout
from .mle import MLE
from .reference import Reference
from .scalabl import ScalaBL
from .temperature import TemperatureScaling

__all__ = [
    "MAP",
    "METHODS",
    "MLE",
    "Ensemble",
    "Fitted",
    "MCDropout",
    "Method",
    "PointMethod",
    "Reference",
    "ScalaBL",
    "TemperatureScaling",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (MLE, MAP, TemperatureScaling, MCDropout, Ensemble, ScalaBL, Reference)
}
