"""A report on runs that were trained apart: by a sweep, or on several machines."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..data import DataSource
from ..files import check_writable
from ..readouts import READOUTS
from ..runs.config import RunConfig
from ..runs.places import resolved
from ..runs.reading import read_json, read_settings_placed
from ..runs.settings import ConfigError
from ._formats import format_table
from ._report import write_report, written
from ._runs import ReportedRun

__all__ = ["ReportConfig", "report_runs", "tabulate"]


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """Settings of ``scalabl report``, described in configs/report.yaml.

    :param runs: a folder of run folders, or several, of which each may be a run folder itself; a
        row is made of runs whose names differ only in ``-seed…`` at the end.
    :param out: the folder for the page and the table; of one folder ``report`` in it if left out.
    :raises ConfigError: if ``out`` is left out of several.
    """

    runs: str | tuple[str, ...]
    out: str = ""

    def __post_init__(self) -> None:
        if not self.out:
            if not isinstance(self.runs, str):
                raise ConfigError(f"runs is {list(self.runs)}: give out, the folder to write")
            object.__setattr__(self, "out", str(Path(self.runs) / "report"))

    @property
    def folders(self) -> list[Path]:
        """Those that may hold runs, or be one."""
        return [Path(self.runs)] if isinstance(self.runs, str) else [Path(run) for run in self.runs]


def report_runs(config: ReportConfig) -> str:
    """``scalabl report``: the table as text."""
    return f"{format_table(tabulate(config))}\n\n{written(Path(config.out))}"


def tabulate(config: ReportConfig) -> dict[str, Any]:
    """Write the page and the table of all runs in these folders to ``config.out``.

    :returns: the table, as in ``table.json``.
    :raises ConfigError: if there is no run, an unfinished one, one without a test split, or two of
        the same row and seed; if runs of a row differ in more than the seed (and what each chose
        among its trials), or rows in their data or seeds.
    """
    check_writable(Path(config.out) / "table.json")
    rows: dict[str, dict[int, Path]] = defaultdict(dict)
    runs: dict[Path, RunConfig] = {}
    found = (path for folder in config.folders for path in _finished(folder))
    for path in sorted(found, key=lambda path: path.name):
        run = read_settings_placed(path)
        if READOUTS[run.model.readout].reads_texts:
            raise ConfigError(f"{path} reads texts, and the table is of answers among choices")
        runs[path] = run
        row = rows[path.name.removesuffix(f"-seed{run.seed}")]
        if run.seed in row:
            raise ConfigError(
                f"{path} and {row[run.seed]} would be the same row and seed: rename one of them"
            )
        if "test" not in read_json(path / "metrics.json"):
            raise ConfigError(f"{path} has no test split, which the table is about")
        row[run.seed] = path
    seeds = {name: sorted(row) for name, row in rows.items()}
    if len({tuple(row) for row in seeds.values()}) > 1:
        raise ConfigError(
            f"the rows have different seeds, {seeds}: train what is missing, or list the runs that"
            " the table is of, as runs=[a,b]"
        )
    folders = {name: [row[seed] for seed in seeds[name]] for name, row in rows.items()}
    for first, *others in folders.values():
        for path in others:
            _check_same_settings(first, path, runs)
    firsts = {name: runs[row[0]] for name, row in folders.items()}
    sources = {name: _source(run) for name, run in firsts.items()}
    if any(source != next(iter(sources.values())) for source in sources.values()):
        one = next(iter(sources.values()))
        differing = sorted({key for s in sources.values() for key in s if s[key] != one[key]})
        shown = {name: {key: s[key] for key in differing} for name, s in sources.items()}
        raise ConfigError(f"the rows have different data, {shown}: make a table of each")
    chosen = {name: {"method": r.method, "fit": asdict(r.fit)} for name, r in firsts.items()}
    trials = {
        name: [{"seed": runs[path].seed, **trial} for path in row for trial in _trials(path)]
        for name, row in folders.items()
    }
    trials = {name: row for name, row in trials.items() if row}
    reported = {name: [ReportedRun.read(folder) for folder in row] for name, row in folders.items()}
    return write_report(Path(config.out), reported, chosen=chosen, trials=trials)


def _finished(folder: Path) -> list[Path]:
    """The runs in a folder, or the run that it is.

    :raises ConfigError: if there is none, or an unfinished one.
    """
    if (folder / "metrics.json").exists():
        return [folder]
    unfinished = sorted(path.name for path in folder.glob("*.unfinished"))
    if unfinished:
        raise ConfigError(
            f"{folder} holds unfinished runs, {unfinished}: go on with resume=true, or remove them"
        )
    finished = sorted(metrics.parent for metrics in folder.glob("*/metrics.json"))
    if not finished:
        below = sorted({path.parents[1] for path in folder.glob("*/*/metrics.json")})
        hint = f", as {below[0]} does" if below else ""
        raise ConfigError(f"runs is {folder}: expected a folder that holds run folders{hint}")
    return finished


def _trials(folder: Path) -> list[dict[str, Any]]:
    path = folder / "trials.json"
    return read_json(path, list) if path.exists() else []


def _check_same_settings(a: Path, b: Path, runs: dict[Path, RunConfig]) -> None:
    other = replace(runs[b], seed=runs[a].seed)
    if (b / "trials.json").exists():
        other = replace(other, method=runs[a].method, fit=runs[a].fit)
    differences = other.differences(runs[a])
    if differences:
        raise ConfigError(
            f"{b} has other settings than {a} ({'; '.join(differences)}): rename one of them, for"
            " a row of its own"
        )


def _source(run: RunConfig) -> dict[str, Any]:
    # How labels are read and the classes, given or decided by the data, are seen in the records.
    data = replace(run.data, classes=(), columns=replace(run.data.columns, labels="auto"))
    names = [field.name for field in fields(DataSource)]
    return resolved({f"data.{name}": getattr(data, name) for name in names})
