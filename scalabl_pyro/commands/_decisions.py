"""What ``scalabl predict`` decides about an answer: to give it, which choices to leave in, and
whether the question is like those that trained the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data import Columns, DataError, Record, asked, fingerprint
from ..prediction.abstention import abstains, threshold_at_risk
from ..prediction.assessment import check_labelled
from ..prediction.conformal import (
    CONFORMAL_SCORES,
    conformal_sets,
    conformal_threshold,
    uniform_of,
)
from ..prediction.metrics import Averaged, summarise
from ..prediction.predictor import Predicts, predict
from ..runs.folder import Run
from ._input import own_records, read_input, warn_of_trained
from ._unfamiliar import UNFAMILIARITY, check_unfamiliar, unfamiliarity

__all__ = ["DecisionConfig", "Decisions", "calibrate"]

log = logging.getLogger(__name__)

_COVERAGE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionConfig:
    """What to decide; nothing if left out.

    :param abstain_below: give no answer whose largest probability is lower.
    :param risk: or take that threshold from labelled records, see
        :func:`~scalabl_pyro.prediction.threshold_at_risk`.
    :param conformal: a score, a key of ``CONFORMAL_SCORES``, to write sets of choices.
    :param coverage: the probability with which a set is to hold the right choice.
    :param unfamiliar: a score, a key of ``UNFAMILIARITY``, to write of each record, and p.
    :param calibration: a file of records that trained nothing, with labels for ``risk`` and
        ``conformal``; the run's validation split if left out.
    :raises ValueError: if a value is out of range, or two of them contradict each other.
    """

    abstain_below: float | None = None
    risk: float | None = None
    conformal: str | None = None
    coverage: float = _COVERAGE
    unfamiliar: str | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        for name in ("abstain_below", "risk"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: expected a number from 0 to 1")
        if self.abstain_below is not None and self.risk is not None:
            raise ValueError(
                f"abstain_below is {self.abstain_below} and risk is {self.risk}: give one, for a"
                " risk chooses the threshold"
            )
        if self.conformal is not None and self.conformal not in CONFORMAL_SCORES:
            raise ValueError(
                f"conformal is {self.conformal!r}: expected one of {sorted(CONFORMAL_SCORES)}"
            )
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage is {self.coverage}: expected a number between 0 and 1")
        if self.conformal is None and self.coverage != _COVERAGE:
            raise ValueError(
                f"coverage is {self.coverage}, which is of conformal sets alone: give conformal, or"
                " leave it out"
            )
        check_unfamiliar(self.unfamiliar)
        if self.calibration is not None and not self.calibrated:
            raise ValueError(
                f"calibration is {self.calibration!r}, which nothing needs: give risk, conformal or"
                " unfamiliar"
            )

    @property
    def calibrated(self) -> bool:
        """Whether records that trained nothing are needed."""
        return (self.risk, self.conformal, self.unfamiliar) != (None, None, None)


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions whose thresholds are known.

    :param abstain_below: a threshold on the largest probability, or ``None``.
    :param conformal: a score, or ``None``; ``threshold`` its own.
    :param seed: of the numbers u of randomised scores.
    :param unfamiliar: a score, or ``None``; ``unfamiliarity`` what the line of each record gains of
        it, by the record's id; ``calibration_records`` a hash of those that p compares with.
    :param calibration: what was found on the labelled records, to be reported.
    """

    abstain_below: float | None = None
    conformal: str | None = None
    threshold: float | None = None
    seed: int = 0
    unfamiliar: str | None = None
    unfamiliarity: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration_records: str | None = None
    calibration: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What the lines of a file depend on, as JSON values; nothing where nothing is decided."""
        settings = {
            "abstain_below": self.abstain_below,
            "conformal": self.conformal,
            "conformal_threshold": self.threshold,
            "unfamiliar": self.unfamiliar,
            "calibration_records": self.calibration_records,
        }
        return {name: value for name, value in settings.items() if value is not None}

    def of(self, records: Sequence[Record], answers: Averaged) -> list[dict[str, Any]]:
        """What the line of each answer gains: how unfamiliar it is, ``abstained``, and the ``set``
        of its choices."""
        rows = [dict(self.unfamiliarity.get(record.id, {})) for record in records]
        if self.abstain_below is not None:
            abstained = abstains(answers.probabilities, self.abstain_below)
            for row, value in zip(rows, abstained.tolist(), strict=True):
                row["abstained"] = value
        if self.conformal is not None and self.threshold is not None:
            uniform = uniform_of([record.id for record in records], seed=self.seed)
            scores = CONFORMAL_SCORES[self.conformal](answers.log_probabilities, uniform)
            for row, inside in zip(rows, conformal_sets(scores, self.threshold), strict=True):
                row["set"] = inside.nonzero()[:, 0].tolist()
        return rows


def calibrate(
    config: DecisionConfig,
    run: Run,
    predictor: Predicts,
    columns: Columns,
    *,
    answered: Sequence[Record],
    seed: int,
    batch_size: int,
    tolerance: float | None,
) -> Decisions:
    """The thresholds, from labelled records where they need some, and how unfamiliar records are.

    :param columns: which columns of the file ``config.calibration`` make a record.
    :param answered: what is to be decided about; a warning tells of those that set the threshold.
    :param tolerance: of the draws, as for the answers.
    :raises ConfigError: if the run has no such score as ``config.unfamiliar``.
    :raises ValueError: if no threshold does what is asked, see
        :func:`~scalabl_pyro.prediction.threshold_at_risk` and
        :func:`~scalabl_pyro.prediction.conformal_threshold`; or a record is bad or has no label.
    """
    if not config.calibrated:
        return Decisions(config.abstain_below)
    # Before any record is read, for a run that may have no such score.
    unlike = UNFAMILIARITY[config.unfamiliar](run) if config.unfamiliar is not None else None
    records = _calibration(config, run, columns)
    of = {"risk": config.risk, "coverage": config.conformal, "p": config.unfamiliar}
    told = ", ".join(name for name, value in of.items() if value is not None)
    warn_of_trained(run, records, f"what they say of {told} holds for no others")
    _warn_of_calibrated(answered, records, told)
    decided: dict[str, Any] = {"abstain_below": config.abstain_below, "seed": seed}
    if config.unfamiliar is not None and unlike is not None:
        rows = unfamiliarity(config.unfamiliar, unlike, run, answered, records, batch_size)
        decided |= {
            "unfamiliar": config.unfamiliar,
            "unfamiliarity": dict(zip((record.id for record in answered), rows, strict=True)),
            "calibration_records": fingerprint({"calibration": records}),
        }
    report: dict[str, Any] = {"records": len(records)}
    if config.risk is None and config.conformal is None:
        return Decisions(**decided, calibration=report)
    predictions = predict(
        predictor, run.encode(records), batch_size=batch_size, tolerance=tolerance
    )
    assert predictions.labels is not None
    answers = summarise(predictions.logits)
    if config.risk is not None:
        chosen = threshold_at_risk(answers.probabilities, predictions.labels, config.risk)
        decided["abstain_below"] = chosen.abstain_below
        if chosen.risk_up_to > 2 * config.risk:
            log.warning(
                "risk is %g, and %.0f labelled records were answered to find its threshold: an"
                " error rate of up to %.2g is as well possible (95 %%); give more records by"
                " calibration=FILE",
                config.risk,
                chosen.coverage * len(records),
                chosen.risk_up_to,
            )
        report |= chosen._asdict()
    if config.conformal is not None:
        # Not the u of an answered record that happens to have the same id.
        names = [f"calibration {record.id}" for record in records]
        uniform = uniform_of(names, seed=seed)
        scores = CONFORMAL_SCORES[config.conformal](answers.log_probabilities, uniform)
        threshold = conformal_threshold(scores, predictions.labels, config.coverage)
        decided |= {"conformal": config.conformal, "threshold": threshold}
        report["conformal_threshold"] = threshold
    return Decisions(**decided, calibration=report)


def _warn_of_calibrated(
    answered: Sequence[Record], calibration: Sequence[Record], told: str
) -> None:
    """Tell of records to be answered that are calibration records too.

    :param told: what is said by these.
    """
    known = set(asked(calibration))
    count = sum(key in known for key in asked(answered))
    if count:
        log.warning(
            "%d of %d records are calibration records too: what is said of %s holds for others"
            " alone",
            count,
            len(answered),
            told,
        )


def _calibration(config: DecisionConfig, run: Run, columns: Columns) -> list[Record]:
    if config.calibration is None:
        try:
            return own_records(run, "validation")
        except DataError as error:
            raise DataError(
                f"{error}; or give calibration=FILE, records that trained nothing"
            ) from error
    records = read_input(config.calibration, run, columns)
    if config.risk is not None or config.conformal is not None:
        check_labelled(records, config.calibration)
    return records
