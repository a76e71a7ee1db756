"""Runs: their settings, what they leave on disk, and how they are read and exported."""

from .config import RunConfig
from .data import DataConfig
from .exports import export, merge, push_to_hub
from .folder import Run, RunFolderError, load_run, save_run
from .memory import MemoryConfig, estimate
from .predictors import PredictionConfig, make_predictor
from .serving import ServedAverage, ServerError
from .settings import ConfigError, build
from .training import train_run

__all__ = [
    "ConfigError",
    "DataConfig",
    "MemoryConfig",
    "PredictionConfig",
    "Run",
    "RunConfig",
    "RunFolderError",
    "ServedAverage",
    "ServerError",
    "build",
    "estimate",
    "export",
    "load_run",
    "make_predictor",
    "merge",
    "push_to_hub",
    "save_run",
    "train_run",
]
