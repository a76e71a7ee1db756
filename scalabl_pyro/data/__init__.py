"""Records, readers, prompts and batches."""

from .batches import Batch, Example, Split
from .columns import Columns
from .completions import Completion, Message
from .hub import Task
from .prompts import GAP, PROMPTS, Prompt, read_template
from .readers import read_completions, read_folder, read_records, read_rows, read_table
from .records import DataError, Record
from .source import DataSource
from .splits import (
    asked,
    check_split,
    disjoint,
    draw_shots,
    fingerprint,
    fingerprints,
    hold_out,
    subsample,
    without_overlap,
)
from .tables import Table, to_records
from .tasks import TASKS

__all__ = [
    "GAP",
    "PROMPTS",
    "TASKS",
    "Batch",
    "Columns",
    "Completion",
    "DataError",
    "DataSource",
    "Example",
    "Message",
    "Prompt",
    "Record",
    "Split",
    "Table",
    "Task",
    "asked",
    "check_split",
    "disjoint",
    "draw_shots",
    "fingerprint",
    "fingerprints",
    "hold_out",
    "read_completions",
    "read_folder",
    "read_records",
    "read_rows",
    "read_table",
    "read_template",
    "subsample",
    "to_records",
    "without_overlap",
]
