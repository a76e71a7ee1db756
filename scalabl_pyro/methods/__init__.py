"""Methods behind one interface, by the name that the command line uses."""

from .base import Fitted, Method, PointMethod
from .blob import BLoB
from .ensemble import Ensemble
from .laplace_lora import LaplaceLoRA
from .map import MAP
from .mc_dropout import MCDropout
from .mle import MLE
from .reference import Reference
from .scalabl import ScalaBL
from .temperature import TemperatureScaling
from .tfb import TFB
from .zero_shot import ZeroShot

__all__ = [
    "MAP",
    "METHODS",
    "MLE",
    "TFB",
    "BLoB",
    "Ensemble",
    "Fitted",
    "LaplaceLoRA",
    "MCDropout",
    "Method",
    "PointMethod",
    "Reference",
    "ScalaBL",
    "TemperatureScaling",
    "ZeroShot",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ZeroShot,
        MLE,
        MAP,
        TemperatureScaling,
        MCDropout,
        Ensemble,
        LaplaceLoRA,
        TFB,
        BLoB,
        ScalaBL,
        Reference,
    )
}
