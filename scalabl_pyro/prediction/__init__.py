"""Prediction from draws of s, its metrics, distillation and generation."""

from .abstention import AbstentionThreshold, abstains, threshold_at_risk
from .assessment import Assessment, assess
from .calibration import CalibrationFloor, adaptive_ece, calibration_band, ece, ece_floor
from .conformal import (
    CONFORMAL_SCORES,
    conformal_sets,
    conformal_threshold,
    uniform_of,
)
from .continuations import Continuation, score_tokens
from .detection import aupr, auroc, auroc_at_equal_length, fpr_at_tpr
from .distillation import distill, fold_into
from .draws import draw, hold, signal_to_noise
from .generation import Decoding, generate
from .intervals import (
    Interval,
    aurc_per_question,
    auroc_per_question,
    crossed_interval,
    paired_difference,
    per_question,
)
from .linearised import Linearised
from .mahalanobis import mahalanobis, pooled_features
from .metrics import (
    Averaged,
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
from .outliers import conformal_p_values
from .predictor import (
    NonFinitePredictionsError,
    Predictions,
    Predictor,
    Predicts,
    RunPredictor,
    predict,
    predict_proba,
)
from .predictor_file import load_predictor, save_predictor
from .rejection import aurc, prr, risk_at_coverage, risk_coverage_curve
from .selection import SELECTION_SCORES, Pool, Selection, select
from .text_scores import semantic_entropy, sequence_rmi, token_scores
from .texts import ScoredText, evaluate_texts, score, score_split
from .weight_draws import WeightAverage

__all__ = [
    "CONFORMAL_SCORES",
    "SELECTION_SCORES",
    "AbstentionThreshold",
    "Assessment",
    "Averaged",
    "CalibrationFloor",
    "Continuation",
    "Decoding",
    "Interval",
    "Linearised",
    "NonFinitePredictionsError",
    "Pool",
    "Predictions",
    "Predictor",
    "Predicts",
    "RunPredictor",
    "ScoredText",
    "Selection",
    "WeightAverage",
    "abstains",
    "adaptive_ece",
    "assess",
    "aupr",
    "aurc",
    "aurc_per_question",
    "auroc",
    "auroc_at_equal_length",
    "auroc_per_question",
    "average",
    "calibration_band",
    "conformal_p_values",
    "conformal_sets",
    "conformal_threshold",
    "crossed_interval",
    "distill",
    "draw",
    "ece",
    "ece_floor",
    "entropy",
    "evaluate",
    "evaluate_texts",
    "fold_into",
    "fpr_at_tpr",
    "generate",
    "half_width",
    "hold",
    "load_predictor",
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
    "prr",
    "risk_at_coverage",
    "risk_coverage_curve",
    "save_predictor",
    "score",
    "score_split",
    "score_tokens",
    "select",
    "semantic_entropy",
    "sequence_rmi",
    "signal_to_noise",
    "summarise",
    "threshold_at_risk",
    "token_scores",
    "uniform_of",
    "weight_novelty",
]
