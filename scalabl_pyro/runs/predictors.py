"""How a run folder predicts: which draws of s, how many, or the posterior's median."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..prediction.draws import KINDS, draw, hold
from ..prediction.linearised import Linearised
from ..prediction.predictor import Predictor, Predicts
from ..prediction.text_scores import check_weights
from .folder import Run

__all__ = ["WAYS", "PredictionConfig", "make_predictor"]


@dataclass(frozen=True, slots=True)
class PredictionConfig:
    """A way to predict with a posterior over s.

    * ``average``: the average of the probabilities over draws of s
    * ``median``: one pass at the posterior's median
    * ``linearised``: the average, with logits that are linear in s

    :param name: one of these.
    :param draws: S; those that the run saved if left out.
    :param kind: of the draws, see :func:`~scalabl_pyro.prediction.draw`.
    :param trunk: share of the lowest blocks, 0 to 1, that stay at the median, and run once for all
        draws.
    :param tolerance: for ``average``, stop drawing for an example when its probabilities are known
        so well (see :func:`~scalabl_pyro.prediction.predict`).
    :param weights: of the draws in texts, a key of ``WEIGHTS``: ``equal``, or ``posterior`` by what
        they gave the text so far.
    :param seed: of new draws; see :meth:`check_seed`.
    :raises ValueError: if a value is not one of those listed, or means nothing.
    """

    name: str = "average"
    draws: int | None = None
    kind: str = "independent"
    trunk: float = 0.0
    tolerance: float | None = None
    weights: str = "equal"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in WAYS:
            raise ValueError(f"prediction.name is {self.name!r}: expected one of {sorted(WAYS)}")
        if self.kind not in KINDS:
            raise ValueError(f"prediction.kind is {self.kind!r}: expected one of {sorted(KINDS)}")
        try:
            check_weights(self.weights)
        except ValueError as error:
            raise ValueError(f"prediction.{error}") from error
        if self.weights != "equal" and self.name == "median":
            raise ValueError(
                f"prediction.weights is {self.weights!r}, of several draws, and prediction.name is"
                " 'median', which has one: leave one of them out"
            )
        if self.draws is not None and self.draws < 1:
            raise ValueError(f"prediction.draws is {self.draws}: expected 1 or more")
        if self.kind != "independent" and self.draws is None:
            raise ValueError(
                f"prediction.kind is {self.kind!r}: give prediction.draws, how many of them"
            )
        if self.name == "median" and (self.draws, self.trunk, self.tolerance) != (None, 0.0, None):
            raise ValueError(
                "prediction.name is 'median', which takes no draws, trunk or tolerance"
            )
        if not 0 <= self.trunk <= 1:
            raise ValueError(f"prediction.trunk is {self.trunk}: expected a share, 0 to 1")
        if self.tolerance is not None and not (self.tolerance > 0 and self.name == "average"):
            raise ValueError(
                f"prediction.tolerance is {self.tolerance} with prediction.name"
                f" {self.name!r}: expected a number above 0, with average"
            )

    def check_seed(self) -> None:
        """Refuse a seed where nothing is drawn anew.

        Not when these settings are made: what a command draws beside s may have this seed too.

        :raises ValueError: if there is a seed, and no number of draws.
        """
        if self.seed and self.draws is None:
            fix = "" if self.name == "median" else "give prediction.draws, how many to make, or "
            raise ValueError(
                f"prediction.seed is {self.seed}, and nothing is drawn anew: {fix}leave it out"
            )


def make_predictor(run: Run, config: PredictionConfig) -> Predicts:
    """What predicts in this way.

    :raises ValueError: if the run has no posterior over s, and the way is another than its own; or
        weights of texts are given for choices.
    """
    if config.weights != "equal" and not run.readout.reads_texts:
        raise ValueError(
            f"prediction.weights is {config.weights!r}, of the tokens of texts, and the run answers"
            " among choices: leave it out"
        )
    if config.weights != "equal" and (config.draws or run.predictor.num_draws) < 2:
        raise ValueError(
            f"prediction.weights is {config.weights!r}, of several draws, and there is one: leave"
            " it out"
        )
    # A seed alone draws nothing, and weights are for those who read texts with the predictor.
    if replace(config, seed=0, weights="equal") == PredictionConfig():
        return run.predictor
    if run.guide is None:
        raise ValueError("the run has no posterior over s: leave prediction as it is")
    only_choices = config.name == "linearised" or config.tolerance is not None
    if only_choices and run.readout.reads_texts:
        raise ValueError(
            f"prediction.name is {config.name!r} and prediction.tolerance {config.tolerance}, of a"
            " run that reads texts: expected average or median, without a tolerance"
        )
    predictor = run.subspace_predictor()
    adapter, draws = predictor.adapter, predictor.draws
    median = adapter.with_perp(run.guide.median()["s"])
    if config.draws is not None:
        draws = draw(run.guide, config.draws, seed=config.seed, kind=config.kind)
    assert draws is not None
    if config.trunk and not adapter.trunk.num_blocks:
        raise ValueError(f"prediction.trunk is {config.trunk}: {adapter.trunk.why_not}")
    depth = round(config.trunk * adapter.trunk.num_blocks)
    if depth:
        draws = hold(draws, median, adapter.trunk.above(depth))
    return WAYS[config.name](predictor, median, draws)


def _average(predictor: Predictor, median: Tensor, draws: Tensor) -> Predicts:
    return replace(predictor, draws=draws)


def _linearised(predictor: Predictor, median: Tensor, draws: Tensor) -> Predicts:
    return Linearised(predictor.adapter, median, draws, predictor.temperature)


def _median(predictor: Predictor, median: Tensor, draws: Tensor) -> Predicts:
    return replace(predictor, draws=median[None])


#: ways to predict by name: functions of the run's predictor, the posterior's median (M, r) and the
#: draws (S, M, r), both with s_perp where there is one, that the other settings ask for
WAYS: dict[str, Callable[[Predictor, Tensor, Tensor], Predicts]] = {
    "average": _average,
    "linearised": _linearised,
    "median": _median,
}
