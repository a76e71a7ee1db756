"""The command line: ``scalabl train``, ``evaluate``, ``predict``, ``generate`` and others.

The first word picks a command; everything after it but ``--help`` is Hydra's own: overrides such as
``fit.steps=100``, ``--multirun``, ``--cfg job``.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .. import __version__
from ..files import json_text
from ._configs import CONFIGS
from ._overrides import as_hydra_reads

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["main"]

USAGE = """usage: scalabl COMMAND [key=value ...]

  demo          over-confidence and its cure on real questions, in minutes
  train         fine-tune a model on labelled records and write a run folder
  evaluate      metrics of a run folder, or of a base model (zero-shot), on a labelled split
  predict       answers, probabilities and uncertainty for records with or without labels
  select        the records that are most worth a label
  generate      texts that continue prompts or answer messages, with the uncertainty of every token
  compare       methods × seeds in one page with pictures; finished runs are skipped
  report        the same page over runs that were trained apart, such as those of a sweep
  distill       a run's model average in one plain PEFT adapter
  export        a run as plain PEFT adapters, one a draw, and as a merged model
  show-prompts  records as the model of a run reads them, before training and after
  memory        how much memory a run needs, before anything is downloaded
  doctor        what works on this machine, and how to mend what does not

scalabl COMMAND --help explains the settings of a command, with their defaults.
scalabl --version prints the version."""


class Command(NamedTuple):
    """Where a command is; importing its file takes seconds, so it waits until the command runs."""

    module: str
    config: str
    function: str

    def load(self) -> tuple[type, Callable[[Any], Any]]:
        """The class of its settings, and what it does with them."""
        module = import_module(f".{self.module}", __package__)
        return getattr(module, self.config), getattr(module, self.function)


COMMANDS = {
    "demo": Command("demo", "CompareConfig", "demonstrate"),
    "train": Command("train", "RunConfig", "train"),
    "evaluate": Command("evaluate", "EvaluateConfig", "evaluate_run"),
    "predict": Command("predict", "PredictConfig", "predict_file"),
    "select": Command("select", "SelectConfig", "select_records"),
    "generate": Command("generate", "GenerateConfig", "generate_file"),
    "compare": Command("compare", "CompareConfig", "compare_methods"),
    "report": Command("report", "ReportConfig", "report_runs"),
    "distill": Command("distill", "DistillConfig", "distill_run"),
    "export": Command("export", "ExportConfig", "export_run"),
    "show-prompts": Command("show_prompts", "ShowPromptsConfig", "show_prompts"),
    "memory": Command("memory", "MemoryConfig", "estimate_memory"),
    "doctor": Command("doctor", "DoctorConfig", "examine"),
}


#: what an interrupted command says of how to go on; others write whole or not at all
GOES_ON = {"train": "go on with resume=true"} | dict.fromkeys(
    ("compare", "demo", "generate", "predict"), "the same command goes on"
)


def main() -> None:
    """Entry point of ``scalabl``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal without Greek letters
    try:
        _main()
        sys.stdout.flush()
    except BrokenPipeError:
        _stop_writing()
    except OSError as error:  # of what is shown: a full disk
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _stop_writing() -> None:
    """Whoever read has enough, as head has; nothing is left to flush at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"scalabl_pyro {__version__}")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked = len(sys.argv) == 2 and sys.argv[1] in ("-h", "--help", "help")
        if len(sys.argv) > 1 and not asked:
            print(f"error: there is no command {sys.argv[1]!r}\n", file=sys.stderr)
        print(USAGE, file=sys.stdout if asked else sys.stderr, flush=True)
        sys.exit(0 if asked else 2)
    command = list(sys.argv)  # what is kept with a run; Hydra reads the rest alone
    name = sys.argv.pop(1)
    if {"-h", "--help"} & set(sys.argv):
        hydras = argparse.ArgumentParser(add_help=False)
        hydras.add_argument("--config-name", "-cn")
        options, overrides = hydras.parse_known_args(sys.argv[1:])
        methods = [word.removeprefix("method=") for word in overrides if word.startswith("method=")]
        from ._help import explain

        try:
            print(explain(name, options.config_name, methods[-1] if methods else None))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        return
    for flag in {"--multirun", "-m"} & set(sys.argv):
        # Hydra reads no override behind a flag that stands among them.
        sys.argv.remove(flag)
        sys.argv.insert(1, flag)

    sweep = bool({"--multirun", "-m"} & set(sys.argv))
    sys.argv[1:] = [as_hydra_reads(word, sweep=sweep) for word in sys.argv[1:]]

    def task(overrides: DictConfig) -> None:
        sys.argv = command  # a sweep may run this in processes that were started otherwise
        _run(COMMANDS[name], overrides, command)

    try:
        import hydra

        with _raised_by_hydra():
            config = COMMANDS[name].module
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config)(task)()
    except KeyboardInterrupt:
        then = GOES_ON.get(name, "nothing was written")
        print(f"error: interrupted; {then}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        _fail(error, command)


@contextmanager
def _raised_by_hydra() -> Iterator[None]:
    """Hydra raises its errors, where it would print them as tracebacks."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _fail(error: Exception, words: Sequence[str]) -> NoReturn:
    from ._errors import explain_error

    print(explain_error(error, words), file=sys.stderr)
    sys.exit(1)


def _run(command: Command, overrides: DictConfig, words: Sequence[str]) -> None:
    """What Hydra calls, for a sweep in other processes too."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from ..distributed import is_main
    from ..infer.checkpoints import Interrupted
    from ..runs.settings import build
    from ._quiet import quiet_libraries

    quiet_libraries()
    try:
        config_class, function = command.load()
        values = _numbers(OmegaConf.to_container(overrides, resolve=True))
        answer = function(build(config_class, values))
        if not is_main():
            return
        print(answer if isinstance(answer, str) else json_text(answer, indent=2), flush=True)
    except BrokenPipeError:
        _stop_writing()
    except Exception as error:
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        if sweep and not isinstance(error, Interrupted):
            raise  # the other runs go on; Hydra raises this at the end
        _fail(error, words)


def _numbers(values: Any) -> Any:
    """Infinity as YAML writes it, which Hydra takes for a text in overrides."""
    if isinstance(values, dict):
        return {key: _numbers(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    if isinstance(values, str) and values.lower() in (".inf", "+.inf", "-.inf"):
        return float(values.replace(".", ""))
    return values
