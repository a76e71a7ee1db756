"""The records of a run: where they are from, and what is made of their splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from ..data import DataError, DataSource, Record, check_split, disjoint, hold_out
from .settings import ConfigError

__all__ = ["DataConfig"]


@dataclass(frozen=True, slots=True)
class DataConfig(DataSource):
    """The records of a run: a source, and what is made of its splits.

    :param validation_fraction: share of the training records held out where there is no validation
        split.
    :raises ValueError: if a value is out of range.
    """

    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        DataSource.__post_init__(self)
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"data.validation_fraction is {self.validation_fraction}: expected a number between"
                " 0 and 1"
            )

    def splits(self, *, seed: int) -> dict[str, list[Record]]:
        """The labelled records by split, of which no question stands in two (see ``disjoint``).

        :param seed: fixes which records are held out for validation where there is no such split.
        :raises DataError: if a file is missing or bad.
        """
        return self.decided_splits(seed=seed)[0]

    def decided_splits(
        self, *, seed: int, default: Sequence[str] = ()
    ) -> tuple[dict[str, list[Record]], Self]:
        """The same, and these settings with what the data decided (see ``read_decided``): a file of
        later, which may not decide it, is then read as those that trained the run.

        :param default: as for ``read_decided``.
        """
        decided = self.read_decided(default=default)
        splits = decided.splits
        train = check_split(splits, "train")
        if "validation" not in splits:
            splits["train"], splits["validation"] = hold_out(
                train, self.validation_fraction, seed=seed
            )
        splits = self.limited(disjoint(splits))
        for name, records in splits.items():
            self.check_known(records, name)
            for record in records:
                if record.label is None:
                    raise DataError(
                        f"the record {record.id!r} of the split {name} has no label; where a column"
                        " of another name has it, give data.columns.label, and leave out a split"
                        " of hidden labels by data.split_names"
                    )
        return splits, replace(
            self,
            columns=replace(self.columns, labels=decided.labels or self.columns.labels),
            classes=self.classes or decided.classes,
        )
