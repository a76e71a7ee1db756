"""Readouts: how a record becomes rows of tokens, and a model's output becomes C logits."""

from .base import Classes, Readout
from .choice_likelihood import ChoiceLikelihood
from .completion_tokens import CompletionTokens
from .config import ReadoutConfig
from .heads import MultipleChoice, SequenceClassification
from .label_tokens import LabelTokens

__all__ = [
    "READOUTS",
    "ChoiceLikelihood",
    "Classes",
    "CompletionTokens",
    "LabelTokens",
    "MultipleChoice",
    "Readout",
    "ReadoutConfig",
    "SequenceClassification",
]

#: readouts by the name that configurations use
READOUTS: dict[str, type[Readout]] = {
    "label_tokens": LabelTokens,
    "sequence_classification": SequenceClassification,
    "multiple_choice": MultipleChoice,
    "choice_likelihood": ChoiceLikelihood,
    "completion_tokens": CompletionTokens,
}
