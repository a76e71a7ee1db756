"""Methods behind one interface, by the name that the command line uses."""

from .base import Fitted, LoRAMethod, Method
from .blob import BLoB
from .blob_tfb import BLoBTFB
from .checkpoint_ensemble import CheckpointEnsemble
from .dalorra import DALorRA
from .ensemble import Ensemble
from .ivon import IVON
from .laplace_lora import LaplaceLoRA
from .last_layer_laplace import LastLayerLaplace
from .map import MAP
from .mc_dropout import MCDropout
from .mle import MLE
from .reference import Reference
from .scalabl import ScalaBL
from .swag import SWAG
from .temperature import TemperatureScaling
from .tfb import TFB
from .zero_shot import ZeroShot

__all__ = [
    "IVON",
    "MAP",
    "METHODS",
    "MLE",
    "SWAG",
    "TFB",
    "BLoB",
    "BLoBTFB",
    "CheckpointEnsemble",
    "DALorRA",
    "Ensemble",
    "Fitted",
    "LaplaceLoRA",
    "LastLayerLaplace",
    "LoRAMethod",
    "MCDropout",
    "Method",
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
        CheckpointEnsemble,
        SWAG,
        IVON,
        LaplaceLoRA,
        LastLayerLaplace,
        TFB,
        BLoB,
        BLoBTFB,
        ScalaBL,
        DALorRA,
        Reference,
    )
}
