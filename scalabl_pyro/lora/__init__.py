"""A language model with LoRA layers as a function of the subspace vectors s."""

from .adapter import CORES, PROJECTIONS, Core, ProjectionMode, SubspaceAdapter
from .config import AdapterConfig, ModelConfig
from .loading import Classes, load_llm, load_readout, make_adapter
from .pretrained import LoadOptions, from_pretrained
from .saving import save_adapter
from .subspace import SUBSPACES, second_moments, set_perp, set_subspace
from .trunk import Trunk

__all__ = [
    "CORES",
    "PROJECTIONS",
    "SUBSPACES",
    "AdapterConfig",
    "Classes",
    "Core",
    "LoadOptions",
    "ModelConfig",
    "ProjectionMode",
    "SubspaceAdapter",
    "Trunk",
    "from_pretrained",
    "load_llm",
    "load_readout",
    "make_adapter",
    "save_adapter",
    "second_moments",
    "set_perp",
    "set_subspace",
]
