"""A table of runs as text for a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..runs.card import plain

__all__ = [
    "AURC",
    "AUROC_OF",
    "BASELINE",
    "BEST",
    "COST",
    "DIFFERENCES",
    "HEADER",
    "HIGHER_IS_BETTER",
    "METRICS",
    "TITLES",
    "UNITS",
    "auroc_note",
    "auroc_scores",
    "aurocs",
    "cell",
    "cost_cells",
    "cost_ratio",
    "cost_titles",
    "difference_cell",
    "differences",
    "format_table",
    "left_out",
    "mark",
    "metric_cells",
    "p_value",
    "to_csv",
    "to_markdown",
]

METRICS = ("acc", "ece", "nll", "brier", "aurc")
HIGHER_IS_BETTER = {"acc"}
#: those that a terminal has room for, and how much
NARROW = {"acc": 13, "ece": 25, "nll": 18, "brier": 16}
BASELINE = "mle"

HEADER = """\
mean ± half of its 95 % interval over seeds and questions (Student's t; one seed: over questions)
ECE: beside it in brackets its floor, what calibrated models with the same probabilities would show,
which it is too high by at most; ± is chance alone, and intervals of differences allow for floors
"""
AURC = "AURC: area under the risk–coverage curve, lower is better"
AUROC = (
    "AUROC of scores that are to tell a split from test, 0.5 is chance; –: of several models, or of"
    " a run that keeps none"
)
EQUAL_LENGTH = (
    "tokens is a control; where it has a number, pairs of equal length (± 2 tokens) alone count"
)
#: keys of a table, and what they are of
AUROC_OF = {
    "auroc_of_entropy": "entropy",
    "auroc_of_mahalanobis": "Mahalanobis distance",
    "auroc_of_tokens": "tokens",
}
UNITS = {"acc": (100, 1), "ece": (100, 1), "nll": (1, 3), "brier": (1, 3), "aurc": (1, 3)}
TITLES = {"acc": "ACC %", "ece": "ECE % (floor)", "nll": "NLL", "brier": "Brier", "aurc": "AURC"}
DIFFERENCES = tuple(title.removesuffix(" (floor)") for title in TITLES.values())
COST_TITLES = ("trained", "stored", "training", "prediction", "training GiB", "prediction GiB")
BEST = "★ best mean; ≈ not told apart from it: the 95 % interval of their paired difference holds 0"
COST = (
    "training and prediction: passes through the language model, forward or backward, over those of"
    f" {BASELINE}; s: seconds on the clock instead, for all of training and for 1,000 predictions;"
    " GiB: the most that was taken on each GPU, added"
)


def format_table(table: Mapping[str, Any]) -> str:
    """The table as text, for a terminal."""
    minus = differences(table)
    splits = list(next(iter(table["metrics"].values())))
    names = [*table["metrics"], *(f"{name} − {BASELINE}" for _, name, _ in minus)]
    widths = [2 + max(map(len, each)) for each in (splits, names)]

    def line(split: str, name: str, cells: str) -> str:
        return f"{split:{widths[0]}s}{name:{widths[1]}s}{cells}"

    lines = [*HEADER.splitlines(), *filter(None, [left_out(table)]), line("", "", _columns(TITLES))]
    for split in splits:
        for name in table["metrics"]:
            lines.append(line(split, name, _columns(metric_cells(table, name, split))))
    if scores := auroc_scores(table):
        titles = "".join(f"{AUROC_OF[score]:>24s}" for score in scores)
        lines += [auroc_note(table), line("", "", titles)]
    for split, name, cells in aurocs(table):
        lines.append(line(split, name, "".join(f"{text:>24s}" for text in cells)))
    if minus:
        lines.append("differences, paired by seed and question, and p of none (two-sided)")
    for split, name, by_metric in minus:
        of_row = {m: difference_cell(by_metric[m], m) for m in NARROW}
        lines.append(line(split, f"{name} − {BASELINE}", _columns(of_row)))
        p = {m: p_value(by_metric[m]["p"]) for m in NARROW}
        lines.append(line("", "", _columns(p)))
    return "\n".join(each.rstrip() for each in lines)


def left_out(table: Mapping[str, Any]) -> str:
    """Which rows are left out, and why; empty if none is."""
    lost = table.get("lost", [])
    return f"left out, as their training diverged: {', '.join(lost)}" if lost else ""


def auroc_note(table: Mapping[str, Any]) -> str:
    """What the AUROC of a table is."""
    return f"{AUROC}; {EQUAL_LENGTH}" if table.get("auroc_of_tokens") else AUROC


def auroc_scores(table: Mapping[str, Any]) -> list[str]:
    """Those of :data:`AUROC_OF` that the table has."""
    return [key for key in AUROC_OF if any(table.get(key, {}).values())]


def aurocs(table: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Split, row, and the AUROC of each of :func:`auroc_scores`; a dash where it is not known."""
    for split in (s for s in next(iter(table["metrics"].values())) if s != "test"):
        for name in table["metrics"]:
            by_score = [
                table[key] if key == "auroc_of_tokens" else table[key][name]
                for key in auroc_scores(table)
            ]
            yield (
                split,
                name,
                [cell(each[split], 1, 3) if split in each else "–" for each in by_score],
            )


def differences(
    table: Mapping[str, Any],
) -> list[tuple[str, str, Mapping[str, Mapping[str, float]]]]:
    """Split, row, and by metric the row's paired difference to :data:`BASELINE`."""
    rows = table.get(f"minus_{BASELINE}", {})
    splits = next(iter(table["metrics"].values()))
    return [(split, name, row[split]) for split in splits for name, row in rows.items()]


def to_markdown(table: Mapping[str, Any]) -> str:
    """The table for a document: a section a split, with marks and costs."""
    lines = [*HEADER.splitlines(), BEST, *filter(None, [plain(left_out(table))]), ""]
    for split in next(iter(table["metrics"].values())):
        heads = ["", *TITLES.values(), *cost_titles(table)]
        lines += [f"## {plain(split)}", "", _line(heads), "|---" * len(heads) + "|"]
        for name in table["metrics"]:
            values = metric_cells(table, name, split)
            cells = [values[m] + mark(table, split, m, name) for m in METRICS]
            lines.append(_line([plain(name), *cells, *cost_cells(table, name).values()]))
        lines.append("")
    lines += [f"{AURC}.", *([f"{COST}."] if cost_titles(table) else [])]
    if scores := auroc_scores(table):
        heads = ["", "split", *(AUROC_OF[score] for score in scores)]
        lines += ["", "## Other data", "", f"{auroc_note(table)}.", "", _line(heads)]
        lines.append("|---" * len(heads) + "|")
        lines += [_line([plain(name), plain(s), *cells]) for s, name, cells in aurocs(table)]
    if differences(table):
        heads = ["", "split", *DIFFERENCES]
        lines += ["", f"## Differences to {BASELINE}, paired by seed and question", ""]
        lines += ["In brackets p of none (two-sided).", "", _line(heads)]
        lines.append("|---" * len(heads) + "|")
    for split, name, by_metric in differences(table):
        cells = [
            f"{difference_cell(by_metric[m], m)} ({p_value(by_metric[m]['p']) or '–'})"
            for m in METRICS
        ]
        lines.append(_line([plain(name), plain(split), *cells]))
    return "\n".join(lines) + "\n"


def mark(table: Mapping[str, Any], split: str, metric: str, name: str) -> str:
    """What tells the best row of a split and those that may be as good."""
    best = table["best"][split][metric]
    if name == best["row"]:
        return " ★"
    return " ≈" if name in best["not_told_apart"] else ""


def cost_titles(table: Mapping[str, Any]) -> list[str]:
    """Those of :data:`COST_TITLES` that are known of a row."""
    rows = [_costs_of(table, name) for name in table["cost"]]
    return [title for title in COST_TITLES if any(row[title] != "–" for row in rows)]


def cost_cells(table: Mapping[str, Any], name: str) -> dict[str, str]:
    """By :func:`cost_titles`, numbers trained and stored, and costs over plain LoRA's; a dash where
    they are not known."""
    cells = _costs_of(table, name)
    return {title: cells[title] for title in cost_titles(table)}


def _costs_of(table: Mapping[str, Any], name: str) -> dict[str, str]:
    own, plain_lora = table["cost"][name], table["cost"].get(BASELINE)
    if own is None:
        return dict.fromkeys(COST_TITLES, "–")
    cells = {key: f"{own[key]:,}" for key in ("trained", "stored")}
    for key, each in (("training", 1), ("prediction", 1000)):
        ratio = cost_ratio(own[key], plain_lora and plain_lora[key])
        if ratio is not None:
            cells[key] = f"{ratio:.3g}×"
        else:
            cells[key] = "–" if own[key] is None else f"{each * own[key]['seconds']:.3g} s"
        peak = own[key] and own[key].get("peak")
        cells[f"{key} GiB"] = f"{peak / 2**30:.3g}" if peak else "–"
    return cells


def cost_ratio(own: Mapping[str, Any] | None, plain_lora: Mapping[str, Any] | None) -> float | None:
    """Passes over plain LoRA's, where both are counted."""
    if own is None or plain_lora is None or None in (own["forward"], plain_lora["forward"]):
        return None
    return float(
        (own["forward"] + own["backward"]) / (plain_lora["forward"] + plain_lora["backward"])
    )


def to_csv(table: Mapping[str, Any]) -> str:
    """A line for each row, split and metric."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["method", "split", "metric", "mean", "standard_error", "low", "high"])
    for name, row in table["metrics"].items():
        for split, values in row.items():
            writer.writerows([name, split, m, *value.values()] for m, value in values.items())
    for name, row in table["cost"].items():
        writer.writerows([name, "", key, value, "", "", ""] for key, value in _costs(row))
    return file.getvalue()


def _costs(row: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    for key, value in (row or {}).items():
        if isinstance(value, Mapping):
            yield from ((f"{key}_{name}", each) for name, each in value.items())
        elif value is not None:
            yield key, value


def cell(value: Mapping[str, float], unit: float, digits: int) -> str:
    """A mean ± half of its interval; of a mean that may be too high, ± the upper half."""
    half = value["high"] - value["mean"]
    known = "" if math.isnan(half) else f" ± {unit * half:.{digits}f}"
    return f"{unit * value['mean']:.{digits}f}{known}"


def difference_cell(value: Mapping[str, float], metric: str) -> str:
    """A difference ± half of its interval or, where that is not even, with its ends."""
    unit, digits = UNITS[metric]
    if metric != "ece" or math.isnan(value["low"]):
        return cell(value, unit, digits)
    mean, low, high = (f"{unit * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def p_value(value: float) -> str:
    """Of a difference of 0; nothing where it is not known."""
    if math.isnan(value):
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def metric_cells(table: Mapping[str, Any], name: str, split: str) -> dict[str, str]:
    """A row's metrics on a split; the ECE with its floor."""
    cells = {m: cell(table["metrics"][name][split][m], *UNITS[m]) for m in METRICS}
    return cells | {"ece": f"{cells['ece']} ({100 * table['ece_floor'][name][split]['mean']:.1f})"}


def _columns(cells: Mapping[str, str]) -> str:
    """Texts by metric, below those of other rows."""
    return "".join(f"{cells[metric]:>{width}s}" for metric, width in NARROW.items())


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
