"""A language model with LoRA layers as a function of the subspace vectors s."""

from . import _bitsandbytes  # noqa: F401  before the files below import peft
from .adapter import PROJECTIONS, ProjectionMode, SubspaceAdapter
from .config import AdapterConfig, ModelConfig
from .loading import Classes, load_llm, load_readout, make_adapter
from .trunk import Trunk

__all__ = [
    "PROJECTIONS",
    "AdapterConfig",
    "Classes",
    "ModelConfig",
    "ProjectionMode",
    "SubspaceAdapter",
    "Trunk",
    "load_llm",
    "load_readout",
    "make_adapter",
]
