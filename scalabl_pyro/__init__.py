"""Bayesian low-rank adaptation of language models as a probabilistic program on Pyro.

Names are imported on first use, so that ``import scalabl_pyro`` costs nothing; ``__init__.pyi``
says where they come from.
"""

import lazy_loader

from . import _bitsandbytes  # noqa: F401  before anything imports peft

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
