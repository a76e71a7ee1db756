"""Prediction from draws of s, its metrics, distillation and generation."""

from .distillation import distill, fold_into
from .draws import draw, hold, signal_to_noise
from .generation import Decoding, ScoredText, generate, score
from .linearised import Linearised
from .metrics import auroc, average, ece, entropy, evaluate, half_width, mutual_information
from .predictor import Predictions, Predictor, Predicts, RunPredictor, predict, predict_proba
from .weight_draws import WeightAverage

__all__ = [
    "Decoding",
    "Linearised",
    "Predictions",
    "Predictor",
    "Predicts",
    "RunPredictor",
    "ScoredText",
    "WeightAverage",
    "auroc",
    "average",
    "distill",
    "draw",
    "ece",
    "entropy",
    "evaluate",
    "fold_into",
    "generate",
    "half_width",
    "hold",
    "mutual_information",
    "predict",
    "predict_proba",
    "score",
    "signal_to_noise",
]
