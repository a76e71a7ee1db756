"""Prediction from draws of s, its metrics, distillation and generation."""

from .assessment import Assessment, assess
from .calibration import CalibrationFloor, ece, ece_floor
from .distillation import distill, fold_into
from .draws import draw, hold, signal_to_noise
from .generation import Decoding, generate
from .intervals import Interval, crossed_interval, paired_difference, per_question
from .linearised import Linearised
from .metrics import (
    Averaged,
    auroc,
    average,
    entropy,
    evaluate,
    half_width,
    mutual_information,
    summarise,
)
from .predictor import (
    NonFinitePredictionsError,
    Predictions,
    Predictor,
    Predicts,
    RunPredictor,
    predict,
    predict_proba,
)
from .texts import ScoredText, evaluate_texts, score, score_split
from .weight_draws import WeightAverage

__all__ = [
    "Assessment",
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
    "assess",
    "auroc",
    "average",
    "crossed_interval",
    "distill",
    "draw",
    "ece",
    "ece_floor",
    "entropy",
    "evaluate",
    "evaluate_texts",
    "fold_into",
    "generate",
    "half_width",
    "hold",
    "mutual_information",
    "paired_difference",
    "per_question",
    "predict",
    "predict_proba",
    "score",
    "score_split",
    "signal_to_noise",
    "summarise",
]
