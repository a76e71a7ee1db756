"""Records, readers, prompts and batches."""

from .batches import Batch, Example, Split
from .prompts import PROMPTS, Prompt
from .readers import check_split, hold_out, iter_jsonl, read_folder, read_jsonl, without_overlap
from .records import DataError, Record

__all__ = [
    "PROMPTS",
    "Batch",
    "DataError",
    "Example",
    "Prompt",
    "Record",
    "Split",
    "check_split",
    "hold_out",
    "iter_jsonl",
    "read_folder",
    "read_jsonl",
    "without_overlap",
]
