"""The command line: ``scalabl train``, ``evaluate``, ``predict``, ``generate`` and others.

The first word picks a command; everything after it but ``--help`` is Hydra's own: overrides such as
``fit.steps=100``, ``--multirun``, ``--cfg job``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..distributed import is_main, start
from ..files import json_text
from ..infer.checkpoints import Interrupted
from ..runs.config import RunConfig, build
from ..runs.memory import MemoryConfig, estimate
from ._configs import CONFIGS
from ._help import explain
from ._quiet import quiet_libraries
from ._report import format_table
from .compare import CompareConfig, compare
from .distill import DistillConfig, distill_run
from .evaluate import EvaluateConfig, evaluate_run
from .export import ExportConfig, export_run
from .generate import GenerateConfig, generate_file
from .predict import PredictConfig, predict_file
from .table import TableConfig, tabulate
from .train import run

__all__ = ["main"]

USAGE = """usage: scalabl COMMAND [key=value ...]

  train      fine-tune a model on labelled records and write a run folder
  evaluate   metrics of a run folder on a labelled split
  predict    answers, probabilities and uncertainty for records with or without labels
  generate   texts that continue prompts, with the uncertainty of every token
  compare    methods × seeds in one table, with pictures; finished runs are skipped
  table      the same table over runs that were trained apart, such as those of a sweep
  distill    a run's model average in one plain PEFT adapter
  export     a run as plain PEFT adapters, one a draw, and as a merged model
  memory     how much memory a run needs, before anything is downloaded

scalabl COMMAND --help explains the settings of a command, with their defaults."""


def train(config: RunConfig) -> dict[str, Any]:
    """Train and evaluate; the result is a run folder."""
    start()
    return {"run": config.run_dir, **run(config)}


def compare_methods(config: CompareConfig) -> str:
    """Methods × seeds in one table."""
    return f"{format_table(compare(config))}\n\ntable and pictures: {config.out}"


def table_of_runs(config: TableConfig) -> str:
    """One table over finished runs."""
    return f"{format_table(tabulate(config))}\n\ntable and pictures: {config.out}"


COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "train": (RunConfig, train),
    "evaluate": (EvaluateConfig, evaluate_run),
    "predict": (PredictConfig, predict_file),
    "generate": (GenerateConfig, generate_file),
    "compare": (CompareConfig, compare_methods),
    "table": (TableConfig, table_of_runs),
    "distill": (DistillConfig, distill_run),
    "export": (ExportConfig, export_run),
    "memory": (MemoryConfig, lambda config: estimate(config).gib()),
}


def main() -> None:
    """Entry point of ``scalabl``."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked = len(sys.argv) == 2 and sys.argv[1] in ("-h", "--help", "help")
        if len(sys.argv) > 1 and not asked:
            print(f"error: there is no command {sys.argv[1]!r}\n", file=sys.stderr)
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    name = sys.argv.pop(1)
    if {"-h", "--help"} & set(sys.argv):
        hydras = argparse.ArgumentParser(add_help=False)
        hydras.add_argument("--config-name", "-cn")
        found, overrides = hydras.parse_known_args(sys.argv[1:])
        methods = [word.removeprefix("method=") for word in overrides if word.startswith("method=")]
        try:
            print(explain(name, found.config_name, methods[-1] if methods else None))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        return
    for flag in {"--multirun", "-m"} & set(sys.argv):
        # Hydra reads no override behind a flag that stands among them.
        sys.argv.remove(flag)
        sys.argv.insert(1, flag)
    config_class, command = COMMANDS[name]

    def task(overrides: DictConfig) -> None:
        quiet_libraries()  # here, for a sweep may run this in other processes
        try:
            values = OmegaConf.to_container(overrides, resolve=True)
            found = command(build(config_class, values))
            if not is_main():
                return
            print(found if isinstance(found, str) else json_text(found, indent=2))
        except KeyboardInterrupt:
            print("error: interrupted; predict and generate go on if called again", file=sys.stderr)
            sys.exit(130)
        except (ValueError, OSError, RuntimeError) as error:
            logging.getLogger(__name__).debug("traceback", exc_info=True)
            sweep = HydraConfig.get().mode is RunMode.MULTIRUN
            if sweep and not isinstance(error, Interrupted):
                raise  # the other runs go on; Hydra names this one at the end
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(task)()
