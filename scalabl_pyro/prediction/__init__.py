"""Prediction from draws of s, its metrics, distillation and generation."""

from .calibration import CalibrationFloor, ece, ece_floor
from .distillation import distill, fold_into
from .draws import draw, hold, signal_to_noise
from .generation import Decoding, ScoredText, generate, score
from .intervals import Interval, crossed_interval, paired_difference, per_question
from .linearised import Linearised
from .mahalanobis import mahalanobis, pooled_features
from .metrics import (
    Averaged,
    auroc,
    auroc_at_equal_length,
    average,
    entropy,
    evaluate,
    half_width,
    max_probability,
    mutual_information,
    noise_to_signal,
    summarise,
)
from .novelty import novelty, weight_novelty
from .predictor import (
    NonFinitePredictionsError,
    Predictions,
    Predictor,
    Predicts,
    RunPredictor,
    predict,
    predict_proba,
)
from .weight_draws import WeightAverage

__all__ = [
    "Averaged",
    "CalibrationFloor",
    "Decoding",
    "Interval",
    "Linearised",
    "NonFinitePredictionsError",
    "Predictions",
    "Predictor",
    "Predicts",
    "RunPredictor",
    "ScoredText",
    "WeightAverage",
    "auroc",
    "auroc_at_equal_length",
    "average",
    "crossed_interval",
    "distill",
    "draw",
    "ece",
    "ece_floor",
    "entropy",
    "evaluate",
    "fold_into",
    "generate",
    "half_width",
    "hold",
    "mahalanobis",
    "max_probability",
    "mutual_information",
    "noise_to_signal",
    "novelty",
    "paired_difference",
    "per_question",
    "pooled_features",
    "predict",
    "predict_proba",
    "score",
    "signal_to_noise",
    "summarise",
    "weight_novelty",
]
