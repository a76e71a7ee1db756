"""A table over runs: means with their intervals, paired differences, what entropy tells apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import json_text, write_whole
from ..prediction.calibration import CalibrationFloor, ece_floor
from ..prediction.intervals import (
    Interval,
    auroc_per_question,
    crossed_interval,
    paired_difference,
    per_question,
    stacked,
)
from ..prediction.metrics import entropy, summarise
from ..prediction.predictor import Predictions
from ..runs.cost import Cost
from ._formats import BASELINE, HIGHER_IS_BETTER, METRICS, format_table, to_csv, to_markdown
from ._page import to_html
from ._plots import plot_comparison
from ._runs import ReportedRun

__all__ = ["write_report", "written"]


def written(out: Path) -> str:
    """What to tell of a report."""
    return f"page: {out / 'report.html'}; table and pictures: {out}"


def write_report(
    out: Path,
    rows: Mapping[str, Sequence[ReportedRun]],
    *,
    chosen: Mapping[str, Any],
    trials: Mapping[str, Any],
    lost: Sequence[str] = (),
) -> dict[str, Any]:
    """Write ``report.html``, its table as ``table.json``, ``.csv``, ``.md`` and ``.txt``, and
    ``comparison.png``.

    :param rows: a row's name → its runs, one a seed, in the same order in each row.
    :param chosen: the settings of each row.
    :param trials: those that were tried: mappings with ``trial``, ``validation_nll`` and, where it
        is not that of the others, ``seed``.
    :param lost: rows that are left out, as their training diverged.
    :returns: by row and split each metric's ``mean``, ``standard_error`` and 95 % interval ``low``
        to ``high``, over seeds and questions, which for ``ece`` allow for its floor; the same and
        ``p`` for differences to ``mle``, paired by seed and question; ``confidence``, the
        probability of the answer; ``ece_floor``, the ECE of calibrated models with the same
        probabilities; and ``auroc_of_entropy`` for telling the examples of a further split from
        ``test``, with ``auroc_of_mahalanobis`` of the rows whose runs keep such distances. Where
        the runs keep how many tokens their questions have, pairs of about equal length alone count
        there, and ``auroc_of_tokens`` has by split what the number of tokens would reach, a
        control.
        ``best`` has for each split and metric the ``row`` with the best mean, and those that are
        ``not_told_apart`` from it: the interval of their paired difference holds 0. ``cost`` is
        the mean over seeds of what runs cost, ``None`` where one of them does not say; ``lost`` are
        the rows that are left out.
    :raises ValueError: if runs answer other questions than the first.
    """
    _check_alike(rows)
    table = _table(rows) | {"chosen": dict(chosen), "trials": dict(trials), "lost": list(lost)}
    page = to_html(table, rows, out)
    write_whole(out / "table.json", json_text(table, indent=1) + "\n")
    write_whole(out / "table.csv", to_csv(table))
    write_whole(out / "table.md", to_markdown(table))
    write_whole(out / "table.txt", format_table(table) + "\n")
    predictions = {name: [run.predictions for run in row] for name, row in rows.items()}
    plot_comparison(predictions, out / "comparison.png")
    write_whole(out / "report.html", page)
    return table


class _Row:
    """What the runs of a row say of each question, by split.

    :param runs: one a seed.
    """

    def __init__(self, runs: Sequence[ReportedRun]) -> None:
        self.runs = runs
        splits = runs[0].predictions
        #: split → metric → (K, N)
        self.values = {
            s: stacked([per_question(*_known(run.predictions[s])) for run in runs]) for s in splits
        }
        self.floors = {s: _floor([run.predictions[s] for run in runs]) for s in splits}

    def too_high(self, metric: str, split: str) -> float:
        """How far an estimate may be above the truth on average."""
        return self.floors[split]["mean"] if metric == "ece" else 0.0

    def mean(self, metric: str, split: str) -> dict[str, float]:
        bias = (self.too_high(metric, split), 0.0)
        return _mean(self.values[split][metric], bias=bias)

    def minus(self, other: _Row, metric: str, split: str) -> Interval:
        """Paired by seed and question."""
        return paired_difference(
            self.values[split][metric],
            other.values[split][metric],
            bias=(self.too_high(metric, split), other.too_high(metric, split)),
        )

    def over_seeds(self, each: Callable[[ReportedRun], Tensor]) -> dict[str, float]:
        """The mean of what each run has of each question."""
        return _mean(torch.stack([each(run) for run in self.runs]))


def _table(runs: Mapping[str, Sequence[ReportedRun]]) -> dict[str, Any]:
    """What :func:`write_report` returns, but for what it is given."""
    rows = {name: _Row(row) for name, row in runs.items()}
    splits = list(next(iter(rows.values())).values)
    tokens = {s: _tokens(runs, s) for s in splits if s != "test"}

    def by_row(figure: Callable[[_Row, str], Any], of: Iterable[str]) -> dict[str, dict[str, Any]]:
        return {name: {s: figure(row, s) for s in of} for name, row in rows.items()}

    def confidence(row: _Row, split: str) -> dict[str, float]:
        return row.over_seeds(lambda run: _confidence(run.predictions[split]))

    def of_entropy(row: _Row, split: str) -> dict[str, float]:
        return row.over_seeds(lambda run: _auroc(_entropies(run, split), tokens[split]))

    def of_distances(row: _Row, split: str) -> dict[str, float]:
        return row.over_seeds(lambda run: _auroc(_distances(run, split), tokens[split]))

    table: dict[str, Any] = {
        "metrics": by_row(lambda row, s: {m: row.mean(m, s) for m in METRICS}, splits),
        "confidence": by_row(confidence, splits),
        "ece_floor": by_row(lambda row, s: row.floors[s], splits),
        "auroc_of_entropy": by_row(of_entropy, tokens),
        "auroc_of_mahalanobis": {
            name: {
                s: of_distances(row, s)
                for s in tokens
                if all({"test", s} <= run.mahalanobis.keys() for run in row.runs)
            }
            for name, row in rows.items()
        },
        "auroc_of_tokens": {
            s: _mean(_auroc(lengths, lengths)[None])
            for s, lengths in tokens.items()
            if lengths is not None
        },
        "best": {s: {m: _best(rows, m, s) for m in METRICS} for s in splits},
        "cost": {name: _cost([run.cost for run in row.runs]) for name, row in rows.items()},
    }
    if BASELINE in rows:
        baseline = rows.pop(BASELINE)
        table[f"minus_{BASELINE}"] = by_row(
            lambda row, s: {m: _entry(row.minus(baseline, m, s), p=True) for m in METRICS}, splits
        )
    return table


def _best(rows: Mapping[str, _Row], metric: str, split: str) -> dict[str, Any]:
    choose = max if metric in HIGHER_IS_BETTER else min
    best = choose(rows, key=lambda name: float(rows[name].values[split][metric].mean()))
    differences = {
        name: row.minus(rows[best], metric, split) for name, row in rows.items() if name != best
    }
    # Of a single number there is no interval, and nothing is told apart.
    close = [n for n, d in differences.items() if not (d.low > 0 or d.high < 0)]
    return {"row": best, "not_told_apart": close}


def _mean(values: Tensor, *, bias: tuple[float, float] = (0.0, 0.0)) -> dict[str, float]:
    return _entry(crossed_interval(values, bias=bias))


def _entry(interval: Interval, *, p: bool = False) -> dict[str, float]:
    names = ("mean", "standard_error", "low", "high", *(("p",) if p else ()))
    return {name: getattr(interval, name) for name in names}


def _confidence(run: Predictions) -> Tensor:
    """(N,), the probability of the answer."""
    return summarise(run.logits).probabilities.amax(-1)


def _floor(runs: Sequence[Predictions]) -> dict[str, float]:
    """Of each seed; their mean."""
    floors = torch.tensor([ece_floor(summarise(run.logits).probabilities) for run in runs])
    return CalibrationFloor(*floors.mean(0).tolist())._asdict()


def _cost(costs: Sequence[Cost | None]) -> dict[str, Any] | None:
    known = [asdict(cost) for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None
    first = known[0]
    return {
        "trained": first["trained"],
        "stored": first["stored"],
        **{key: _mean_passes([cost[key] for cost in known]) for key in ("training", "prediction")},
    }


def _mean_passes(runs: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    known = [run for run in runs if run is not None]
    if len(known) < len(runs):
        return None
    return {
        key: None if None in (each := [run[key] for run in known]) else sum(each) / len(each)
        for key in known[0]
    }


def _known(run: Predictions) -> tuple[Tensor, Tensor]:
    assert run.labels is not None  # a run evaluates all its splits
    return run.logits, run.labels


def _check_alike(rows: Mapping[str, Sequence[ReportedRun]]) -> None:
    """:raises ValueError: if runs answer other questions than the first."""
    of_first = next(iter(rows.values()))
    first = of_first[0]
    for row in rows.values():
        for run, other in zip(row, of_first, strict=True):
            _check_labels(run, first)
            _check_records(run, first, first.predictions)
            _check_records(run, other, run.data)  # of one seed: those held out are the same too


def _check_labels(run: ReportedRun, first: ReportedRun) -> None:
    for split, expected in first.predictions.items():
        predictions = run.predictions.get(split)
        if predictions is None or not torch.equal(_known(predictions)[1], _known(expected)[1]):
            raise ValueError(
                f"{run.name} answers other questions of {split!r} than {first.name}: expected the"
                " same, in the same order; make a table of each"
            )


def _check_records(run: ReportedRun, other: ReportedRun, splits: Iterable[str]) -> None:
    """That two runs had the same records of these splits, as far as is known."""
    for split in sorted({*splits} & run.data.keys() & other.data.keys()):
        if run.data[split] != other.data[split]:
            raise ValueError(
                f"{run.name} had other records of {split!r} than {other.name}: expected the same;"
                " make a table of each"
            )


#: how far the numbers of tokens of a pair may be apart
_APART = 2
#: of the questions of ``test``, and of those of another split
Pair = tuple[Tensor, Tensor]


def _tokens(rows: Mapping[str, Sequence[ReportedRun]], split: str) -> Pair | None:
    """How many tokens each question has, if all runs say the same and some have about as many."""
    runs = [run for row in rows.values() for run in row]
    if not all({"test", split} <= run.tokens.keys() for run in runs):
        return None
    pairs = [(run.tokens["test"], run.tokens[split]) for run in runs]
    same = all(torch.equal(a, b) for pair in pairs for a, b in zip(pair, pairs[0], strict=True))
    known, other = pairs[0]
    near = (known[:, None] - other).abs().min() <= _APART
    return pairs[0] if same and near else None


def _entropies(run: ReportedRun, split: str) -> Pair:
    known, other = run.predictions["test"], run.predictions[split]
    return entropy(known.logits), entropy(other.logits)


def _distances(run: ReportedRun, split: str) -> Pair:
    return run.mahalanobis["test"], run.mahalanobis[split]


def _auroc(scores: Pair, tokens: Pair | None) -> Tensor:
    """What each question of ``test`` and of another split adds to it.

    :param tokens: lengths, of which a pair's are about equal.
    """
    is_other = torch.arange(sum(map(len, scores))) >= len(scores[0])
    lengths = None if tokens is None else torch.cat(tokens)
    return auroc_per_question(torch.cat(scores).double(), is_other, lengths, apart=_APART)
