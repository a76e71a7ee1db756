"""Model cards: what a run folder or an export says of itself, in Markdown with a YAML head."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf
from torch import Tensor

from .. import __version__
from ..embedded import model_folder
from ..lora.gguf import find_gguf
from ..prediction.intervals import Interval, crossed_interval, per_question, per_text
from ..readouts import READOUTS
from .config import RunConfig

__all__ = ["Figure", "about", "head", "plain", "results", "run_card", "settings", "with_intervals"]

#: a metric of one run: with an interval over its questions, a number, or none where it is not one
Figure = Interval | float | None


def with_intervals(
    metrics: Mapping[str, Mapping[str, float | None]], tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Figure]]:
    """The metrics by split, of which those that are means over questions get their interval.

    :param tensors: by split, see :class:`~scalabl_pyro.prediction.Assessment`.
    """
    figures: dict[str, dict[str, Figure]] = {}
    for split, values in metrics.items():
        known = tensors[split]
        each = (
            per_question(known["logits"], known["labels"])
            if "logits" in known
            else per_text(known["log_probs"], known["lengths"])
        )
        too_high = {"ece": values.get("ece_floor") or 0.0}
        intervals = {
            name: crossed_interval(value[None], bias=(too_high.get(name, 0.0), 0.0))
            for name, value in each.items()
        }
        figures[split] = {name: intervals.get(name, value) for name, value in values.items()}
    return figures


def run_card(
    config: RunConfig,
    sizes: Mapping[str, int],
    figures: Mapping[str, Mapping[str, Figure]],
    *,
    rank: int,
    adapter: bool = False,
) -> str:
    """The card of a run folder.

    :param sizes: examples by split.
    :param figures: see :func:`with_intervals`.
    :param rank: r, which an adapter to start from may have brought.
    :param adapter: the card of the folder ``adapter`` in it.
    """
    base, _ = find_gguf(model_folder(config.model.name))
    there = (
        "An ordinary PEFT adapter: `PeftModel.from_pretrained(llm, FOLDER)` puts it on the base"
        " model. Where the method has a posterior it is at the posterior's median, and in one pass"
        " it predicts other probabilities than the average, which the results are of."
    )
    lines = [*head(base), f"# {plain(config.method['name'])} on {plain(config.model.name)}", ""]
    if adapter:
        lines += [there, ""]
    lines += about(config, sizes, rank)
    lines += ["", "## Results", "", *results(figures)]
    if not adapter:
        lines += ["", "## How to load it", "", *_loading(config), "", f"`adapter/`: {there}"]
    lines += ["", "## Settings", "", *settings(config)]
    return "\n".join(lines) + "\n"


def head(base: str, *, on_hub: bool = True) -> list[str]:
    """The YAML that the Hub reads.

    :param on_hub: whether the base model may be one of the Hub's.
    """
    known = on_hub and not Path(base).exists()
    lines = ["---", *([f"base_model: {base}"] if known else []), "library_name: peft"]
    return [*lines, "tags: [lora, bayesian]", "---", ""]


def about(config: RunConfig, sizes: Mapping[str, int], rank: int) -> list[str]:
    """Method, model and data in a sentence each.

    :param sizes: examples by split; none where they are not known.
    :param rank: r of the adapter.
    """
    lines = [
        f"Method `{config.method['name']}` of scalabl_pyro {__version__}, seed"
        f" {config.seed}, LoRA of rank {rank} on {plain(config.model.name)}."
    ]
    if sizes:
        counts = ", ".join(f"{count} of {plain(name)}" for name, count in sizes.items())
        lines += ["", f"Examples: {counts}."]
    return lines


def settings(config: RunConfig) -> list[str]:
    """Those of model, data and method, as ``config.yaml`` has them."""
    values = asdict(config)
    shown = {name: values[name] for name in ("method", "data", "model", "lora", "fit")}
    # A fence longer than any that a prompt may hold.
    text = OmegaConf.to_yaml(OmegaConf.create(shown)).rstrip()
    fence = "`" * max(3, 1 + max(map(len, _runs_of_backticks(text)), default=0))
    return [f"{fence}yaml", text, fence]


def results(figures: Mapping[str, Mapping[str, Figure]]) -> list[str]:
    """A table of metrics by split."""
    names = list(dict.fromkeys(name for values in figures.values() for name in values))
    splits = [plain(split) for split in figures]
    lines = [
        "Of the prediction with all draws. ± is half of the 95 % interval over the questions of"
        " this one run (Student's t), to which another seed adds; an ECE may besides be too high by"
        " up to ece_floor. Entropy and mutual information are in nats.",
        "",
        f"| | {' | '.join(splits)} |",
        "|---" * (len(splits) + 1) + "|",
    ]
    for name in names:
        cells = (_cell(values.get(name)) for values in figures.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def plain(text: str) -> str:
    """A name in Markdown, as it stands."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _cell(value: Figure) -> str:
    """A metric that was not a number is null in ``metrics.json``."""
    if isinstance(value, Interval):
        half = value.high - value.mean
        return f"{value.mean:.4g}" + ("" if math.isnan(half) else f" ± {half:.2g}")
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _loading(config: RunConfig) -> list[str]:
    texts = READOUTS[config.model.readout].reads_texts
    use = (
        "run.predictor  # for scalabl_pyro.prediction.score and generate"
        if texts
        else "run.predict_proba(records)  # (N, C), the average over the draws"
    )
    read = [] if texts else ["from scalabl_pyro.data import read_records"]
    records = [] if texts else ['records = read_records("FILE")  # .jsonl, .csv, .tsv or .parquet']
    return [
        "```python",
        *read,
        "from scalabl_pyro.runs import load_run",
        "",
        'run = load_run("FOLDER")',
        *records,
        use,
        "```",
    ]


def _runs_of_backticks(text: str) -> list[str]:
    return "".join(c if c == "`" else " " for c in text).split()
