"""Records, readers, prompts and batches."""

from .batches import Batch, Example, Split
from .completions import Completion, Message
from .hub import Task
from .prompts import GAP, PROMPTS, Prompt
from .readers import iter_records, read_completions, read_folder, read_records
from .records import DataError, Record
from .source import DataSource
from .splits import check_split, disjoint, fingerprint, hold_out, without_overlap
from .tasks import TASKS

__all__ = [
    "GAP",
    "PROMPTS",
    "TASKS",
    "Batch",
    "Completion",
    "DataError",
    "DataSource",
    "Example",
    "Message",
    "Prompt",
    "Record",
    "Split",
    "Task",
    "check_split",
    "disjoint",
    "fingerprint",
    "hold_out",
    "iter_records",
    "read_completions",
    "read_folder",
    "read_records",
    "without_overlap",
]
