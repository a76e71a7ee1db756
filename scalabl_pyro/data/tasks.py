"""Data sets by name, one entry each: where they are, and which columns make a record."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..embedded import openbookqa
from .columns import Columns
from .hub import Task
from .records import DataError, Record

__all__ = ["TASKS", "EmbeddedTask", "find_task"]


def _world() -> dict[str, list[Record]]:
    # The world is made of records, whose package this is.
    from .world import world

    return world().splits


def _questions() -> dict[str, list[Record]]:
    splits: dict[str, list[Record]] = {}
    for row in openbookqa():
        record = Record(row["id"], row["question"], tuple(row["choices"]), row["label"])
        splits.setdefault(row["split"], []).append(record)
    return splits


@dataclass(frozen=True)
class EmbeddedTask:
    """A data set in this package: the invented world, or 500 questions of OpenBookQA.

    :param splits: makes its splits.
    """

    splits: Callable[[], dict[str, list[Record]]]

    def read(self, hub_path: str | None = None) -> dict[str, list[Record]]:
        """Its splits.

        :raises DataError: if ``hub_path`` is given.
        """
        if hub_path is not None:
            raise DataError("data.hub_path: the data set is in this package and has no copies")
        return self.splits()


def find_task(name: str) -> Task | EmbeddedTask:
    """The entry of ``TASKS``.

    :raises DataError: if there is none; the message suggests the nearest.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        listed = [key for key in TASKS if not key.startswith("mmlu:")] + ["mmlu:<subject>"]
        hint = f"did you mean {near[0]}?" if near else f"expected one of {listed}"
        raise DataError(f"there is no data set {name!r}; {hint}")
    return TASKS[name]


# Some questions have the keys A to D, and some 1 to 4.
_ARC = Columns(choices="choices.text", label="answerKey", keys="choices.label")
_OPENBOOKQA = replace(_ARC, question="question_stem")
_WINOGRANDE = Columns("sentence", ("option1", "option2"), "answer", labels="from_1")
_BOOLQ = Columns("{passage}\n{question}?", label="answer", labels="from_0")
_MMLU = Columns(label="answer", labels="from_0")

_ALL = {"train": "train", "validation": "validation", "test": "test"}
# The labels of the official test split are not public.
_VALIDATION_IS_TEST = {"train": "train", "test": "validation"}
_NO_TRAIN = {"dev": "dev", "validation": "validation", "test": "test"}
_SUBJECTS = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
college_chemistry college_computer_science college_mathematics college_medicine college_physics
computer_security conceptual_physics econometrics electrical_engineering elementary_mathematics
formal_logic global_facts high_school_biology high_school_chemistry high_school_computer_science
high_school_european_history high_school_geography high_school_government_and_politics
high_school_macroeconomics high_school_mathematics high_school_microeconomics high_school_physics
high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning
management marketing medical_genetics miscellaneous moral_disputes moral_scenarios nutrition
philosophy prehistory professional_accounting professional_law professional_medicine
professional_psychology public_relations security_studies sociology us_foreign_policy virology
world_religions
"""

TASKS: dict[str, Task | EmbeddedTask] = {
    "embedded": EmbeddedTask(_world),
    "openbookqa_500": EmbeddedTask(_questions),
    "openbookqa": Task("allenai/openbookqa", "main", _OPENBOOKQA, _ALL),
    "arc_easy": Task("allenai/ai2_arc", "ARC-Easy", _ARC, _ALL),
    "arc_challenge": Task("allenai/ai2_arc", "ARC-Challenge", _ARC, _ALL),
    "winogrande_xs": Task("allenai/winogrande", "winogrande_xs", _WINOGRANDE, _VALIDATION_IS_TEST),
    "winogrande_s": Task("allenai/winogrande", "winogrande_s", _WINOGRANDE, _VALIDATION_IS_TEST),
    "winogrande_m": Task("allenai/winogrande", "winogrande_m", _WINOGRANDE, _VALIDATION_IS_TEST),
    "winogrande_l": Task("allenai/winogrande", "winogrande_l", _WINOGRANDE, _VALIDATION_IS_TEST),
    "boolq": Task("google/boolq", "default", _BOOLQ, _VALIDATION_IS_TEST, ("no", "yes")),
    **{f"mmlu:{name}": Task("cais/mmlu", name, _MMLU, _NO_TRAIN) for name in _SUBJECTS.split()},
}
